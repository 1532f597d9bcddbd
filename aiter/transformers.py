"""aiter as an attention implementation of Hugging Face transformers.

    import aiter.transformers
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="aiter")

    transformers ── mask function, sizes, padding ──> `padding_mask` ──> Mask, once for each forward pass
                 ── query, key, value, Mask, options ──> `attention` ──> the operations, once for each layer

Causal, bidirectional and cross attention; sliding windows, soft caps, sinks; padding on either side; documents packed
in one row; any cache; inference and training; torch.compile and torch.export. Every argument is used or refused by name
with ValueError: what the kernels have no form of (position biases, other masks) never gives another model's
results. A model that computes attention itself cannot mistake a `Mask` for a tensor.

docs/transformers.md says which model families work, which are refused, and why.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from aiter import checks
from aiter.operations import flash_attn_func, variable_length_attention
from aiter.options import NO_LIMIT, OptionKeywords

NAME = "aiter"
USE_OTHERS = "use attn_implementation='sdpa' or 'eager'"

# Arguments that transformers hands through the layers and that say nothing about attention.
NOT_ATTENTION = frozenset(
    (
        "cache_position",
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "seq_idx",  # documents as the layers with a state need them; attention has cu_seq_lens_q or position_ids
        "use_cache",
    )
)

# What an additive mask must hold at least to hide a key wholly, whatever the scores: exp(-10^4) is 0.
HIDDEN = -1e4

REFUSED_MASK = (
    f"attn_implementation={NAME!r} takes causal and bidirectional masks, windows, padding and packed documents; this "
    f"model or batch asks for another mask (chunks with a cache, images that see ahead, …): {USE_OTHERS}"
)
REFUSED_TRACED = (
    f"attn_implementation={NAME!r}: compiled or exported, the mask must be causal or bidirectional, and a row one "
    "document, without gaps where there is a window. Give documents by cu_seq_lens_q, cu_seq_lens_k, max_length_q and "
    "max_length_k, or do not compile"
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
    are looked at only outside of tracing.
    """
    if isinstance(attention_mask, Mask):
        return attention_mask  # `generate` asks for masks ahead of the model, which hands them in again
    tracing = torch.compiler.is_compiling()
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
    if not tracing and bool(valid.all()):
        return made
    if first is not None:
        return made._replace(
            refused=f"attn_implementation={NAME!r} takes packed documents or padding, not both at once: {USE_OTHERS}"
        )
    if hides:  # distances must stay what they are when tokens are put first
        whole = ((valid[:, 1:] & ~valid[:, :-1]).sum(1) + valid[:, 0] <= 1).all()
        if tracing:
            made = made._replace(holds=whole if holds is None else holds & whole)
        elif not bool(whole):
            return made._replace(refused=REFUSED_GAPS)
    seqlens_k, order_k = _tokens_first(valid, tracing)
    made = made._replace(seqlens_k=seqlens_k, order_k=order_k)
    if not causal:  # a query that is padding sees what the others see: nobody reads what comes of it
        if not hides:
            return made
        return made._replace(query_offsets=_for_each_row(begin - valid.int().argmax(1), batch_size, device))
    valid_q = valid.index_select(1, torch.arange(q_length, device=valid.device) + begin)
    if not tracing and bool(valid_q.all()):
        return made
    seqlens_q, order_q = _tokens_first(valid_q, tracing)
    return made._replace(seqlens_q=seqlens_q, order_q=order_q)


def _for_each_row(value: int | torch.Tensor, batch: int, device: torch.device | None) -> torch.Tensor:
    """int32 (batch,)."""
    return torch.as_tensor(value, dtype=torch.int32, device=device).reshape(-1).expand(batch).contiguous()


def _tokens_first(valid: torch.Tensor, tracing: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """How many tokens each row of `valid` (batch, seq) has, and the order that puts them first; None: they are."""
    count = valid.sum(1, dtype=torch.int32)
    if not tracing and bool((valid[:, 1:] <= valid[:, :-1]).all()):
        return count, None
    return count, (~valid).to(torch.uint8).argsort(dim=1, stable=True)


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
    that sees images ahead. While tracing there are no values to decide by: the third result, a bool, is what must hold
    for one document in each row.
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
    if torch.compiler.is_compiling():
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


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Mask | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """query (batch, heads_q, seq_q, head_dim), key (batch, heads_kv, seq_k, head_dim) and value (batch, heads_kv,
    seq_k, value_dim), as transformers calls it; attention_mask as `padding_mask` makes it, or which keys are tokens:
    (batch, seq_k) or bool (batch, 1, 1, seq_k). Returns (batch, seq_q, heads_q, value_dim) and no weights.

    Documents packed in a row: cu_seq_lens_q and cu_seq_lens_k (documents + 1,), max_length_q and max_length_k; or
    position_ids (batch, seq_q) that begin again, where there is no cache yet. is_causal, or the module's, is for a call
    whose mask does not say: models set it by whether they have one.

    sliding_window: a query sees keys less than that far from its own; it must be the window that the mask was made for,
    and is for a call whose mask does not say. s_aux: (heads_q,), attention sinks.
    """
    own = s_aux is None or s_aux.dim() == 1
    _refuse_others(s_aux=None if own else s_aux, **others)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
        if attention_mask is None and is_causal and query.shape[2] > 1 and not _may_rely_on_is_causal(type(module)):
            raise ValueError(
                f"attn_implementation={NAME!r}: {type(module).__name__} gives no mask, and its model is not made for "
                f"attention that goes by is_causal instead: {USE_OTHERS}"
            )
    seen = _as_mask(attention_mask, query, key, bool(is_causal), sliding_window)
    seqlens_q: torch.Tensor | None
    seqlens_k: torch.Tensor | None
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(length is not None for length in lengths):
        seqlens_q, seqlens_k, longest = _given_documents(seen, query, key, *lengths)
    else:
        if seen.holds is not None:
            _require(seen.holds, REFUSED_TRACED)
        if position_ids is not None:
            seen = _positions_begin_again(seen, query, position_ids)
        seqlens_q, seqlens_k, longest = seen.documents, seen.documents, seen.longest
    packed = seqlens_q is not None
    if not packed:
        seqlens_q, seqlens_k, longest = seen.seqlens_q, seen.seqlens_k, key.shape[2]
    features: OptionKeywords = {}
    if _has_window(seen, sliding_window, longest):
        features["window_size"] = seen.window
    if seen.query_offsets is not None:
        features["query_offsets"] = seen.query_offsets
    if softcap:
        features["softcap"] = float(softcap)
    if s_aux is not None:
        features["sinks"] = s_aux
    if dropout:  # in training alone: models say 0 else
        features["dropout_p"] = float(dropout)

    batch, _, seq_q, head_dim = query.shape
    value_dim = value.shape[3]
    if scaling is None:
        scaling = head_dim**-0.5
    query, key, value = (_padded_dim(tensor).transpose(1, 2) for tensor in (query, key, value))
    if packed:
        query, key, value = (tensor.flatten(0, 1) for tensor in (query, key, value))
    if seen.order_q is not None:
        query = _reorder(query, seen.order_q)
    if seen.order_k is not None:
        key, value = (_reorder(tensor, seen.order_k) for tensor in (key, value))
    if packed:
        assert seqlens_q is not None
        output = variable_length_attention(
            query,
            key,
            value,
            seqlens_q,
            longest,
            seen.causal,
            seqlens_k=seqlens_k,
            max_seqlen_k=longest,
            softmax_scale=scaling,
            **features,
        )
    else:
        output = flash_attn_func(
            query, key, value, seen.causal, scaling, seqlens_q=seqlens_q, seqlens_k=seqlens_k, **features
        )
    if seen.order_q is not None:
        output = _reorder(output, seen.order_q.argsort(1))
    return output.view(batch, seq_q, *output.shape[-2:])[..., :value_dim], None


def _refuse_others(**others) -> None:
    """ValueError for what a layer asks for besides, if it says anything about attention."""
    unknown = [
        name for name, value in others.items() if value is not None and value is not False and name not in NOT_ATTENTION
    ]
    if unknown:
        raise ValueError(f"attn_implementation={NAME!r} has no {', '.join(unknown)}: {USE_OTHERS}")


def _has_window(seen: Mask, sliding_window: int | None, longest: int) -> bool:
    """Whether a window hides keys: the mask's, which is what a model computes by, and which the layer must agree to."""
    left, right = seen.window
    # Two-sided, some models give the distance, as transformers' masks have it (T5Gemma), others count the query's own
    # key too (ModernBERT).
    known = (left + 1, right) if right > 0 else (left + 1,)
    if sliding_window is not None and sliding_window not in known and (seen.hides or longest > sliding_window):
        made_for = "without a window" if seen.window == NO_WINDOW else f"for a window of {seen.window} keys"
        raise ValueError(
            f"attn_implementation={NAME!r}: sliding_window is {sliding_window}, but the mask was made {made_for}: "
            f"{USE_OTHERS}"
        )
    return seen.hides


def _as_mask(
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
            _require((visible | hidden).all(), REFUSED_MASK)
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


def _require(condition: torch.Tensor, message: str) -> None:
    """Raises ValueError where the condition does not hold; traced, the program fails by it when it runs."""
    if torch.compiler.is_compiling():
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
    if torch.compiler.is_compiling() or bool(same):
        _require(same, REFUSED_TRACED)
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


@torch._dynamo.assume_constant_result
def _may_rely_on_is_causal(module: type) -> bool:
    """Whether the models beside a layer are said to run on other attention than their own, which is where transformers
    sees to it that is_causal is right. A layer without a model beside it is somebody's own, and taken at its word."""
    names = vars(sys.modules.get(module.__module__, object)).values()
    models = [name for name in names if isinstance(name, type) and issubclass(name, PreTrainedModel)]
    own: list[type[PreTrainedModel]] = [model for model in models if model.__module__ == module.__module__]
    return not own or any(model._supports_sdpa or model._supports_attention_backend for model in own)


def _given_documents(
    seen: Mask,
    query: torch.Tensor,
    key: torch.Tensor,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The lengths (documents,) of packed queries and keys, and a bound for both, from what a collator says of them."""
    if cu_seq_lens_q is None or cu_seq_lens_k is None or max_length_q is None or max_length_k is None:
        raise ValueError("cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k belong together: give all four")
    if seen.seqlens_k is not None or query.shape[2] != key.shape[2]:
        raise ValueError(f"attn_implementation={NAME!r} takes cu_seq_lens_q without padding and without earlier tokens")
    longest = max(int(max_length_q), int(max_length_k))
    lengths = []
    for name, ends in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        checks.indices(name, ends, (None,), "int32 (documents + 1,)", query)
        lengths.append(ends.diff().to(torch.int32))
    return lengths[0], lengths[1], longest


def _positions_begin_again(seen: Mask, query: torch.Tensor, position_ids: torch.Tensor) -> Mask:
    """`seen` with the documents that positions tell, which transformers looks for only where there is no cache."""
    batch, seq_q = query.shape[0], query.shape[2]
    whole = seen.causal and seen.seqlens_k is None and seen.documents is None and seen.seqlen_k == seq_q > 1
    if not whole or position_ids.dim() != 2 or position_ids.shape[1] != seq_q:
        return seen
    if torch.compiler.is_compiling():
        _require((position_ids.diff() > 0).all(), REFUSED_TRACED)
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


def _padded_dim(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros behind the last dimension, up to one that kernels take; they change no score."""
    missing = -tensor.shape[-1] % checks.HEAD_DIM_STEP
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def _reorder(tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The rows of (batch, seq, heads, head_dim) in an order of their own for each sequence."""
    return tensor.gather(1, order[:, :, None, None].expand(-1, -1, *tensor.shape[2:]))


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
