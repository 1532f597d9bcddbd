"""`aiter demo`: the five operations on the best device here, beside PyTorch's own operator, as a table."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F

import aiter
from aiter.cli.table import duration, table
from aiter.errors import UnsupportedError
from aiter.jit.arch import arch_of, is_gpu
from aiter.reference import attend_one, gather_pages

BATCH, SEQ, HEADS, KV_HEADS, HEAD_DIM, PAGE = 2, 512, 8, 2, 64, 16
Result = TypeVar("Result")
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Case:
    """One operation on given data: `run` calls it, `torch_run` does the same with PyTorch, `reference` is float64."""

    name: str
    run: Callable[[], torch.Tensor]
    torch_run: Callable[[], torch.Tensor]
    reference: torch.Tensor


def run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    dtype = options.dtype or ("fp16" if device.type == "cuda" else "fp32")
    arch = arch_of(device)
    where = torch.cuda.get_device_name(device) if is_gpu(arch) else f"CPU, {torch.get_num_threads()} threads"
    if not options.json:
        print(f"aiter {aiter.__version__} on {device} ({where}, arch {arch}), {dtype}")
        print(f"batch {BATCH}, {SEQ} tokens, {HEADS} query heads, head_dim {HEAD_DIM}, causal")
        print("Each operation's first call compiles its kernel if no cache holds it, in some seconds ...", flush=True)
    with torch.inference_mode():
        rows = [measure(case, device) for case in cases(device, DTYPES[dtype])]
    if options.json:
        print(json.dumps({"device": str(device), "arch": arch, "dtype": dtype, "operations": rows}, indent=2))
    else:
        head = ("operation", "first call", "later calls", "PyTorch's", "error", "PyTorch's error")
        times, errors = ("first_s", "later_s", "torch_s"), ("error", "torch_error")
        cells = [
            (row["operation"], *(duration(row[t]) for t in times), *(f"{row[e]:.1e}" for e in errors)) for row in rows
        ]
        print(f"\n{table(head, cells)}")
        print("\nOperations share kernels. Errors are the largest distance of any element from float64 mathematics.")
        print("PyTorch's is scaled_dot_product_attention, on pages gathered and padding masked beforehand.")
    return 0 if all(row["error"] <= max(4 * row["torch_error"], 1e-2 * row["scale"]) for row in rows) else 1


def choose_device(name: str | None) -> torch.device:
    """The device called so, or the best one. Raises UnsupportedError where PyTorch has no such device here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        raise UnsupportedError(
            f"--device {name}: there is no such kind of device; expected cpu, cuda, cuda:1, ..."
        ) from None
    if device.type == "cuda":
        if not 0 <= (device.index or 0) < gpus:
            here = f"{gpus} here, cuda:0 to cuda:{gpus - 1}" if gpus else "none here"
            built = "" if torch.version.hip or torch.version.cuda else ", because it is built for CPUs alone"
            raise UnsupportedError(f"--device {name}: of such GPUs PyTorch sees {here}{built}")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def measure(case: Case, device: torch.device) -> dict:
    """First call, later calls and error of one operation, and the same of PyTorch's operator."""
    first, output = timed(case.run, device)
    later = statistics.median(timed(case.run, device)[0] for _ in range(10))
    _, torch_output = timed(case.torch_run, device)
    torch_later = statistics.median(timed(case.torch_run, device)[0] for _ in range(10))
    return {
        "operation": case.name,
        "first_s": first,
        "later_s": later,
        "torch_s": torch_later,
        "error": _error(output, case.reference),
        "torch_error": _error(torch_output, case.reference),
        "scale": case.reference.abs().max().item(),
    }


def cases(device: torch.device, dtype: torch.dtype) -> list[Case]:
    """The five operations on random data that is the same in every run."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, key, value = (random(BATCH, SEQ, HEADS, HEAD_DIM) for _ in range(3))
    few_key, few_value = (random(BATCH, SEQ, KV_HEADS, HEAD_DIM) for _ in range(2))
    one_key, one_value = (random(BATCH, SEQ, 1, HEAD_DIM) for _ in range(2))
    pages = BATCH * SEQ // PAGE
    k_cache, v_cache = (random(pages, KV_HEADS, PAGE, HEAD_DIM) for _ in range(2))
    page_table = torch.randperm(pages, generator=generator).to(torch.int32).view(BATCH, -1).to(device)
    token = random(BATCH, 1, HEADS, HEAD_DIM)
    paged_key, paged_value = (
        torch.stack([gather_pages(cache, row, SEQ) for row in page_table]) for cache in (k_cache, v_cache)
    )
    lengths = [SEQ, SEQ // 3]
    seq_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    return [
        _dense("flash_attn_func", lambda: aiter.flash_attn_func(query, key, value, causal=True), query, key, value),
        Case(
            "flash_attn_with_kvcache",
            lambda: aiter.flash_attn_with_kvcache(token, (k_cache, v_cache), page_table, PAGE),
            lambda: _torch(token, paged_key, paged_value),
            _reference(token, paged_key, paged_value, [SEQ] * BATCH, causal=False),
        ),
        _dense(
            "grouped_query_attention",
            lambda: aiter.grouped_query_attention(query, few_key, few_value, HEADS // KV_HEADS, causal=True),
            query,
            few_key,
            few_value,
        ),
        _dense(
            "multi_query_attention",
            lambda: aiter.multi_query_attention(query, one_key, one_value, causal=True),
            query,
            one_key,
            one_value,
        ),
        Case(
            "variable_length_attention",
            lambda: aiter.variable_length_attention(query, key, value, seq_lengths, SEQ, causal=True),
            _padded(query, key, value, seq_lengths),
            _reference(query, key, value, lengths, causal=True),
        ),
    ]


def _dense(name: str, call: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Case:
    reference = _reference(query, key, value, [SEQ] * BATCH, causal=True)
    return Case(name, call, lambda: _torch(query, key, value, is_causal=True), reference)


def _torch(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options) -> torch.Tensor:
    """PyTorch's operator, which has heads before tokens."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options).transpose(1, 2)


def _padded(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: torch.Tensor) -> Callable:
    position = torch.arange(SEQ, device=query.device)
    inside = position < lengths.view(-1, 1)
    mask = (inside.unsqueeze(1) & (position <= position.view(-1, 1))).unsqueeze(1)
    return lambda: _torch(query, key, value, attn_mask=mask) * inside.view(BATCH, SEQ, 1, 1)


def _reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], causal: bool
) -> torch.Tensor:
    output = torch.zeros(query.shape, dtype=torch.float64)
    for b, length in enumerate(lengths):
        tokens = min(length, query.shape[1])
        one, _ = attend_one(query[b, :tokens].cpu(), key[b, :length].cpu(), value[b, :length].cpu(), causal)
        output[b, :tokens] = one
    return output


def timed(call: Callable[[], Result], device: torch.device) -> tuple[float, Result]:
    """Seconds until all of a call is done, and what it returns."""
    begin = time.perf_counter()
    output = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin, output


def _error(output: torch.Tensor, reference: torch.Tensor) -> float:
    error = (output.double().cpu() - reference).abs().max().item()
    return error if math.isfinite(error) else math.inf
