"""Which way a call takes: straight to a launch, or through PyTorch's dispatcher, where something else must see it.

operation ── plain tensors ───────────────────────────> plan.forward
          ── plain tensors, and a gradient is wanted ─> library.Attention ──> plan.forward
          ── anything else (torch_state.py says what) > torch.ops.aiter.attention, or its form for torch.func
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch

from aiter import checks, library, plan, torch_state
from aiter.jit import settings
from aiter.layout import NO_INDICES, Indices, Sizes, check_common, sizes_of
from aiter.options import NO_OPTIONS, OptionKeywords, read_options
from aiter.plan import Call

_is_grad_enabled = torch.is_grad_enabled  # bound once, as it is asked at every call
_LARGEST = checks.FLOAT32_MAX
_new = tuple.__new__  # a third of the time that a NamedTuple's own takes


_OUT_TAKES_NO_GRADIENT = "out= takes no gradient: leave it out where one is needed, or use torch.no_grad()"


class First(NamedTuple):
    """What is to be done when nothing can be refused any more."""

    do: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # query, key and value to use, shaped as before
    explain: Callable[[], ValueError | None]  # of what is refused before it is done: what says it better, if anything


class Operation(NamedTuple):
    """What one public operation asks of its arguments beyond the common form of all (layout.py).

    check(query, key, value, *own) raises for a bad argument; it looks at shapes, dtypes and devices alone, and may be
    traced. fits(sizes, *own) says whether there is no need to: the same question about own arguments, asked cheaply;
    None where there is nothing to ask.
    """

    check: Callable[..., None]
    fits: Callable[..., bool] | None
    names: checks.Names = checks.Names()


def attend(
    operation: Operation,
    own: tuple,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    softmax_scale: float | None,
    return_lse: bool,
    keywords: OptionKeywords,
    indices: Indices = NO_INDICES,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    out: torch.Tensor | None = None,
    first: First | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Runs one call of an operation; `own` are the arguments that only it has. out: where the output goes, of which
    rows that belong to no sequence are left alone. first: what is to be done before query, key and value are read."""
    if return_lse is not True and return_lse is not False:
        checks.flag("return_lse", return_lse)
    if not torch_state.is_plain(query, key, value):
        output, lse = _through_dispatcher(
            *(operation, own, query, key, value, causal, softmax_scale, keywords, indices, max_seqlen_q, max_seqlen_k),
            *(out, first),
        )
        return (output, lse) if return_lse else output

    sizes = sizes_of(query, key, value, indices, max_seqlen_q, max_seqlen_k)
    check, fits, names = operation
    if sizes is None or (fits is not None and not fits(sizes, *own)):
        check(query, key, value, *own)
        if sizes is None:
            check_common(query, key, value, indices, names)
    if causal is not True and causal is not False:
        checks.flag("causal", causal)
    if softmax_scale is None:
        softmax_scale = query.shape[-1] ** -0.5
    elif type(softmax_scale) is not float or not -_LARGEST <= softmax_scale <= _LARGEST:
        softmax_scale = checks.softmax_scale(softmax_scale, query.shape[-1])
    options, sinks = NO_OPTIONS, None
    if keywords:
        causal, options = read_options(causal, keywords)
        options.check(query, key, sizes, names.query)
        sinks, options = options.sinks, options.drawn(query).readable()
    if out is not None:
        checks.not_in_place(checks.output(out, query, value, names), key, value, names)
    call = _new(Call, (sizes, indices, options, causal, softmax_scale, names))
    if indices is not NO_INDICES and query.is_cuda and settings.flag("AITER_CHECK_VALUES"):
        _look_at_values(call)
    if first is not None:
        query, key, value = _look_and_do(first, call, query, key, value, out)
    if _is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (sinks is not None and sinks.requires_grad)
    ):
        if out is not None:
            raise ValueError(_OUT_TAKES_NO_GRADIENT)
        if key.dtype is not query.dtype:
            raise NotImplementedError(library.NO_FP8_GRADIENT)
        output, lse = library.Attention.apply(query, key, value, sinks, call)
    else:
        output, lse = plan.forward(call, query, key, value, return_lse, out)
    return (output, lse) if return_lse else output


def _through_dispatcher(
    operation: Operation,
    own: tuple,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    softmax_scale: float | None,
    keywords: OptionKeywords,
    indices: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    out: torch.Tensor | None,
    first: First | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for a call that something of PyTorch must see. Whatever is wrong is found here, or by the operator."""
    query, key, value = library.autocast(query, key, value)
    operation.check(query, key, value, *own)
    checks.flag("causal", causal)
    scale = checks.softmax_scale(softmax_scale, query.shape[-1])
    causal, options = read_options(causal, keywords)
    options.check(query, key, query_name=operation.names.query)
    wants_gradient = torch_state.wants_gradient(query, key, value, *([] if options.sinks is None else [options.sinks]))
    if wants_gradient and key.dtype in checks.FP8_NAMES:
        raise NotImplementedError(library.NO_FP8_GRADIENT)
    options = options.drawn(query)
    inputs = (
        *(indices.seqlens_q, indices.seqlens_k, indices.page_table, causal, scale, max_seqlen_q, max_seqlen_k),
        *(indices.starts_q, indices.starts_k, *options, indices.page_indptr, indices.last_page_len),
    )
    traced = torch.compiler.is_compiling()
    if out is not None:
        if wants_gradient:
            raise ValueError(_OUT_TAKES_NO_GRADIENT)
        if not traced:
            checks.output(out, query, value, operation.names)
    if first is not None:
        if not traced and torch_state.are_real(query, key, value):  # what the operator finds would be found too late
            call = library.read_call(query, key, value, *inputs)._replace(names=operation.names)
            done = _look_and_do(first, call, query, key, value, out)
        else:
            done = first.do()
        query, key, value = library.autocast(*done)
    if out is None:
        return library.operator()(query, key, value, *inputs)
    return out, torch.ops.aiter.attention_out(out, query, key, value, *inputs)


def _look_and_do(
    first: First, call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    try:
        plan.look(call, query, key, value, out)
        return first.do()
    except ValueError as error:
        raise first.explain() or error from None


# The index tensors whose values were looked at last, each with its version then and what it was held against: layers
# of a model share them, and a look waits for the GPU.
_latest: dict[str, tuple[weakref.ref[torch.Tensor], int, Sizes]] = {}


def _look_at_values(call: Call) -> None:
    seen = True
    for name, tensor in zip(Indices._fields, call.indices, strict=True):
        if tensor is None:
            continue
        if tensor.is_inference():  # counts no versions: it may have changed
            seen = False
            continue
        known = _latest.get(name)
        if not (known and known[0]() is tensor and known[1:] == (tensor._version, call.sizes)):
            seen = False
            _latest[name] = weakref.ref(tensor), tensor._version, call.sizes
    if not seen:
        try:
            checks.values(call.sizes, call.indices, call.options, call.names)
        except ValueError:
            _latest.clear()
            raise
