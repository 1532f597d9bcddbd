"""Masks that come as tensors, read as what the operations take: which keys are tokens, and whether a query sees on.

    attn_mask ── read ──> Seen ── arrange ──> key and value with the tokens first, options of the operation

Padding, triangles and causal windows, padded or not, as bool or to be added to scores. Anything else is None: whoever
asks refuses it by name or leaves it to others.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch

# What an additive mask must hold at least to hide a key wholly, whatever the scores: exp(-10^4) is 0.
HIDDEN = -1e4


class Seen(NamedTuple):
    """What each query sees: keys that are tokens, if causal those up to its own place."""

    keys: torch.Tensor | None = None  # bool (batch, seq_k); None: all
    causal: bool = False
    offset: int = 0  # the key that the first query of a causal mask sees last
    window: int = 0  # how many keys it sees at most, its own counted; 0: no limit


def values_are_hidden(tensor: torch.Tensor | None = None) -> bool:
    """Whether no value can be looked at: traced, there is none yet; a CUDA graph in the making would break by it."""
    if torch.compiler.is_compiling() or is_capturing():
        return True
    return tensor is not None and (
        type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or tensor.is_meta
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def fits(mask: torch.Tensor, *sizes: int) -> bool:
    """Whether it can be broadcast to these: (batch, heads, seq_q, seq_k)."""
    pairs = zip(reversed(mask.shape), reversed(sizes), strict=False)
    return 2 <= mask.dim() <= len(sizes) and all(size in (1, of) for size, of in pairs)


def read(mask: torch.Tensor, batch: int, seq_q: int, seq_k: int) -> Seen | None:
    """What a mask says that `fits`: bool, True where a query sees a key, or a floating type, to be added to the scores.

    A bool mask of one row for all queries is padding, whatever it holds. The values of others are looked at, once for
    all layers that are given the same tensor, which waits for a GPU; None where they are hidden."""
    given, mask = mask, mask[(None,) * (4 - mask.dim())]
    if mask.requires_grad:
        return None  # a bias to be learned
    same = [size == 1 or stride == 0 for size, stride in zip(mask.shape, mask.stride(), strict=True)]
    if mask.dtype == torch.bool and same[1] and same[2]:
        return Seen(mask[:, 0, 0].expand(batch, seq_k))
    return None if values_are_hidden(mask) else _look(given, mask, batch, seq_q, seq_k)


_last_look: tuple = (None, None, None)


def _look(given: torch.Tensor, mask: torch.Tensor, *sizes: int) -> Seen | None:
    """`_look_at` the mask, once for a given tensor that does not change; each call may bring another view of it."""
    global _last_look
    if given.is_inference():  # whether it has changed is not known
        return _look_at(mask, *sizes)
    whole = given if given._base is None else given._base
    view = (given._version, mask.shape, mask.stride(), mask.storage_offset(), sizes)
    known, known_view, found = _last_look
    if known is None or known() is not whole or known_view != view:
        found = _look_at(mask.detach(), *sizes)
        _last_look = weakref.ref(whole), view, found
    return found


def _look_at(mask: torch.Tensor, batch: int, seq_q: int, seq_k: int) -> Seen | None:
    """mask: (batch or 1, heads or 1, seq_q or 1, seq_k or 1)."""
    if mask.shape[1] != 1 and mask.stride(1) != 0 and not torch.equal(mask, mask[:, :1].expand_as(mask)):
        return None  # heads see what others do not
    mask = mask[:, 0]
    visible = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((visible.any(2, keepdim=True) & (visible | (mask <= HIDDEN))).all()):
        return None  # scores that count; or a row without a key, of which a finite mask makes an average
    visible = visible.expand(-1, seq_q, seq_k)
    keys = visible.any(1)
    every = None if bool(keys.all()) else keys.expand(batch, -1)
    if torch.equal(visible, keys[:, None].expand_as(visible)):
        return Seen(every)
    together = ((keys[:, 1:] & ~keys[:, :-1]).sum(1) + keys[:, 0] <= 1).all()  # else places would move
    most = int(visible.sum(2).max())
    for offset in {seq_k - seq_q, 0}:
        triangle = torch.ones_like(visible[0]).tril(offset)
        for window, shape in ((0, triangle), (most, triangle.triu(offset - most + 1))):
            if bool(together) and torch.equal(visible, keys[:, None] & shape):
                return Seen(every, True, offset, window)
    return None


def arrange(
    seen: Seen, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """key and value (batch, seq_k, heads, head_dim) with the tokens first, and the options of `flash_attn_func`. On the
    CPU what is in this order already is not copied; a GPU is not waited for."""
    options: dict[str, Any] = {}
    if seen.keys is not None:
        blind = seen.keys.is_cuda or values_are_hidden(seen.keys)
        options["seqlens_k"], order = tokens_first(seen.keys, blind)
        if order is not None:
            key, value = reorder(key, order), reorder(value, order)
    if seen.causal and (seen.keys is not None or seen.offset != key.shape[1] - query.shape[1]):
        first = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        if seen.keys is not None:
            first = seen.keys.int().argmax(1)
        options["query_offsets"] = (seen.offset - first).to(torch.int32)
    if seen.window:
        options["window_size"] = (seen.window - 1, 0)
    return key, value, options


def tokens_first(valid: torch.Tensor, blind: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """How many tokens each row of `valid` (batch, seq) has, int32 (batch,), and the order that puts them first, int64
    (batch, seq); None: they are. `blind`: without a look at the values."""
    count = valid.sum(1, dtype=torch.int32)
    if not blind and bool((valid[:, 1:] <= valid[:, :-1]).all()):
        return count, None
    return count, (~valid).to(torch.uint8).argsort(dim=1, stable=True)


def reorder(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The rows of (batch, seq, heads, head_dim) in an order (batch, seq) of their own for each sequence."""
    return tensor.gather(1, order[:, :, None, None].expand(-1, -1, *tensor.shape[2:]))
