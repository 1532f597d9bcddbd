"""The CPU operations beside PyTorch's in one run: a table, and on request JSON and a plot.

    python benchmarks/cpu.py [--only WORD] [--seconds 2] [--json FILE] [--plot FILE.png]

Both sides use torch.get_num_threads() threads and are called in turn, so that whatever else the machine does slows
both; times are medians. AITER_CPU_ARCH selects the code of an older CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

import aiter
from aiter.jit.arch import cpu_arch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Case:
    """One line of the table: two callables that compute the same, and what they compute or read."""

    name: str
    dtype: str
    ours: Callable[[], object]
    pytorch: Callable[[], object]
    goal: float  # PyTorch's time over ours
    flops: float = 0.0
    bytes: float = 0.0


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def forward(dtype: str, batch: int, seq: int, heads: int, dim: int, causal: bool, goal: float) -> Case:
    query, key, value = (torch.randn(batch, seq, heads, dim).to(DTYPES[dtype]) for _ in "qkv")
    q, k, v = heads_first(query, key, value)
    return Case(
        f"forward ({batch}, {seq}, {heads}, {dim}){' causal' if causal else ''}",
        dtype,
        lambda: aiter.flash_attn_func(query, key, value, causal=causal),
        lambda: scaled_dot_product_attention(q, k, v, is_causal=causal),
        goal,
        flops=4 * batch * heads * seq * seq * dim * (0.5 if causal else 1),
    )


def training(dtype: str, causal: bool, goal: float) -> Case:
    query, key, value, grad = (torch.randn(1, 2048, 8, 128).to(DTYPES[dtype]) for _ in "qkvg")
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]

    def pytorch() -> object:
        output = scaled_dot_product_attention(*heads_first(*inputs), is_causal=causal).transpose(1, 2)
        return torch.autograd.grad(output, inputs, grad)

    return Case(
        f"forward + backward (1, 2048, 8, 128){' causal' if causal else ''}",
        dtype,
        lambda: torch.autograd.grad(aiter.flash_attn_func(*inputs, causal=causal), inputs, grad),
        pytorch,
        goal,
        flops=14 * 8 * 2048 * 2048 * 128 * (0.5 if causal else 1),
    )


def grouped(dtype: str, seq_q: int, seq_k: int, batch: int) -> Case:
    query = torch.randn(batch, seq_q, 32, 128).to(DTYPES[dtype])
    key, value = (torch.randn(batch, seq_k, 8, 128).to(DTYPES[dtype]) for _ in "kv")

    def pytorch() -> object:
        expanded = (tensor.repeat_interleave(4, 2) for tensor in (key, value))
        return scaled_dot_product_attention(*heads_first(query, *expanded))

    what = "decoding" if seq_q == 1 else "forward"
    return Case(
        f"{what} 32/8 heads, {batch} x {seq_k} tokens",
        dtype,
        lambda: aiter.grouped_query_attention(query, key, value, num_groups=4),
        pytorch,
        2.0,
        flops=4 * batch * 32 * seq_q * seq_k * 128 if seq_q > 1 else 0,
        bytes=0 if seq_q > 1 else 2 * key.nbytes,
    )


def decoding(dtype: str, goal: float) -> Case:
    query = torch.randn(4, 1, 16, 128).to(DTYPES[dtype])
    key, value = (torch.randn(4, 8192, 16, 128).to(DTYPES[dtype]) for _ in "kv")
    q, k, v = heads_first(query, key, value)
    return Case(
        "decoding 16 heads, 4 x 8192 tokens",
        dtype,
        lambda: aiter.flash_attn_func(query, key, value),
        lambda: scaled_dot_product_attention(q, k, v),
        goal,
        bytes=2 * key.nbytes,
    )


def paged(dtype: str, page: int) -> Case:
    pages = 8192 // page
    query = torch.randn(4, 1, 16, 128).to(DTYPES[dtype])
    key, value = (torch.randn(4 * pages, 16, page, 128).to(DTYPES[dtype]) for _ in "kv")
    table = torch.randperm(4 * pages, dtype=torch.int32).view(4, pages)

    def gather(cache: torch.Tensor) -> torch.Tensor:
        return cache[table.long()].transpose(1, 2).flatten(2, 3)

    return Case(
        f"decoding through pages of {page}",
        dtype,
        lambda: aiter.flash_attn_with_kvcache(query, (key, value), table, page),
        lambda: scaled_dot_product_attention(query.transpose(1, 2), gather(key), gather(value)),
        3.0,
        bytes=2 * key.nbytes,
    )


def variable(dtype: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1025, (16,), generator=generator, dtype=torch.int32)
    packed = [torch.randn(int(lengths.sum()), 8, 64).to(DTYPES[dtype]) for _ in "qkv"]
    padded = [torch.randn(16, 8, 1024, 64).to(DTYPES[dtype]) for _ in "qkv"]
    mask = (torch.arange(1024) < lengths.unsqueeze(1))[:, None, None, :]
    return Case(
        "variable length, packed, 16 x [1, 1024]",
        dtype,
        lambda: aiter.variable_length_attention(*packed, lengths, 1024),
        lambda: scaled_dot_product_attention(*padded, attn_mask=mask),
        4.0,
        flops=float((4 * lengths.double() ** 2 * 8 * 64).sum()),
    )


def cases() -> Iterator[Case]:
    goals = {"fp32": 1.5, "bf16": 2.5, "fp16": 2.0}
    for dtype, goal in goals.items():
        for causal in (False, True):
            yield forward(dtype, 1, 4096, 8, 128, causal, goal)
            yield forward(dtype, 2, 1024, 16, 64, causal, goal)
    for dtype, goal in (("fp32", 1.5), ("bf16", 2.0)):
        for causal in (False, True):
            yield training(dtype, causal, goal)
    for dtype, goal in (("fp32", 1.5), ("bf16", 5.0)):
        yield decoding(dtype, goal)
        for page in (16, 128):
            yield paged(dtype, page)
        yield grouped(dtype, 1, 8192, 4)
        yield grouped(dtype, 2048, 2048, 1)
        yield variable(dtype)
    for dtype in DTYPES:
        for seq in (16, 64):
            yield forward(dtype, 1, seq, 1, 64, False, 1.0)


def medians(ours: Callable, pytorch: Callable, seconds: float) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    ours(), pytorch()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip((ours, pytorch), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def read_bandwidth() -> float:
    """Bytes per second that a sum over far more than the caches hold reads: the bound of decoding."""
    tensor = torch.ones(2**28, dtype=torch.float32)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        tensor.sum()
        times.append(time.perf_counter() - start)
    return tensor.nbytes / statistics.median(times)


def rate(case: Case, seconds: float) -> str:
    return f"{case.flops / seconds / 1e9:.0f} GFLOP/s" if case.flops else f"{case.bytes / seconds / 1e9:.1f} GB/s"


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(rows) + 1))
    labels = [f"{row['dtype']} {row['name']}" for row in rows]
    axes.barh(labels, [row["ratio"] for row in rows], color="tab:blue")
    axes.scatter([row["goal"] for row in rows], labels, color="black", marker="|", s=120, label="goal", zorder=3)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times PyTorch's speed")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name or dtype contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = read_bandwidth()
    threads = torch.get_num_threads()
    print(f"{cpu_arch()}, {threads} threads, reads {bandwidth / 1e9:.1f} GB/s, PyTorch {torch.__version__}")
    print(f"{'case':48} {'aiter':>24} {'PyTorch':>24} {'ratio':>6} {'goal':>5}")
    rows = []
    for case in cases():
        label = f"{case.dtype} {case.name}"
        if options.only not in label:
            continue
        ours, pytorch = medians(case.ours, case.pytorch, options.seconds)
        row = {key: value for key, value in asdict(case).items() if key not in ("ours", "pytorch")}
        rows.append({**row, "seconds": ours, "pytorch_seconds": pytorch, "ratio": pytorch / ours})
        figures = (f"{1e3 * s:9.3f} ms {rate(case, s):>11}" for s in (ours, pytorch))
        print(f"{label:48} {' '.join(figures)} {pytorch / ours:6.2f} {case.goal:5.1f}", flush=True)
    if options.json:
        machine = {"arch": cpu_arch(), "threads": threads, "platform": platform.platform()}
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "read_bytes_per_second": bandwidth, "cases": rows}, file, indent=1)
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
