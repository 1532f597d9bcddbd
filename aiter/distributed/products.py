"""One product: queries of one run and keys that lie beside each other in memory, by one call of a kernel.

Several documents in a run are one call with a list of where they start. A mask that hides nothing from these queries is
left out, so that most products take the code without a mask, and the others the causal one where that says it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from aiter import jit, kernels
from aiter.checks import DTYPE_NAMES
from aiter.distributed.layout import Run
from aiter.distributed.needs import Mask, segments
from aiter.jit.arch import arch_of, is_gpu
from aiter.options import NO_LIMIT, one_mask


class Asked(NamedTuple):
    """What a call asks of all its products. Tensors are as the kernels' options take them, of all query heads here;
    sinks only where a product sees all keys of its rows."""

    mask: Mask
    scale: float
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    batch_invariant: bool = False


class Heads(NamedTuple):
    """Query heads and the KV heads that they read, all with the same number of query heads."""

    queries: Run
    keys: Run


class Product(NamedTuple):
    """rows and keys: where they lie in the tensors. starts: of several documents, among these rows and keys."""

    rows: Run
    keys: Run
    causal: bool
    left: int
    right: int
    offsets: tuple[int, ...] | None
    starts_q: tuple[int, ...] | None
    starts_k: tuple[int, ...] | None


@lru_cache(maxsize=4096)
def product_of(queries: Run, row: int, keys: Run, key_row: int, mask: Mask, by_distance: bool) -> Product | None:
    """Of a run of queries that begins at `row` and of keys that begin at `key_row`; None where none sees any.

    by_distance: scores depend on how far keys are (ALiBi), whether or not the mask hides any.
    """
    found = segments(queries, keys, mask)
    if not found:
        return None
    left, right = mask.left, mask.right
    if all(part.queries.stop - 1 - left <= part.keys.start for part in found):
        left = NO_LIMIT
    if all(part.queries.start + right >= part.keys.stop - 1 for part in found):
        right = NO_LIMIT
    causal, left, right = one_mask(False, left, right)
    offsets = None
    if by_distance or causal or (left, right) != (NO_LIMIT, NO_LIMIT):
        places = tuple(part.queries.start - part.keys.start for part in found)
        if places != tuple(part.keys.length - part.queries.length for part in found):
            offsets = places
    first, last = found[0], found[-1]
    starts_q = starts_k = None
    if len(found) > 1:
        starts_q = (
            *(part.queries.start - first.queries.start for part in found),
            last.queries.stop - first.queries.start,
        )
        starts_k = (*(part.keys.start - first.keys.start for part in found), last.keys.stop - first.keys.start)
    return Product(
        Run(first.queries.start - queries.start + row, last.queries.stop - queries.start + row),
        Run(first.keys.start - keys.start + key_row, last.keys.stop - keys.start + key_row),
        *(causal, left, right, offsets, starts_q, starts_k),
    )


@lru_cache(maxsize=1024)
def _int32(values: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Kept, as to bring it to a GPU takes the host longer than a launch."""
    return torch.tensor(values, dtype=torch.int32, device=device)


def cut(tensor: torch.Tensor, rows: Run, heads: Run) -> torch.Tensor:
    """Of (batch, seq, heads, …)."""
    return tensor[:, rows.start : rows.stop, heads.start : heads.stop]


def cut_lse(tensor: torch.Tensor, rows: Run, heads: Run) -> torch.Tensor:
    """Of (batch, heads, seq)."""
    return tensor[:, heads.start : heads.stop, rows.start : rows.stop]


def _inputs(asked: Asked, product: Product, heads: Heads, query: torch.Tensor) -> dict[str, Any]:
    """The operators' arguments but for tensors of rows and lists of lengths."""
    _, _, causal, left, right, offsets, starts_q, starts_k = product
    device, longest_q, longest_k = query.device, 0, 0
    if starts_q is not None and starts_k is not None:
        longest_q = max(b - a for a, b in itertools.pairwise(starts_q))
        longest_k = max(b - a for a, b in itertools.pairwise(starts_k))
    elif offsets is not None:
        offsets = offsets * query.shape[0]
    alibi_slopes, sinks = (
        tensor if tensor is None else tensor[..., heads.queries.start : heads.queries.stop]
        for tensor in (asked.alibi_slopes, asked.sinks)
    )
    return {
        "causal": causal,
        "softmax_scale": asked.scale,
        "max_seqlen": longest_q,
        "max_seqlen_k": longest_k,
        "starts_q": None if starts_q is None else _int32(starts_q, device),
        "starts_k": None if starts_k is None else _int32(starts_k, device),
        "window_left": left,
        "window_right": right,
        "softcap": asked.softcap,
        "alibi_slopes": alibi_slopes,
        "sinks": sinks,
        "query_offsets": None if offsets is None else _int32(offsets, device),
        "batch_invariant": asked.batch_invariant,
    }


def forward(
    asked: Asked,
    product: Product,
    heads: Heads,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (batch, rows, heads, head_dim) of value, written to its place in `output` where that is given, and the
    log-sum-exp (batch, heads, rows)."""
    tensors = [cut(query, product.rows, heads.queries), *(cut(t, product.keys, heads.keys) for t in (key, value))]
    if output is not None:
        tensors.insert(0, cut(output, product.rows, heads.queries))
    packed = product.starts_q is not None
    if packed:
        tensors = [tensor.squeeze(0) for tensor in tensors]
    inputs = _inputs(asked, product, heads, query)
    if output is None:
        result, lse = torch.ops.aiter.attention(*tensors, None, None, None, **inputs)
    else:
        lse = torch.ops.aiter.attention_out(*tensors, None, None, None, **inputs)
        result = tensors[0]
    return (result.unsqueeze(0), lse.unsqueeze(0)) if packed else (result, lse)


def backward(
    asked: Asked,
    product: Product,
    heads: Heads,
    grad_output: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    whole: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of these queries, keys and values, (batch, rows, heads, head_dim), from the output and the log-sum-exp
    of the whole rows; `whole`: all keys of which are in this product."""
    rows, of_rows = product.rows, heads.queries
    tensors = [
        None if grad_output is None else cut(grad_output, rows, of_rows),
        None if grad_lse is None else cut_lse(grad_lse, rows, of_rows),
        cut(query, rows, of_rows),
        *(cut(t, product.keys, heads.keys) for t in (key, value)),
        cut(output, rows, of_rows),
        cut_lse(lse, rows, of_rows),
    ]
    packed = product.starts_q is not None
    if packed:
        tensors = [tensor if tensor is None else tensor.squeeze(0) for tensor in tensors]
    inputs = _inputs(asked, product, heads, query)
    gradients = torch.ops.aiter.attention_backward(*tensors, None, None, **inputs, lse_is_given=not whole)
    return tuple(g.unsqueeze(0) for g in gradients) if packed else gradients


def compile_kernels(
    asked: Asked, products: Iterable[Product], query: torch.Tensor, value: torch.Tensor, gradients: bool
) -> None:
    """Builds what these products need, or waits for the process of this machine that does."""
    switched_on = {
        "alibi": asked.alibi_slopes is not None,
        "batch_invariant": asked.batch_invariant,
        "softcap": asked.softcap,
    }
    own = [name for name, on in switched_on.items() if on]
    kinds = {(call.causal, (call.left, call.right) != (NO_LIMIT, NO_LIMIT)) for call in products}
    for causal, window in sorted(kinds):
        options = (*own, *(["window"] if window else []))
        _compile(query.device, query.dtype, query.shape[-1], value.shape[-1], causal, options, gradients)


@lru_cache(maxsize=256)
def _compile(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    causal: bool,
    options: tuple[str, ...],
    gradients: bool,
) -> None:
    arch = arch_of(device)
    names = ["attention_forward"] if head_dim <= kernels.HEAD_DIM_MAX or not is_gpu(arch) else ["attention_decode"]
    for name in names + ["attention_backward"] * gradients:
        for spec in kernels.forms(name, DTYPE_NAMES[dtype], head_dim, causal, arch, False, value_dim, options):
            jit.get_kernel(spec)
