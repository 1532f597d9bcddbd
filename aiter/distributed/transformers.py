"""Hugging Face transformers models on a sequence that is split over ranks.

    parallel = ContextParallel(model, group, layout="zigzag") loss = model(**parallel.shard(input_ids=tokens,
    labels=labels)).loss      # each rank's share; DDP averages gradients

Every layer but attention works row by row, so that ranks need their own rows alone, at their own positions. Attention
is `context_parallel_attention`, by an attention implementation that is registered for the group. What only one rank can
see (padding, masks of a model's own) is refused on all.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from aiter.distributed.attention import context_parallel_attention
from aiter.distributed.exchange import GroupOrMesh, groups_of, size_of
from aiter.distributed.layout import LayoutName, check_name, positions_of, shard
from aiter.distributed.work import Scheme, refuse
from aiter.options import NO_LIMIT, OptionKeywords

# Arguments that transformers hands through the layers and that say nothing about attention here: positions are known.
NOT_ATTENTION = frozenset(
    (
        "cache_position",
        "labels",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    )
)
_numbers = itertools.count()


class Seen(NamedTuple):
    """What a layer's mask says: causal, or a window; refused: why it is none that can be split."""

    causal: bool
    window: tuple[int, int]
    refused: str | None = None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config: Any = None,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Seen:
    """From how transformers describes a mask: of this rank's rows, so that only its kind counts, not its indices."""
    causal = allow_is_bidirectional_skip is None  # transformers asks it of bidirectional masks only
    window = (NO_LIMIT, NO_LIMIT)
    if local_size is not None:
        window = (local_size - 1, 0) if causal else (local_size, local_size)
    refused = None
    if use_vmap or getattr(config, "attention_chunk_size", None):
        refused = "the model has a mask of its own, chunks or tokens that see ahead"
    elif kv_length != q_length or q_offset != kv_offset:
        refused = f"there are {q_length} queries and {kv_length} keys; generate without context parallelism"
    elif attention_mask is not None and not bool(attention_mask.all()):
        refused = "attention_mask hides tokens; pack documents (cu_seq_lens_q) instead of padding them"
    elif causal and mask_function is not None and q_length > 1:
        rows = torch.arange(q_length - 1, device=device).unsqueeze(0)
        ahead = mask_function(torch.arange(batch_size, device=device).unsqueeze(1), rows[:, :1] * 0, rows, rows + 1)
        if bool(torch.as_tensor(ahead).any()):
            refused = "the model has a mask of its own, in which tokens see ahead"
    return Seen(causal, window, refused)


def _attention(
    settings: ContextParallel,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Seen | torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Tensors (batch, heads, rows, head_dim), as transformers has them; cu_seq_lens_q: of the whole sequence."""
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    window = (NO_LIMIT, NO_LIMIT)
    unknown = [
        name for name, given in others.items() if given is not None and given is not False and name not in NOT_ATTENTION
    ]
    refused = None
    if isinstance(attention_mask, Seen):
        causal, window, refused = attention_mask
        if sliding_window is not None and sliding_window not in (window[0] + 1, window[1]):
            refused = f"sliding_window is {sliding_window}, but the mask was made for a window of {window}"
    elif attention_mask is not None:
        refused = "the model makes its own mask"
    elif sliding_window is not None:
        window = (sliding_window - 1, 0) if causal else (sliding_window, sliding_window)
    if unknown or dropout:
        refused = f"there is no {', '.join([*unknown, *(['dropout'] if dropout else [])])}"
    if (cu_seq_lens_q is None) != (cu_seq_lens_k is None):
        refused = "cu_seq_lens_q and cu_seq_lens_k belong together"
    elif cu_seq_lens_k is not None and cu_seq_lens_q is not None and not torch.equal(cu_seq_lens_q, cu_seq_lens_k):
        refused = "cu_seq_lens_q and cu_seq_lens_k differ"
    if cu_seq_lens_q is not None and query.shape[0] != 1:
        refused = f"documents are packed in one row, but the batch has {query.shape[0]}"
    if refused:
        refuse(settings.group, ValueError(f"context parallelism cannot serve this model or batch: {refused}"))
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if cu_seq_lens_q is not None:
        query, key, value = (tensor.squeeze(0) for tensor in (query, key, value))
    options: OptionKeywords = {"window_size": window, "softcap": float(softcap or 0.0), "sinks": s_aux}
    output = context_parallel_attention(
        *(query, key, value, settings.group),
        causal=bool(causal),
        softmax_scale=scaling,
        layout=settings.layout,
        scheme=settings.scheme,
        cu_seqlens=cu_seq_lens_q,
        **options,
    )
    assert isinstance(output, torch.Tensor)
    return output if output.dim() == 4 else output.unsqueeze(0), None


class ContextParallel:
    """Gives a model attention over a sequence that is split over `group`; see context_parallel_attention for the rest.

    Takes models whose layers ask transformers' interface for causal or bidirectional attention, windows, soft caps and
    sinks; raises ValueError, on all ranks, for what they ask beyond that.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        group: GroupOrMesh = None,
        *,
        layout: LayoutName = "zigzag",
        scheme: Scheme = "auto",
    ) -> None:
        self.group, self.layout, self.scheme = group, layout, scheme
        check_name(layout)
        self.groups = groups_of(group)
        if len(self.groups) != 1:
            raise ValueError("ContextParallel takes a group of one dimension")
        name = f"aiter_context_parallel_{next(_numbers)}"
        AttentionInterface.register(name, partial(_attention, self))
        AttentionMaskInterface.register(name, _mask)
        model.set_attn_implementation(name)

    def shard(
        self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, *, ignore_index: int = -100, **others: Any
    ) -> dict[str, Any]:
        """This rank's arguments for the model, from tokens (batch, seq) and labels that every rank has whole.

        Labels are shifted before they are cut, as a rank's last token predicts another's first. The loss of a rank is
        the sum of its tokens' over the mean number of tokens that ranks have: the mean over ranks is that of one
        process, whatever each has, and so are gradients that DDP or FSDP average. others: tensors (batch, seq, …) that
        are cut alike, such as position_ids of packed documents.
        """
        group = self.groups[0]
        cut = partial(shard, dim=1, layout=self.layout, group=group)
        positions = positions_of(input_ids.shape[1], self.layout, group, device=input_ids.device)
        arguments = {"input_ids": cut(input_ids), "position_ids": positions.unsqueeze(0).expand(len(input_ids), -1)}
        arguments.update({name: cut(tensor) for name, tensor in others.items()})
        if labels is not None:
            following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=ignore_index)
            arguments["labels"] = arguments["shift_labels"] = cut(following)
            arguments["num_items_in_batch"] = (following != ignore_index).sum() / size_of(group)
        return arguments
