"""Attention written down as the mathematics says it, in float64, one sequence at a time: slow, and easy to trust.

`aiter demo` and the tests hold the kernels against these.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch


def attend_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, softmax_scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence: query (seq_q, heads_q, head_dim), key and value (seq_k, heads_kv, head_dim).

    Returns float64 output like query and log-sum-exp (heads_q, seq_q). Each query takes part only with the keys that it
    sees, so that what stands in the others, inf and NaN included, has no effect. Differentiable.
    """
    seq_q, heads_q, head_dim = query.shape
    seq_k, heads_kv, _ = key.shape
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    q, k, v = (t.double().transpose(0, 1) for t in (query, key, value))
    k, v = (t.repeat_interleave(heads_q // heads_kv, 0) for t in (k, v))
    if not causal:
        return _attend_rows(q, k, v, scale)
    visible = torch.arange(seq_q, device=query.device) + (seq_k - seq_q + 1)
    if v.isfinite().all() and k.isfinite().all():
        hidden = torch.arange(seq_k, device=query.device) >= visible.unsqueeze(1)
        return _attend_rows(q, k, v, scale, hidden)
    rows = [_attend_rows(q[:, i : i + 1], k[:, : max(n, 0)], v[:, : max(n, 0)], scale) for i, n in enumerate(visible)]
    outputs, lses = zip(*rows, strict=True)
    return torch.cat(outputs), torch.cat(lses, 1)


def _attend_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, hidden: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = q @ k.transpose(1, 2) * scale
    if k.shape[1] == 0:
        return torch.zeros_like(q).transpose(0, 1), q.new_full(q.shape[:2], -math.inf)
    blind = None
    if hidden is not None:
        blind = hidden.all(1)
        # A blind row would be 0/0; it is computed unmasked and replaced, which keeps its gradient zero, not NaN.
        scores = scores.masked_fill(hidden & ~blind.unsqueeze(1), -math.inf)
    lse = scores.logsumexp(2)
    output = scores.softmax(2) @ v
    if blind is not None:
        output = output.masked_fill(blind.view(1, -1, 1), 0.0)
        lse = lse.masked_fill(blind, -math.inf)
    return output.transpose(0, 1), lse


def gather_pages(cache: torch.Tensor, pages: torch.Tensor, length: int) -> torch.Tensor:
    """The first `length` tokens of a sequence, (length, heads, head_dim), from a cache (pages, heads, page_size, …)."""
    needed = pages[: -(-length // cache.shape[2])].long()
    return cache[needed].transpose(1, 2).flatten(0, 1)[:length]


def split_packed(seq_lengths: list[int]) -> Iterator[slice]:
    """Where each sequence of a packed tensor lies."""
    start = 0
    for length in seq_lengths:
        yield slice(start, start + length)
        start += length
