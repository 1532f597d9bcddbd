"""Where each sequence's tokens lie in the cache of a call of FlashAttention's: in rows, in rows that an index names, in
pages; and without those at its beginning that are padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from aiter import checks, torch_state
from aiter.options import readable_index


class Cache(NamedTuple):
    """A cache as pages (pages, page_size, heads_kv, dim), and int32 (batch, max_pages) which of them each sequence has;
    without a table, sequence b has page b."""

    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor | None

    @classmethod
    def of(
        cls,
        key: torch.Tensor,
        value: torch.Tensor,
        batch_of: checks.BatchOf,
        block_table: torch.Tensor | None,
        batch_index: torch.Tensor | None,
        query: torch.Tensor,
    ) -> Cache:
        checks.same_shape("v_cache", value, "k_cache", key, but_last=True)
        batch = batch_of[2]
        if batch_index is not None:
            checks.indices("cache_batch_idx", batch_index, (batch,), "int32 (batch,)", query, "q", batch_of)
        if block_table is not None:
            if batch_index is not None:
                layout = "int32 (batch_cache, max_blocks), as there is a cache_batch_idx"
                checks.indices("block_table", block_table, (None, None), layout, query, "q")
                block_table = _rows_of(block_table, batch_index)
            checks.indices("block_table", block_table, (batch, None), "int32 (batch, max_blocks)", query, "q", batch_of)
            return cls(key, value, readable_index(block_table))
        if batch_index is not None:
            return cls(key, value, readable_index(batch_index.unsqueeze(1)))
        if key.shape[0] < batch:
            raise ValueError(f"k_cache has shape {tuple(key.shape)}; it must have a row for each of {batch} sequences")
        return cls(key, value, None)

    @property
    def room(self) -> int:
        """For tokens of a sequence."""
        return self.key.shape[1] * (1 if self.table is None else self.table.shape[1])

    def without(self, padding: torch.Tensor) -> Cache:
        """The same without the first tokens of each sequence: a page for each of the others."""
        rows, page_size = self.key.shape[:2]
        apart = [_rows_apart(name, cache) for name, cache in (("k_cache", self.key), ("v_cache", self.value))]
        if apart[0] != apart[1]:
            raise ValueError("with cache_leftpad, k_cache and v_cache must have alike strides")
        batch = padding.shape[0]
        pages = torch.arange(batch, device=padding.device).unsqueeze(1) if self.table is None else self.table
        places = torch.arange(self.room, device=padding.device) + padding.unsqueeze(1)
        places = places.clamp(0, self.room - 1).long()
        page = pages.long().clamp(0, rows - 1).gather(1, places // page_size)
        key, value = (_as_tokens(cache, apart[0]) for cache in (self.key, self.value))
        return Cache(key, value, (page * apart[0] + places % page_size).to(torch.int32))


def _rows_of(block_table: torch.Tensor, batch_index: torch.Tensor) -> torch.Tensor:
    """The rows of block_table that cache_batch_idx names; on a GPU those that there are none of are the last."""
    rows = block_table.shape[0]
    if torch_state.may_look(batch_index) and bool(((batch_index < 0) | (batch_index >= rows)).any()):
        for index, row in enumerate(batch_index.tolist()):
            if not 0 <= row < rows:
                raise checks.no_such(f"cache_batch_idx[{index}]", row, "block_table", "rows", rows)
    return block_table.index_select(0, batch_index.clamp(0, rows - 1))


def check_padding(
    padding: torch.Tensor,
    cache: Cache,
    lengths: torch.Tensor | None,
    names: checks.Names,
    misfit: Callable[[], ValueError | None] | None,
) -> None:
    """Looks at cache_leftpad, and at what else it is used with, where that makes nobody wait. misfit: says what is
    wrong with new tokens, which lengths count already."""
    if not torch_state.may_look(padding):
        return
    try:
        _look_at_padding(padding, cache, lengths, names)
    except ValueError as error:
        raise (misfit and misfit()) or error from None


def _look_at_padding(padding: torch.Tensor, cache: Cache, lengths: torch.Tensor | None, names: checks.Names) -> None:
    room = cache.room
    if cache.table is not None:
        pages, page_size = cache.key.shape[:2]
        checks.pages(names, cache.table, pages, page_size, lengths, room, padding.long())
    whole = [room] * padding.shape[0] if lengths is None else checks.as_given(lengths).tolist()
    for index, (most, length) in enumerate(zip(whole, checks.as_given(padding).tolist(), strict=True)):
        if not 0 <= most <= room:
            raise checks.no_length(names.seqlens_k, index, most, names.longest_k, room)
        if not 0 <= length <= most:
            raise ValueError(f"cache_leftpad[{index}] is {length}; it must be from 0 to its sequence's {most} tokens")


def _rows_apart(name: str, cache: torch.Tensor) -> int:
    """How many tokens further the next sequence begins."""
    batch_stride, token_stride = cache.stride()[:2]
    if cache.shape[1] == 1:  # whose stride from token to token means nothing
        return 1
    if token_stride == 0 or batch_stride % token_stride:
        raise ValueError(
            f"with cache_leftpad, {name} must have a stride from sequence to sequence that is a multiple of the one "
            f"from token to token; its strides are {cache.stride()}"
        )
    return batch_stride // token_stride


def _as_tokens(cache: torch.Tensor, apart: int) -> torch.Tensor:
    """Pages of one token."""
    rows, room, heads, dim = cache.shape
    if room == 1:
        return cache
    _, token, head, element = cache.stride()
    return cache.as_strided(((rows - 1) * apart + room if rows else 0, 1, heads, dim), (token, token, head, element))
