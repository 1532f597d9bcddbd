"""The attention function of transformers' layers, on our operations."""

from __future__ import annotations

import sys

import torch
from transformers import PreTrainedModel

from aiter import checks
from aiter.integrations.masks import reorder
from aiter.integrations.transformers.masks import (
    NAME,
    NO_WINDOW,
    REFUSED_TRACED,
    USE_OTHERS,
    Mask,
    as_mask,
    positions_begin_again,
    require,
)
from aiter.operations import flash_attn_func, variable_length_attention
from aiter.options import OptionKeywords

# Arguments that transformers hands through the layers and that say nothing about attention.
NOT_ATTENTION = frozenset(
    (
        "cache_position",
        "labels",
        "logits_indices",  # continuous batching: which rows are read
        "logits_processor_args",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "seq_idx",  # documents as the layers with a state need them; attention has cu_seq_lens_q or position_ids
        "use_cache",
    )
)


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
    refuse_others(s_aux=None if own else s_aux, **others)
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
        if attention_mask is None and is_causal and query.shape[2] > 1 and not _may_rely_on_is_causal(type(module)):
            raise ValueError(
                f"attn_implementation={NAME!r}: {type(module).__name__} gives no mask, and its model is not made for "
                f"attention that goes by is_causal instead: {USE_OTHERS}"
            )
    seen = as_mask(attention_mask, query, key, bool(is_causal), sliding_window)
    seqlens_q: torch.Tensor | None
    seqlens_k: torch.Tensor | None
    lengths = (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)
    if any(length is not None for length in lengths):
        seqlens_q, seqlens_k, longest = _given_documents(seen, query, key, *lengths)
    else:
        if seen.holds is not None:
            require(seen.holds, REFUSED_TRACED)
        if position_ids is not None:
            seen = positions_begin_again(seen, query, position_ids)
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
        query = reorder(query, seen.order_q)
    if seen.order_k is not None:
        key, value = (reorder(tensor, seen.order_k) for tensor in (key, value))
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
        output = reorder(output, seen.order_q.argsort(1))
    return output.view(batch, seq_q, *output.shape[-2:])[..., :value_dim], None


def refuse_others(**others) -> None:
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


def _padded_dim(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros behind the last dimension, up to one that kernels take; they change no score."""
    missing = -tensor.shape[-1] % checks.HEAD_DIM_STEP
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
