"""The CPU operations beside PyTorch's in one run, and what options cost beside the same calls without them: two tables,
and on request JSON and a plot.

    python benchmarks/cpu.py [--only WORD] [--seconds 2] [--json FILE] [--plot FILE.png]

Both sides use torch.get_num_threads() threads and are called in turn, so that whatever else the machine does slows
both; times are medians. Where memory bounds a case, a loop that only reads the same keys and values takes its turn too,
and "of reading" is the speed as a part of that loop's. AITER_CPU_ARCH selects the code of an older CPU; to hold PyTorch
to AVX2 as well: ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

import aiter
from aiter.jit.arch import cpu_arch, cpuinfo
from aiter.jit.toolchain import CppToolchain
from aiter.launch import cpu_queue

SOURCES = Path(__file__).parents[1] / "kernels_src"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Case:
    """One line of the table: two callables that compute the same, and what they compute or read."""

    name: str
    dtype: str
    ours: Callable[..., object]  # takes the operation's options
    pytorch: Callable[[], object]
    goal: float  # PyTorch's time over ours
    flops: float = 0.0
    reads: tuple[torch.Tensor, ...] = ()  # the keys and values, where reading them bounds the case

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.reads)


def heads_first(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.transpose(1, 2) for tensor in tensors]


def forward(dtype: str, batch: int, seq: int, heads: int, dim: int, causal: bool, goal: float) -> Case:
    query, key, value = (torch.randn(batch, seq, heads, dim).to(DTYPES[dtype]) for _ in "qkv")
    q, k, v = heads_first(query, key, value)
    return Case(
        f"forward ({batch}, {seq}, {heads}, {dim}){' causal' if causal else ''}",
        dtype,
        lambda **options: aiter.flash_attn_func(query, key, value, causal=causal, **options),
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


def grouped(dtype: str, group: int, seq_q: int, seq_k: int, batch: int) -> Case:
    query = torch.randn(batch, seq_q, 8 * group, 128).to(DTYPES[dtype])
    key, value = (torch.randn(batch, seq_k, 8, 128).to(DTYPES[dtype]) for _ in "kv")

    def pytorch() -> object:
        expanded = (tensor.repeat_interleave(group, 2) for tensor in (key, value))
        return scaled_dot_product_attention(*heads_first(query, *expanded))

    what = "decoding" if seq_q == 1 else "forward"
    return Case(
        f"{what} {8 * group}/8 heads, {batch} x {seq_k} tokens",
        dtype,
        lambda **options: aiter.grouped_query_attention(query, key, value, num_groups=group, **options),
        pytorch,
        2.0,
        flops=4 * batch * 8 * group * seq_q * seq_k * 128,
        reads=() if seq_q > 1 else (key, value),
    )


def decoding(dtype: str, goal: float) -> Case:
    query = torch.randn(4, 1, 16, 128).to(DTYPES[dtype])
    key, value = (torch.randn(4, 8192, 16, 128).to(DTYPES[dtype]) for _ in "kv")
    q, k, v = heads_first(query, key, value)
    return Case(
        "decoding 16 heads, 4 x 8192 tokens",
        dtype,
        lambda **options: aiter.flash_attn_func(query, key, value, **options),
        lambda: scaled_dot_product_attention(q, k, v),
        goal,
        reads=(key, value),
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
        lambda **options: aiter.flash_attn_with_kvcache(query, (key, value), table, page, **options),
        lambda: scaled_dot_product_attention(query.transpose(1, 2), gather(key), gather(value)),
        3.0,
        reads=(key, value),
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
    for dtype, goal in (("fp32", 1.5), ("bf16", 5.0), ("fp16", 1.5)):
        yield decoding(dtype, goal)
        for page in (16, 128):
            yield paged(dtype, page)
        yield from groups(dtype)
    for dtype in DTYPES:
        yield grouped(dtype, 4, 2048, 2048, 1)
        yield variable(dtype)
    for dtype in DTYPES:
        for seq in (16, 64):
            yield forward(dtype, 1, seq, 1, 64, False, 1.0)


@dataclass
class Option:
    """One line of the second table: a call with an option, and the same without."""

    name: str
    dtype: str
    ours: Callable[[], object]
    plain: Callable[[], object]
    bound: float  # of the time of ours over the share of that of `plain`
    share: float = 1.0  # of the keys that the plain call's queries see


def options() -> Iterator[Option]:
    for dtype in DTYPES:
        long, window = 32768, 1024
        case = forward(dtype, 1, long, 1, 128, True, 0.0)
        seen = window * (2 * long - window) / long**2
        call = functools.partial(case.ours, window_size=(window - 1, 0))
        yield Option(f"window of {window} in {case.name}", dtype, call, case.ours, 1.15, seen)
        case = forward(dtype, 1, 4096, 8, 128, True, 0.0)
        for name, bound, chosen in (
            ("softcap", 1 / 0.75, {"softcap": 50.0}),
            ("sinks", 1.02, {"sinks": torch.randn(8)}),
            ("batch_invariant", 1.1, {"batch_invariant": True}),
        ):
            yield Option(f"{name}, {case.name}", dtype, functools.partial(case.ours, **chosen), case.ours, bound)
        for case in (decoding(dtype, 0.0), *(paged(dtype, page) for page in (16, 128)), *groups(dtype)):
            call = functools.partial(case.ours, batch_invariant=True)
            yield Option(f"batch_invariant, {case.name}", dtype, call, case.ours, 1.1)


def groups(dtype: str) -> Iterator[Case]:
    return (grouped(dtype, group, 1, 8192, 4) for group in (4, 8))


@functools.cache
def read_memory() -> Callable[[int, int, int], int]:
    """read_loop.cpp's function of address, bytes and executor."""
    compiler = CppToolchain().require("the loop that reads memory").path
    with tempfile.TemporaryDirectory() as folder:
        library, source = f"{folder}/read_loop.so", str(Path(__file__).with_name("read_loop.cpp"))
        flags = ["-std=c++17", "-O3", "-march=native", "-Wno-psabi", "-pthread", "-fPIC", "-shared"]
        flags += [f"-I{folder}" for folder in (SOURCES, SOURCES / "include")]
        subprocess.run([compiler, *flags, source, "-o", library], check=True)
        function = ctypes.CDLL(library).read_memory
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), ctypes.c_int64
    return function


def read(tensors: tuple[torch.Tensor, ...]) -> None:
    for tensor in tensors:
        read_memory()(tensor.data_ptr(), tensor.nbytes, cpu_queue.executor())


def medians(seconds: float, *calls: Callable[[], object]) -> list[float]:
    """The median time of each, called in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def measure_option(option: Option, seconds: float) -> dict:
    """A row of the second result."""
    ours, plain = medians(seconds, option.ours, option.plain)
    return {
        "dtype": option.dtype,
        "name": option.name,
        "seconds": ours,
        "plain_seconds": plain,
        "ratio": ours / (plain * option.share),
        "bound": option.bound,
    }


def measure(case: Case, seconds: float) -> dict:
    """A row of the result."""
    loop = (lambda: read(case.reads),) if case.reads else ()
    ours, pytorch, *reading = medians(seconds, case.ours, case.pytorch, *loop)
    return {
        "dtype": case.dtype,
        "name": case.name,
        "flops": 0.0 if case.reads else case.flops,
        "bytes": case.bytes,
        "seconds": ours,
        "pytorch_seconds": pytorch,
        "read_seconds": reading[0] if reading else None,
        "ratio": pytorch / ours,
        "goal": case.goal,
    }


def line(row: dict) -> str:
    def side(seconds: float) -> str:
        work, unit = (row["bytes"], "GB/s") if row["bytes"] else (row["flops"], "GFLOP/s")
        return f"{1e3 * seconds:9.3f} ms {work / seconds / 1e9:6.{1 if unit == 'GB/s' else 0}f} {unit:7}"

    of_reading = f"{row['read_seconds'] / row['seconds']:9.0%}" if row["read_seconds"] else ""
    ratio = f"{row['ratio']:6.2f} {row['goal']:5.1f} {of_reading}"
    return f"{row['dtype'] + ' ' + row['name']:48} {side(row['seconds'])} {side(row['pytorch_seconds'])} {ratio}"


def plot(rows: list[dict], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.3 * len(rows) + 1))
    labels = [f"{row['dtype']} {row['name']}" for row in rows]
    axes.barh(labels, [row["ratio"] for row in rows], color="tab:blue")
    axes.scatter([row["goal"] for row in rows], labels, color="black", marker="|", s=120, label="goal", zorder=3)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(len(rows) - 0.5, -0.5)
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
    arguments = parser.parse_args()
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    print(f"{cpu_arch()}, {threads} threads, PyTorch {torch.__version__} ({torch.backends.cpu.get_cpu_capability()})")
    print(f"{'case':48} {'aiter':^27} {'PyTorch':^27} {'ratio':>6} {'goal':>5} of reading")
    rows = []
    for case in cases():
        if arguments.only in f"{case.dtype} {case.name}":
            rows.append(measure(case, arguments.seconds))
            print(line(rows[-1]), flush=True)
    print(f"\n{'time over that without the option, of the keys that are seen':72} {'ratio':>6} {'bound':>6}")
    rows_of_options = []
    for option in options():
        if arguments.only in f"{option.dtype} {option.name}":
            rows_of_options.append(row := measure_option(option, arguments.seconds))
            print(f"{row['dtype'] + ' ' + row['name']:72} {row['ratio']:6.2f} {row['bound']:6.2f}", flush=True)
    if arguments.json:
        machine = {"cpu": cpuinfo("model name"), "arch": cpu_arch(), "threads": threads}
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "cases": rows, "options": rows_of_options}, file, indent=1)
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
