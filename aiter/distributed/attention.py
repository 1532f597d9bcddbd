"""`context_parallel_attention`: schemes for autograd, and for torch.compile.

Eager calls are a plain autograd function, which keeps what the scheme would otherwise send again (the rows that an
all-to-all brought). A compiled call is an operator, `aiter::context_parallel_attention`, that does all of it when it
runs; its gradient keeps what it was given and exchanges rows for heads once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from aiter import flops, library
from aiter.distributed import allgather, ring
from aiter.distributed.agree import Changed
from aiter.distributed.alltoall import Exchange
from aiter.distributed.exchange import GroupOrMesh, groups_of, held, process_group
from aiter.distributed.job import Gradients, Job
from aiter.distributed.layout import LayoutName, Run
from aiter.distributed.products import Heads
from aiter.distributed.work import POSITIONS, Scheme, Work, prepare, refuse_others, settle
from aiter.options import OptionKeywords, read_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _forward(
    work: Work,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    with_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, ...]]:
    """Output and log-sum-exp of this rank's rows, and what the backward pass reads. Tensors are (batch, rows, …).
    with_lse: whether a log-sum-exp that would have to be sent is wanted."""
    scheme = ring if work.rows == "ring" else allgather
    heads_q, heads_kv = query.shape[2], key.shape[2]
    exchange = work.exchange(heads_q, heads_kv)
    if exchange is None:
        job = work.job((Heads(Run(0, heads_q), Run(0, heads_kv)),), alibi_slopes, sinks)
        output, lse = scheme.forward(job, query, key, value)
        return output, lse, (query, key, value, output, lse)
    job = _job_of_heads(work, exchange, alibi_slopes, sinks)
    tensors = exchange.to_heads([query, key, value], [False, True, True])
    output, lse = scheme.forward(job, *tensors)
    saved = (*tensors, output, lse)
    given = [output, lse.transpose(1, 2)] if with_lse else [output]
    mine, *mine_lse = exchange.to_rows(given, [False] * len(given), [heads_q] * len(given))
    return mine, mine_lse[0].transpose(1, 2).contiguous() if with_lse else None, saved


def _job_of_heads(work: Work, exchange: Exchange, alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None) -> Job:
    span = exchange.spans(False)[exchange.rank]
    of_heads = (t if t is None else t[..., span.start : span.stop] for t in (alibi_slopes, sinks))
    return work.job(exchange.own_heads(), *of_heads)


def _backward(
    work: Work,
    grad_output: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    heads: tuple[int, int],
    saved: Sequence[torch.Tensor],
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> Gradients:
    scheme = ring if work.rows == "ring" else allgather
    exchange = work.exchange(*heads)
    if exchange is None:
        job = work.job((Heads(Run(0, heads[0]), Run(0, heads[1])),), alibi_slopes, sinks)
        return scheme.backward(job, grad_output, grad_lse, *saved)
    job = _job_of_heads(work, exchange, alibi_slopes, sinks)
    given = [grad for grad in (grad_output, None if grad_lse is None else grad_lse.transpose(1, 2)) if grad is not None]
    arrived = exchange.to_heads(given, [False] * len(given))
    of_output = arrived.pop(0) if grad_output is not None else None
    of_lse = arrived.pop(0).transpose(1, 2).contiguous() if grad_lse is not None else None
    gradients = scheme.backward(job, of_output, of_lse, *saved)
    return Gradients(*exchange.to_rows(list(gradients), [False, True, True], [heads[0], heads[1], heads[1]]))


class _ContextParallel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, sinks, alibi_slopes, work, return_lse):
        with_lse = return_lse or sinks is not None
        output, lse, saved = _forward(work, query, key, value, alibi_slopes, sinks, with_lse)
        ctx.work, ctx.heads, ctx.return_lse = work, (query.shape[2], key.shape[2]), return_lse
        ctx.set_materialize_grads(False)
        own = (None, None) if sinks is None else (output, lse)
        ctx.save_for_backward(*saved, *own, sinks, alibi_slopes)
        return output, lse if return_lse else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output, grad_lse):
        *saved, output, lse, sinks, alibi_slopes = ctx.saved_tensors
        # What is exchanged for heads, all ranks send: whether others have a gradient of it, none knows.
        if grad_output is None:
            grad_output = saved[3].new_zeros(
                (*saved[3].shape[:1], ctx.work.layout.rows(ctx.work.rank), ctx.heads[0], saved[3].shape[3])
            )
        if grad_lse is None and ctx.return_lse and ctx.work.inner > 1:
            grad_lse = grad_output.new_zeros(
                (grad_output.shape[0], ctx.heads[0], grad_output.shape[1]), dtype=torch.float32
            )
        gradients = _backward(ctx.work, grad_output, grad_lse, ctx.heads, saved, alibi_slopes, sinks)
        of_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            of_sinks = library.sink_gradient(grad_output, output, lse, sinks)
        return (*gradients, of_sinks, None, None, None)


def context_parallel_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: GroupOrMesh = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    layout: LayoutName | torch.Tensor = "contiguous",
    scheme: Scheme = "auto",
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    return_lse: bool = False,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Self-attention over a sequence of which each rank of `group` has some rows; returns the output of those rows.

    query (batch, rows, heads_q, head_dim), key (batch, rows, heads_kv, head_dim) and value (batch, rows, heads_kv,
    value_dim); or packed, without batch. All ranks call it, with the same arguments but for rows and positions. Output
    and, with return_lse, log-sum-exp float32 (batch, heads_q, rows) are those that one process would have for the rows,
    within the rounding of parts (docs/context_parallel.md). Differentiable, deterministic.

    group: a ProcessGroup or a DeviceMesh of one dimension, None for all ranks; or a mesh of two for "alltoall+ring".
    layout: which rows a rank has: "contiguous", "zigzag" (balanced for causal masks; cut by `shard`), or this rank's
    positions, int64 (rows,), ascending.
    scheme: "allgather", "alltoall" or "ring"; on a mesh (ring, alltoall) "alltoall+ring"; "auto" goes by cost.py.
    cu_seqlens: where documents of the whole packed sequence begin, and the last ends, (documents + 1,), on all ranks
    the same; they may cross ranks. On the CPU, or a list: a GPU's would have to be waited for.
    window_size, softcap, alibi_slopes, sinks, batch_invariant: as `aiter.flash_attn_func` has them.

    Raises TypeError or ValueError for bad arguments, and `aiter.errors.RankMismatchError` on the ranks whose arguments
    are not to blame, or where ranks' arguments differ: on all ranks, before data moves."""
    if torch.compiler.is_compiling():
        return _traced(
            *(query, key, value, group, causal, softmax_scale, layout, scheme, cu_seqlens, return_lse, options),
        )
    groups = groups_of(group)
    request, work, confirm = prepare(
        *(query, key, value, groups, causal, softmax_scale, layout, scheme, cu_seqlens, return_lse, options),
        ahead=True,
    )
    tensors = request.query, request.key, request.value, request.sinks, request.alibi_slopes
    try:
        with held(groups[0], confirm):
            output, lse = _ContextParallel.apply(*tensors, work, return_lse)
    except Changed as now:
        output, lse = _ContextParallel.apply(*tensors, settle(groups, request, now.known), return_lse)
    if query.dim() == 3:
        output, lse = output.squeeze(0), lse.squeeze(0) if return_lse else None
    return (output, lse) if return_lse else output


# ---- torch.compile ----


_OPERATOR = "aiter::context_parallel_attention"
_ASKED = (
    "Tensor? cu_seqlens, Tensor? positions, str[] groups, str layout, str scheme, bool causal, float softmax_scale, "
    "SymInt window_left, SymInt window_right, float softcap, bool batch_invariant, bool gradients"
)
_library = torch.library.Library("aiter", "FRAGMENT")
_library.define(
    "context_parallel_attention(Tensor query, Tensor key, Tensor value, Tensor? sinks, Tensor? alibi_slopes, "
    f"{_ASKED}) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "context_parallel_attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    f"Tensor output, Tensor lse, Tensor? sinks, Tensor? alibi_slopes, {_ASKED}) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _traced(query, key, value, group, causal, softmax_scale, layout, scheme, cu_seqlens, return_lse, keywords):
    causal, options = read_options(causal, keywords)
    refuse_others(options)
    if cu_seqlens is not None and not isinstance(cu_seqlens, torch.Tensor):
        cu_seqlens = torch.tensor(list(cu_seqlens), dtype=torch.int32)
    positions = layout if isinstance(layout, torch.Tensor) else None
    scale = query.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    names = [process_group(one).group_name for one in groups_of(group)]
    tensors = [query, key, value, *([] if options.sinks is None else [options.sinks])]
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    query, key, value = library.autocast(query, key, value)
    output, lse = torch.ops.aiter.context_parallel_attention(
        *(query, key, value, options.sinks, options.alibi_slopes, cu_seqlens, positions, names),
        *(POSITIONS if positions is not None else layout, scheme, causal, scale, options.window_left),
        *(options.window_right, options.softcap, options.batch_invariant, gradients),
    )
    return (output, lse) if return_lse else output


def _prepared(query, key, value, sinks, alibi_slopes, cu_seqlens, positions, groups, layout, scheme, *numbers):
    causal, scale, left, right, softcap, batch_invariant, gradients = numbers
    keywords: OptionKeywords = {
        "window_size": (left, right),
        "softcap": softcap,
        "batch_invariant": batch_invariant,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
    }
    request, work, _ = prepare(
        *(query, key, value, [dist.distributed_c10d._resolve_process_group(name) for name in groups], causal, scale),
        *(layout if positions is None else positions, scheme, cu_seqlens, True, keywords, gradients),
    )
    return request, work


def _operator(query, key, value, *rest):
    request, work = _prepared(query, key, value, *rest)
    tensors = request.query, request.key, request.value
    output, lse, _ = _forward(work, *tensors, request.alibi_slopes, request.sinks, True)
    assert lse is not None
    return (output.squeeze(0), lse.squeeze(0)) if query.dim() == 3 else (output, lse)


def _operator_backward(grad_output, grad_lse, query, key, value, output, lse, *rest):
    request, work = _prepared(query, key, value, *rest)
    given = [grad_output, grad_lse, output, lse]
    if query.dim() == 3:
        given = [tensor if tensor is None else tensor.unsqueeze(0) for tensor in given]
    grad_output, grad_lse, output, lse = given
    saved = [*request[:3], output, lse]
    heads = saved[0].shape[2], saved[1].shape[2]
    exchange = work.exchange(*heads)
    if exchange is not None:
        saved[4] = lse.transpose(1, 2)
        saved = exchange.to_heads(saved, [False, True, True, False, False])
        saved[4] = saved[4].transpose(1, 2).contiguous()
    gradients = _backward(work, grad_output, grad_lse, heads, saved, request.alibi_slopes, request.sinks)
    return tuple((g.squeeze(0) if query.dim() == 3 else g).contiguous() for g in gradients)


for _device in ("CPU", "CUDA"):
    _library.impl("context_parallel_attention", _operator, _device)
    _library.impl("context_parallel_attention_backward", _operator_backward, _device)
flops.count_shares(torch.ops.aiter.context_parallel_attention, torch.ops.aiter.context_parallel_attention_backward)


@torch.library.register_fake(_OPERATOR, lib=_library)
def _(query, key, value, *rest):
    *batch, tokens, heads, _ = query.shape
    lse = query.new_empty((*batch, heads, tokens), dtype=torch.float32)
    return query.new_empty((*query.shape[:-1], value.shape[-1])), lse


@torch.library.register_fake("aiter::context_parallel_attention_backward", lib=_library)
def _(grad_output, grad_lse, query, key, value, *rest):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _save_for_backward(ctx, inputs, output):
    tensors, ctx.asked = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *output)


def _operator_gradient(ctx, grad_output, grad_lse):
    query, key, value, *rest, output, lse = ctx.saved_tensors
    gradients = torch.ops.aiter.context_parallel_attention_backward(
        grad_output, grad_lse, query, key, value, output, lse, *rest, *ctx.asked
    )
    of_sinks = None
    if rest[0] is not None and ctx.needs_input_grad[3]:
        of_sinks = library.sink_gradient(grad_output, output, lse, rest[0])
    return (*gradients, of_sinks, *(None,) * (3 + len(ctx.asked)))


torch.library.register_autograd(_OPERATOR, _operator_gradient, setup_context=_save_for_backward, lib=_library)
