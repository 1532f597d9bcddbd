"""Attention written down as the mathematics says it, in float64, one sequence at a time: slow, and easy to trust; and
as PyTorch computes it, whose error says what is to be expected.

`aiter demo`, `aiter selftest` and the tests hold the kernels against these. What each option means stands in
kernels_src/include/aiter_abi.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from aiter import dropout


def attend_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    offset: int | None = None,
    chunk: int = 0,
    kept: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one sequence: query (seq_q, heads_q, head_dim), key (seq_k, heads_kv, head_dim), value (seq_k,
    heads_kv, value_dim); alibi_slopes and sinks (heads_q,); kept bool (heads_q, seq_q, seq_k), the weights that dropout
    with dropout_p leaves (aiter.dropout.keep_mask).

    Returns float64 output (seq_q, heads_q, value_dim) and log-sum-exp (heads_q, seq_q). Each query takes part only with
    the keys that it sees, so that what stands in the others, inf and NaN included, has no effect. Differentiable.
    """
    seq_q, heads_q, head_dim = query.shape
    seq_k, heads_kv, _ = key.shape
    scale = 1.0 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    q, k, v = (t.double().transpose(0, 1) for t in (query, key, value))
    k, v = (t.repeat_interleave(heads_q // heads_kv, 0) for t in (k, v))
    seen = visible_keys(seq_q, seq_k, causal, window, offset, query.device, chunk)
    factors = None if kept is None else kept.double() * dropout.scale(dropout_p)

    def scores_of(rows: slice, keys: slice) -> torch.Tensor:
        scores = capped(q[:, rows] @ k[:, keys].transpose(1, 2) * scale, softcap)
        if alibi_slopes is None:
            return scores
        return scores + alibi_bias(seq_q, seq_k, alibi_slopes.double(), offset)[:, rows, keys]

    every = slice(None)
    if seen.all() or (v.isfinite().all() and k.isfinite().all()):
        output, lse = _attend_rows(scores_of(every, every), v, ~seen, factors)
    else:  # row by row, with what each sees and nothing else
        rows = []
        for i in range(seq_q):
            visible = seen[i].nonzero()
            keys = slice(int(visible[0]), int(visible[-1]) + 1) if len(visible) else slice(0, 0)
            own = None if factors is None else factors[:, i : i + 1, keys]
            rows.append(_attend_rows(scores_of(slice(i, i + 1), keys), v[:, keys], None, own))
        output, lse = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
    if sinks is not None:
        output = output * torch.sigmoid(lse - sinks.double().unsqueeze(1)).unsqueeze(2)
    return output.transpose(0, 1), lse


def pytorch_attend_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    offset: int | None = None,
    chunk: int = 0,
    kept: torch.Tensor | None = None,
    dropout_p: float = 0.0,
) -> torch.Tensor:
    """PyTorch's result for one sequence, in the dtype of its tensors; arguments as for `attend_one`.

    Where PyTorch has an operator, by that. Soft caps, ALiBi, sinks and dropout are written out as its fused operators
    compute: scores and their softmax in float32, weights rounded to the dtype."""
    seq_q, heads_q, head_dim = query.shape
    seq_k, heads_kv, _ = key.shape
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    k, v = (t.repeat_interleave(heads_q // heads_kv, 1) for t in (k, v))
    seen = visible_keys(seq_q, seq_k, causal, window, offset, query.device, chunk)
    if softcap == 0.0 and alibi_slopes is None and sinks is None and kept is None:
        mask = seen if causal or window or chunk else None
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)[0].transpose(0, 1)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    scores = capped(q[0].float() @ k[0].float().transpose(1, 2) * scale, softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(seq_q, seq_k, alibi_slopes.float(), offset)
    blind = ~seen.any(1).view(1, -1, 1)
    scores = scores.masked_fill(~seen & ~blind[0], -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(-1, seq_q, 1)), 2)
    weights = scores.softmax(2)[..., :seq_k]
    if kept is not None:
        weights = weights * kept * dropout.scale(dropout_p)
    return (weights.to(v.dtype) @ v[0]).masked_fill(blind, 0.0).transpose(0, 1)


def visible_keys(
    seq_q: int,
    seq_k: int,
    causal: bool,
    window: tuple[int, int] | None = None,
    offset: int | None = None,
    device: torch.device | None = None,
    chunk: int = 0,
) -> torch.Tensor:
    """Which keys each query sees: (seq_q, seq_k), bool. Query i stands at key i + offset, by default seq_k - seq_q."""
    left, right = window or (-1, -1)
    if causal:
        right = 0
    # How far each key lies behind the place of each query.
    keys, places = torch.arange(seq_k, device=device), _places(seq_q, seq_k, offset, device).unsqueeze(1)
    ahead = keys - places
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen & (keys // chunk == places.div(chunk, rounding_mode="floor")) if chunk else seen


def capped(scores: torch.Tensor, softcap: float) -> torch.Tensor:
    """Scaled scores, none of them larger than the cap."""
    return scores if softcap == 0.0 else softcap * torch.tanh(scores / softcap)


def alibi_bias(seq_q: int, seq_k: int, slopes: torch.Tensor, offset: int | None = None) -> torch.Tensor:
    """What ALiBi adds to the scores: (heads, seq_q, seq_k), in the dtype of the slopes (heads,)."""
    places = _places(seq_q, seq_k, offset, slopes.device)
    distance = (torch.arange(seq_k, device=slopes.device) - places.unsqueeze(1)).abs()
    return -slopes.view(-1, 1, 1) * distance


def _places(seq_q: int, seq_k: int, offset: int | None, device: torch.device | None) -> torch.Tensor:
    return torch.arange(seq_q, device=device) + (seq_k - seq_q if offset is None else offset)


def _attend_rows(
    scores: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None, factors: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp from scores (heads, rows, keys), of which `hidden` (rows, keys) take no part. Weights
    count `factors` times (dropout)."""

    def weights_of(scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(2) if factors is None else scores.softmax(2) * factors

    if v.shape[1] == 0:
        return scores.softmax(2) @ v, v.new_full(scores.shape[:2], -math.inf)  # zeros
    if hidden is None or not hidden.any():
        return weights_of(scores) @ v, scores.logsumexp(2)
    blind = hidden.all(1)
    # A blind row would be 0/0; it is computed unmasked and replaced, which keeps its gradient zero, not NaN.
    scores = scores.masked_fill(hidden & ~blind.unsqueeze(1), -math.inf)
    output = (weights_of(scores) @ v).masked_fill(blind.view(1, -1, 1), 0.0)
    return output, scores.logsumexp(2).masked_fill(blind, -math.inf)


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
