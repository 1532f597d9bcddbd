"""From an operation's arguments to a launch: finds the plan of their layout, or makes it, and runs it.

    operation ── query, key, value, options ──> Plan (checked; problem struct, kernel, what to allocate)
                                            ──> addresses ──> launch

A repeated call costs the look-up of its plan, the allocation of its result and one foreign call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from aiter import checks
from aiter.plan import GPU_ALIGNMENT, NO_INDICES, BackwardPlan, Indices, Plan

# Layouts are few in practice; a program that never repeats one must not grow without bound.
MAX_PLANS = 4096

# Bound once, as they are asked at every call.
_Tensor = torch.Tensor
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_active_dispatch_modes = torch._C._len_torch_dispatch_stack
_active_transform = torch._C._functorch.peek_interpreter_stack

_plans: dict[tuple, Plan | BackwardPlan] = {}
# The last call of each operation, tried first: to compare a signature costs a third of hashing it.
_latest: dict[Callable[..., None], tuple[tuple, Plan]] = {}
_NO_PLAN = None, None


def attend(
    check: Callable[..., None],
    options: tuple,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    softmax_scale: float | None,
    return_lse: bool,
    indices: Indices = NO_INDICES,
    max_seqlen: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Runs one attention call. `check(query, key, value, *options)` raises where an argument is bad; it sees each
    layout of arguments once, so it must look at nothing but shapes, dtypes and devices."""
    if not _is_plain(query, key, value):
        if _is_autocast_enabled():
            query, key, value = autocast(query, key, value)
        check(query, key, value, *options)
        checks.flag("causal", causal)
        scale = checks.softmax_scale(softmax_scale, query.shape[-1])
        output, lse = _operator()(query, key, value, *indices, causal, scale, max_seqlen)
        return (output, lse) if return_lse else output
    try:
        signature = _signature(query, key, value, indices, causal, softmax_scale, max_seqlen, options)
        latest, plan = _latest.get(check, _NO_PLAN)
        if signature != latest:
            plan = _plans.get((check, signature))
            if plan is not None:
                _latest[check] = signature, plan
    except (TypeError, RuntimeError):  # an unhashable option or a tensor without strides, which check names
        check(query, key, value, *options)
        raise
    if plan is None:
        check(query, key, value, *options)
        checks.flag("causal", causal)
        scale = checks.softmax_scale(softmax_scale, query.shape[-1])
        plan = _keep((check, signature), Plan(query, key, value, indices, causal, scale, max_seqlen))
        _latest[check] = signature, plan
    output, lse = plan.run(query, key, value, indices, return_lse)
    return (output, lse) if return_lse else output


def _operator() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Attention as PyTorch's dispatcher takes it at this moment."""
    if _active_transform() is None or _is_compiling():
        return torch.ops.aiter.attention
    from aiter.library import TransformedAttention  # which imports this module

    return TransformedAttention.apply


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


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: Indices,
    causal: bool,
    softmax_scale: float,
    max_seqlen: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What aiter::attention runs once PyTorch's dispatcher is done with it: output and log-sum-exp."""
    signature = _signature(query, key, value, indices, causal, softmax_scale, max_seqlen)
    plan = _plans.get(signature)
    if plan is None:
        plan = _keep(signature, Plan(query, key, value, indices, causal, softmax_scale, max_seqlen))
    return plan.run(query, key, value, indices, True)


def backward(
    grad_output: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    indices: Indices,
    causal: bool,
    softmax_scale: float,
    max_seqlen: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What aiter::attention_backward runs: the gradients of query, key and value. A gradient that is None is zero."""
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    options = causal, softmax_scale, max_seqlen
    signature = _signature(query, key, value, indices, *options)
    plan = _plans.get(signature) or _keep(signature, Plan(query, key, value, indices, *options))
    signature = (signature, grad_output.stride(), grad_output.data_ptr() % GPU_ALIGNMENT)
    backward_plan = _plans.get(signature) or _keep(signature, BackwardPlan(plan, grad_output, query, key))
    return backward_plan.run(grad_output, grad_lse, query, key, value, output, lse, indices)


def _is_plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a call needs nothing of PyTorch's dispatcher: no gradient, autocast, tracing, transform or subclass."""
    return (
        type(query) is _Tensor
        and type(key) is _Tensor
        and type(value) is _Tensor
        and not (_is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and not _is_compiling()
        and not _is_autocast_enabled()
        and not _active_dispatch_modes()
        and _active_transform() is None
    )


def _signature(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, indices: Indices, *rest: object
) -> tuple[object, ...]:
    """All that a plan depends on."""
    signature = (
        query.shape,
        key.shape,
        value.shape,
        query.stride(),
        key.stride(),
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        None if indices is NO_INDICES else tuple(None if tensor is None else tensor.shape for tensor in indices),
        rest,
    )
    if query.is_cuda:
        signature += tuple(tensor.data_ptr() % GPU_ALIGNMENT for tensor in (query, key, value))
    return signature


def _keep(signature: tuple[object, ...], plan: Plan | BackwardPlan) -> Plan | BackwardPlan:
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    _plans[signature] = plan
    return plan
