"""The operations as PyTorch's compiler, autograd and autocast see them: one operator and its gradient.

`aiter::attention` is the common form of all operations (layout.py, options.py); it always returns the log-sum-exp too,
which the backward pass needs. It takes what it can read, converts what it can (int64 or strided lengths, any strides)
and refuses the rest by name.

What is here twice is so because PyTorch has three kinds of autograd, each with a form of its own: registered formulas
for torch.compile and torch.export, functions with setup_context for torch.func, and plain functions, which cost least,
for calls that need nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from aiter import checks, plan, torch_state
from aiter.layout import NO_INDICES, Indices, check_common, sizes_of
from aiter.options import (
    Options,
    check_rng_state,
    chunk_in_range,
    dropout_in_range,
    one_mask,
    readable_index,
    softcap_in_range,
)
from aiter.plan import Call

# Everything after max_seqlen is optional. max_seqlen bounds packed keys too unless max_seqlen_k is given (0: not).
_OPTIONS = (
    "SymInt max_seqlen_k=0, Tensor? starts_q=None, Tensor? starts_k=None, SymInt window_left=-1, "
    "SymInt window_right=-1, Scalar softcap=0.0, Tensor? alibi_slopes=None, Tensor? sinks=None, "
    "Tensor? query_offsets=None, bool batch_invariant=False, Scalar dropout_p=0.0, Tensor? rng_state=None, "
    "SymInt attention_chunk=0, Tensor? k_descale=None, Tensor? v_descale=None"
)
# Of calls with lists of pages, which page_table then is: those take no gradient.
_LISTS = "Tensor? page_indptr=None, Tensor? last_page_len=None"
_library = torch.library.Library("aiter", "DEF")
_library.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? seqlens_q, Tensor? seqlens_k, Tensor? page_table, "
    f"bool causal, Scalar softmax_scale, SymInt max_seqlen, {_OPTIONS}, {_LISTS}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention_backward(Tensor? grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor output, "
    "Tensor lse, Tensor? seqlens_q, Tensor? seqlens_k, bool causal, Scalar softmax_scale, SymInt max_seqlen, "
    f"{_OPTIONS}, bool lse_is_given=False) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "attention_out(Tensor(a!) output, Tensor query, Tensor key, Tensor value, Tensor? seqlens_q, Tensor? seqlens_k, "
    f"Tensor? page_table, bool causal, Scalar softmax_scale, SymInt max_seqlen, {_OPTIONS}, {_LISTS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
# Their defaults: PyTorch leaves out inputs that are equal to these at the end.
_DEFAULTS = (0, None, None, -1, -1, 0.0, None, None, None, False, 0.0, None, 0, None, None)
_FIRST_OPTION, _SINKS = 9, 16  # where attention's inputs have the first of them, and the sinks
# What the inputs of attention and of its gradient are called, and where the state of dropout stands among them: by how
# many tensors come first.
_NAMES = {
    count: [argument.name for argument in operator.default._schema.arguments]
    for count, operator in ((3, torch.ops.aiter.attention), (7, torch.ops.aiter.attention_backward))
}
_RNG_STATE = {count: names.index("rng_state") for count, names in _NAMES.items()}


def read_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seqlens_q: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    page_table: torch.Tensor | None,
    causal: bool,
    softmax_scale: float,
    max_seqlen_q: int,
    max_seqlen_k: int = 0,
    starts_q: torch.Tensor | None = None,
    starts_k: torch.Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    query_offsets: torch.Tensor | None = None,
    batch_invariant: bool = False,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    attention_chunk: int = 0,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    page_indptr: torch.Tensor | None = None,
    last_page_len: torch.Tensor | None = None,
) -> Call:
    """The operator's arguments, checked and made readable."""
    given = (seqlens_q, seqlens_k, page_table, starts_q, starts_k, page_indptr, last_page_len)
    indices = NO_INDICES
    if any(tensor is not None for tensor in given):
        for name, tensor in zip(Indices._fields, given, strict=True):
            if tensor is not None:
                rank = 2 if name == "page_table" and page_indptr is None else 1
                checks.indices(name, tensor, (None,) * rank, "int32", query)
                checks.memory(**{name: tensor})
        indices = Indices(*(tensor if tensor is None else readable_index(tensor) for tensor in given))
    checks.memory(alibi_slopes=alibi_slopes, sinks=sinks, query_offsets=query_offsets, rng_state=rng_state)
    if page_indptr is None:
        max_seqlen_k = max_seqlen_k or max_seqlen_q
    sizes = sizes_of(query, key, value, indices, max_seqlen_q, max_seqlen_k)
    if sizes is None:
        check_common(query, key, value, indices, checks.Names())
    scale = checks.softmax_scale(softmax_scale, query.shape[-1])
    chunk, dropout_p = chunk_in_range(attention_chunk), dropout_in_range(dropout_p)
    causal, left, right = one_mask(causal, window_left, window_right, chunk)
    tensors = alibi_slopes, sinks, query_offsets
    drawn = dropout_p, rng_state, chunk
    chosen = Options(left, right, softcap_in_range(softcap), *tensors, batch_invariant, *drawn, k_descale, v_descale)
    chosen.check(query, key, sizes)
    if chosen.rng_state is not None:
        check_rng_state(chosen.rng_state)
    if chosen.dropout_p and chosen.rng_state is None:
        raise ValueError("dropout_p needs a rng_state, int64 (2,), that both passes draw their mask from")
    return Call(sizes, indices, chosen.readable(), causal, scale, checks.Names())


def _attention(query, key, value, *inputs):
    return plan.forward(read_call(query, key, value, *inputs), query, key, value, True)


def _attention_out(output, query, key, value, *inputs):
    call = read_call(query, key, value, *inputs)
    checks.not_in_place(checks.output(output, query, value, call.names), key, value, call.names)
    return plan.forward(call, query, key, value, True, output)[1]


def _attention_backward(
    grad_output, grad_lse, query, key, value, output, lse, seqlens_q, seqlens_k, causal, softmax_scale, *inputs
):
    numbers, lse_is_given = inputs[: 1 + len(_DEFAULTS)], inputs[1 + len(_DEFAULTS) :] == (True,)
    call = read_call(query, key, value, seqlens_q, seqlens_k, None, causal, softmax_scale, *numbers)
    return _gradients(call, grad_output, grad_lse, query, key, value, output, lse, lse_is_given)


for _device in ("CPU", "CUDA"):
    _library.impl("attention", _attention, _device)
    _library.impl("attention_out", _attention_out, _device)
    _library.impl("attention_backward", _attention_backward, _device)


def _gradients(call, grad_output, grad_lse, query, key, value, output, lse, lse_is_given=False):
    """Of query, key and value. With sinks, weights are divided by what includes them."""
    if key.dtype in checks.FP8_NAMES:
        raise NotImplementedError(NO_FP8_GRADIENT)
    sinks = call.options.sinks
    for name, tensor in (("the output", output), ("the log-sum-exp", lse), ("sinks", sinks)):
        checks.address(name, tensor)
    for name, tensor in (("output", grad_output), ("log-sum-exp", grad_lse)):
        checks.address(f"the gradient of the {name}", tensor)
    if sinks is None:
        return plan.backward(call, query, key, value, output, lse, grad_output, grad_lse, lse_is_given)
    total = with_sinks(lse, sinks)
    if grad_lse is None:
        return plan.backward(call, query, key, value, output, total, grad_output, None, True)
    # A gradient of the keys' own log-sum-exp goes to weights among the keys. What sinks take of those is then taken of
    # the output's gradient instead: a row's weights may be too small to be scaled up again.
    if grad_output is not None:
        share = torch.where(lse == -torch.inf, 0.0, (lse - total).exp())
        grad_output = (grad_output * share.transpose(-1, -2).unsqueeze(-1)).to(grad_output.dtype)
    return plan.backward(call, query, key, value, output, lse, grad_output, grad_lse, True)


def log_add(lse: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """torch.logaddexp, with a gradient of zero where both are -inf: there PyTorch's is that of -inf less -inf, NaN."""
    nothing = (lse == -torch.inf) & (other == -torch.inf)
    added = torch.logaddexp(lse.masked_fill(nothing, 0.0), torch.where(nothing, 0.0, other))
    return added.masked_fill(nothing, -torch.inf)


def with_sinks(lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """The log-sum-exp of each row's keys and its head's sink."""
    return log_add(lse, sinks.unsqueeze(-1))  # (heads, total) and (batch, heads, seq) alike


def sink_gradient(
    grad_output: torch.Tensor | None, output: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor
) -> torch.Tensor:
    """The weight of a row's sink, times what all other weights lose for it: -rowsum(grad_output * output)."""
    if grad_output is None:
        return torch.zeros_like(sinks)
    delta = (grad_output.float() * output.float()).sum(-1).transpose(-1, -2)  # as lse lies
    delta = delta.masked_fill(lse == -torch.inf, 0.0)  # rows without keys, and padding, whose gradient may be NaN
    values = sinks.float().unsqueeze(-1)
    # A head without a sink (-inf) has no weight for it, in rows without keys either.
    weights = torch.where(values == -torch.inf, 0.0, (values - with_sinks(lse, sinks.float())).exp())
    gradient = -(weights * delta).sum(-1)
    return (gradient if gradient.dim() == 1 else gradient.sum(0)).to(sinks.dtype)


_NO_FORWARD_MODE = "attention has no forward-mode derivative here; use reverse mode (torch.func.vjp, backward())"
_NO_PAGED_GRADIENT = (
    "a paged cache takes no gradient: use contiguous key and value where one is needed, or torch.no_grad()"
)
NO_FP8_GRADIENT = (
    "float8 keys and values take no gradient, nor does what is computed from them: use key and value of query's dtype "
    "where one is needed, or torch.no_grad()"
)
_NO_SECOND_DERIVATIVE = "attention has no second derivative here: the backward pass is not differentiable"


def _fake_lse(query: torch.Tensor) -> torch.Tensor:
    *batch, tokens, heads, _ = query.shape
    return query.new_empty((*batch, heads, tokens), dtype=torch.float32)


@torch.library.register_fake("aiter::attention", lib=_library)
def _(query, key, value, *rest):
    return query.new_empty((*query.shape[:-1], value.shape[-1])), _fake_lse(query)


@torch.library.register_fake("aiter::attention_out", lib=_library)
def _(output, query, *rest):
    return _fake_lse(query)


@torch.library.register_fake("aiter::attention_backward", lib=_library)
def _(grad_output, grad_lse, query, key, value, *rest):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


# ---- gradients ----


class Attention(torch.autograd.Function):
    """The gradient of a plain call, past the dispatcher: forward(query, key, value, sinks, call)."""

    @staticmethod
    def forward(ctx, query, key, value, sinks, call):
        output, lse = plan.forward(call, query, key, value, True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        # What the backward pass reads from the call, too: PyTorch then sees when it was changed in between.
        options = call.options
        read = options.rng_state, options.alibi_slopes, options.query_offsets, *call.indices
        ctx.save_for_backward(query, key, value, output, lse, sinks, *read)
        return output, lse

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        if ctx.call.indices.page_table is not None:
            raise NotImplementedError(_NO_PAGED_GRADIENT)
        query, key, value, output, lse, sinks, *_ = ctx.saved_tensors
        if grad_output is None and grad_lse is None:
            return (None,) * 5
        call = ctx.call
        grads_given = [grad for grad in (grad_output, grad_lse) if grad is not None]
        plain = all(torch_state.is_plain(query, key, grad) and not torch_state.is_batched(grad) for grad in grads_given)
        if torch.is_grad_enabled() or not plain:
            # Someone watches: a second derivative is wanted, gradients are batched, or a compiler traces.
            grads = torch.ops.aiter.attention_backward(
                *(grad_output, grad_lse, query, key, value, output, lse, *call.indices[:2], call.causal),
                *(call.softmax_scale, call.sizes.seqlen_q, call.sizes.seqlen_k, *call.indices[3:5], *call.options),
            )
        else:
            grads = _gradients(call, grad_output, grad_lse, query, key, value, output, lse)
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            checks.address("sinks", sinks)
            grad_sinks = sink_gradient(grad_output, output, lse, sinks)
        return (*grads, grad_sinks, None)


def _save_for_backward(ctx, inputs, output):
    query, key, value, seqlens_q, seqlens_k, page_table, *numbers = inputs
    if key.dtype in checks.FP8_NAMES:
        raise NotImplementedError(NO_FP8_GRADIENT)
    options = (*inputs[_FIRST_OPTION:], *_DEFAULTS[len(inputs) - _FIRST_OPTION :])[: len(_DEFAULTS)]
    max_seqlen_k, starts_q, starts_k, left, right, softcap, alibi_slopes, sinks, query_offsets, *rest = options
    invariant, dropout_p, rng_state, chunk, *_ = rest
    ctx.set_materialize_grads(False)
    ctx.paged, ctx.count = page_table is not None, len(inputs)
    ctx.numbers = *numbers[:3], max_seqlen_k, left, right, softcap, invariant, dropout_p, chunk
    tensors = seqlens_q, seqlens_k, starts_q, starts_k, alibi_slopes, sinks, query_offsets, rng_state
    ctx.save_for_backward(query, key, value, *output, *tensors)


def _backward(ctx, grad_output, grad_lse, operator=torch.ops.aiter.attention_backward):
    if ctx.paged:
        raise NotImplementedError(_NO_PAGED_GRADIENT)
    if grad_output is None and grad_lse is None:
        return (None,) * ctx.count
    query, key, value, output, lse, *tensors = ctx.saved_tensors
    seqlens_q, seqlens_k, starts_q, starts_k, alibi_slopes, sinks, query_offsets, rng_state = tensors
    causal, softmax_scale, max_seqlen, max_seqlen_k, left, right, softcap, invariant, dropout_p, chunk = ctx.numbers
    grads = operator(
        *(grad_output, grad_lse, query, key, value, output, lse, seqlens_q, seqlens_k, causal, softmax_scale),
        *(max_seqlen, max_seqlen_k, starts_q, starts_k, left, right, softcap, alibi_slopes, sinks, query_offsets),
        *(invariant, dropout_p, rng_state, chunk),
    )
    result = [*grads, *(None,) * (ctx.count - 3)]
    if sinks is not None and ctx.needs_input_grad[_SINKS]:
        result[_SINKS] = sink_gradient(grad_output, output, lse, sinks)
    return tuple(result)


torch.library.register_autograd("aiter::attention", _backward, setup_context=_save_for_backward, lib=_library)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError(_NO_SECOND_DERIVATIVE)


torch.library.register_autograd("aiter::attention_backward", _no_second_derivative, lib=_library)


# ---- autocast ----


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that autocast, where it is on for their device, wants attention to run in."""
    return tuple(
        tensor.to(torch.get_autocast_dtype(tensor.device.type))
        if isinstance(tensor, torch.Tensor)
        and tensor.device.type in ("cpu", "cuda")
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


# ---- torch.func ----


def _fold(operator, count, info, in_dims, *inputs):
    """Calls `operator` with the mapped dimension of its first `count` inputs, tensors, folded into the batch. What
    belongs to heads alone (sinks, slopes) stays as it is, and so does the state of dropout: the mask differs with the
    sequence."""
    tensors, rest = inputs[:count], inputs[count:]
    rng_state = next(iter(inputs[_RNG_STATE[count] :]), None)
    for index, (other, dim) in enumerate(zip(rest, in_dims[count:], strict=False), count):
        if not isinstance(other, torch.Tensor) or (other is rng_state and dim is None):
            continue
        if not other.is_floating_point():
            raise NotImplementedError("torch.vmap over variable-length or paged attention is not offered; loop over it")
        if dim is not None or other.dim() > 1:
            name = _NAMES[count][index]
            raise NotImplementedError(
                f"torch.vmap over {name} is not offered: only query, key and value may differ with the sequence; "
                f"give one {name} (heads,) for all, or loop over them"
            )
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


class _TransformedAttention(torch.autograd.Function):
    """The operator for torch.func.grad and its like, which take no gradient that is registered with an operator."""

    @staticmethod
    def forward(*inputs):
        return torch.ops.aiter.attention(*inputs)

    setup_context = staticmethod(_save_for_backward)

    @staticmethod
    def backward(ctx, grad_output, grad_lse):
        return _backward(ctx, grad_output, grad_lse, _TransformedBackward.apply)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_NO_FORWARD_MODE)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold(_TransformedAttention.apply, 3, info, in_dims, *inputs)


class _TransformedBackward(torch.autograd.Function):
    @staticmethod
    def forward(*inputs):
        return torch.ops.aiter.attention_backward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = staticmethod(_no_second_derivative)

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(_NO_FORWARD_MODE)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        return _fold(_TransformedBackward.apply, 7, info, in_dims, *inputs)


def operator() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Attention as PyTorch's dispatcher takes it at this moment."""
    if torch.compiler.is_compiling():
        return torch.ops.aiter.attention
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return _TransformedAttention.apply
    return torch.ops.aiter.attention
