"""The five public operations: scaled dot product attention, softmax(scale * query @ key^T) @ value.

Common to all. Tensors are (batch, seq, heads, head_dim) in float16, bfloat16 or (on CPUs) float32; query, key and value
share dtype and device; or key and value are torch.float8_e4m3fn, float8_e4m3fnuz or float8_e5m2, where no gradient is
needed. head_dim is a multiple of 8 up to 512. Any strides are taken; tensors whose last dimension is adjacent are used
in place. Query head h reads KV head h // (heads_q / heads_kv). `causal` aligns the last query with the last key: query
i sees key j where j <= i + seq_k - seq_q. A row that sees no key gives zeros (log-sum-exp -inf). `softmax_scale`
defaults to 1/sqrt(head_dim). value may have a head_dim of its own. The result is a new contiguous tensor of the shape
of query, with value's head_dim; with `return_lse=True` it is a pair with the log-sum-exp of the scores, float32 (batch,
heads, seq). Further keywords, the same for all: windows, soft caps, ALiBi, sinks, positions, descales
(`aiter.options.OptionKeywords`).

The algorithm is FlashAttention's (Dao et al., 2022, https://arxiv.org/abs/2205.14135): scores are never stored.

Raises TypeError or ValueError for bad arguments, before anything is compiled or launched, and the classes of
`aiter.errors` where no kernel can be had.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, overload

import torch

from aiter import checks
from aiter.checks import BSHD, CACHE, PACKED, Names
from aiter.dispatch import Operation, attend
from aiter.layout import NO_INDICES, Indices, Sizes, index_tensor, page_lists
from aiter.options import OptionKeywords
from aiter.repeated import repeats

if TYPE_CHECKING:
    from typing_extensions import Unpack

_TABLE = "int32 (batch, max_blocks)"


@overload
def flash_attn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    *,
    seqlens_q: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor: ...
@overload
def flash_attn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    *,
    seqlens_q: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    return_lse: Literal[True],
    **options: Unpack[OptionKeywords],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = ...,
    softmax_scale: float | None = ...,
    *,
    seqlens_q: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    return_lse: bool,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@repeats
def flash_attn_func(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = False,
    softmax_scale: float | None = None,
    *,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of query (batch, seq_q, heads_q, head_dim) over key and value (batch, seq_k, heads_kv, head_dim).

    heads_q must be a multiple of heads_kv; seq_q and seq_k may differ. seqlens_q, seqlens_k: int32 (batch,), how many
    rows of each sequence of a padded batch are valid, by default all: output rows past them are zeros, and what stands
    in the padding, NaN included, has no effect. (Soft caps on a GPU: none but in the last bits, within the accuracy of
    the type, where the largest score of a tile decides how it is worked out; with batch_invariant not even that.)
    """
    indices = NO_INDICES
    if seqlens_q is not None or seqlens_k is not None:
        indices = _lengths(query, seqlens_q, seqlens_k)
    return attend(_DENSE, (), query, key, value, causal, softmax_scale, return_lse, options, indices)


@overload
def grouped_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_groups: int,
    causal: bool = ...,
    *,
    softmax_scale: float | None = ...,
    seqlens_q: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor: ...
@overload
def grouped_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_groups: int,
    causal: bool = ...,
    *,
    softmax_scale: float | None = ...,
    seqlens_q: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    return_lse: Literal[True],
    **options: Unpack[OptionKeywords],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def grouped_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_groups: int,
    causal: bool = ...,
    *,
    softmax_scale: float | None = ...,
    seqlens_q: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    return_lse: bool,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@repeats
def grouped_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_groups: int,
    causal: bool = False,
    *,
    softmax_scale: float | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` where `num_groups` query heads share each KV head: heads_q = num_groups * heads_kv."""
    indices = NO_INDICES
    if seqlens_q is not None or seqlens_k is not None:
        indices = _lengths(query, seqlens_q, seqlens_k)
    return attend(_GROUPED, (num_groups,), query, key, value, causal, softmax_scale, return_lse, options, indices)


@overload
def multi_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = ...,
    *,
    softmax_scale: float | None = ...,
    seqlens_q: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor: ...
@overload
def multi_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = ...,
    *,
    softmax_scale: float | None = ...,
    seqlens_q: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    return_lse: Literal[True],
    **options: Unpack[OptionKeywords],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def multi_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = ...,
    *,
    softmax_scale: float | None = ...,
    seqlens_q: torch.Tensor | None = ...,
    seqlens_k: torch.Tensor | None = ...,
    return_lse: bool,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@repeats
def multi_query_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = False,
    *,
    softmax_scale: float | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` where all query heads share one KV head: key and value are (batch, seq_k, 1, head_dim)."""
    indices = NO_INDICES
    if seqlens_q is not None or seqlens_k is not None:
        indices = _lengths(query, seqlens_q, seqlens_k)
    return attend(_MULTI_QUERY, (), query, key, value, causal, softmax_scale, return_lse, options, indices)


@overload
def flash_attn_with_kvcache(
    query: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    page_table: torch.Tensor | None,
    block_size: int,
    causal: bool = ...,
    *,
    cache_seqlens: torch.Tensor | None = ...,
    seqlens_q: torch.Tensor | None = ...,
    page_indptr: torch.Tensor | None = ...,
    page_indices: torch.Tensor | None = ...,
    last_page_len: torch.Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor: ...
@overload
def flash_attn_with_kvcache(
    query: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    page_table: torch.Tensor | None,
    block_size: int,
    causal: bool = ...,
    *,
    cache_seqlens: torch.Tensor | None = ...,
    seqlens_q: torch.Tensor | None = ...,
    page_indptr: torch.Tensor | None = ...,
    page_indices: torch.Tensor | None = ...,
    last_page_len: torch.Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[True],
    **options: Unpack[OptionKeywords],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def flash_attn_with_kvcache(
    query: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    page_table: torch.Tensor | None,
    block_size: int,
    causal: bool = ...,
    *,
    cache_seqlens: torch.Tensor | None = ...,
    seqlens_q: torch.Tensor | None = ...,
    page_indptr: torch.Tensor | None = ...,
    page_indices: torch.Tensor | None = ...,
    last_page_len: torch.Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    softmax_scale: float | None = ...,
    return_lse: bool,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@repeats
def flash_attn_with_kvcache(
    query: torch.Tensor,
    kv_cache: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    page_table: torch.Tensor | None,
    block_size: int,
    causal: bool = True,
    *,
    cache_seqlens: torch.Tensor | None = None,
    seqlens_q: torch.Tensor | None = None,
    page_indptr: torch.Tensor | None = None,
    page_indices: torch.Tensor | None = None,
    last_page_len: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of query (batch, seq_q, heads_q, head_dim) over cached keys and values that lie in pages.

    kv_cache: one tensor (num_blocks, heads_kv, block_size, head_dim) that serves as keys and values both, a pair
    (k_cache, v_cache) of those, or one stacked tensor (2, num_blocks, heads_kv, block_size, head_dim).
    page_table: int32 (batch, max_blocks); entry [b, i] is the page that holds tokens i * block_size and on of sequence
    b. cache_seqlens: int32 (batch,), how many cached tokens are valid; by default all pages are full. Only the entries
    of page_table that the valid tokens need are read. seqlens_q: int32 (batch,), how many rows of a padded query are
    valid.

    Instead of page_table (then None), lists of pages: those of sequence b are page_indices[page_indptr[b]] to before
    page_indices[page_indptr[b + 1]], int32 (batch + 1,) and one flat int32 list, which may be longer. The last page of
    a list has last_page_len[b] tokens, int32 (batch,), by default block_size. max_seqlen_k bounds the tokens of a
    sequence (by default all that are listed); with it a GPU is shared out better.
    """
    key, value = _split_cache(kv_cache)
    if not isinstance(query, torch.Tensor) or query.dim() != 4:
        checks.tensor("query", query, 4, BSHD)
    batch = query.shape[0]
    batch_of = "query", query, batch
    lengths = index_tensor("cache_seqlens", cache_seqlens, (batch,), "int32 (batch,)", query, batch_of)
    rows = index_tensor("seqlens_q", seqlens_q, (batch,), "int32 (batch,)", query, batch_of)
    if page_table is not None and page_indptr is page_indices is last_page_len is None:
        indices = Indices(rows, lengths, index_tensor("page_table", page_table, (batch, None), _TABLE, query, batch_of))
    else:
        lists = page_lists(page_indptr, page_indices, last_page_len, batch_of, query, page_table)
        indices = Indices(rows, lengths, **lists)
    return attend(
        *(_PAGED, (block_size,), query, key, value, causal, softmax_scale, return_lse, options, indices),
        max_seqlen_k=0 if max_seqlen_k is None else checks.positive_int("max_seqlen_k", max_seqlen_k),
    )


@overload
def variable_length_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seq_lengths: torch.Tensor,
    max_seq_len: int,
    causal: bool = ...,
    *,
    seqlens_k: torch.Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    page_table: torch.Tensor | None = ...,
    block_size: int | None = ...,
    page_indptr: torch.Tensor | None = ...,
    page_indices: torch.Tensor | None = ...,
    last_page_len: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[False] = ...,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor: ...
@overload
def variable_length_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seq_lengths: torch.Tensor,
    max_seq_len: int,
    causal: bool = ...,
    *,
    seqlens_k: torch.Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    page_table: torch.Tensor | None = ...,
    block_size: int | None = ...,
    page_indptr: torch.Tensor | None = ...,
    page_indices: torch.Tensor | None = ...,
    last_page_len: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    return_lse: Literal[True],
    **options: Unpack[OptionKeywords],
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def variable_length_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seq_lengths: torch.Tensor,
    max_seq_len: int,
    causal: bool = ...,
    *,
    seqlens_k: torch.Tensor | None = ...,
    max_seqlen_k: int | None = ...,
    page_table: torch.Tensor | None = ...,
    block_size: int | None = ...,
    page_indptr: torch.Tensor | None = ...,
    page_indices: torch.Tensor | None = ...,
    last_page_len: torch.Tensor | None = ...,
    softmax_scale: float | None = ...,
    return_lse: bool,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]: ...
@repeats
def variable_length_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seq_lengths: torch.Tensor,
    max_seq_len: int,
    causal: bool = False,
    *,
    seqlens_k: torch.Tensor | None = None,
    max_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None,
    block_size: int | None = None,
    page_indptr: torch.Tensor | None = None,
    page_indices: torch.Tensor | None = None,
    last_page_len: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    return_lse: bool = False,
    **options: Unpack[OptionKeywords],
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention of a batch of sequences of different lengths, seq_lengths int32 (batch,).

    Padded: tensors are (batch, max_seq_len, heads, head_dim); output rows past a sequence's length are zeros, and what
    stands in the padding, NaN included, has no effect. Packed: tensors are (total_tokens, heads, head_dim), sequences
    one after the other; the log-sum-exp is then (heads, total_tokens). With `page_table` (and `block_size`), key and
    value are paged caches (num_blocks, heads_kv, block_size, head_dim) as in `flash_attn_with_kvcache`; likewise with
    page_indptr, page_indices and last_page_len, which then say how many keys there are.
    seqlens_k: int32 (batch,), the lengths of keys and values where they are not those of the queries (cross-attention,
    queries that come on top of a cache); max_seqlen_k bounds them (packed; by default by the rows there are). Lengths
    may be 0.
    """
    if type(max_seq_len) is not int or not 0 < max_seq_len <= checks.INT32_MAX:
        max_seq_len = checks.bound("max_seq_len", checks.positive_int("max_seq_len", max_seq_len))
    if not isinstance(query, torch.Tensor) or not 3 <= query.dim() <= 4:
        checks.tensor("query", query, (3, 4), f"{BSHD}, or packed {PACKED}")
    rows, batch_of = (None, None) if query.dim() == 3 else (query.shape[0], ("query", query, query.shape[0]))
    lengths = index_tensor("seq_lengths", seq_lengths, (rows,), "int32 (batch,)", query, batch_of)
    if lengths is None:
        raise TypeError("seq_lengths must be a torch.Tensor int32 (batch,), not NoneType")
    batch = lengths.shape[0]
    batch_of = "seq_lengths", lengths, batch
    keys: torch.Tensor | None = lengths
    if seqlens_k is not None:
        keys = index_tensor("seqlens_k", seqlens_k, (batch,), "int32 (batch,)", query, batch_of)
    listed = not (page_indptr is page_indices is last_page_len is None)
    paged = listed or page_table is not None
    if not paged and block_size is not None:
        raise ValueError(f"block_size is {block_size}, but there is no page_table; give both or neither")
    if paged and block_size is None:
        raise ValueError("page_table is given without block_size; give both or neither")
    if listed:
        lists = page_lists(page_indptr, page_indices, last_page_len, batch_of, query, page_table)
        indices = Indices(lengths, None if seqlens_k is None else keys, **lists)
        max_seqlen_k = 0 if max_seqlen_k is None else checks.bound("max_seqlen_k", max_seqlen_k)
    else:
        table = index_tensor("page_table", page_table, (batch, None), _TABLE, query, batch_of)
        indices = Indices(lengths, keys, table)
        if seqlens_k is None:
            max_seqlen_k = max_seq_len
        elif max_seqlen_k is None:
            max_seqlen_k = checks.tensor("key", key, (3, 4), f"{BSHD}, or packed {PACKED}").shape[0]
        else:
            max_seqlen_k = checks.bound("max_seqlen_k", max_seqlen_k)
    operation = _VARIABLE_LENGTH_PAGED if paged else _VARIABLE_LENGTH
    own = (max_seq_len, seqlens_k is None, block_size)
    return attend(
        *(operation, own, query, key, value, causal, softmax_scale, return_lse, options, indices),
        max_seqlen_q=max_seq_len,
        max_seqlen_k=max_seqlen_k,
    )


def _lengths(query: torch.Tensor, seqlens_q: torch.Tensor | None, seqlens_k: torch.Tensor | None) -> Indices:
    checks.tensor("query", query, 4, BSHD)
    shape, layout, batch_of = (query.shape[0],), "int32 (batch,)", ("query", query, query.shape[0])
    return Indices(
        index_tensor("seqlens_q", seqlens_q, shape, layout, query, batch_of),
        index_tensor("seqlens_k", seqlens_k, shape, layout, query, batch_of),
    )


def _check_dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, tensor, 4, BSHD)
    checks.attention_kind(query=query, key=key, value=value)
    checks.equal_size("key", key.shape[3], "head_dim", "query", checks.head_dim(query))
    checks.equal_size("key", key.shape[0], "batch size", "query", query.shape[0])
    checks.same_shape("value", value, "key", key, but_last=True)
    checks.head_dim(value, "value", latent=False)
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
        assert isinstance(kv_cache, torch.Tensor)
        if kv_cache.dim() == 5 and kv_cache.shape[0] != 2:
            raise ValueError(f"kv_cache has shape {tuple(kv_cache.shape)}; it must be {forms}")
        key, value = kv_cache if kv_cache.dim() == 5 else (kv_cache, kv_cache)
    return key, value


def _check_cache(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int, name: str) -> None:
    for part, tensor in ((f"{name}key", key), (f"{name}value", value)):
        checks.tensor(part, tensor, 4, CACHE)
    checks.attention_kind(query=query, **{f"{name}key": key, f"{name}value": value})
    checks.same_shape(f"{name}value", value, f"{name}key", key, but_last=True)
    checks.head_dim(value, f"{name}value", latent=False)
    checks.equal_size(f"{name}key", key.shape[3], "head_dim", "query", checks.head_dim(query))
    checks.heads(query.shape[-2], key.shape[1], f"{name}key")
    checks.equal_size("block_size", checks.positive_int("block_size", block_size), "the value", CACHE, key.shape[2])


def _check_paged(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_size: int) -> None:
    checks.tensor("query", query, 4, BSHD)
    _check_cache(query, key, value, block_size, "kv_cache ")


def _check_variable_length(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, max_seq_len: int, alike: bool, block_size: None
) -> None:
    """alike: keys have the lengths of the queries."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, tensor, (3, 4), f"{BSHD}, or packed {PACKED}")
    checks.attention_kind(query=query, key=key, value=value)
    checks.equal_size("key", key.dim(), "number of dimensions", "query", query.dim())
    checks.equal_size("key", key.shape[-1], "head_dim", "query", checks.head_dim(query))
    checks.same_shape("value", value, "key", key, but_last=True)
    checks.head_dim(value, "value", latent=False)
    if alike and query.shape[:-2] != key.shape[:-2]:
        raise ValueError(
            f"key has shape {tuple(key.shape)}; it must hold as many tokens as query, {tuple(query.shape)}, or have "
            "lengths of its own (seqlens_k)"
        )
    if query.dim() == 4:
        checks.equal_size("key", key.shape[0], "batch size", "query", query.shape[0])
    _check_padded_length(query, max_seq_len)
    checks.heads(query.shape[-2], key.shape[-2])


def _check_variable_length_paged(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, max_seq_len: int, alike: bool, block_size: int
) -> None:
    checks.tensor("query", query, (3, 4), f"{BSHD}, or packed {PACKED}")
    _check_cache(query, key, value, block_size, "")
    _check_padded_length(query, max_seq_len)


def _check_padded_length(query: torch.Tensor, max_seq_len: int) -> None:
    if query.dim() == 4 and query.shape[1] != max_seq_len:
        raise ValueError(
            f"query is padded to {query.shape[1]} tokens (shape {tuple(query.shape)}), but max_seq_len is {max_seq_len}"
        )


def _fits_grouped(sizes: Sizes, num_groups: int) -> bool:
    return type(num_groups) is int and sizes.heads_q == num_groups * sizes.heads_kv and num_groups > 0


def _fits_paged(sizes: Sizes, block_size: int) -> bool:
    return type(block_size) is int and sizes.page_size == block_size and block_size > 0


def _fits_variable_length(sizes: Sizes, max_seq_len: int, alike: bool, block_size: int | None) -> bool:
    return (
        sizes.seqlen_q == max_seq_len
        and sizes.page_size == (block_size or 0)
        and sizes.packed_q == sizes.packed_k
        and (not alike or (sizes.total_q == sizes.total_k and sizes.seqlen_q == sizes.seqlen_k))
    )


def _fits_variable_length_paged(sizes: Sizes, max_seq_len: int, alike: bool, block_size: int) -> bool:
    return sizes.seqlen_q == max_seq_len and _fits_paged(sizes, block_size)


_DENSE = Operation(_check_dense, None)
_GROUPED = Operation(_check_grouped, _fits_grouped)
_MULTI_QUERY = Operation(_check_multi_query, lambda sizes: sizes.heads_kv == 1)
_PAGED = Operation(_check_paged, _fits_paged, Names(seqlens_k="cache_seqlens", longest_k="max_blocks * block_size"))
_LENGTHS = Names("seq_lengths", "seqlens_k", "max_seq_len", "max_seqlen_k", fill=True)
_VARIABLE_LENGTH = Operation(_check_variable_length, _fits_variable_length, _LENGTHS)
_VARIABLE_LENGTH_PAGED = Operation(
    _check_variable_length_paged,
    _fits_variable_length_paged,
    _LENGTHS._replace(longest_k="what page_table holds"),
)
