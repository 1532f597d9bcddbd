"""Masks: what transformers describes by functions of indices, as which keys each query sees.

Mask functions, sizes and padding become a `Mask`, once for each forward pass. Values are looked at then, where that
is possible (`values_are_hidden`); what our kernels have no form of is remembered as a reason to refuse, as some models
make masks that none of their layers has.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from aiter.integrations.masks import HIDDEN, tokens_first, values_are_hidden
from aiter.options import NO_LIMIT

NAME = "aiter"
USE_OTHERS = "use attn_implementation='sdpa' or 'eager'"

REFUSED_MASK = (
    f"attn_implementation={NAME!r} takes causal and bidirectional masks, windows, padding and packed documents; this "
    f"model or batch asks for another mask (chunks with a cache, images that see ahead, …): {USE_OTHERS}"
)
REFUSED_TRACED = (
    f"attn_implementation={NAME!r}: compiled, exported or in a CUDA graph, the mask must be causal or bidirectional, "
    "and a row one document, without gaps where there is a window. Give documents by cu_seq_lens_q, cu_seq_lens_k, "
    "max_length_q and max_length_k, or do not compile"
)
REFUSED_GAPS = (
    f"attn_implementation={NAME!r} takes windows with padding before or after the tokens of a row, not between them: "
    f"{USE_OTHERS}"
)
NO_WINDOW = (NO_LIMIT, NO_LIMIT)


class OwnAttentionError(ValueError, AttributeError):
    """A model uses its mask as a tensor, to compute attention itself: it does not ask this module for it."""

    def __init__(self, use: str) -> None:
        super().__init__(
            f"attn_implementation={NAME!r}: this model computes attention itself, with its mask as a tensor ({use}); "
            f"{NAME} makes none: {USE_OTHERS}"
        )


class Mask(NamedTuple):
    """Which keys each query sees, from `padding_mask` to `attention`: a triangle or all, over those tokens that count.

    Not a tensor, on purpose: a model that wants to compute with it gets an error that says so.
    """

    batch: int
    seqlen_k: int
    causal: bool
    # int32 (batch,): how many queries and keys of each sequence are tokens; None: all.
    seqlens_q: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None
    # int64 (batch, seq): where they stand, the tokens before the padding; None: in this order already.
    order_q: torch.Tensor | None = None
    order_k: torch.Tensor | None = None
    # int32 (documents,): the lengths of documents packed in the rows, and the longest of them; None: a row is one.
    documents: torch.Tensor | None = None
    longest: int = 0
    # How many keys before and after its own a query sees, as the mask was made for; and whether that
    # hides any key from any query (traced: perhaps).
    window: tuple[int, int] = NO_WINDOW
    hides: bool = False
    # int32 (batch,): the key that stands where the first query does; None: the last query stands at the last key.
    query_offsets: torch.Tensor | None = None
    # A bool that must be true when a traced program runs, unless documents are given to the layers.
    holds: torch.Tensor | None = None
    # Why no layer may use it; some models make masks that none of their layers has.
    refused: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.batch, self.seqlen_k

    @property
    def ndim(self) -> int:
        return 0  # transformers would take 2 for the padding it makes masks from

    def __getattr__(self, name: str):
        raise OwnAttentionError(name)

    def __getitem__(self, index):
        if not isinstance(index, int):
            raise OwnAttentionError("[…]")
        return tuple.__getitem__(self, index)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise OwnAttentionError(getattr(function, "__name__", str(function)))


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | Mask | None = None,
    device: torch.device | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    **kwargs,
) -> Mask:
    """What transformers describes by a function of indices and the (batch, tokens) mask of those that are not padding.

    Queries stand at positions q_offset and on, keys at kv_offset and on. local_size: of the window or chunks that the
    function is said to have: the window counts its query where it is causal, and is a distance where it is not. Values
    are looked at only where they can be.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask  # `generate` asks for masks ahead of the model, which hands them in again
    blind = values_are_hidden()
    valid = None
    if attention_mask is not None:
        # Positions that attention_mask does not reach are padding, as in transformers.
        missing = max(0, kv_offset + kv_length - attention_mask.shape[1])
        valid = torch.nn.functional.pad(attention_mask.bool(), (0, missing))[:, kv_offset : kv_offset + kv_length]

    begin = q_offset - kv_offset  # the key that stands where the first query does
    window, hides = NO_WINDOW, False
    if mask_function is causal_mask_function or mask_function is bidirectional_mask_function:
        causal, first, holds = mask_function is causal_mask_function, None, None
    else:
        causal = allow_is_bidirectional_skip is None  # transformers asks it of bidirectional masks only
        indices = torch.arange(q_length, device=device)[None].expand(batch_size, -1) + begin
        try:
            if use_vmap:
                raise ValueError(REFUSED_MASK)  # a function of the model's or user's own
            if local_size is not None:
                window = (local_size - 1, 0) if causal else (local_size, local_size)
            first, hides, holds = _documents_seen(mask_function, causal, window, indices, kv_length, kv_offset, valid)
        except ValueError as error:
            return Mask(batch_size, kv_length, causal, refused=str(error))
    made = Mask(batch_size, kv_length, causal, window=window, hides=hides, holds=holds)
    if first is not None:
        made = made._replace(**_documents(first))
    # Kernels take the last query to stand at the last key; of a causal mask, that is so.
    placed = causal or not hides or (isinstance(begin, int) and begin == kv_length - q_length)
    if not placed:
        made = made._replace(query_offsets=_for_each_row(begin, batch_size, device))

    held = begin + q_length if causal else kv_length  # a static cache is longer than what it holds so far
    if valid is None:
        if isinstance(held, int) and held == kv_length:
            return made
        return made._replace(seqlens_k=_for_each_row(held, batch_size, device))
    if causal:
        valid = valid & (torch.arange(kv_length, device=valid.device) < held)
    if not blind and bool(valid.all()):
        return made
    if first is not None:
        return made._replace(
            refused=f"attn_implementation={NAME!r} takes packed documents or padding, not both at once: {USE_OTHERS}"
        )
    if hides:  # distances must stay what they are when tokens are put first
        whole = ((valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0] <= 1).all()
        if blind:
            made = made._replace(holds=whole if holds is None else holds & whole)
        elif not bool(whole):
            return made._replace(refused=REFUSED_GAPS)
    seqlens_k, order_k = tokens_first(valid, blind)
    made = made._replace(seqlens_k=seqlens_k, order_k=order_k)
    if not causal:  # a query that is padding sees what the others see: nobody reads what comes of it
        if not hides:
            return made
        return made._replace(query_offsets=_for_each_row(begin - valid.int().argmax(1), batch_size, device))
    valid_q = valid.index_select(1, torch.arange(q_length, device=valid.device) + begin)
    if not blind and bool(valid_q.all()):
        return made
    seqlens_q, order_q = tokens_first(valid_q, blind)
    return made._replace(seqlens_q=seqlens_q, order_q=order_q)


def _for_each_row(value: int | torch.Tensor, batch: int, device: torch.device | None) -> torch.Tensor:
    """int32 (batch,)."""
    return torch.as_tensor(value, dtype=torch.int32, device=device).reshape(-1).expand(batch).contiguous()


def _documents_seen(
    sees: Callable,
    causal: bool,
    window: tuple[int, int],
    query: torch.Tensor,
    kv_length: int,
    kv_offset: int,
    valid: torch.Tensor | None,
) -> tuple[torch.Tensor | None, bool, torch.Tensor | None]:
    """Where documents begin, bool (batch, seq_q), by a mask function that wraps others (None: one in each row), and
    whether the window, which the function may have or not, hides a key.

    query (batch, seq_q) holds the keys at which the queries stand; valid (batch, seq_k) the keys that are tokens. A few
    keys of each query, those at the edges of what it should see, tell windows, packed documents and chunks from text
    that sees images ahead. Where values are hidden there is nothing to decide by: the third result, a bool, is what
    must hold for one document in each row.
    """
    batch, last = query.shape[0], kv_length - 1
    rows, head = torch.arange(batch, device=query.device)[:, None], torch.zeros_like(query[:1, :1])
    if valid is None:
        low, counts = torch.zeros_like(query), torch.ones_like(query, dtype=torch.bool)
    else:
        low, counts = valid.int().argmax(1, keepdim=True).expand_as(query), valid.gather(1, query)

    def seen(key):
        return sees(rows, head, query + kv_offset, key.clamp(0, last) + kv_offset)

    first = ~seen(query - 1) & (query > low) & counts & causal
    start = torch.where(first, query, low).cummax(1).values  # where the document of each query begins
    left, right = (kv_length if side == NO_LIMIT else side for side in window)
    begin, end = query - left, query + (0 if causal else right)
    regular = seen(query) & seen(begin.maximum(start)) & seen(end.clamp(max=last))
    regular &= ~(seen(begin - 1) & (begin > start)) & ~(seen(end + 1) & (end < last))
    regular = (regular | ~counts).all()
    if values_are_hidden():
        return None, window != NO_WINDOW, regular & ~first.any()
    several = bool(first.any())
    if not bool(regular) or (several and query.shape[1] != kv_length):
        raise ValueError(REFUSED_MASK)
    hidden = begin > start if causal else (begin > start) | (end < last)
    return (first if several else None), bool((hidden & counts).any()), None


def _documents(first: torch.Tensor) -> dict:
    """The fields of a Mask for documents that begin where `first` (batch, seq) says, and at each row."""
    begin = torch.cat((torch.ones_like(first[:, :1]), first[:, 1:]), 1).flatten().nonzero().squeeze(1)
    lengths = begin.diff(append=begin.new_tensor([first.numel()]))
    return dict(documents=lengths.to(torch.int32), longest=int(lengths.max()))


def as_mask(
    given: Mask | torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
    sliding_window: int | None,
) -> Mask:
    batch, seq_q, seq_k = query.shape[0], query.shape[2], key.shape[2]
    if isinstance(given, Mask):
        if given.shape != (batch, seq_k):
            raise ValueError(
                f"attn_implementation={NAME!r}: the mask was made for (batch, keys) {given.shape}, but this layer has "
                f"{(batch, seq_k)}: {USE_OTHERS}"
            )
        if given.refused:
            raise ValueError(given.refused)
        return given
    reach = None if sliding_window is None else sliding_window - 1
    if given is not None and given.dim() == 4 and given.shape[1:] in ((1, 1, seq_k), (1, seq_q, seq_k)):
        if given.shape[2] != seq_q:
            reach = None  # all queries see the same keys
        visible = given[:, 0] if given.dtype == torch.bool else given[:, 0] == 0
        if given.dtype != torch.bool:
            hidden = given[:, 0] <= HIDDEN
            require((visible | hidden).all(), REFUSED_MASK)
        keys, causal, documents = _read_matrix(visible.expand(batch, -1, -1), seq_q, reach)
        if documents is not None:
            window = NO_WINDOW if reach is None else (reach, 0 if causal else reach)
            return Mask(batch, seq_k, causal, window=window, hides=reach is not None, **documents)
        given = keys
    if given is not None and given.shape != (batch, seq_k):
        raise ValueError(
            f"attn_implementation={NAME!r}: attention_mask must say which keys are tokens, {(batch, seq_k)} (batch, "
            f"seq_k), but is {given.dtype} {tuple(given.shape)}: {USE_OTHERS}"
        )
    function, local_size = causal_mask_function if causal else bidirectional_mask_function, None
    if reach is not None and causal:
        function, local_size = sliding_window_causal_mask_function(reach + 1), reach + 1
    elif reach is not None:
        function, local_size = sliding_window_bidirectional_mask_function(reach), reach
    return padding_mask(
        *(batch, seq_q, seq_k, seq_k - seq_q),
        mask_function=function,
        attention_mask=given,
        device=key.device,
        allow_is_bidirectional_skip=None if causal else False,
        local_size=local_size,
    )


def require(condition: torch.Tensor, message: str) -> None:
    """Raises ValueError where the condition does not hold; traced, the program fails by it when it runs."""
    if values_are_hidden():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)


def _read_matrix(visible: torch.Tensor, seq_q: int, reach: int | None) -> tuple[torch.Tensor, bool, dict | None]:
    """What a mask (batch, seq_q or 1, seq_k) of a model's own making says, in a window of `reach` keys to either side:
    which keys are tokens, (batch, seq_k), whether it is causal, and the documents that it separates; ValueError if it
    says anything else."""
    keys, sees_none = visible.any(1, keepdim=True), ~visible.any(2, keepdim=True)  # padding's own rows may be empty
    near = torch.ones_like(visible[0])
    if reach is not None:
        last = visible.shape[2] - seq_q
        near = near.tril(last + reach).triu(last - reach)
    same = ((visible == keys & near) | sees_none).all()
    if values_are_hidden() or bool(same):
        require(same, REFUSED_TRACED)
        return keys[:, 0], False, None
    rows, seq_k = visible.shape[1:]
    triangle = near.tril(seq_k - seq_q)
    if rows == seq_q and bool(((visible == keys & triangle) | sees_none).all()):
        return keys[:, 0], True, None
    if rows == seq_k:
        first = torch.nn.functional.pad(~visible.diagonal(-1, 1, 2), (1, 0), value=True)
        number = first.cumsum(1)
        together = number[:, :, None] == number[:, None]
        for causal, expected in ((False, together & near), (True, together & triangle)):
            if torch.equal(visible, expected):
                return keys[:, 0], causal, _documents(first)
    raise ValueError(REFUSED_MASK)


def positions_begin_again(seen: Mask, query: torch.Tensor, position_ids: torch.Tensor) -> Mask:
    """`seen` with the documents that positions tell, which transformers looks for only where there is no cache."""
    batch, seq_q = query.shape[0], query.shape[2]
    whole = seen.causal and seen.seqlens_k is None and seen.documents is None and seen.seqlen_k == seq_q > 1
    if not whole or position_ids.dim() != 2 or position_ids.shape[1] != seq_q:
        return seen
    if values_are_hidden():
        require((position_ids.diff() > 0).all(), REFUSED_TRACED)
        return seen
    return seen._replace(**_documents_by_position(position_ids, batch))


_last_positions: tuple = (None, 0, 0, {})


def _documents_by_position(position_ids: torch.Tensor, batch: int) -> dict:
    """Looks at the values once for all layers, which are given the same tensor."""
    global _last_positions
    known, version, rows, found = _last_positions
    if known is None or known() is not position_ids or (version, rows) != (position_ids._version, batch):
        again = (position_ids.diff(prepend=position_ids[:, :1] - 1) <= 0).expand(batch, -1)
        found = _documents(again) if bool(again.any()) else {}
        _last_positions = weakref.ref(position_ids), position_ids._version, batch, found
    return found
