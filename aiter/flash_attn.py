"""FlashAttention's functions, with its names, signatures and meanings, on this package's kernels.

    from aiter.flash_attn import flash_attn_func, flash_attn_varlen_func

Positions of arguments are FlashAttention 2's (https://github.com/Dao-AILab/flash-attention, flash_attn_interface.py);
keywords are those of FlashAttention 2, 3 and ROCm's library where their meanings agree. What is not offered raises
NotImplementedError by name; hints for speed (num_splits, pack_gqa, sm_margin, deterministic, ...) are taken and change
nothing: results are deterministic always. head_dim may be anything up to 256: it is padded to a multiple of 8.

Tensors are (batch, seq, heads, head_dim), packed ones (total_tokens, heads, head_dim). window_size is (left, right), -1
for no limit; query i stands at key i + seq_k - seq_q. softmax_lse is float32 (batch, heads, seq), packed (heads,
total_tokens), natural logarithm, of the keys alone (a sink is not in it). Rows without a key are zeros, lse -inf.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from aiter import checks
from aiter.dispatch import Operation, attend
from aiter.layout import NO_INDICES, Indices
from aiter.options import OptionKeywords, readable_index

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

# Taken and of no consequence: how fast, on how many units, in which order.
_HINTS = frozenset(
    (
        "num_splits",
        "pack_gqa",
        "sm_margin",
        "scheduler_metadata",
        "how_v3_bf16_cvt",
        "min_seqlen_q",
        "is_v3_atomic_fp32",
    )
)
# Not offered, and the value of each that asks for nothing.
_NOT_OFFERED: dict[str, Any] = {
    "dropout_p": 0.0,
    "qv": None,
    "q_descale": None,
    "k_descale": None,
    "v_descale": None,
    "attention_chunk": 0,
    "bias": None,
    "cu_seqlens_q_padded": None,
    "cu_seqlens_k_padded": None,
    "learnable_sink": None,
}
_OPERATION = Operation(lambda query, key, value: None, lambda sizes: True)


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
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    """Attention of q (batch, seq_q, heads_q, head_dim) over k (batch, seq_k, heads_kv, head_dim) and v, which is like k
    but may have another head_dim.

    Returns the output; with return_lse, (output, softmax_lse); with return_attn_probs, (output, softmax_lse, None), as
    there are no probabilities in memory. sinks: (heads_q,), one logit a head that joins the softmax. out: where the
    output goes.
    """
    options = _options(dropout_p, causal, window_size, softcap, alibi_slopes, sinks, others)
    return _attend(
        *(q, k, v, NO_INDICES, 0, 0, softmax_scale, causal, options, out, deterministic, return_attn_probs, return_lse)
    )


def flash_attn_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    """`flash_attn_func` with keys and values in one tensor (batch, seq_k, 2, heads_kv, head_dim)."""
    checks.tensor("kv", kv, 5, "(batch, seq_k, 2, heads_kv, head_dim)")
    k, v = _unpacked("kv", kv, 2)
    return flash_attn_func(q, k, v, *arguments, **keywords)


def flash_attn_qkvpacked_func(qkv: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    """`flash_attn_func` with all three in one tensor (batch, seq, 3, heads, head_dim)."""
    checks.tensor("qkv", qkv, 5, "(batch, seq, 3, heads, head_dim)")
    q, k, v = _unpacked("qkv", qkv, 3)
    return flash_attn_func(q, k, v, *arguments, **keywords)


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
    return_lse: bool = False,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **others: Any,
) -> Any:
    """Attention of packed sequences of different lengths.

    q: (total_q, heads_q, head_dim); sequence b has its rows from cu_seqlens_q[b] to before cu_seqlens_q[b + 1], int32
    (batch + 1,). k, v: packed likewise, by cu_seqlens_k; or, with block_table int32 (batch, max_blocks), caches
    (num_blocks, block_size, heads_kv, head_dim) of any strides, in which sequence b has seqused_k[b] tokens (or as many
    as cu_seqlens_k says). seqused_q, seqused_k: int32 (batch,), how many rows of each sequence count. max_seqlen_q and
    max_seqlen_k bound the lengths. Rows of q that belong to no sequence give zeros, or are left alone in `out`.
    """
    options = _options(dropout_p, causal, window_size, softcap, alibi_slopes, sinks, others)
    starts_q = _index("cu_seqlens_q", cu_seqlens_q, 1, "int32 (batch + 1,)", q)
    starts_k = _index("cu_seqlens_k", cu_seqlens_k, 1, "int32 (batch + 1,)", q)
    used_q = _index("seqused_q", seqused_q, 1, "int32 (batch,)", q)
    used_k = _index("seqused_k", seqused_k, 1, "int32 (batch,)", q)
    if starts_q is None:
        raise TypeError("cu_seqlens_q must be a torch.Tensor int32 (batch + 1,), not NoneType")
    pages = _index("block_table", block_table, 2, "int32 (batch, max_blocks)", q)
    if pages is not None:
        for name, cache in (("k", k), ("v", v)):
            checks.tensor(name, cache, 4, "(num_blocks, block_size, heads_kv, head_dim), as there is a block_table")
        if used_k is None and starts_k is not None:
            used_k = starts_k.diff()
        k, v, starts_k = k.transpose(1, 2), v.transpose(1, 2), None
    elif starts_k is None:
        raise TypeError("cu_seqlens_k must be a torch.Tensor int32 (batch + 1,), as there is no block_table")
    indices = Indices(used_q, used_k, pages, starts_q, starts_k)
    return _attend(
        *(q, k, v, indices, max_seqlen_q, max_seqlen_k, softmax_scale, causal, options, out, deterministic),
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


def _attend(
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
) -> Any:
    checks.flag("deterministic", deterministic)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, tensor, (3, 4), f"{checks.BSHD}, or packed {checks.PACKED}")
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5
    padded = head_dim % checks.HEAD_DIM_STEP or value_dim % checks.HEAD_DIM_STEP
    target = out
    if padded:
        q, k, v = (_pad(tensor) for tensor in (q, k, v))
        target = None if out is None else _pad(out)
    output, lse = attend(
        *(_OPERATION, (), q, k, v, causal, softmax_scale, True, options, indices, max_seqlen_q, max_seqlen_k, target)
    )
    if padded:
        output = output[..., :value_dim]
        output = output.contiguous() if out is None else out.copy_(output)
    if return_attn_probs:
        return output, lse, None
    return (output, lse) if return_lse else output


def _pad(tensor: torch.Tensor) -> torch.Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % checks.HEAD_DIM_STEP))


def _options(
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, ...],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    others: dict[str, Any],
) -> OptionKeywords:
    """What is asked for beyond tensors, in this package's words. Raises for what is not offered or not known."""
    checks.flag("causal", causal)
    if isinstance(window_size, (tuple, list)) and len(window_size) == 3:  # ROCm's third is a number of sink tokens
        if window_size[2]:
            raise NotImplementedError(f"window_size {tuple(window_size)} keeps sink tokens, which is not offered")
        window_size = window_size[:2]
    for name, value in {"dropout_p": dropout_p, **others}.items():
        if name in ("sink_ptr", "s_aux") and name in others:
            if sinks is not None and value is not None:
                raise ValueError(f"sinks and {name} are one argument; give one of them")
            sinks = value if value is not None else sinks
        elif name in _NOT_OFFERED:
            if value is not None and value != _NOT_OFFERED[name]:
                raise NotImplementedError(f"{name} is not offered (it was {value!r})")
        elif name not in _HINTS:
            raise TypeError(f"there is no argument {name!r}")
    options: OptionKeywords = {}
    if tuple(window_size) != (-1, -1):
        options["window_size"] = tuple(window_size)  # type: ignore[typeddict-item]
    if softcap > 0:  # FlashAttention takes any other number for none
        options["softcap"] = softcap
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    if sinks is not None:
        options["sinks"] = sinks
    return options


def _index(name: str, index: object, rank: int, layout: str, query: torch.Tensor) -> torch.Tensor | None:
    if index is None:
        return None
    checks.indices(name, index, (None,) * rank, layout, query)
    assert isinstance(index, torch.Tensor)
    return readable_index(index)


def _unpacked(name: str, tensor: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    if tensor.shape[-3] != count:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its third dimension from the end must be {count}")
    return tensor.unbind(-3)
