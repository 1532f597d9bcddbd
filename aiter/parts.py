"""Attention in parts: for those who split a row's keys over calls, devices or caches.

    output, lse of each part ── merge_attention_states ──> output, lse of the whole row
    gradient of the output   ── attention_backward, part by part, with the whole row's output and lse ──> gradients

Both follow from the softmax alone: weights of a part are those of the whole row times exp(lse of the part - lse).
Log-sum-exps are natural logarithms, float32, of the keys alone: a sink joins once, when parts are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from aiter import checks, library
from aiter.options import OptionKeywords, per_head, read_options

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionGradients(NamedTuple):
    """Of query, key and value, in their shapes and dtypes, and of the sinks where there are any."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sinks: torch.Tensor | None = None


def merge_attention_states(
    outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], *, sinks: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of rows whose keys were attended to in parts.

    outputs: of each part, (batch, seq, heads, head_dim) or packed (total, heads, head_dim), all of one shape. lses:
    theirs, float32 (batch, heads, seq) or (heads, total). A row that a part has no key for counts nothing there,
    whatever its output holds. sinks: (heads,), joined here if it was not in the parts. The result has the dtype of
    outputs[0]; its log-sum-exp is that of the keys alone. Sums are made in float32, in the order of the parts.
    Differentiable.

    The formula is that of online softmax (Milakov and Gimelshein, 2018, https://arxiv.org/abs/1805.02867).
    """
    for name, parts in (("outputs", outputs), ("lses", lses)):
        if not isinstance(parts, (Sequence, torch.Tensor)):
            raise TypeError(f"{name} must be a list of tensors, one of each part, not {type(parts).__name__}")
    checks.memory(outputs=outputs, lses=lses, sinks=sinks)
    outputs, lses = list(outputs), list(lses)
    if len(outputs) != len(lses) or not outputs:
        raise ValueError(f"there are {len(outputs)} outputs and {len(lses)} lses; give one lse for each output")
    first = outputs[0]
    for index, (output, lse) in enumerate(zip(outputs, lses, strict=True)):
        checks.tensor(f"outputs[{index}]", output, (3, 4), f"{checks.BSHD}, or packed {checks.PACKED}")
        checks.tensor(f"lses[{index}]", lse, output.dim() - 1, "(batch, heads, seq), or (heads, total_tokens)")
        checks.same_shape(f"outputs[{index}]", output, "outputs[0]", first)
        if output.dtype not in checks.DTYPE_NAMES:
            raise TypeError(f"outputs[{index}] has dtype {output.dtype}; it must be a floating one of the operations")
        expected = (*first.shape[:-3], first.shape[-2], first.shape[-3])
        if lse.shape != torch.Size(expected):
            raise ValueError(f"lses[{index}] has shape {tuple(lse.shape)}; it must be {expected}")
        if lse.dtype != torch.float32:
            raise TypeError(f"lses[{index}] has dtype {lse.dtype}; it must be torch.float32")
        checks.same_device(f"outputs[{index}]", output, "outputs[0]", first)
        checks.same_device(f"lses[{index}]", lse, "outputs[0]", first)
    lse = lses[0]
    for other in lses[1:]:
        lse = library.log_add(lse, other)
    total = lse
    if sinks is not None:
        per_head("sinks", sinks, first, (1,), query_name="outputs[0]")
        total = library.with_sinks(lse, sinks.float())
    merged = torch.zeros((), dtype=torch.float32, device=first.device)
    for output, part in zip(outputs, lses, strict=True):
        empty = part == -torch.inf
        # The difference of two infinities is NaN, and so would its gradient be.
        weight = (part.masked_fill(empty, 0.0) - total.masked_fill(empty, 0.0)).exp().masked_fill(empty, 0.0)
        hidden, rows = (tensor.transpose(-1, -2).unsqueeze(-1) for tensor in (empty, weight))
        merged = merged + output.float().masked_fill(hidden, 0.0) * rows
    return merged.to(first.dtype), lse


def attention_backward(
    grad_output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    grad_lse: torch.Tensor | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    **options: Unpack[OptionKeywords],
) -> AttentionGradients:
    """Gradients of attention from an output and a log-sum-exp that are given: those of these very keys, or of whole
    rows of which key and value are a part.

    Shapes as in `flash_attn_func`; or packed, with seqlens_q and seqlens_k int32 (batch,) and max_seqlen_q and
    max_seqlen_k, which bound them (by default the rows there are). output and grad_output (batch, seq_q, heads_q,
    head_dim of value), lse and grad_lse float32 (batch, heads_q, seq_q). What parts give for query adds up. With
    `sinks`, output includes them and lse does not, as the operations return them.
    """
    packed = f"{checks.BSHD}, or packed {checks.PACKED}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, tensor, (3, 4), packed)
    for name, tensor in (("grad_output", grad_output), ("output", output)):
        checks.tensor(name, tensor, query.dim(), packed)
        expected = (*query.shape[:-1], value.shape[-1])
        if tensor.shape != torch.Size(expected):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {expected}")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be that of query, {query.dtype}")
        checks.same_device(name, tensor, "query", query)
    shape = (*query.shape[:-3], query.shape[-2], query.shape[-3])
    for name, given in (("lse", lse), ("grad_lse", grad_lse)):
        if given is not None:
            checks.tensor(name, given, len(shape), "(batch, heads, seq), or (heads, total_tokens)")
            if given.shape != torch.Size(shape) or given.dtype != torch.float32:
                raise ValueError(f"{name} is {given.dtype} {tuple(given.shape)}; it must be torch.float32 {shape}")
            checks.same_device(name, given, "query", query)
    checks.flag("causal", causal)
    scale = checks.softmax_scale(softmax_scale, query.shape[-1])
    causal, chosen = read_options(causal, options)
    chosen.check(query, key)
    if chosen.dropout_p and chosen.rng_state is None:
        raise ValueError("dropout_p needs the rng_state that the forward pass had: give both calls one")
    bounds = (max_seqlen_q or query.shape[0], max_seqlen_k or key.shape[0]) if query.dim() == 3 else (0, 0)
    lengths = seqlens_q, seqlens_k
    if query.is_cpu and lengths != (None, None) and not torch.compiler.is_compiling():
        inputs: tuple[Any, ...] = (*lengths, None, causal, scale, *bounds, None, None, *chosen)
        call = library.read_call(query, key, value, *inputs)
        checks.values(call.sizes, call.indices, call.options, call.names)
    grad_query, grad_key, grad_value = torch.ops.aiter.attention_backward(
        *(grad_output, grad_lse, query, key, value, output, lse, *lengths, causal, scale, bounds[0]),
        *(bounds[1], None, None, *chosen, True),
    )
    sinks = None
    if chosen.sinks is not None:
        sinks = library.sink_gradient(grad_output, output, lse, chosen.sinks)
    return AttentionGradients(grad_query, grad_key, grad_value, sinks)
