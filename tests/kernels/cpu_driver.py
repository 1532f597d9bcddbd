"""Drives CPU kernels below the operations: problem and tensors are filled in here, straight through the launch ABI."""

from __future__ import annotations

import ctypes
import functools
import math

import torch

from aiter import abi
from aiter.jit import get_kernel
from aiter.jit.arch import cpu_arch, runs_here
from aiter.jit.spec import Spec

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Every code path that this CPU can run, and no kernel twice: an arch is listed where it changes the code for a dtype.
ARCHS = [
    (dtype, arch)
    for dtype, arch in (
        ("fp32", "x86-64-v2"),
        ("fp16", "x86-64-v2"),
        ("bf16", "x86-64-v3"),
        ("fp32", "x86-64-v3"),
        ("fp16", "x86-64-v3"),
        ("fp32", "x86-64-v4"),
        ("fp16", "x86-64-v4"),
        ("bf16", "x86-64-v4"),
        ("bf16", "x86-64-v4+avx512bf16"),
        ("bf16", "x86-64-v4+avx512bf16+amxbf16"),
        ("fp16", "x86-64-v4+avx512bf16+amxbf16+amxfp16"),
    )
    if runs_here(arch)
] or [(dtype, cpu_arch()) for dtype in DTYPES]
GOMP_PARALLEL = ctypes.cast(getattr(ctypes.CDLL(None), "GOMP_parallel", None), ctypes.c_void_p).value


@functools.cache
def kernel(dtype: str, head_dim: int, causal: bool, arch: str, name: str = "attention_forward"):
    return get_kernel(Spec(name, dtype, head_dim, causal, arch))


def attend(
    arch: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    max_seqlen: tuple[int, int] | None = None,
    threads: int = 2,
    parallel: int | None = GOMP_PARALLEL,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp. Tensors are (batch, seq, heads, head_dim), or packed (total, heads, head_dim) with
    `max_seqlen`; with a page table key and value are (pages, position, heads, head_dim)."""
    packed_q, packed_k = query.dim() == 3, key.dim() == 3
    heads_q, head_dim = query.shape[-2:]
    heads_kv, paged = key.shape[-2], page_table is not None
    batch = len(seqlens_q) if packed_q else query.shape[0]
    seqlen_q = max_seqlen[0] if packed_q else query.shape[1]
    seqlen_k = page_table.shape[1] * key.shape[1] if paged else max_seqlen[1] if packed_k else key.shape[1]
    # Whatever the kernel does not write shows up as NaN.
    output = torch.full(query.shape, math.nan, dtype=query.dtype)
    lse = torch.full((heads_q, query.shape[0]) if packed_q else (batch, heads_q, seqlen_q), math.nan)

    def strides(tensor: torch.Tensor) -> tuple[int, int, int]:
        return (0, *tensor.stride()[:2]) if tensor.dim() == 3 else tensor.stride()[:3]

    problem = abi.AttentionProblem(
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        packed_q=packed_q,
        packed_k=packed_k,
        page_size=key.shape[1] if paged else 0,
        total_q=query.shape[0] if packed_q else 0,
        total_k=key.shape[0] if packed_k else 0,
        num_pages=key.shape[0] if paged else 0,
        page_table_stride=page_table.stride(0) if paged else 0,
        query_strides=strides(query),
        key_strides=strides(key),
        value_strides=strides(value),
        output_strides=strides(output),
        lse_strides=(0, query.shape[0]) if packed_q else lse.stride()[:2],
        softmax_scale=1 / math.sqrt(head_dim) if scale is None else scale,
    )
    names = {dtype: name for name, dtype in DTYPES.items()}
    built = kernel(names[query.dtype], head_dim, causal, arch)
    workspace = torch.full((built.workspace_bytes(problem),), 0x7F, dtype=torch.uint8)
    tensors = (query, key, value, output, lse, seqlens_q, seqlens_k, page_table, workspace)
    executor = abi.CpuExecutor(parallel, threads, 0)
    built.launch(
        problem,
        abi.pack_tensors(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors)),
        ctypes.addressof(executor),
    )
    return output, lse


def gradients(
    arch: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    max_seqlen: tuple[int, int] | None = None,
    threads: int = 2,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV, from what `attend` returned. Tensors are dense, or packed with `max_seqlen`."""
    packed = query.dim() == 3
    heads_q, head_dim = query.shape[-2:]
    results = [torch.full(tensor.shape, math.nan, dtype=tensor.dtype) for tensor in (query, key, value)]

    def strides(tensor: torch.Tensor) -> tuple[int, int, int]:
        return (0, *tensor.stride()[:2]) if packed else tensor.stride()[:3]

    forward = abi.AttentionProblem(
        batch=len(seqlens_q) if packed else query.shape[0],
        heads_q=heads_q,
        heads_kv=key.shape[-2],
        seqlen_q=max_seqlen[0] if packed else query.shape[1],
        seqlen_k=max_seqlen[1] if packed else key.shape[1],
        packed_q=packed,
        packed_k=packed,
        total_q=query.shape[0] if packed else 0,
        total_k=key.shape[0] if packed else 0,
        query_strides=strides(query),
        key_strides=strides(key),
        value_strides=strides(value),
        output_strides=strides(output),
        lse_strides=(0, query.shape[0]) if packed else lse.stride()[:2],
        softmax_scale=1 / math.sqrt(head_dim) if scale is None else scale,
    )
    names = ("grad_output_strides", "grad_query_strides", "grad_key_strides", "grad_value_strides")
    grads = {name: strides(tensor) for name, tensor in zip(names, (grad_output, *results), strict=True)}
    problem = abi.AttentionGradProblem(forward=forward, **grads)
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    built = kernel(dtype_names[query.dtype], head_dim, causal, arch, "attention_backward")
    workspace = torch.full((built.workspace_bytes(problem),), 0x7F, dtype=torch.uint8)
    tensors = (query, key, value, output, lse, grad_output, grad_lse, *results, seqlens_q, seqlens_k, workspace)
    executor = abi.CpuExecutor(GOMP_PARALLEL, threads, 0)
    built.launch(
        problem,
        abi.pack_grad_tensors(*(0 if tensor is None else tensor.data_ptr() for tensor in tensors)),
        ctypes.addressof(executor),
    )
    return tuple(results)
