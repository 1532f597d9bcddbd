"""The operations as PyTorch's compiler, autograd and autocast see them: one operator and its gradient.

    aiter.flash_attn_func(...)  ── plain tensors, no gradient ──> plan.Plan (no dispatcher in between)
                                ── anything else ──> torch.ops.aiter.attention ──> autocast, autograd ──> plan.Plan

`aiter::attention` is the common form of the five operations (see plan.Plan for the layouts it takes); it always
returns the log-sum-exp too, which the backward pass needs.
"""

from __future__ import annotations

import torch

from aiter import checks, plan_cache
from aiter.plan import Indices

_library = torch.library.Library("aiter", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? seqlens_q, Tensor? seqlens_k, Tensor? page_table, "
    "bool causal, float softmax_scale, SymInt max_seqlen) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention_backward(Tensor? grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output, "
    "Tensor lse, Tensor? seqlens_q, Tensor? seqlens_k, bool causal, float softmax_scale, SymInt max_seqlen) -> "
    "(Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _attention(query, key, value, seqlens_q, seqlens_k, page_table, causal, softmax_scale, max_seqlen):
    return plan_cache.forward(
        query, key, value, Indices(seqlens_q, seqlens_k, page_table), causal, softmax_scale, max_seqlen
    )


def _attention_backward(
    grad_output, grad_lse, query, key, value, output, lse, seqlens_q, seqlens_k, causal, softmax_scale, max_seqlen
):
    return plan_cache.backward(
        grad_output,
        grad_lse,
        query,
        key,
        value,
        output,
        lse,
        Indices(seqlens_q, seqlens_k),
        causal,
        softmax_scale,
        max_seqlen,
    )


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _device)
    _library.impl("attention_backward", _attention_backward, _device)


@torch.library.register_fake("aiter::attention", lib=_library)
def _(query, key, value, seqlens_q, seqlens_k, page_table, causal, softmax_scale, max_seqlen):
    if query.dim() == 3:
        lse_shape = (query.shape[1], query.shape[0])
    else:
        lse_shape = (query.shape[0], query.shape[2], query.shape[1])
    return query.new_empty(query.shape), query.new_empty(lse_shape, dtype=torch.float32)


@torch.library.register_fake("aiter::attention_backward", lib=_library)
def _(grad_output, grad_lse, query, key, value, *rest):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    query, key, value, seqlens_q, seqlens_k, page_table, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.paged = page_table is not None
    ctx.save_for_backward(query, key, value, *output, seqlens_q, seqlens_k)


def _backward(ctx, grad_output, grad_lse, operator=torch.ops.aiter.attention_backward):
    if ctx.paged:
        raise NotImplementedError(
            "a paged cache takes no gradient: use contiguous key and value where one is needed, or torch.no_grad()"
        )
    if grad_output is None and grad_lse is None:
        return (None,) * 9
    query, key, value, output, lse, seqlens_q, seqlens_k = ctx.saved_tensors
    grads = operator(grad_output, grad_lse, query, key, value, output, lse, seqlens_q, seqlens_k, *ctx.options)
    return (*grads, *(None,) * 6)


torch.library.register_autograd("aiter::attention", _backward, setup_context=_save_for_backward, lib=_library)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("attention has no second derivative here: the backward pass is not differentiable")


torch.library.register_autograd("aiter::attention_backward", _no_second_derivative, lib=_library)


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that autocast, where it is on for their device, wants attention to run in."""
    return tuple(
        tensor.to(torch.get_autocast_dtype(tensor.device.type))
        if isinstance(tensor, torch.Tensor)
        and torch.is_autocast_enabled(tensor.device.type)
        and tensor.dtype in checks.DTYPE_NAMES
        else tensor
        for tensor in tensors
    )


def _autocast(device_type: str):
    """Runs attention in autocast's dtype, as PyTorch's own operator does."""

    def cast(query, key, value, *rest):
        tensors = autocast(query, key, value)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.aiter.attention(*tensors, *rest)

    return cast


_library.impl("attention", _autocast("cpu"), "AutocastCPU", with_keyset=False)
_library.impl("attention", _autocast("cuda"), "AutocastCUDA", with_keyset=False)


def _fold(operator, count, info, in_dims, *inputs):
    """Calls `operator` with the mapped dimension of its first `count` inputs, tensors, folded into the batch."""
    tensors, rest = inputs[:count], inputs[count:]
    if any(isinstance(other, torch.Tensor) for other in rest):
        raise NotImplementedError("torch.vmap over variable-length or paged attention is not supported; loop over it")
    folded = [
        tensor
        if tensor is None
        else (tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).flatten(0, 1)
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]
    outputs = operator(*folded, *rest)
    return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0,) * len(outputs)


@torch.library.register_vmap("aiter::attention", lib=_library)
def _(info, in_dims, *inputs):
    return _fold(torch.ops.aiter.attention, 3, info, in_dims, *inputs)


@torch.library.register_vmap("aiter::attention_backward", lib=_library)
def _(info, in_dims, *inputs):
    return _fold(torch.ops.aiter.attention_backward, 7, info, in_dims, *inputs)


# torch.func.grad and its like take no gradient that is registered with an operator: they are given these.


class TransformedAttention(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return torch.ops.aiter.attention(*inputs)

    setup_context = staticmethod(_save_for_backward)

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        return _backward(ctx, grad_output, grad_lse, _TransformedBackward.apply)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold(TransformedAttention.apply, 3, info, in_dims, *inputs)


class _TransformedBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return torch.ops.aiter.attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_no_second_derivative)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold(_TransformedBackward.apply, 7, info, in_dims, *inputs)
