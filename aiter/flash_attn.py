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

import itertools
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F

from aiter import checks, kv_cache, plan, torch_state
from aiter.cache_layout import Cache, check_padding
from aiter.dispatch import First, Operation, attend
from aiter.dropout import draw_rng_state, keep_mask
from aiter.errors import LengthError
from aiter.layout import NO_INDICES, Indices, check_tensors, index_tensor, page_lists
from aiter.options import OptionKeywords, check_rng_state, chunk_in_range, dropout_in_range
from aiter.parts import merge_attention_states
from aiter.reference import attend_one
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

# Taken and of no consequence: how fast, on how many units, in which order. None is taken for each, too.
_HINTS: dict[str, tuple[type, ...]] = {
    "num_splits": (int,),
    "pack_gqa": (bool, int),
    "sm_margin": (int,),
    "scheduler_metadata": (torch.Tensor,),
    "how_v3_bf16_cvt": (int,),
    "min_seqlen_q": (int,),
    "is_v3_atomic_fp32": (bool, int),
}
# Not offered; None asks for nothing.
_NOT_OFFERED = ("q_descale", "bias", "cu_seqlens_q_padded", "cu_seqlens_k_padded", "learnable_sink")


def _operation(names: checks.Names) -> Operation:
    return Operation(partial(check_tensors, names=names), None, names)


_NAMES = checks.Names(
    *("seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", False, "cu_seqlens_q", "cu_seqlens_k", "block_table"),
    query="q",
    key="k",
    value="v",
)
_OPERATION = _operation(_NAMES)
_PAGED_NAMES = _NAMES._replace(longest_k="what block_table has room for")
_PAGED = _operation(_PAGED_NAMES)
_PAGED_BY_STARTS = _operation(_PAGED_NAMES._replace(seqlens_k="the length in cu_seqlens_k"))
_CACHE_NAMES = _NAMES._replace(longest_k="what the cache has room for", key="k_cache", value="v_cache")


def _cached(paged: bool, indexed: bool, appends: bool) -> Operation:
    names = _CACHE_NAMES._replace(seqlens_k="cache_seqlens + new tokens" if appends else "cache_seqlens")
    if paged:
        names = names._replace(longest_k=_PAGED_NAMES.longest_k)
    if paged and indexed:
        names = names._replace(page_entry="{table}[cache_batch_idx[{row}], {column}]")
    elif indexed:
        names = names._replace(page_table="cache_batch_idx", page_entry="{table}[{row}]", pages="rows")
    return _operation(names)


# By whether there are a block_table, a cache_batch_idx, and new tokens.
_CACHED = {case: _cached(*case) for case in itertools.product((False, True), repeat=3)}


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
        q, k, v = _widened(q, k, v, others, _NAMES)
    options = _options(dropout_p, causal, window_size, softcap, alibi_slopes, sinks, others, qv)
    if qv is not None:
        q, k, softmax_scale = _with_values(q, qv, k, v, softmax_scale)
    return _attend(
        *(_OPERATION, q, k, v, NO_INDICES, 0, 0, softmax_scale, causal, options, out, deterministic),
        *(return_attn_probs, return_lse),
    )


def flash_attn_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    """`flash_attn_func` with keys and values in one tensor (batch, seq_k, 2, heads_kv, head_dim)."""
    checks.tensor("kv", kv, 5, "(batch, seq_k, 2, heads_kv, head_dim)")
    k, v = _unpacked("kv", kv, 2)
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
    q, k, v = _unpacked("qkv", qkv, 3)
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
    batch = _batch(starts_q)
    batch_of = "cu_seqlens_q", starts_q, batch
    starts_k = index_tensor("cu_seqlens_k", cu_seqlens_k, (batch + 1,), "int32 (batch + 1,)", q, batch_of)
    used_q = index_tensor("seqused_q", seqused_q, (batch,), "int32 (batch,)", q, batch_of)
    used_k = index_tensor("seqused_k", seqused_k, (batch,), "int32 (batch,)", q, batch_of)
    if q.dtype in checks.FP8_NAMES:
        q, k, v = _widened(q, k, v, others, _NAMES, starts_q)
    options = _options(dropout_p, causal, window_size, softcap, alibi_slopes, sinks, others, qv)
    operation = _OPERATION
    pages: dict[str, torch.Tensor | None] = {}
    if not (page_indptr is page_indices is last_page_len is None):
        pages = page_lists(page_indptr, page_indices, last_page_len, batch_of, q, block_table, "block_table")
    elif block_table is not None:
        layout = "int32 (batch, max_blocks)"
        pages["page_table"] = index_tensor("block_table", block_table, (batch, None), layout, q, batch_of)
    if pages:
        for name, cache in (("k", k), ("v", v)):
            checks.tensor(name, cache, 4, "(num_blocks, block_size, heads_kv, head_dim), as there are pages")
        operation = _PAGED
        if used_k is None and starts_k is not None:
            used_k, operation = starts_k.diff(), _PAGED_BY_STARTS
        k, v, starts_k = k.transpose(1, 2), v.transpose(1, 2), None
    elif starts_k is None:
        raise TypeError("cu_seqlens_k must be a torch.Tensor int32 (batch + 1,), as there is no block_table")
    indices = Indices(used_q, used_k, starts_q=starts_q, starts_k=starts_k, **pages)
    if qv is not None:
        q, k, softmax_scale = _with_values(q, qv, k, v, softmax_scale)
    return _attend(
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
    k, v = _unpacked("kv", kv, 2)
    return flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *arguments, **keywords
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *arguments: Any, **keywords: Any
) -> Any:
    """`flash_attn_varlen_func` with all three in one tensor (total, 3, heads, head_dim)."""
    checks.tensor("qkv", qkv, 4, "(total, 3, heads, head_dim)")
    q, k, v = _unpacked("qkv", qkv, 3)
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
        q, k_cache, v_cache = _widened(q, k_cache, v_cache, others, _CACHE_NAMES, starts_q)
    options = _options(0.0, causal, window_size, softcap, alibi_slopes, sinks, others, qv)
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
        _check_values(q, qv, k_cache, v_cache)
    batch = q.shape[0] if starts_q is None else _batch(starts_q)
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
    operation = _CACHED[block_table is not None, cache_batch_idx is not None, appends]
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
        return (own, key, value) if qv is None else (*_with_values(own, qv, key, value, scale)[:2], value)

    query, seen_key, scale = q, key, softmax_scale
    if qv is not None:
        query, seen_key, softmax_scale = _with_values(q, qv, key, value, scale, copies=append is None)
    indices = NO_INDICES
    if lengths is not None or seen.table is not None or starts_q is not None:
        indices = Indices(None, lengths, starts_q=starts_q, **(lists or {"page_table": seen.table}))
    return _attend(
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
    output = output.to(dtype) if out is None else _copy(out, output)
    return output, lse.transpose(-1, -2)


def _attend(
    operation: Operation,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    options: OptionKeywords,
    out: torch.Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    return_lse: bool,
    first: First | None = None,
) -> Any:
    """`attend`, of head_dims that need not be multiples of 8."""
    names = operation.names
    for name, flag in (
        ("deterministic", deterministic),
        ("return_attn_probs", return_attn_probs),
        ("return_lse", return_lse),
    ):
        if flag is not True and flag is not False:
            checks.flag(name, flag)
    for name, tensor in ((names.query, q), (names.key, k), (names.value, v)):
        checks.tensor(name, tensor, (3, 4), f"{checks.BSHD}, or packed {checks.PACKED}")
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    checks.equal_size(names.key, k.shape[-1], "head_dim", names.query, head_dim)
    for name, size in ((names.query, head_dim), (names.value, value_dim)):
        if not 0 < size <= checks.HEAD_DIM_MAX and size != checks.LATENT_HEAD_DIM:
            raise ValueError(f"{name} has head_dim {size}; it must be from 1 to {checks.HEAD_DIM_MAX}")
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if type(bound) is not int or not 0 <= bound <= checks.INT32_MAX:
            checks.bound(name, bound)
    if indices is not NO_INDICES:  # a bound of 0 is one that nothing but empty sequences keeps
        max_seqlen_q = max(max_seqlen_q, 1)
        if indices.page_indptr is None:
            max_seqlen_k = max(max_seqlen_k, 1)
    if softmax_scale is None:
        softmax_scale = checks.softmax_scale(None, head_dim)
    padded = head_dim % checks.HEAD_DIM_STEP or value_dim % checks.HEAD_DIM_STEP
    target = out
    if padded:
        if out is not None:
            target = _pad(checks.output(out, q, v, names))
        if first is None:
            q, k, v = _padded(q, k, v)
        else:
            unpadded, step = first.do, checks.HEAD_DIM_STEP
            q, k, v = (_shape_of(tensor, -(-tensor.shape[-1] // step) * step) for tensor in (q, k, v))
            first = First(lambda: _padded(*unpadded()), first.explain)
    wants_lse = return_attn_probs or return_lse
    if return_attn_probs and options.get("dropout_p"):
        options.setdefault("rng_state", draw_rng_state(q.device))
    result: Any = attend(
        *(operation, (), q, k, v, causal, softmax_scale, wants_lse, options, indices, max_seqlen_q, max_seqlen_k),
        *(target, first),
    )
    output, lse = result if wants_lse else (result, None)
    if padded:
        output = output[..., :value_dim]
        output = output.contiguous() if out is None else _copy(out, output)
    if return_attn_probs:
        weights = _signed_weights(q, k, indices, max_seqlen_q, max_seqlen_k, softmax_scale, causal, options)
        return output, lse, weights
    return (output, lse) if return_lse else output


def _widened(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    others: dict[str, Any],
    names: checks.Names,
    starts_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """8-bit queries as bfloat16, times the q_descale among the other keywords: float32 of one element, (heads_kv,) or
    (batch, heads_kv), each for the query heads of a KV head. The product is rounded once. Keys and values as they are,
    without a gradient."""
    checks.tensor(names.query, q, *((4, checks.BSHD) if starts_q is None else (3, checks.PACKED)))
    for name, tensor in ((names.key, k), (names.value, v)):
        checks.tensor(name, tensor, (3, 4), f"{checks.BSHD}, or packed {checks.PACKED}")
    k, v, heads_kv = k.detach(), v.detach(), k.shape[-2]
    checks.heads(q.shape[-2], heads_kv, names.key, names.query)
    descale = others.pop("q_descale", None)
    if descale is not None:
        batch = q.shape[0] if starts_q is None else starts_q.shape[0] - 1
        checks.per_kv_head("q_descale", descale, q, batch, heads_kv, names.query)
    q = q.detach().to(torch.bfloat16)
    if descale is None:
        return q, k, v
    if descale.numel() != 1:
        descale = descale.repeat_interleave(q.shape[-2] // heads_kv, -1)
        if descale.dim() == 2 and starts_q is not None:  # a row of scales for each row of q
            rows = torch.arange(q.shape[0], device=q.device)
            sequence = torch.searchsorted(starts_q, rows, right=True).sub(1).clamp(0, descale.shape[0] - 1)
            descale = descale[sequence]
        elif descale.dim() == 2:
            descale = descale.unsqueeze(1)
        descale = descale.unsqueeze(-1)
    return (q.float() * descale.detach()).to(torch.bfloat16), k, v


def _with_values(
    q: torch.Tensor,
    qv: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    copies: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Query, key and scale such that scores are those of q and k and those of qv and v together. Where k and v lie side
    by side in one memory the key is that memory, else a copy of both, or only of that shape."""
    _check_values(q, qv, k, v)
    both = q.shape[-1] + qv.shape[-1]
    scale = checks.softmax_scale(None, both) if softmax_scale is None else softmax_scale
    if _is_behind(v, k):
        return torch.cat((qv, q), -1), v.as_strided((*v.shape[:-1], both), v.stride()), scale
    if _is_behind(k, v):
        return torch.cat((q, qv), -1), k.as_strided((*k.shape[:-1], both), k.stride()), scale
    return torch.cat((q, qv), -1), torch.cat((k, v), -1) if copies else _shape_of(k, both), scale


def _check_values(q: torch.Tensor, qv: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises for a qv that does not go with the others."""
    checks.tensor("qv", qv, q.dim(), "of the shape of q, with v's head_dim")
    if qv.shape != (*q.shape[:-1], v.shape[-1]) or qv.dtype != q.dtype:
        expected = (*q.shape[:-1], v.shape[-1])
        raise ValueError(f"qv is {qv.dtype} {tuple(qv.shape)}; it must be {q.dtype} {expected}: q's, with v's head_dim")
    checks.same_device("qv", qv, "q", q)
    checks.same_shape("v", v, "k", k, but_last=True)
    checks.equal_size("k", k.shape[-1], "head_dim", "q", q.shape[-1])
    both = q.shape[-1] + qv.shape[-1]
    if both > checks.HEAD_DIM_MAX and (both, v.shape[-1]) != (checks.LATENT_HEAD_DIM, checks.HEAD_DIM_MAX):
        raise NotImplementedError(
            f"qv is not offered for head_dims of q and v that add up to {both}; up to {checks.HEAD_DIM_MAX}, and "
            f"{checks.LATENT_HEAD_DIM - checks.HEAD_DIM_MAX} with {checks.HEAD_DIM_MAX}, they are"
        )


def _is_behind(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether each row of the second lies right behind one of the first, in one memory."""
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (first.requires_grad or second.requires_grad))
        and first.stride() == second.stride()
        and first.stride(-1) == 1
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.shape[-1] == second.storage_offset()
    )


@torch.no_grad()
def _signed_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    indices: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    options: OptionKeywords,
) -> torch.Tensor | None:
    """S_dmask: see flash_attn_func."""
    dropout_p, rng_state = options.get("dropout_p", 0.0), options.get("rng_state")
    if not dropout_p or rng_state is None:
        return None
    if indices.page_table is not None:
        raise NotImplementedError("return_attn_probs is not offered for pages with dropout_p; leave out one of them")
    used_q, used_k, _, starts_q, starts_k, *_ = indices
    batch = q.shape[0] if starts_q is None else starts_q.shape[0] - 1
    seq_q = q.shape[1] if starts_q is None else max_seqlen_q
    seq_k = k.shape[1] if starts_k is None else max_seqlen_k
    heads = q.shape[-2]
    weights = q.new_zeros((batch, heads, seq_q, seq_k))
    kept = keep_mask(rng_state, dropout_p, batch, heads, seq_q, seq_k)
    slopes = options.get("alibi_slopes")
    for b in range(batch):
        rows, keys = (
            tensor[b] if starts is None else tensor[int(starts[b]) : int(starts[b + 1])]
            for tensor, starts in ((q, starts_q), (k, starts_k))
        )
        rows, keys = (part if used is None else part[: int(used[b])] for part, used in ((rows, used_q), (keys, used_k)))
        if not (len(rows) and len(keys)):
            continue
        values = torch.eye(len(keys), device=q.device).unsqueeze(1).expand(-1, keys.shape[1], -1)
        own, _ = attend_one(
            *(rows, keys, values, causal, softmax_scale),
            window=options.get("window_size"),
            softcap=options.get("softcap", 0.0),
            alibi_slopes=None if slopes is None else slopes if slopes.dim() == 1 else slopes[b],
            chunk=options.get("attention_chunk", 0),
        )
        relative = (own / own.amax(-1, keepdim=True)).nan_to_num(0.0).transpose(0, 1)  # rows that see nothing: 0 / 0
        place = b, slice(None), slice(len(rows)), slice(len(keys))
        weights[place] = torch.where(kept[place], relative, -relative).to(q.dtype)
    return weights


def _copy(out: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling() or not out.is_inference():
        return out.copy_(output)
    with torch.inference_mode():  # elsewhere PyTorch lets nobody write into such a tensor
        return out.copy_(output)


def _pad(tensor: torch.Tensor) -> torch.Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % checks.HEAD_DIM_STEP))


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _pad(q), _pad(k), _pad(v)


def _shape_of(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """What checks can be asked about, in place of a copy with that head_dim that is yet to be made."""
    return tensor.new_empty(()).expand(*tensor.shape[:-1], head_dim)


def _options(
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, ...],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    others: dict[str, Any],
    qv: torch.Tensor | None,
) -> OptionKeywords:
    """What is asked for beyond tensors, in this package's words. Raises for what is not offered or not known."""
    checks.flag("causal", causal)
    if isinstance(window_size, torch.Tensor) and window_size.is_cpu:
        checks.tensor("window_size", window_size, 1, "(left, right)")
        window_size = tuple(window_size.tolist())
    if window_size is None:
        window_size = (-1, -1)
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(f"window_size must be a pair (left, right) of ints, -1 for no limit, not {window_size!r}")
    for side in window_size:
        if not checks.is_int(side):
            raise TypeError(f"window_size must be a pair (left, right) of ints, -1 for no limit, not {window_size!r}")
    if len(window_size) == 3:  # ROCm's third is a number of sink tokens
        if window_size[2]:
            raise NotImplementedError(f"window_size {tuple(window_size)} keeps sink tokens, which is not offered")
        window_size = window_size[:2]
    options: OptionKeywords = {}
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = dropout_in_range(dropout_p)
        if dropout_p:
            options["dropout_p"] = dropout_p
    for name, value in others.items():
        if name in ("sink_ptr", "s_aux") and name in others:
            if sinks is not None and value is not None:
                raise ValueError(f"sinks and {name} are one argument; give one of them")
            sinks = value if value is not None else sinks
        elif name in ("k_descale", "v_descale"):
            if value is not None and qv is not None:
                raise NotImplementedError(f"{name} is not offered with qv, whose keys are k and v of one scale")
            if value is not None:
                options[name] = value  # type: ignore[literal-required]
        elif name in _NOT_OFFERED:
            if value is not None:
                given = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
                raise NotImplementedError(f"{name} is not offered (it was {given}); leave it out, or give None")
        elif name in _HINTS:
            if value is not None and not isinstance(value, _HINTS[name]):
                kinds = " or ".join(kind.__name__ for kind in _HINTS[name])
                raise TypeError(f"{name} must be {kinds} or None, not {type(value).__name__}")
        elif name not in ("rng_state", "attention_chunk"):
            raise TypeError(f"there is no argument {name!r}")
    if others.get("rng_state") is not None:
        check_rng_state(others["rng_state"])
        options["rng_state"] = others["rng_state"]
    if others.get("attention_chunk") is not None:
        options["attention_chunk"] = chunk_in_range(others["attention_chunk"])
    if tuple(window_size) != (-1, -1):
        options["window_size"] = tuple(window_size)  # type: ignore[typeddict-item]
    if isinstance(softcap, bool) or not isinstance(softcap, Real) or softcap != softcap:
        raise TypeError(f"softcap must be a number, 0.0 for none, not {softcap!r}")
    if softcap > 0:  # FlashAttention takes any other number for none
        options["softcap"] = softcap
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    if sinks is not None:
        options["sinks"] = sinks
    return options


def _batch(starts: torch.Tensor) -> int:
    if starts.shape[0] == 0:
        raise ValueError("cu_seqlens_q has shape (0,); it must be int32 (batch + 1,), from 0 on")
    return starts.shape[0] - 1


def _unpacked(name: str, tensor: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    checks.memory(**{name: tensor})
    if tensor.shape[-3] != count:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its third dimension from the end must be {count}")
    return tensor.unbind(-3)
