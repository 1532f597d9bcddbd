"""The five public operations: scaled dot product attention, softmax(scale * query @ key^T) @ value.

Common to all. Tensors are (batch, seq, heads, head_dim) in float16, bfloat16 or (on CPUs) float32; query, key and value
share dtype and device. head_dim is a multiple of 8 up to 256. Any strides are taken; tensors whose last dimension is
adjacent are used in place. Query head h reads KV head h // (heads_q / heads_kv). `causal` aligns the last query with
the last key: query i sees key j where j <= i + seq_k - seq_q. A row that sees no key gives zeros (log-sum-exp -inf).
`softmax_scale` defaults to 1/sqrt(head_dim). The result is a new contiguous tensor of the shape of query; with
`return_lse=True` it is a pair with the log-sum-exp of the scaled scores, float32 (batch, heads, seq).

The algorithm is FlashAttention's (Dao et al., 2022, https://arxiv.org/abs/2205.14135): scores are never stored.

Raises TypeError or ValueError for bad arguments, before anything is compiled or launched, and the classes of
`aiter.errors` where no kernel can be had.
"""

from __future__ import annotations

import torch

from aiter import checks
from aiter.dispatch import attend
from aiter.plan import Indices

BSHD = "(batch, seq, heads, head_dim)"
PACKED = "(total_tokens, heads, head_dim)"
CACHE = "(num_blocks, heads_kv, block_size, head_dim)"


def flash_attn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of query (batch, seq_q, heads_q, head_dim) over key and value (batch, seq_k, heads_kv, head_dim).

    heads_q must be a multiple of heads_kv; seq_q and seq_k may differ.
    """
    return attend(_check_dense, (), query, key, value, causal, softmax_scale, return_lse)


def grouped_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_groups: int,
    causal: bool = False,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` where `num_groups` query heads share each KV head: heads_q = num_groups * heads_kv."""
    return attend(_check_grouped, (num_groups,), query, key, value, causal, softmax_scale, return_lse)


def multi_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = False,
    *,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` where all query heads share one KV head: key and value are (batch, seq_k, 1, head_dim)."""
    return attend(_check_multi_query, (), query, key, value, causal, softmax_scale, return_lse)


def flash_attn_with_kvcache(
    query: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    page_table: torch.Tensor,
    block_size: int,
    causal: bool = True,
    *,
    cache_seqlens: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of query (batch, seq_q, heads_q, head_dim) over cached keys and values that lie in pages.

    kv_cache: one tensor (num_blocks, heads_kv, block_size, head_dim) that serves as keys and values both, a pair
    (k_cache, v_cache) of those, or one stacked tensor (2, num_blocks, heads_kv, block_size, head_dim).
    page_table: int32 (batch, max_blocks); entry [b, i] is the page that holds tokens i * block_size and on of sequence
    b. cache_seqlens: int32 (batch,), how many cached tokens are valid; by default all pages are full. Only the entries
    of page_table that the valid tokens need are read.
    """
    key, value = _split_cache(kv_cache)
    checks.tensor("query", query, 4, BSHD)
    checks.indices("page_table", page_table, (query.shape[0], None), "int32 (batch, max_blocks)", query)
    page_table = page_table.to(torch.int32).contiguous()
    if cache_seqlens is not None:
        checks.indices("cache_seqlens", cache_seqlens, (query.shape[0],), "int32 (batch,)", query)
    _check_paged(query, key, value, block_size)
    longest = page_table.shape[1] * key.shape[2]
    if cache_seqlens is not None:
        checks.lengths_in_range("cache_seqlens", cache_seqlens, longest, "max_blocks * block_size", None)
        cache_seqlens = cache_seqlens.to(torch.int32).contiguous()
    checks.pages_in_range(page_table, key.shape[0], key.shape[2], cache_seqlens, longest)
    indices = Indices(None, cache_seqlens, page_table)
    return attend(_check_paged, (block_size,), query, key, value, causal, softmax_scale, return_lse, indices)


def variable_length_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seq_lengths: torch.Tensor,
    max_seq_len: int,
    causal: bool = False,
    *,
    page_table: torch.Tensor | None = None,
    block_size: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Self-attention of a batch of sequences of different lengths, seq_lengths int32 (batch,).

    Padded: tensors are (batch, max_seq_len, heads, head_dim); output rows past a sequence's length are zeros, and what
    stands in the padding, NaN included, has no effect. Packed: tensors are (total_tokens, heads, head_dim), sequences
    one after the other; the log-sum-exp is then (heads, total_tokens). With `page_table` (and `block_size`), key and
    value are paged caches (num_blocks, heads_kv, block_size, head_dim) as in `flash_attn_with_kvcache`.
    """
    max_seq_len = checks.positive_int("max_seq_len", max_seq_len)
    checks.tensor("query", query, (3, 4), f"{BSHD}, or packed {PACKED}")
    packed = query.dim() == 3
    batch = None if packed else query.shape[0]
    checks.indices("seq_lengths", seq_lengths, (batch,), "int32 (batch,)", query)
    if page_table is None:
        if block_size is not None:
            raise ValueError(f"block_size is {block_size}, but there is no page_table; give both or neither")
        check, options = _check_variable_length, (max_seq_len,)
        check(query, key, value, *options)
        longest, longest_name = max_seq_len, "max_seq_len"
    else:
        if block_size is None:
            raise ValueError("page_table is given without block_size; give both or neither")
        batch = seq_lengths.shape[0]
        checks.indices("page_table", page_table, (batch, None), "int32 (batch, max_blocks)", query)
        page_table = page_table.to(torch.int32).contiguous()
        check, options = _check_variable_length_paged, (max_seq_len, block_size)
        check(query, key, value, *options)
        held = page_table.shape[1] * key.shape[2]
        longest, longest_name = min((max_seq_len, "max_seq_len"), (held, "what page_table holds"))
    checks.lengths_in_range("seq_lengths", seq_lengths, longest, longest_name, query.shape[0] if packed else None)
    seq_lengths = seq_lengths.to(torch.int32).contiguous()
    if page_table is not None:
        checks.pages_in_range(page_table, key.shape[0], key.shape[2], seq_lengths, longest)
    indices = Indices(seq_lengths, seq_lengths, page_table)
    return attend(check, options, query, key, value, causal, softmax_scale, return_lse, indices, max_seq_len)


def _check_dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, tensor, 4, BSHD)
    checks.same_kind(query=query, key=key, value=value)
    head_dim = checks.head_dim(query)
    checks.equal_size("key", key.shape[3], "head_dim", "query", head_dim)
    checks.equal_size("key", key.shape[0], "batch size", "query", query.shape[0])
    checks.same_shape("value", value, "key", key)
    checks.heads(query.shape[2], key.shape[2])


def _check_grouped(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_groups: int) -> None:
    _check_dense(query, key, value)
    checks.positive_int("num_groups", num_groups)
    if query.shape[2] != num_groups * key.shape[2]:
        raise ValueError(
            f"num_groups is {num_groups}, but query has {query.shape[2]} heads and key {key.shape[2]}; num_groups is "
            f"the number of query heads that share a KV head, so that query has num_groups times the heads of key"
        )


def _check_multi_query(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    _check_dense(query, key, value)
    if key.shape[2] != 1:
        raise ValueError(f"key has {key.shape[2]} heads; multi-query attention takes one KV head")


def _split_cache(kv_cache: object) -> tuple[torch.Tensor, torch.Tensor]:
    forms = f"one tensor {CACHE}, a pair (k_cache, v_cache) of those, or one stacked tensor (2, ...)"
    if isinstance(kv_cache, (tuple, list)):
        if len(kv_cache) != 2:
            raise ValueError(f"kv_cache is a sequence of {len(kv_cache)} items; it must be {forms}")
        key, value = kv_cache
    else:
        checks.tensor("kv_cache", kv_cache, (4, 5), forms)
        if kv_cache.dim() == 5 and kv_cache.shape[0] != 2:
            raise ValueError(f"kv_cache has shape {tuple(kv_cache.shape)}; it must be {forms}")
        key, value = kv_cache if kv_cache.dim() == 5 else (kv_cache, kv_cache)
    return key, value


def _check_cache(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int, name: str) -> None:
    for part, tensor in ((f"{name}key", key), (f"{name}value", value)):
        checks.tensor(part, tensor, 4, CACHE)
    checks.same_kind(query=query, **{f"{name}key": key, f"{name}value": value})
    checks.same_shape(f"{name}value", value, f"{name}key", key)
    head_dim = checks.head_dim(query)
    checks.equal_size(f"{name}key", key.shape[3], "head_dim", "query", head_dim)
    checks.heads(query.shape[-2], key.shape[1], f"{name}key")
    checks.equal_size("block_size", checks.positive_int("block_size", block_size), "the value", CACHE, key.shape[2])


def _check_paged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int) -> None:
    _check_cache(query, key, value, block_size, "kv_cache ")


def _check_variable_length(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, max_seq_len: int) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, tensor, (3, 4), f"{BSHD}, or packed {PACKED}")
    checks.same_kind(query=query, key=key, value=value)
    head_dim = checks.head_dim(query)
    checks.equal_size("key", key.dim(), "number of dimensions", "query", query.dim())
    checks.equal_size("key", key.shape[-1], "head_dim", "query", head_dim)
    checks.same_shape("value", value, "key", key)
    if query.shape[:-2] != key.shape[:-2]:
        raise ValueError(
            f"key has shape {tuple(key.shape)}; it must hold as many tokens as query, {tuple(query.shape)}"
        )
    _check_padded_length(query, max_seq_len)
    checks.heads(query.shape[-2], key.shape[-2])


def _check_variable_length_paged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    max_seq_len: int,
    block_size: int,
) -> None:
    _check_cache(query, key, value, block_size, "")
    _check_padded_length(query, max_seq_len)


def _check_padded_length(query: torch.Tensor, max_seq_len: int) -> None:
    if query.dim() == 4 and query.shape[1] != max_seq_len:
        raise ValueError(
            f"query is padded to {query.shape[1]} tokens (shape {tuple(query.shape)}), but max_seq_len is {max_seq_len}"
        )
