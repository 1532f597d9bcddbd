"""Decoding over a cache that is split over ranks: each attends to the keys that it has, one collective merges."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from aiter.distributed.exchange import GroupOrMesh, groups_of, size_of
from aiter.operations import flash_attn_with_kvcache
from aiter.options import OptionKeywords
from aiter.parts import merge_attention_states

if TYPE_CHECKING:
    from typing_extensions import Unpack


def merge_over_ranks(
    output: torch.Tensor,
    lse: torch.Tensor,
    group: GroupOrMesh = None,
    *,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of rows whose keys are split over the ranks of a group, the same on every rank.

    output, lse: of the keys of this rank, as an operation gives them with return_lse=True: (batch, seq, heads,
    head_dim) and float32 (batch, heads, seq), or packed; of one shape on all ranks. sinks: (heads,), joined once, here.
    One all-gather of both together; merged in float32, in the order of the ranks. For inference: takes no gradient.
    """
    (own,) = groups_of(group)
    if torch.is_grad_enabled() and (output.requires_grad or lse.requires_grad):
        raise ValueError("merge_over_ranks takes no gradient: use torch.no_grad(), or context_parallel_attention")
    sent = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in (output, lse)])
    received = [torch.empty_like(sent) for _ in range(size_of(own))]
    dist.all_gather(received, sent, group=own)
    outputs, lses = [], []
    for part in received:
        of_output, of_lse = part.split([output.numel() * output.element_size(), lse.numel() * lse.element_size()])
        outputs.append(of_output.clone().view(output.dtype).view(output.shape))
        lses.append(of_lse.clone().view(lse.dtype).view(lse.shape))
    return merge_attention_states(outputs, lses, sinks=sinks)


def context_parallel_decode(
    query: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    page_table: torch.Tensor,
    block_size: int,
    group: GroupOrMesh = None,
    *,
    cache_seqlens: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`aiter.flash_attn_with_kvcache` where each rank of `group` has some pages of every sequence; all ranks have the
    same queries and get the same result.

    cache_seqlens: int32 (batch,), how many tokens of each sequence are in this rank's pages, 0 included. By default the
    queries see all of them, which is what one new token does, and the order of pages does not matter. For several new
    tokens (causal=True), windows and ALiBi, this rank's tokens of a sequence must follow each other, and query_offsets,
    int32 (batch,), says where the first query stands, counted from the first of them: below 0 or past the last where it
    stands on another rank. One small collective: outputs and log-sum-exps of the ranks."""
    if (causal or "window_size" in options or options.get("alibi_slopes") is not None) and (
        options.get("query_offsets") is None
    ):
        raise ValueError(
            "query_offsets is missing: with causal, window_size or alibi_slopes, each rank must know where the queries "
            "stand, counted from its own first token"
        )
    sinks = options.pop("sinks", None)
    output, lse = flash_attn_with_kvcache(
        *(query, kv_cache, page_table, block_size, causal),
        cache_seqlens=cache_seqlens,
        softmax_scale=softmax_scale,
        return_lse=True,
        **options,
    )
    output, lse = merge_over_ranks(output, lse, group, sinks=sinks)
    return (output, lse) if return_lse else output
