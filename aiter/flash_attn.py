"""FlashAttention's functions, with its names, signatures and meanings, on this package's kernels.

    from aiter.flash_attn import flash_attn_func, flash_attn_varlen_func

Positions of arguments are FlashAttention 2's (https://github.com/Dao-AILab/flash-attention, flash_attn_interface.py);
keywords are those of FlashAttention 2, 3 and ROCm's library where their meanings agree. What is not offered raises
NotImplementedError by name; hints for speed (num_splits, pack_gqa, sm_margin, deterministic, ...) are taken and change
nothing: results are deterministic always. head_dim may be anything up to 512: it is padded to a multiple of 8.

Keys and values may be float8_e4m3fn, float8_e4m3fnuz or float8_e5m2 where no gradient is needed: k_descale and
v_descale, float32 of one element, (heads_kv,) or (batch, heads_kv), are what they are multiplied by. What is appended
to such a cache is divided by them, but for 8-bit floats of the cache's own type. Queries may be 8-bit floats too, with
q_descale: they are made bfloat16 first, which the result then is, and no gradient is taken.

Tensors are (batch, seq, heads, head_dim), packed ones (total_tokens, heads, head_dim). window_size is (left, right), -1
for no limit; query i stands at key i + seq_k - seq_q. softmax_lse is float32 (batch, heads, seq), packed (heads,
total_tokens), natural logarithm, of the keys alone (a sink is not in it). Rows without a key are zeros, lse -inf.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from aiter import checks, kv_cache, plan, torch_state
from aiter.cache_layout import Cache, check_padding
from aiter.dispatch import First
from aiter.errors import LengthError
from aiter.flash_attn_arguments import (
    CACHE_NAMES,
    CACHED,
    NAMES,
    OPERATION,
    PAGED,
    PAGED_BY_STARTS,
    attend_any_head_dim,
    batch_of_starts,
    check_values,
    copy_into,
    options_of,
    unpacked,
    widened,
    with_values,
)
from aiter.layout import NO_INDICES, Indices, index_tensor, page_lists
from aiter.parts import merge_attention_states
from aiter.repeated import repeats

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]


@repeats
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, ...] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    qv: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    """Attention of q (batch, seq_q, heads_q, head_dim) over k (batch, seq_k, heads_kv, head_dim) and v, which is like k
    but may have another head_dim.

    Returns the output; with return_lse, (output, softmax_lse); with return_attn_probs, (output, softmax_lse, S_dmask).
    S_dmask is None without dropout, as there are no probabilities in memory. With dropout it is there for tests, and
    worked out anew in the memory of a score matrix: (batch, heads_q, seq_q, seq_k) of the dtype of q, each weight
    relative to the greatest of its row, negative where it is left out, 0 where the key is hidden.

    dropout_p: in training, the probability of a weight to be left out. The mask follows from `rng_state`, int64 (2,),
    a keyword, by default drawn from PyTorch's generator; see aiter.dropout. qv: (batch, seq_q, heads_q, head_dim of v),
    a second query, of the values: scores are those of q and k plus those of qv and v; where k and v lie side by side
    in one memory that costs nothing, elsewhere a copy of both.
    attention_chunk, a keyword: a query sees only keys of its own chunk of so many places. sinks: (heads_q,), one logit
    a head that joins the softmax. out: where the output goes.
    """
    if isinstance(q, torch.Tensor) and q.dtype in checks.FP8_NAMES:
        q, k, v = widened(q, k, v, others, NAMES)
    options = options_of(dropout_p, causal, window_size, softcap, alibi_slopes, sinks, others, qv)
    if qv is not None:
        q, k, softmax_scale = with_values(q, qv, k, v, softmax_scale)
    return attend_any_head_dim(
        *(OPERATION, q, k, v, NO_INDICES, 0, 0, softmax_scale, causal, options, out, deterministic),
        *(return_attn_probs, return_lse),
    )


def flash_attn_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    """`flash_attn_func` with keys and values in one tensor (batch, seq_k, 2, heads_kv, head_dim)."""
    checks.tensor("kv", kv, 5, "(batch, seq_k, 2, heads_kv, head_dim)")
    k, v = unpacked("kv", kv, 2)
    return flash_attn_func(q, k, v, *arguments, **keywords)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor, *arguments: Any, num_heads_q: int | None = None, **keywords: Any
) -> Any:
    """`flash_attn_func` with all three in one tensor: (batch, seq, 3, heads, head_dim), or, with num_heads_q,
    (batch, seq, num_heads_q + 2 * heads_kv, head_dim)."""
    if num_heads_q is not None:
        checks.tensor("qkv", qkv, 4, "(batch, seq, num_heads_q + 2 * heads_kv, head_dim)")
        checks.memory(qkv=qkv)
        heads_kv, rest = divmod(qkv.shape[2] - checks.positive_int("num_heads_q", num_heads_q), 2)
        if heads_kv <= 0 or rest:
            raise ValueError(f"qkv has {qkv.shape[2]} heads; they must be num_heads_q, {num_heads_q}, and 2 * heads_kv")
        return flash_attn_func(*qkv.split((num_heads_q, heads_kv, heads_kv), 2), *arguments, **keywords)
    checks.tensor("qkv", qkv, 5, "(batch, seq, 3, heads, head_dim)")
    q, k, v = unpacked("qkv", qkv, 3)
    return flash_attn_func(q, k, v, *arguments, **keywords)


@repeats
def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, ...] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    page_indptr: torch.Tensor | None = None,
    page_indices: torch.Tensor | None = None,
    last_page_len: torch.Tensor | None = None,
    return_lse: bool = False,
    qv: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    """Attention of packed sequences of different lengths.

    q: (total_q, heads_q, head_dim); sequence b has its rows from cu_seqlens_q[b] to before cu_seqlens_q[b + 1], int32
    (batch + 1,). k, v: packed likewise, by cu_seqlens_k; or, with block_table int32 (batch, max_blocks), caches
    (num_blocks, block_size, heads_kv, head_dim) of any strides, in which sequence b has seqused_k[b] tokens (or as many
    as cu_seqlens_k says); or such caches with lists of pages: page_indptr int32 (batch + 1,), page_indices a flat int32
    list, last_page_len int32 (batch,), see `aiter.flash_attn_with_kvcache`. seqused_q, seqused_k: int32 (batch,), how
    many rows of each sequence count; the CPU refuses more than it has, a GPU takes those that there are. max_seqlen_q
    and max_seqlen_k bound the lengths. Rows of q that belong to no sequence give zeros, or are left alone in `out`. qv:
    packed as q. S_dmask has a row and a column for each place that max_seqlen_q and max_seqlen_k leave room for.
    """
    if not isinstance(q, torch.Tensor):
        checks.tensor("q", q, 3, checks.PACKED)
    starts_q = index_tensor("cu_seqlens_q", cu_seqlens_q, (None,), "int32 (batch + 1,)", q)
    if starts_q is None:
        raise TypeError("cu_seqlens_q must be a torch.Tensor int32 (batch + 1,), not NoneType")
    batch = batch_of_starts(starts_q)
    batch_of = "cu_seqlens_q", starts_q, batch
    starts_k = index_tensor("cu_seqlens_k", cu_seqlens_k, (batch + 1,), "int32 (batch + 1,)", q, batch_of)
    used_q = index_tensor("seqused_q", seqused_q, (batch,), "int32 (batch,)", q, batch_of)
    used_k = index_tensor("seqused_k", seqused_k, (batch,), "int32 (batch,)", q, batch_of)
    if q.dtype in checks.FP8_NAMES:
        q, k, v = widened(q, k, v, others, NAMES, starts_q)
    options = options_of(dropout_p, causal, window_size, softcap, alibi_slopes, sinks, others, qv)
    operation = OPERATION
    pages: dict[str, torch.Tensor | None] = {}
    if not (page_indptr is page_indices is last_page_len is None):
        pages = page_lists(page_indptr, page_indices, last_page_len, batch_of, q, block_table, "block_table")
    elif block_table is not None:
        layout = "int32 (batch, max_blocks)"
        pages["page_table"] = index_tensor("block_table", block_table, (batch, None), layout, q, batch_of)
    if pages:
        for name, cache in (("k", k), ("v", v)):
            checks.tensor(name, cache, 4, "(num_blocks, block_size, heads_kv, head_dim), as there are pages")
        operation = PAGED
        if used_k is None and starts_k is not None:
            used_k, operation = starts_k.diff(), PAGED_BY_STARTS
        k, v, starts_k = k.transpose(1, 2), v.transpose(1, 2), None
    elif starts_k is None:
        raise TypeError("cu_seqlens_k must be a torch.Tensor int32 (batch + 1,), as there is no block_table")
    indices = Indices(used_q, used_k, starts_q=starts_q, starts_k=starts_k, **pages)
    if qv is not None:
        q, k, softmax_scale = with_values(q, qv, k, v, softmax_scale)
    return attend_any_head_dim(
        *(operation, q, k, v, indices, max_seqlen_q, max_seqlen_k, softmax_scale, causal, options, out, deterministic),
        *(return_attn_probs, return_lse),
    )


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *arguments: Any,
    **keywords: Any,
) -> Any:
    """`flash_attn_varlen_func` with keys and values in one tensor (total_k, 2, heads_kv, head_dim)."""
    checks.tensor("kv", kv, 4, "(total_k, 2, heads_kv, head_dim)")
    k, v = unpacked("kv", kv, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *arguments, **keywords
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *arguments: Any, **keywords: Any
) -> Any:
    """`flash_attn_varlen_func` with all three in one tensor (total, 3, heads, head_dim)."""
    checks.tensor("qkv", qkv, 4, "(total, 3, heads, head_dim)")
    q, k, v = unpacked("qkv", qkv, 3)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *arguments, **keywords)


@repeats
def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, ...] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    page_table: torch.Tensor | None = None,
    page_indptr: torch.Tensor | None = None,
    page_indices: torch.Tensor | None = None,
    last_page_len: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: torch.Tensor | None = None,
    qv: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    """Attention over a cache, to which new keys and values are appended first, in place.

    q: (batch, seq_q, heads_q, head_dim), or with cu_seqlens_q int32 (batch + 1,) and max_seqlen_q packed (total_q,
    heads_q, head_dim). k_cache, v_cache of any strides: (batch_cache, seq_cache, heads_kv, head_dim), of which sequence
    b has row b, or row cache_batch_idx[b], int32 (batch,); or, with block_table (also called page_table) int32 (batch,
    max_blocks), pages (num_blocks, block_size, heads_kv, head_dim). Or such pages in lists: page_indptr int32 (batch +
    1,), page_indices a flat int32 list, last_page_len int32 (batch,); these append nothing.

    cache_seqlens: an int or int32 (batch,), how many tokens each sequence has in the cache, without the new ones; None:
    a full cache. k, v: (batch, seq_new, heads_kv, head_dim), or with cu_seqlens_k_new packed: the tokens that go behind
    those. The last query stands at the last key, new ones counted. cache_leftpad: int32 (batch,), how many tokens at
    the beginning of each sequence are not seen. With both, cache_batch_idx names rows of the block_table.

    rotary_cos, rotary_sin: (places, rotary_dim / 2), of the dtype of q. New key i is rotated by the angles of place
    cache_seqlens[b] + i (or rotary_seqlens[b] + i; that says nothing without angles), query i likewise, or, where
    neither causal nor a window is asked for, by those of the first place. Pairs are elements 2d and 2d + 1
    (rotary_interleaved), or d and d + rotary_dim / 2.

    qv: of the shape of q but with the values' head_dim, a second query, of the values. Where keys and values lie in one
    cache side by side (latent attention) it costs nothing, elsewhere a copy of the caches at every call.

    Returns the output, with return_softmax_lse (output, softmax_lse). Takes no gradient. Nothing is written before all
    arguments have been looked at. On the CPU raises ValueError, and writes nothing, where new tokens do not fit, or
    where cache_batch_idx gives two sequences one row and new tokens of both one place in it; on a GPU the former are
    not written, and chance says which of the latter stay.
    """
    if not isinstance(q, torch.Tensor):
        checks.tensor("q", q, (3, 4), f"{checks.BSHD}, or packed {checks.PACKED}")
    if "rng_state" in others:
        raise TypeError("there is no argument 'rng_state': there is no dropout over a cache")
    checks.flag("rotary_interleaved", rotary_interleaved)
    checks.flag("return_softmax_lse", return_softmax_lse)
    starts_q = index_tensor("cu_seqlens_q", cu_seqlens_q, (None,), "int32 (batch + 1,)", q)
    others = {"num_splits": num_splits, **others}
    if q.dtype in checks.FP8_NAMES:
        q, k_cache, v_cache = widened(q, k_cache, v_cache, others, CACHE_NAMES, starts_q)
    options = options_of(0.0, causal, window_size, softcap, alibi_slopes, sinks, others, qv)
    if page_table is not None:
        if block_table is not None:
            raise ValueError("block_table and page_table are one argument; give one of them")
        block_table = page_table
    for name, given in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.tensor(name, given, 4, "(batch or num_blocks, seq or block_size, heads_kv, head_dim)")
    checks.tensor("q", q, 4 if starts_q is None else 3, checks.BSHD if starts_q is None else checks.PACKED)
    checks.attention_kind(q=q, k_cache=k_cache, v_cache=v_cache)
    checks.equal_size("k_cache", k_cache.shape[-1], "head_dim", "q", q.shape[-1])
    checks.heads(q.shape[-2], k_cache.shape[2], "k_cache", "q")
    if qv is not None:
        check_values(q, qv, k_cache, v_cache)
    batch = q.shape[0] if starts_q is None else batch_of_starts(starts_q)
    batch_of = ("q", q, batch) if starts_q is None else ("cu_seqlens_q", starts_q, batch)
    if max_seqlen_q is None:
        if starts_q is not None:
            raise TypeError("max_seqlen_q must be given with cu_seqlens_q: the most rows that any sequence has")
        max_seqlen_q = 0
    elif starts_q is None and checks.bound("max_seqlen_q", max_seqlen_q) < q.shape[1]:
        raise ValueError(f"max_seqlen_q is {max_seqlen_q}, but q has {q.shape[1]} rows a sequence (no cu_seqlens_q)")
    if checks.is_int(cache_seqlens):
        if not 0 <= cache_seqlens <= checks.INT32_MAX:
            raise LengthError(f"cache_seqlens is {cache_seqlens}; it must be from 0 to what the cache has room for")
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=q.device)
    lengths = index_tensor("cache_seqlens", cache_seqlens, (batch,), "int32 (batch,)", q, batch_of)
    lists: dict[str, torch.Tensor | None] = {}
    if page_indptr is page_indices is last_page_len is None:
        cache = Cache.of(k_cache, v_cache, batch_of, block_table, cache_batch_idx, q)
    else:
        lists = page_lists(page_indptr, page_indices, last_page_len, batch_of, q, block_table, "block_table")
        if k is not None or v is not None or cache_batch_idx is not None:
            raise NotImplementedError(
                "with page_indptr, k, v and cache_batch_idx are not offered: write new tokens with "
                "aiter.kv_cache.reshape_and_cache first, or give a block_table"
            )
        if cache_leftpad is not None:
            raise NotImplementedError("with page_indptr, cache_leftpad is not offered: leave out pages not seen")
        cache = Cache(k_cache, v_cache, lists["page_table"])
    padding = index_tensor("cache_leftpad", cache_leftpad, (batch,), "int32 (batch,)", q, batch_of)
    seen = cache if padding is None else cache.without(padding)

    rotary = None
    positions = index_tensor("rotary_seqlens", rotary_seqlens, (batch,), "int32 (batch,)", q, batch_of)
    if rotary_cos is not None or rotary_sin is not None:
        if k is None or rotary_cos is None or rotary_sin is None:
            raise ValueError("rotary_cos and rotary_sin are given together, with new k and v")
        moves = causal or "window_size" in options
        rotary_cos, rotary_sin = (
            checks.tensor(name, angles, 2, "(places, rotary_dim / 2)")
            for name, angles in (("rotary_cos", rotary_cos), ("rotary_sin", rotary_sin))
        )
        rotary_cos, rotary_sin = (
            angles.to(q.dtype) if angles.dtype in checks.FP8_NAMES else angles for angles in (rotary_cos, rotary_sin)
        )
        rotary = kv_cache.Rotary(rotary_cos, rotary_sin, positions, rotary_interleaved, moves)
    appends = k is not None or v is not None
    operation = CACHED[block_table is not None, cache_batch_idx is not None, appends]
    append = misfit = None
    if appends:
        if k is None or v is None or lengths is None:
            raise ValueError("k and v are given together, with cache_seqlens")
        layout = "int32 (batch + 1,)"
        starts_new = index_tensor("cu_seqlens_k_new", cu_seqlens_k_new, (batch + 1,), layout, q, batch_of)
        for name, new in (("k", k), ("v", v)):
            checks.tensor(name, new, *((4, checks.BSHD) if starts_new is None else (3, checks.PACKED)))
        scales = options.get("k_descale"), options.get("v_descale")
        if k.dtype in checks.FP8_NAMES and k.dtype == v.dtype == k_cache.dtype:
            k, v, scales = k.to(q.dtype), v.to(q.dtype), (None, None)  # they are of the cache's scale already
        checks.same_kind(q=q, k=k, v=v)
        # The next call would write over what a backward pass reads.
        for name, tensor in (("q", q), ("k", k), ("v", v), ("qv", qv), ("sinks", options.get("sinks"))):
            if isinstance(tensor, torch.Tensor) and torch_state.wants_gradient(tensor):
                raise ValueError(
                    f"a call with new k and v takes no gradient, but {name} requires one: use torch.no_grad()"
                )
        append = partial(
            kv_cache.append,
            *(k, v, cache.key, cache.value, lengths, cache.table, starts_new, rotary, q, starts_q, *scales),
            cache_batch_idx,
        )
        tokens = kv_cache.New(k, cache.key, lengths, cache.table, starts_new, rotary, q, starts_q)
        misfit = partial(kv_cache.misfit, operation.names, tokens)
        lengths = plan.longer(lengths, k.shape[1] if starts_new is None else starts_new.diff())
    elif cu_seqlens_k_new is not None:
        raise ValueError("cu_seqlens_k_new is given without k and v")
    if padding is not None:
        check_padding(padding, cache, lengths, operation.names, misfit)
        lengths = ((cache.room if lengths is None else lengths) - padding).clamp(min=0)
    key, value = seen.key, seen.value
    if seen.table is not None:
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    elif key.shape[0] != batch:  # sequence b has row b
        key, value = key[:batch], value[:batch]

    def appended() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value, once the new tokens are in the cache."""
        assert append is not None
        rotated = append()
        own = q if rotated is None else rotated
        return (own, key, value) if qv is None else (*with_values(own, qv, key, value, scale)[:2], value)

    query, seen_key, scale = q, key, softmax_scale
    if qv is not None:
        query, seen_key, softmax_scale = with_values(q, qv, key, value, scale, copies=append is None)
    indices = NO_INDICES
    if lengths is not None or seen.table is not None or starts_q is not None:
        indices = Indices(None, lengths, starts_q=starts_q, **(lists or {"page_table": seen.table}))
    return attend_any_head_dim(
        *(operation, query, seen_key, value, indices, max_seqlen_q, 0),
        *(softmax_scale, causal, options, out, False, False, return_softmax_lse),
        None if misfit is None else First(appended, misfit),
    )


def flash_attn_combine(
    out_partial: torch.Tensor,
    lse_partial: torch.Tensor,
    out: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of rows whose keys were attended to in parts.

    out_partial: (parts, batch, seq, heads, head_dim), lse_partial: float32 (parts, batch, seq, heads), whatever its
    strides; or both without batch. Returns the output (batch, seq, heads, head_dim), of out_dtype or the dtype of
    out_partial, in `out` if that is given, and the log-sum-exp (batch, seq, heads).
    """
    checks.tensor("out_partial", out_partial, (4, 5), "(parts, batch, seq, heads, head_dim)")
    checks.tensor("lse_partial", lse_partial, out_partial.dim() - 1, "(parts, batch, seq, heads)")
    checks.same_kind(out_partial=out_partial)
    checks.same_device("lse_partial", lse_partial, "out_partial", out_partial)
    checks.memory(out_partial=out_partial, lse_partial=lse_partial, out=out)
    if lse_partial.shape != out_partial.shape[:-1]:
        raise ValueError(
            f"lse_partial has shape {tuple(lse_partial.shape)}; it must be that of out_partial without head_dim, "
            f"{tuple(out_partial.shape[:-1])}"
        )
    if lse_partial.dtype != torch.float32:
        raise TypeError(f"lse_partial has dtype {lse_partial.dtype}; it must be torch.float32")
    if out_partial.shape[0] == 0:
        raise ValueError(f"out_partial has shape {tuple(out_partial.shape)}; there must be at least one part")
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype in checks.DTYPE_NAMES):
        known = ", ".join(str(dtype) for dtype in checks.DTYPE_NAMES)
        raise TypeError(f"out_dtype is {out_dtype!r}; it must be None or one of {known}")
    dtype = out_dtype or out_partial.dtype
    if out is not None:
        checks.tensor("out", out, out_partial.dim() - 1, "(batch, seq, heads, head_dim)")
        checks.same_kind(out=out)
        checks.same_device("out", out, "out_partial", out_partial)
        checks.same_shape("out", out, "a part of out_partial", out_partial[0])
        checks.overlap("out", out)
        if out_dtype not in (None, out.dtype):
            raise TypeError(f"out has dtype {out.dtype}; it must be out_dtype, {out_dtype}")
        if torch.is_grad_enabled() and (out.requires_grad or out_partial.requires_grad or lse_partial.requires_grad):
            raise ValueError("out= takes no gradient: leave it out where one is needed, or use torch.no_grad()")
    output, lse = merge_attention_states(out_partial.float().unbind(), lse_partial.transpose(-1, -2).unbind())
    output = output.to(dtype) if out is None else copy_into(out, output)
    return output, lse.transpose(-1, -2)
