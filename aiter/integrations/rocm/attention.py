"""ROCm/aiter's attention functions and cache writes, with its names, positions and keywords.

What differs from there: any head_dim up to 512 and any number of heads; results are deterministic; a log-sum-exp is
that of the keys alone (a sink is not in it); probabilities that are asked for are None, or with dropout those of
aiter.flash_attn. Hints (how_v3_bf16_cvt, num_splits, workspaces, work metadata, ...) are taken and change nothing.
What is not offered raises NotImplementedError by name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from aiter import checks, flash_attn, flops, operations
from aiter.jit.arch import arch_of
from aiter.kv_cache import reshape_and_cache as write

Tensor = torch.Tensor
Window = tuple[int, ...]

# What programs ask of aiter.jit.core: whether flash_attn_func itself is to be called, rather than its form in Triton.
ENABLE_CK = True

# What everything here ends in; it checks its arguments, keywords that are put together below among them.
dense: Any = flash_attn.flash_attn_func
varlen: Any = flash_attn.flash_attn_varlen_func

# Keywords of ROCm's flash_attn_func that the operation of this package does not have.
_ONLY_ROCM = frozenset(
    (
        *("q", "k", "v", "bias", "deterministic", "return_attn_probs", "how_v3_bf16_cvt", "num_splits"),
        *("cu_seqlens_q", "cu_seqlens_kv", "sink_ptr", "out"),
    )
)
_own_flash_attn_func = operations.flash_attn_func
_OWN_POSITIONS = 5  # query, key, value, causal, softmax_scale


@functools.wraps(_own_flash_attn_func)
def either_flash_attn_func(*arguments: Any, **keywords: Any) -> Any:
    """`aiter.flash_attn_func`: this package's, or ROCm's where that one's keywords or longer list of positions are."""
    if len(arguments) < 4 and not keywords:
        return _own_flash_attn_func(*arguments)
    rocm = len(arguments) > _OWN_POSITIONS
    for name in keywords:
        rocm = rocm or name in _ONLY_ROCM or (name == "window_size" and _is_rocm_window(keywords[name]))
    if len(arguments) > 3 and rocm is isinstance(arguments[3], bool):
        raise TypeError(
            f"the fourth argument of flash_attn_func is {arguments[3]!r}: it is causal here, and dropout_p in ROCm's "
            "library; give both by name: flash_attn_func(q, k, v, causal=..., softmax_scale=..., dropout_p=...)"
        )
    if not rocm:
        return _own_flash_attn_func(*arguments, **keywords)
    if 3 < len(arguments) <= _OWN_POSITIONS:
        raise TypeError(
            "flash_attn_func has other positions here than in ROCm's library: with its keywords, give everything after "
            "q, k and v by name"
        )
    return flash_attn_func(*arguments, **{_ROCM_NAMES.get(name, name): value for name, value in keywords.items()})


_ROCM_NAMES = {"query": "q", "key": "k", "value": "v"}


def _is_rocm_window(window: object) -> bool:
    return isinstance(window, (tuple, list)) and len(window) == 3


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1, 0),
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    how_v3_bf16_cvt: int = 1,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    sink_ptr: Tensor | None = None,
    num_splits: int = 0,
    **others: Any,
) -> Any:
    """Dense attention, (batch, seq, heads, head_dim); with cu_seqlens_q and cu_seqlens_kv, int32 (batch + 1,), of that
    many rows of each sequence of a padded batch. Returns the output, or a tuple with what was asked for."""
    options: dict[str, Any] = {
        **{"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal, "window_size": window_size},
        **{"bias": bias, "alibi_slopes": alibi_slopes, "deterministic": deterministic, "sinks": sink_ptr},
        **{"num_splits": num_splits, "how_v3_bf16_cvt": how_v3_bf16_cvt, **others},
    }
    wants = {"return_lse": return_lse, "return_attn_probs": return_attn_probs}
    if cu_seqlens_q is None and cu_seqlens_kv is None:
        result = dense(q, k, v, **wants, **options)
        return _returned(result, return_lse, return_attn_probs)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, tensor, 4, checks.BSHD)
    batch, seqlen_q, heads_q, _ = q.shape
    places = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    result = varlen(
        *(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), places * seqlen_q, places * k.shape[1]),
        max_seqlen_q=seqlen_q,
        max_seqlen_k=k.shape[1],
        seqused_q=None if cu_seqlens_q is None else cu_seqlens_q.diff(),
        seqused_k=None if cu_seqlens_kv is None else cu_seqlens_kv.diff(),
        **wants,
        **options,
    )
    if return_lse or return_attn_probs:
        output, lse, *rest = result
        lse = lse.view(heads_q, batch, seqlen_q).transpose(0, 1)
        result = output.unflatten(0, (batch, seqlen_q)), lse, *rest
    else:
        result = result.unflatten(0, (batch, seqlen_q))
    return _returned(result, return_lse, return_attn_probs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    min_seqlen_q: int = 0,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    window_size: Window = (-1, -1, 0),
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    how_v3_bf16_cvt: int = 1,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
    cu_seqlens_q_padded: Tensor | None = None,
    cu_seqlens_k_padded: Tensor | None = None,
    sink_ptr: Tensor | None = None,
    **others: Any,
) -> Any:
    """Attention of packed sequences: see `aiter.flash_attn.flash_attn_varlen_func`, which has FlashAttention's
    positions. With cu_seqlens_*_padded, those say where sequences begin, and cu_seqlens_* how many rows each has. With
    block_table, k and v are caches (num_blocks, block_size, heads_kv, head_dim)."""
    if not checks.is_int(min_seqlen_q):
        raise TypeError(
            f"the eighth argument, min_seqlen_q, is {min_seqlen_q!r}; it must be an int. Where FlashAttention's "
            "positions are meant (dropout_p comes eighth there), use aiter.flash_attn.flash_attn_varlen_func"
        )
    if block_table is not None and not (cu_seqlens_q_padded is cu_seqlens_k_padded is None):
        raise NotImplementedError("cu_seqlens_q_padded and cu_seqlens_k_padded are not offered with a block_table")
    if cu_seqlens_q_padded is not None:
        cu_seqlens_q, others["seqused_q"] = cu_seqlens_q_padded, cu_seqlens_q.diff()
    if cu_seqlens_k_padded is not None and cu_seqlens_k is not None:
        cu_seqlens_k, others["seqused_k"] = cu_seqlens_k_padded, cu_seqlens_k.diff()
    result = varlen(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal),
        window_size=window_size,
        softcap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        block_table=block_table,
        sinks=sink_ptr,
        out=out,
        bias=bias,
        return_lse=return_lse,
        return_attn_probs=return_attn_probs,
        **others,
    )
    return _returned(result, return_lse, return_attn_probs)


def flash_attn_fp8_pertensor_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    causal: bool = False,
    window_size: Window = (-1, -1, 0),
    softmax_scale: float | None = None,
    sink_ptr: Tensor | None = None,
) -> Tensor:
    """`flash_attn_func` of 8-bit floats times a scale each; computed in bfloat16, which the result has."""
    q, k, v = _descaled(q, q_descale), _descaled(k, k_descale), _descaled(v, v_descale)
    return flash_attn_func(
        q, k, v, causal=causal, window_size=window_size, softmax_scale=softmax_scale, sink_ptr=sink_ptr
    )


def flash_attn_varlen_fp8_pertensor_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor,
    k_descale: Tensor,
    v_descale: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    min_seqlen_q: int = 0,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    window_size: Window = (-1, -1, 0),
    softmax_scale: float | None = None,
    sink_ptr: Tensor | None = None,
) -> Tensor:
    """`flash_attn_varlen_func` of 8-bit floats times a scale each; computed in bfloat16, which the result has."""
    q, k, v = _descaled(q, q_descale), _descaled(k, k_descale), _descaled(v, v_descale)
    return flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, min_seqlen_q),
        logits_soft_cap=logits_soft_cap,
        causal=causal,
        window_size=window_size,
        softmax_scale=softmax_scale,
        sink_ptr=sink_ptr,
    )


def mha_batch_prefill_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    kv_indptr: Tensor | None,
    kv_page_indices: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    window_size: Window = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    out: Tensor | None = None,
    kv_last_page_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    seqlen_k: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    kv_block_descale: Tensor | None = None,
    sink_ptr: Tensor | None = None,
    sink_size: int = 0,
) -> Any:
    """Packed queries over caches (pages, page_size, heads_kv, head_dim), or (slots, heads_kv, head_dim) with pages of
    one token: by lists of pages, or by block_table and seqlen_k where those are given. The caches that ROCm's library
    calls vectorized (five dimensions) are not offered."""
    _neutral(kv_block_descale=(kv_block_descale, None), sink_size=(sink_size, 0))
    result = varlen(
        *(q, _pages("k", k), _pages("v", v), cu_seqlens_q, None, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale),
        causal=causal,
        window_size=window_size,
        softcap=logits_soft_cap,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        sinks=sink_ptr,
        out=out,
        return_lse=return_lse,
        return_attn_probs=return_attn_probs,
        **_where(cu_seqlens_q.shape[0] - 1, kv_indptr, kv_page_indices, kv_last_page_lens, block_table, seqlen_k),
        **_descales(q, k, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale),
    )
    return _returned(result, return_lse, return_attn_probs)


# ---- decoding ----


def paged_attention_v1(
    out: Tensor,
    workspace_buffer: Tensor | None,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    block_tables: Tensor,
    cu_query_lens: Tensor | None,
    context_lens: Tensor,
    max_context_len: int,
    alibi_slopes: Tensor | None,
    kv_cache_dtype: str,
    kv_cache_layout: str,
    logits_soft_cap: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    fp8_out_scale: Tensor | None = None,
    partition_size: int = 256,
    mtp: int = 1,
    sliding_window: int = 0,
) -> Tensor:
    """One query (batch, heads_q, head_dim) of each sequence over its cached tokens; sequence b has row b, or row
    cu_query_lens[b]. kv_cache_layout: "NHD" (pages, page_size, heads_kv, head_dim), or "HND". sliding_window: how many
    tokens are seen, its own counted; 0: all."""
    _neutral(fp8_out_scale=(fp8_out_scale, None), mtp=(mtp, 1))
    batch = context_lens.shape[0]
    if cu_query_lens is None:
        starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    else:
        starts = torch.cat([cu_query_lens[:batch], cu_query_lens[batch - 1 : batch] + 1])
    caches = _cache_pages(key_cache, value_cache, kv_cache_dtype, kv_cache_layout)
    varlen(
        *(query, *caches, starts, None, 1, max_context_len),
        seqused_q=torch.ones_like(context_lens, dtype=torch.int32),
        out=out,
        block_table=block_tables,
        seqused_k=context_lens,
        **_paged_options(scale, alibi_slopes, logits_soft_cap, sliding_window),
        **_descales(query, caches[0], k_descale=k_scale, v_descale=v_scale),
    )
    return out


def paged_attention_ragged(
    out: Tensor,
    workspace_buffer: Tensor | None,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    kv_indptr: Tensor,
    kv_page_indices: Tensor,
    kv_last_page_lens: Tensor | None,
    block_size: int,
    max_num_partitions: int,
    alibi_slopes: Tensor | None,
    kv_cache_dtype: str,
    kv_cache_layout: str,
    logits_soft_cap: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    fp8_out_scale: Tensor | None = None,
    partition_size: int = 256,
    mtp: int = 1,
) -> Tensor:
    """`paged_attention_v1` by lists of pages. Sequences have at most max_num_partitions * partition_size tokens."""
    _neutral(fp8_out_scale=(fp8_out_scale, None), mtp=(mtp, 1))
    batch = query.shape[0]
    caches = _cache_pages(key_cache, value_cache, kv_cache_dtype, kv_cache_layout)
    checks.equal_size("block_size", block_size, "the value", "key_cache", caches[0].shape[1])
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    varlen(
        *(query, *caches, starts, None, 1, max_num_partitions * partition_size),
        out=out,
        **_where(batch, kv_indptr, kv_page_indices, kv_last_page_lens),
        **_paged_options(scale, alibi_slopes, logits_soft_cap),
        **_descales(query, caches[0], k_descale=k_scale, v_descale=v_scale),
    )
    return out


def mla_decode_fwd(
    q: Tensor,
    kv_buffer: Tensor,
    o: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_lens: Tensor | None,
    max_seqlen_q: int,
    page_size: int = 1,
    nhead_kv: int = 1,
    sm_scale: float | None = None,
    logit_cap: float = 0.0,
    num_kv_splits: int | None = None,
    num_kv_splits_indptr: Tensor | None = None,
    work_meta_data: Tensor | None = None,
    work_indptr: Tensor | None = None,
    work_info_set: Tensor | None = None,
    reduce_indptr: Tensor | None = None,
    reduce_final_map: Tensor | None = None,
    reduce_partial_map: Tensor | None = None,
    q_scale: Tensor | None = None,
    kv_scale: Tensor | None = None,
    intra_batch_mode: bool = False,
    return_logits: bool = False,
    return_lse: bool = False,
    g_kv_indptr: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    causal: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Latent attention: q (total_q, heads, 576), any number of heads and of queries of a sequence, over kv_buffer
    (pages, page_size, nhead_kv, 576), whose first o.shape[-1] elements are the values too. Writes o (total_q, heads,
    512). Returns it and the log-sum-exp (total_q, heads), or None."""
    _neutral(return_logits=(return_logits, False), cp_world_size=(cp_world_size, 1))
    checks.tensor("kv_buffer", kv_buffer, 4, "(pages, page_size, heads_kv, head_dim)")
    for name, given, dim in (("page_size", page_size, 1), ("nhead_kv", nhead_kv, 2)):
        checks.equal_size(name, given, "the value", "kv_buffer", kv_buffer.shape[dim])
    result = varlen(
        *(q, kv_buffer, kv_buffer[..., : o.shape[-1]], qo_indptr, None, max_seqlen_q, 0),
        softmax_scale=sm_scale,
        causal=causal,
        softcap=logit_cap,
        out=o,
        return_lse=return_lse,
        **_where(qo_indptr.shape[0] - 1, kv_indptr, kv_indices, kv_last_page_lens),
        **_descales(q, kv_buffer, q_descale=q_scale, k_descale=kv_scale, v_descale=kv_scale),
    )
    return o, result[1].transpose(0, 1) if return_lse else None


def mla_prefill_fwd(
    q: Tensor,
    kv_buffer: Tensor,
    o: Tensor,
    qo_indptr: Tensor,
    kv_indptr: Tensor,
    kv_indices: Tensor,
    kv_last_page_lens: Tensor | None,
    max_seqlen_q: int,
    sm_scale: float | None = None,
    logit_cap: float = 0.0,
    num_kv_splits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`mla_decode_fwd` for prompts; the log-sum-exp is (total_q, 1, heads, 1)."""
    _, lse = mla_decode_fwd(
        *(q, kv_buffer, o, qo_indptr, kv_indptr, kv_indices, kv_last_page_lens, max_seqlen_q),
        page_size=kv_buffer.shape[1],
        nhead_kv=kv_buffer.shape[2],
        sm_scale=sm_scale,
        logit_cap=logit_cap,
        return_lse=True,
    )
    assert lse is not None
    return o, lse[:, None, :, None]


def get_mla_metadata_info_v1(*arguments: Any, **keywords: Any) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shapes and dtypes of what `mla_decode_fwd` is to be given: one element each, as it looks at none."""
    return (((1,), torch.uint64), *(((1,), torch.int32),) * 5)


def get_mla_metadata_v1(*arguments: Any, **keywords: Any) -> None:
    """Writes nothing: `mla_decode_fwd` shares out its work itself."""


# ---- caches ----


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    """Writes key and value (tokens, heads_kv, head_dim) by slot into caches (pages, page_size, heads_kv, head_dim)."""
    (key_cache, value_cache), scaled = _as_floats((key_cache, value_cache), kv_cache_dtype)
    scales = (_one_or_more(scale) if scaled else None for scale in (k_scale, v_scale))
    write(key, value, key_cache, value_cache, slot_mapping, *scales)


def concat_and_cache_mla(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, kv_cache_dtype: str, scale: Tensor | None
) -> None:
    """Writes kv_c (tokens, 512) and k_pe (tokens, 64) by slot, side by side, into a cache (pages, page_size, 576)."""
    (cache,), scaled = _as_floats((kv_cache.unsqueeze(2),), kv_cache_dtype)
    latent, scales = kv_c.shape[-1], (_one_or_more(scale) if scaled else None,) * 2
    caches = cache[..., :latent], cache[..., latent:]
    write(kv_c.unsqueeze(1), k_pe.unsqueeze(1), *caches, slot_mapping, *scales)


# ---- what is known by name and not offered ----


def _not_offered(name: str, why: str) -> Callable[..., NoReturn]:
    def function(*arguments: Any, **keywords: Any) -> NoReturn:
        raise NotImplementedError(f"{name} of ROCm's library is not offered: {why}")

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Not offered: {why}."
    return function


_SHUFFLED = "no kernel here reads its caches, pieces of 16 bytes: (pages, heads, head_dim / x, page_size, x)"
_FP8_PREFILL = "8-bit prefill in two steps; flash_attn_varlen_func and mla_prefill_fwd do it in one, from 16-bit values"
pa_fwd_asm = _not_offered("pa_fwd_asm", _SHUFFLED)
paged_attention_common = _not_offered("paged_attention_common", _SHUFFLED)
paged_attention_rocm = _not_offered("paged_attention_rocm", _SHUFFLED)
reshape_and_cache = _not_offered("reshape_and_cache", f"{_SHUFFLED}; see reshape_and_cache_flash")
get_ps_metadata_info_v1 = _not_offered("get_ps_metadata_info_v1", _FP8_PREFILL)
get_ps_metadata_v1 = _not_offered("get_ps_metadata_v1", _FP8_PREFILL)
mla_prefill_ps_asm_fwd = _not_offered("mla_prefill_ps_asm_fwd", _FP8_PREFILL)
mla_reduce_v1 = _not_offered("mla_reduce_v1", _FP8_PREFILL)


# ---- arguments ----


def _returned(result: Any, return_lse: bool, return_attn_probs: bool) -> Any:
    """What ROCm's functions return: the output alone, or a tuple of it, the log-sum-exp and the probabilities, of which
    FlashAttention's have the last two or none."""
    if return_lse or not return_attn_probs:
        return result
    output, _, probabilities = result
    return output, probabilities


def _neutral(**given: tuple[object, object]) -> None:
    for name, (value, neutral) in given.items():
        if value is not neutral and (isinstance(value, Tensor) or value != neutral):
            shown = "a tensor" if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{name} is not offered (it was {shown}); leave it out, or give {neutral!r}")


def _pages(name: str, cache: Tensor) -> Tensor:
    """A cache as (pages, page_size, heads_kv, head_dim)."""
    if isinstance(cache, Tensor) and cache.dim() == 5:
        raise NotImplementedError(f"{name} has five dimensions, the layout called vectorized, which is not offered")
    checks.tensor(name, cache, (3, 4), "(pages, page_size, heads_kv, head_dim) or (slots, heads_kv, head_dim)")
    return cache.unsqueeze(1) if cache.dim() == 3 else cache


def _cache_pages(key_cache: Tensor, value_cache: Tensor, dtype: str, layout: str) -> tuple[Tensor, ...]:
    caches, _ = _as_floats((_pages("key_cache", key_cache), _pages("value_cache", value_cache)), dtype)
    if layout not in ("NHD", "HND"):
        raise ValueError(f"kv_cache_layout is {layout!r}; it must be 'NHD' or 'HND'")
    return caches if layout == "NHD" else tuple(cache.transpose(1, 2) for cache in caches)


def _where(
    batch: int,
    indptr: Tensor | None,
    indices: Tensor | None,
    last_page_lens: Tensor | None,
    block_table: Tensor | None = None,
    lengths: Tensor | None = None,
) -> dict[str, Any]:
    """Where pages lie, as keywords. Lists may be of more sequences than there are."""
    if block_table is not None:
        return {"block_table": block_table, "seqused_k": lengths}
    lists = {"page_indptr": indptr, "page_indices": indices, "last_page_len": last_page_lens, "seqused_k": lengths}
    for name, count in (("page_indptr", batch + 1), ("last_page_len", batch)):
        tensor = lists[name]
        lists[name] = None if tensor is None else tensor[:count]
    return lists


def _paged_options(scale: float, slopes: Tensor | None, softcap: float, sliding_window: int = 0) -> dict[str, Any]:
    if slopes is not None and softcap > 0:
        raise NotImplementedError(
            "alibi_slopes with logits_soft_cap is not offered: ROCm's library caps after the bias, here it is before"
        )
    window = (sliding_window - 1, 0) if sliding_window > 0 else (-1, -1)
    return {"softmax_scale": scale, "alibi_slopes": slopes, "softcap": softcap, "window_size": window, "causal": True}


def _descales(q: Tensor, cache: Tensor, **descales: Tensor | None) -> dict[str, Any]:
    """Of 8-bit caches; others are not scaled, whatever is given."""
    if q.element_size() == 1:
        raise NotImplementedError(f"a query of 8 bits is not offered (it was {q.dtype}); give it in 16 bits")
    return descales if cache.element_size() == 1 else {}


def _descaled(tensor: Tensor, descale: Tensor) -> Tensor:
    return (tensor.float() * descale).to(torch.bfloat16)


def _one_or_more(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.reshape(-1)


def _as_floats(caches: tuple[Tensor, ...], name: str) -> tuple[tuple[Tensor, ...], bool]:
    """Caches with the dtype that kv_cache_dtype names, and whether they hold scaled values. Bytes that are called fp8
    are what the GPU itself calculates with: e4m3fnuz on gfx942, e4m3fn elsewhere."""
    if name == "auto":
        return caches, False
    if name not in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        raise ValueError(f"kv_cache_dtype is {name!r}; it must be 'auto', 'fp8', 'fp8_e4m3' or 'fp8_e5m2'")
    if caches[0].dtype != torch.uint8:
        return caches, True
    dtype = torch.float8_e5m2
    if name != "fp8_e5m2":
        fnuz = caches[0].is_cuda and arch_of(caches[0].device) == "gfx942"
        dtype = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
    return tuple(cache.view(dtype) for cache in caches), True


# ---- as torch.ops.aiter has them ----

_library = torch.library.Library("aiter", "FRAGMENT")
_COMMON = (
    "Tensor? alibi_slopes, str kv_cache_dtype, str kv_cache_layout, float logits_soft_cap, Tensor k_scale, "
    "Tensor v_scale, Tensor? fp8_out_scale=None, int partition_size=256, int mtp=1"
)
_FIRST = "Tensor(a!) out, Tensor workspace_buffer, Tensor query, Tensor key_cache, Tensor value_cache, float scale"
_library.define(
    f"paged_attention_v1({_FIRST}, Tensor block_tables, Tensor? cu_query_lens, Tensor context_lens, "
    f"int max_context_len, {_COMMON}, int sliding_window=0) -> Tensor(a!)"
)
_library.define(
    f"paged_attention_ragged({_FIRST}, Tensor kv_indptr, Tensor kv_page_indices, Tensor kv_last_page_lens, "
    f"int block_size, int max_num_partitions, {_COMMON}) -> Tensor(a!)"
)
for _device in ("CPU", "CUDA"):
    _library.impl("paged_attention_v1", paged_attention_v1, _device)
    _library.impl("paged_attention_ragged", paged_attention_ragged, _device)
flops.count_pages(torch.ops.aiter.paged_attention_v1, torch.ops.aiter.paged_attention_ragged)
