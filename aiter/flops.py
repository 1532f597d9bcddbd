"""How many floating-point operations a call takes, for PyTorch's FlopCounterMode.

Counted as PyTorch counts its own operators: the products of matrices, two forward and five backward, keys that a mask
hides included. Lengths count where their values can be looked at; of a traced call, their bounds do.
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

from aiter import library  # noqa: F401 - defines the operators


@register_flop_formula(torch.ops.aiter.attention, get_raw=True)
def _forward(
    query,
    key,
    value,
    seqlens_q=None,
    seqlens_k=None,
    page_table=None,
    causal=False,
    softmax_scale=1.0,
    max_seqlen=0,
    max_seqlen_k=0,
    starts_q=None,
    starts_k=None,
    *options,
    **others,
) -> int:
    if page_table is None:
        room = key.shape[1] if key.dim() == 4 else max_seqlen_k or max_seqlen
    else:
        room = page_table.shape[1] * key.shape[2]
    pairs = _pairs(query, seqlens_q, seqlens_k, starts_q, starts_k, page_table, max_seqlen, room)
    return 2 * pairs * query.shape[-2] * (query.shape[-1] + value.shape[-1])


@register_flop_formula(torch.ops.aiter.attention_out, get_raw=True)
def _forward_out(output, *arguments, **others) -> int:
    return _forward(*arguments, **others)


@register_flop_formula(torch.ops.aiter.attention_backward, get_raw=True)
def _backward(
    grad_output,
    grad_lse,
    query,
    key,
    value,
    output,
    lse,
    seqlens_q=None,
    seqlens_k=None,
    causal=False,
    softmax_scale=1.0,
    max_seqlen=0,
    max_seqlen_k=0,
    starts_q=None,
    starts_k=None,
    *options,
    **others,
) -> int:
    room = key.shape[1] if key.dim() == 4 else max_seqlen_k or max_seqlen
    pairs = _pairs(query, seqlens_q, seqlens_k, starts_q, starts_k, None, max_seqlen, room)
    # Scores again, and the gradients of query and key; those of the weights and of value.
    return 2 * pairs * query.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _pairs(
    query: torch.Tensor,
    seqlens_q: torch.Tensor | None,
    seqlens_k: torch.Tensor | None,
    starts_q: torch.Tensor | None,
    starts_k: torch.Tensor | None,
    page_table: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> int:
    """How many pairs of a query and a key of one sequence there are."""
    if query.dim() == 4:
        batch, max_seqlen_q = query.shape[:2]
    elif starts_q is not None:
        batch = starts_q.shape[0] - 1
    else:
        batch = next(index.shape[0] for index in (seqlens_q, seqlens_k, page_table) if index is not None)
    rows = _lengths(seqlens_q, starts_q, batch, max_seqlen_q)
    keys = _lengths(seqlens_k, starts_k, batch, max_seqlen_k)
    return sum(row * key for row, key in zip(rows, keys, strict=True))


def _lengths(lengths: torch.Tensor | None, starts: torch.Tensor | None, batch: int, longest: int) -> list[int]:
    given = starts if lengths is None else lengths
    if type(given) is not torch.Tensor or given.is_meta:  # none, or one without values
        return [longest] * batch
    return given.tolist() if given is lengths else given.diff().tolist()
