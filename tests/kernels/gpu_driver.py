"""Drives GPU kernels below the operations, through the launch ABI: on an emulated AMD GPU, or on a CUDA device.

A target is the arch of an emulated GPU or "cuda". On an emulated one the kernel sees nothing but its arguments, each
between guards: any access beside them is an error that names the instruction.
"""

from __future__ import annotations

import functools
import math
import os
import shutil

import emulator
import pytest
import torch

from aiter import abi
from aiter.jit import get_kernel
from aiter.jit.arch import arch_of
from aiter.jit.spec import Spec

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
EMULATED = emulator.ARCHS
TARGETS = (*EMULATED, "cuda")


def require(target: str) -> None:
    """Skips the test where the target, or the compiler for it, is not to be had."""
    if target == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    elif not (os.environ.get("AITER_HIPCC") or shutil.which("hipcc")):
        pytest.skip("no hipcc (.ci/amd-toolchain makes one)")


def device(target: str) -> str:
    return "cuda" if target == "cuda" else "cpu"


@functools.cache
def kernel(target: str, name: str, dtype: str, head_dim: int, causal: bool, paged: bool):
    if target != "cuda":
        emulator.load_runtime()
    arch = arch_of(torch.device("cuda")) if target == "cuda" else target
    return get_kernel(Spec(name, dtype, head_dim, causal, arch, (("paged", 1),) if paged else ()))


def attend(
    target: str,
    name: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool = False,
    scale: float | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    max_seqlen: tuple[int, int] | None = None,
    stats: dict | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp. Tensors are (batch, seq, heads, head_dim), or packed (total, heads, head_dim) with
    `max_seqlen`; with a page table key and value are (pages, position, heads, head_dim). `stats` receives what the
    emulator has counted."""
    packed_q, packed_k, paged = query.dim() == 3, key.dim() == 3, page_table is not None
    heads_q, head_dim = query.shape[-2:]
    batch = len(seqlens_q) if packed_q else query.shape[0]
    seqlen_q = max_seqlen[0] if packed_q else query.shape[1]
    # Whatever the kernel does not write shows up as NaN.
    output = torch.full(query.shape, math.nan, dtype=query.dtype, device=query.device)
    lse_shape = (heads_q, query.shape[0]) if packed_q else (batch, heads_q, seqlen_q)
    lse = torch.full(lse_shape, math.nan, device=query.device)

    def strides(tensor: torch.Tensor) -> tuple[int, int, int]:
        return (0, *tensor.stride()[:2]) if tensor.dim() == 3 else tensor.stride()[:3]

    problem = abi.AttentionProblem(
        batch=batch,
        heads_q=heads_q,
        heads_kv=key.shape[-2],
        seqlen_q=seqlen_q,
        seqlen_k=page_table.shape[1] * key.shape[1] if paged else max_seqlen[1] if packed_k else key.shape[1],
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
    dtype = next(word for word, dtype in DTYPES.items() if dtype == query.dtype)
    built = kernel(target, name, dtype, head_dim, causal, paged)

    def launch() -> None:
        built.launch(problem, abi.pack_tensors(*(0 if t is None else t.data_ptr() for t in tensors)), stream)

    workspace = torch.full((built.workspace_bytes(problem),), 0x7F, dtype=torch.uint8, device=query.device)
    tensors = (query, key, value, output, lse, seqlens_q, seqlens_k, page_table, workspace)
    if target == "cuda":
        stream = torch.cuda.current_stream().cuda_stream
        launch()
        return output, lse
    stream = 0
    with emulator.session(target, threads=2) as gpu:
        for tensor in tensors:
            gpu.allow(tensor, writable=tensor is output or tensor is lse or tensor is workspace)
        launch()
        gpu.check()
        if stats is not None:
            stats.update(gpu.stats())
    return output, lse
