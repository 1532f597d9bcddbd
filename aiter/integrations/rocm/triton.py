"""The attention functions of ROCm/aiter's aiter.ops.triton, with its names, positions and keywords: see attention.py.

Functions there that share a name have prefixes here: mha_ for those of aiter.ops.triton.attention.mha, v3_ for those of
mha_v3, which are FlashAttention 3's.
"""

from __future__ import annotations

from typing import Any

import torch

from aiter import flash_attn
from aiter.integrations.rocm import attention
from aiter.integrations.rocm.attention import Window, _descales, _neutral, varlen

Tensor = torch.Tensor


def unified_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: Window,
    block_table: Tensor,
    softcap: float,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    q_scales: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    output_scale: Tensor | None = None,
    qq_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    shuffled_kv_cache: bool = False,
    skip_reduce: bool = False,
) -> None:
    """Packed queries, of prompts and of decoding alike, over caches (pages, page_size, heads_kv, head_dim) by
    block_table; the output goes to `out`, of which rows that belong to no sequence are left alone. Not causal too."""
    _neutral(
        q_scales=(q_scales, None),
        output_scale=(output_scale, None),
        qq_bias=(qq_bias, None),
        shuffled_kv_cache=(shuffled_kv_cache, False),
        skip_reduce=(skip_reduce, False),
    )
    varlen(
        *(q, k, v, cu_seqlens_q, None, max_seqlen_q, max_seqlen_k),
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
        seqused_k=seqused_k,
        sinks=sinks,
        out=out,
        **_descales(q, k, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale),
    )


def mla_decode_fwd(
    q: Tensor,
    kv_buffer: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    max_seqlen_kv: int,
    block_tables: Tensor,
    softmax_scale: float,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    causal: bool,
    q_descale: Tensor | None,
    kv_descale: Tensor | None,
    q_scales: Tensor | None = None,
    out_scale: Tensor | None = None,
    shuffled_kv_cache: bool = False,
    skip_reduce: bool = False,
) -> None:
    """Latent attention of q (total_q, heads, kv_lora_rank + qk_rope_head_dim) over kv_buffer (pages, page_size, 1, the
    same) by block_tables; the output (total_q, heads, kv_lora_rank) goes to `out`. Sequences may have any number of
    queries."""
    _neutral(
        q_scales=(q_scales, None),
        out_scale=(out_scale, None),
        shuffled_kv_cache=(shuffled_kv_cache, False),
        skip_reduce=(skip_reduce, False),
    )
    varlen(
        *(q, kv_buffer, kv_buffer[..., :kv_lora_rank], cu_seqlens_q, None, q.shape[0], max_seqlen_kv),
        softmax_scale=softmax_scale,
        causal=causal,
        block_table=block_tables,
        seqused_k=seqused_k,
        out=out,
        **_descales(q, kv_buffer, q_descale=q_descale, k_descale=kv_descale, v_descale=kv_descale),
    )


def mha_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    sink: Tensor | None = None,
    config: dict[str, Any] | None = None,
) -> Any:
    """`attention.flash_attn_func`; config, the sizes of tiles, changes nothing."""
    positions = dropout_p, softmax_scale, causal, window_size, bias, alibi_slopes, deterministic
    return attention.flash_attn_func(q, k, v, *positions, return_lse, return_attn_probs, sink_ptr=sink)


def mha_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    out: Tensor | None = None,
    sink: Tensor | None = None,
    config: dict[str, Any] | None = None,
    **others: Any,
) -> Any:
    """`attention.flash_attn_varlen_func`; config, the sizes of tiles, changes nothing."""
    return attention.flash_attn_varlen_func(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        dropout_p=dropout_p,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        bias=bias,
        alibi_slopes=alibi_slopes,
        deterministic=deterministic,
        return_lse=return_lse,
        return_attn_probs=return_attn_probs,
        block_table=block_table,
        out=out,
        sink_ptr=sink,
        **others,
    )


def v3_flash_attn_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False, **others: Any
) -> Any:
    """`aiter.flash_attn.flash_attn_func` with FlashAttention 3's first positions; the others by keyword."""
    return flash_attn.flash_attn_func(q, k, v, softmax_scale=softmax_scale, causal=causal, **others)


def v3_flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None = None,
    causal: bool = False,
    **others: Any,
) -> Any:
    """`aiter.flash_attn.flash_attn_varlen_func` with FlashAttention 3's first positions; the others by keyword."""
    positions = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return varlen(*positions, softmax_scale=softmax_scale, causal=causal, **others)


def v3_flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    **others: Any,
) -> Any:
    """`aiter.flash_attn.flash_attn_with_kvcache`, causal unless told otherwise; the arguments after it by keyword."""
    return flash_attn.flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v),
        qv=qv,
        cache_seqlens=cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        **others,
    )
