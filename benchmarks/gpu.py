"""Every case on the GPU at hand, with PyTorch's operators (FlashAttention-2, cuDNN, unfused) in the same run, and with
FlashAttention-3 where its wheel is installed (`pip install fa3-fwd`, Hopper only).

    python benchmarks/gpu.py [--out FOLDER] [--only forward,dims,chunks,variable,options,decode,latent,serving,...]

Prints a table; with --out also writes gpu.json and, where matplotlib is installed, gpu.png. Times are medians of device
events over repeated calls on random data that is larger than the caches, or for the small ones rotates among copies.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import aiter
from aiter import flash_attn

try:
    import fa3_fwd_interface as fa3
except ImportError:
    fa3 = None

BACKENDS = {
    "FA2": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "unfused": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,  # the only fused one that takes any mask
}
BF16 = torch.bfloat16
CACHE_BYTES = 100e6  # inputs smaller than this rotate among copies

Call = Callable[[], object]


@dataclass
class Case:
    """One row of the table: ours and the calls to compare it with."""

    name: str
    unit: str
    work: float  # FLOPs or bytes of a call; 0: the row is the host's time for one
    ours: list[Call]
    others: dict[str, list[Call]] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)  # in `unit`
    other_work: dict[str, float] = field(default_factory=dict)  # of those calls that do something else

    def rate(self, name: str, seconds: float) -> float:
        return self.other_work.get(name, self.work) / seconds / 1e12 if self.work else seconds * 1e6

    def row(self) -> dict:
        measure = device_seconds if self.work else host_seconds
        seconds = {"aiter": measure(self.ours)}
        for name, calls in self.others.items():
            chosen = BACKENDS.get(name.split(",")[0])
            try:
                with sdpa_kernel(chosen) if chosen else nullcontext():
                    seconds[name] = measure(calls)
            except (RuntimeError, torch.OutOfMemoryError):  # cannot, or not in this memory
                torch.cuda.empty_cache()
        rates = {name: self.rate(name, seconds[name]) if name in seconds else None for name in ("aiter", *self.others)}
        return {"case": self.name, "unit": self.unit, **rates, **self.bounds}


# A card's clock depends on what it has just been busy with: after a product of matrices it is up to a sixth lower than
# after decoding, and takes so long to follow.
WARM_SECONDS = 0.1


def device_seconds(calls: list[Call], budget: float = 0.2) -> float:
    """Median device time of one call, as the card is after a while of the same; `calls` are taken in turn."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    times: list[float] = []
    turn = itertools.cycle(calls)
    start = time.perf_counter()
    while len(times) < 200 and (time.perf_counter() < start + budget or len(times) < 5):
        events = [(torch.cuda.Event(True), torch.cuda.Event(True)) for _ in range(5)]
        torch.cuda._sleep(2_000_000)  # a millisecond in which the host gets ahead: no gaps between the calls
        for begin, end in events:
            begin.record()
            next(turn)()
            end.record()
        torch.cuda.synchronize()
        if time.perf_counter() > start + WARM_SECONDS:
            times += (begin.elapsed_time(end) for begin, end in events)
    return statistics.median(times) / 1e3


def host_seconds(calls: list[Call]) -> float:
    """How long the CPU is busy with one call, in a row of calls that are not waited for."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(100):
            calls[0]()
        times.append((time.perf_counter() - start) / 100)
    return statistics.median(times)


def randn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype)


def pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def forward() -> Iterator[Case]:
    """16384 tokens in all, heads * head_dim = 2048 or nearly."""
    shapes = [(d, 2048 // d, 2048 // d) for d in (64, 96, 128, 192, 256)] + [(128, 32, 8)]
    for head_dim, heads, heads_kv in shapes:
        for length in (512, 1024, 2048, 4096, 8192, 16384):
            batch = 16384 // length
            tensors = [randn(batch, length, n, head_dim) for n in (heads, heads_kv, heads_kv)]
            for causal in (False, True):
                theirs: dict[str, list[Call]] = {}
                if fa3:
                    theirs["FA3"] = [partial(fa3.flash_attn_func, *tensors, causal=causal)]
                pytorchs = [partial(pytorch, *tensors, is_causal=causal, enable_gqa=heads != heads_kv)]
                names = ("cuDNN", "FA2", "unfused")[: 3 if length == 1024 else 2]  # unfused takes 60 times as long
                theirs |= dict.fromkeys(names, pytorchs)
                yield Case(
                    f"forward D{head_dim} {heads}/{heads_kv} {length}{' causal' * causal}",
                    "TFLOP/s",
                    4 * batch * heads * length * length * head_dim / (2 if causal else 1),
                    [partial(aiter.flash_attn_func, *tensors, causal=causal)],
                    theirs,
                )


def dims() -> Iterator[Case]:
    """fp16 beside bf16, head dims that are no multiple of 64, values of another length; 4096 tokens; useful FLOPs."""
    batch, length = 4, 4096
    for head_dim, value_dim, dtype in (
        *((d, d, dtype) for d in (64, 128, 256) for dtype in (torch.float16, BF16)),
        *((d, d, BF16) for d in (40, 72, 80, 112, 160, 192)),
        (192, 128, BF16),
    ):
        heads = 2048 // head_dim
        tensors = [randn(batch, length, heads, d, dtype=dtype) for d in (head_dim, head_dim, value_dim)]
        name = f"D{head_dim}" + f"/{value_dim}" * (value_dim != head_dim) + " fp16" * (dtype != BF16)
        for causal in (False, True):
            yield Case(
                f"dims {name}{' causal' * causal}",
                "TFLOP/s",
                2 * batch * heads * length * length * (head_dim + value_dim) / (2 if causal else 1),
                [partial(aiter.flash_attn_func, *tensors, causal=causal)],
                {"FA3": [partial(fa3.flash_attn_func, *tensors, causal=causal)]}
                if fa3 and head_dim == value_dim and head_dim % 64 == 0
                else {},
            )


def options() -> Iterator[Case]:
    """What models add to attention; unit: FLOPs of the keys that are seen, so that the plain rows compare (of a window,
    docs/gpu.md says how)."""
    heads, head_dim = 16, 128
    sinks, slopes = torch.randn(heads, device="cuda"), torch.rand(heads, device="cuda")
    for length, window in ((16384, None), (32768, 1024)):
        tensors = [randn(1, length, heads, head_dim) for _ in "qkv"]
        seen = length * window if window else length * length / 2
        sides = {} if window is None else {"window_size": (window - 1, 0)}
        for name, chosen in (
            ("plain", {}),
            ("batch_invariant", {"batch_invariant": True}),
            ("softcap", {"softcap": 50.0}),
            ("ALiBi", {"alibi_slopes": slopes}),
            ("sinks", {"sinks": sinks}),
            ("softcap, ALiBi, sinks", {"softcap": 50.0, "alibi_slopes": slopes, "sinks": sinks}),
        ):
            theirs: dict[str, list[Call]] = {}
            if name != "plain":  # ours without the option, in turn with it
                theirs["plain"] = [partial(aiter.flash_attn_func, *tensors, causal=True, **sides)]
            elif window:  # as many rows and tiles of 128 keys as the window's rows see, whole
                whole = [randn(length // window, n, heads, head_dim) for n in (window, window + 128, window + 128)]
                theirs["its tiles"] = [partial(aiter.flash_attn_func, *whole)]
            if fa3 and name in ("plain", "softcap"):
                arguments = {"causal": True, "window_size": sides.get("window_size", (-1, -1))}
                theirs["FA3"] = [partial(fa3.flash_attn_func, *tensors, **chosen, **arguments)]
            yield Case(
                f"options {length} causal{f', window {window}' * bool(window)}: {name}",
                "TFLOP/s",
                4 * heads * seen * head_dim,
                [partial(aiter.flash_attn_func, *tensors, causal=True, **sides, **chosen)],
                theirs,
            )


def serving() -> Iterator[Case]:
    """What an engine calls: caches of 8 bits, tokens written and read in one graph, batches of mixed lengths."""
    heads_q, heads_kv, head_dim, page = 32, 8, 128, 16
    bounds = {"copy": copy_bandwidth()}
    for batch, length in ((16, 8192), (64, 4096)):
        query = randn(batch, 1, heads_q, head_dim)
        table = torch.randperm(batch * length // page, device="cuda").to(torch.int32).view(batch, -1)
        cache = [randn(batch * length // page, page, heads_kv, head_dim) for _ in "kv"]
        moved = 2 * batch * length * heads_kv * head_dim * 2
        used = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        ours = partial(flash_attn.flash_attn_with_kvcache, query, *cache, cache_seqlens=used, block_table=table)
        yield Case(f"serving: decode {batch} x {length}, bf16, as if of 2 bytes", "TB/s", moved, [ours], {}, bounds)
        scale = torch.ones(batch, heads_kv, device="cuda")
        for kind in (torch.float8_e4m3fn, torch.float8_e5m2):
            ours = partial(
                flash_attn.flash_attn_with_kvcache,
                query,
                *(t.to(kind) for t in cache),
                cache_seqlens=used,
                block_table=table,
                k_descale=scale,
                v_descale=scale,
            )
            name = str(kind).removeprefix("torch.")
            yield Case(
                f"serving: decode {batch} x {length}, {name}, as if of 2 bytes", "TB/s", moved, [ours], {}, bounds
            )
        new = [randn(batch, 1, heads_kv, head_dim) for _ in "kv"]
        before = used - 1
        step = partial(
            flash_attn.flash_attn_with_kvcache,
            query,
            *cache,
            *new,
            cache_seqlens=before,
            block_table=table,
            causal=True,
        )
        yield Case(f"serving: append, decode {batch} x {length} in a graph", "TB/s", moved, [graph(step)], {}, bounds)
    # Eight chunks of 512 and 56 single tokens, each over 4096 tokens: a call, and its two parts on their own.
    length, rows = 4096, torch.tensor([512] * 8 + [1] * 56)
    table = torch.randperm(64 * length // page, device="cuda").to(torch.int32).view(64, -1)
    cache = [randn(64 * length // page, page, heads_kv, head_dim) for _ in "kv"]
    for name, chosen in (("mixed batch", slice(0, 64)), ("its chunks", slice(0, 8)), ("its decoding", slice(8, 64))):
        own = rows[chosen]
        starts = F.pad(own.cumsum(0), (1, 0)).to("cuda", torch.int32)
        packed = randn(int(own.sum()), heads_q, head_dim)
        used = torch.full((len(own),), length, dtype=torch.int32, device="cuda")
        ours = partial(
            flash_attn.flash_attn_varlen_func,
            packed,
            *cache,
            starts,
            None,
            int(own.max()),
            length,
            causal=True,
            block_table=table[chosen].contiguous(),
            seqused_k=used,
        )
        yield Case(f"serving: {name}", "calls/ms", 1e9, [ours])


def graph(call: Call) -> Call:
    """`call` as a CUDA graph, which is replayed."""
    call()
    torch.cuda.synchronize()
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        call()
    return recorded.replay


def chunks() -> Iterator[Case]:
    """The last tokens of a prompt that comes in pieces, over all keys before them."""
    heads, heads_kv, head_dim = 32, 8, 128
    few = ((1, 64, 32768), (1, 128, 8192), (1, 256, 4096))  # so few rows that keys are cut, on sm_90a
    for batch, rows, length in (*few, (1, 512, 32768), (1, 2048, 131072), (8, 16, 4096), (32, 4, 4096)):
        query = randn(batch, rows, heads, head_dim)
        cache = [randn(batch, length, heads_kv, head_dim) for _ in "kv"]
        yield Case(
            f"chunk {batch} x {rows} on {length}",
            "TFLOP/s",
            4 * batch * heads * head_dim * rows * (length - (rows - 1) / 2),
            [partial(aiter.flash_attn_func, query, *cache, causal=True)],
            {"FA3": [partial(fa3.flash_attn_func, query, *cache, causal=True)]} if fa3 else {},
        )


def copy_bandwidth() -> float:
    """TB/s of a copy on the device, read and written: the bound of decoding."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    return 2 * source.numel() / device_seconds([partial(torch.empty_like(source).copy_, source)]) / 1e12


def decode() -> Iterator[Case]:
    bounds = {"copy": copy_bandwidth()}
    usual = ((1, 1024), (1, 8192), (1, 32768), (1, 131072), (4, 8192), (16, 8192), (64, 4096), (256, 512))
    shapes = [(*case, 32, 8, 128) for case in usual] + [(128, 1024, 64, 8, 128), (16, 8192, 64, 8, 64)]
    for batch, length, heads_q, heads_kv, head_dim in [*shapes, (16, 8192, 16, 16, 128)]:
        name = f"decode {batch} x {length}, {heads_q}/{heads_kv}, D{head_dim}"
        moved = 2 * batch * length * heads_kv * head_dim * 2
        sets = [
            (randn(batch, 1, heads_q, head_dim), *(randn(batch, length, heads_kv, head_dim) for _ in "kv"))
            for _ in range(math.ceil(CACHE_BYTES / moved))
        ]
        theirs = [partial(pytorch, *tensors, enable_gqa=True) for tensors in sets]
        ours = [partial(aiter.flash_attn_func, *tensors) for tensors in sets]
        others = dict.fromkeys(("FA2", "cuDNN"), theirs)
        others["batch_invariant"] = [partial(aiter.flash_attn_func, *tensors, batch_invariant=True) for tensors in sets]
        if fa3:
            others["FA3"] = [partial(fa3.flash_attn_func, *tensors) for tensors in sets]
            # Its way to results that do not depend on the batch.
            others["FA3, one split"] = [partial(fa3.flash_attn_func, *tensors, num_splits=1) for tensors in sets]
        yield Case(name, "TB/s", moved, ours, others, bounds)
        for page_size in (16, 128) if (batch, length) in ((16, 8192), (64, 4096)) else (16,):
            pages = batch * length // page_size
            table = torch.randperm(pages, device="cuda").to(torch.int32).view(batch, -1)
            ours = [
                partial(aiter.flash_attn_with_kvcache, query, paged(cache, page_size), table, page_size)
                for query, *cache in sets
            ]
            yield Case(f"{name}, pages of {page_size}", "TB/s", moved, ours, {}, bounds)


def latent() -> Iterator[Case]:
    """Latent attention (MLA, 576/512): one KV head, whose first columns are the values. Bounds: the cache once at the
    rate of a copy, and the products at that of a large product of matrices, measured beside them."""
    copy = copy_bandwidth()
    product, product_work = [partial(torch.mm, randn(8192, 8192), randn(8192, 8192))], 2.0 * 8192**3
    for batch, length, heads, rows in (
        (64, 4096, 128, 1),
        (64, 4096, 128, 2),
        (64, 4096, 16, 1),
        (128, 1024, 128, 1),
        (32, 8192, 64, 1),
        (1, 32768, 128, 1),
        (4, 4096, 16, 1),
    ):
        query, cache = randn(batch, rows, heads, 576), randn(batch, length, 1, 576)
        apart = cache[..., :512].clone()
        products = 2.0 * batch * heads * rows * length * (576 + 512)
        moved = 2.0 * (cache.numel() + query.numel() + batch * rows * heads * 512)
        compared = {"product": product}, {"copy": products / moved * copy}, {"product": product_work}
        name = f"latent decode {batch} x {length}, {heads} heads" + f", {rows} tokens" * (rows > 1)
        causal = rows > 1
        ours = partial(aiter.flash_attn_func, query, cache, cache[..., :512], causal)
        yield Case(name, "TFLOP/s", products, [ours], *compared)
        ours = partial(aiter.flash_attn_func, query, cache, apart, causal)
        yield Case(f"{name}, values apart", "TFLOP/s", products, [ours], *compared)
        for page_size in (16, 64):
            table = torch.randperm(batch * length // page_size, device="cuda").to(torch.int32).view(batch, -1)
            pages = cache.view(-1, page_size, 1, 576)
            ours = partial(
                flash_attn.flash_attn_with_kvcache,
                query,
                pages,
                pages[..., :512],
                cache_seqlens=torch.full((batch,), length, dtype=torch.int32, device="cuda"),
                block_table=table,
                causal=causal,
            )
            yield Case(f"{name}, pages of {page_size}", "TFLOP/s", products, [ours], *compared)


def paged(cache: list[torch.Tensor], page_size: int) -> tuple[torch.Tensor, ...]:
    return tuple(t.unflatten(1, (-1, page_size)).flatten(0, 1).transpose(1, 2).contiguous() for t in cache)


def variable() -> Iterator[Case]:
    """16 packed sequences of random lengths, against FA3 and, one of them, PyTorch on the padded batch with a mask."""
    batch = 16
    for longest, heads, heads_kv, head_dim in ((4096, 16, 16, 128), (1024, 32, 8, 64)):
        lengths = torch.randint(1, longest + 1, (batch,), generator=torch.Generator().manual_seed(20))
        packed = [randn(int(lengths.sum()), n, head_dim) for n in (heads, heads_kv, heads_kv)]
        on_gpu = lengths.to("cuda", torch.int32)
        starts = F.pad(on_gpu.cumsum(0), (1, 0)).to(torch.int32)
        for causal in (False, True):
            theirs: dict[str, list[Call]] = {}
            if fa3:
                arguments = (*packed, starts, starts, longest, longest)
                theirs["FA3"] = [partial(fa3.flash_attn_varlen_func, *arguments, causal=causal)]
            if longest == 4096 and not causal:
                padded = [randn(batch, longest, n, head_dim) for n in (heads, heads_kv, heads_kv)]
                mask = (torch.arange(longest, device="cuda") < on_gpu.view(-1, 1)).view(batch, 1, 1, longest)
                names = (f"{name}, padded" for name in ("PyTorch's choice", "efficient", "cuDNN", "unfused"))
                pytorchs = [partial(pytorch, *padded, attn_mask=mask)]
                theirs |= dict.fromkeys(names, pytorchs)
            yield Case(
                f"variable length to {longest}, D{head_dim} {heads}/{heads_kv}{' causal' * causal}",
                "TFLOP/s",
                float((4 * lengths.double() ** 2 * heads * head_dim).sum()) / (2 if causal else 1),
                [partial(aiter.variable_length_attention, *packed, on_gpu, longest, causal)],
                theirs,
            )


def backward() -> Iterator[Case]:
    """Counted as 2.5 times the forward's work, the five products of matrices that the mathematics needs."""
    for head_dim in (64, 96, 128, 192, 256):
        heads = 2048 // head_dim
        for length in (2048, 4096, 16384):
            batch = 16384 // length
            grad = randn(batch, length, heads, head_dim)
            leaves = [randn(batch, length, heads, head_dim).requires_grad_() for _ in "qkv"]
            for causal in (False, True):
                yield Case(
                    f"backward D{head_dim} {length}{' causal' * causal}",
                    "TFLOP/s",
                    10 * batch * heads * length * length * head_dim / (2 if causal else 1),
                    [Backward(partial(aiter.flash_attn_func, causal=causal), leaves, grad)],
                    {n: [Backward(partial(pytorch, is_causal=causal), leaves, grad)] for n in ("FA2", "cuDNN")},
                )


class Backward:
    """The backward pass alone; its forward pass is made at the first call, under the operator that is then chosen."""

    def __init__(self, operator: Callable[..., torch.Tensor], leaves: list[torch.Tensor], grad: torch.Tensor) -> None:
        self.operator, self.leaves, self.grad = operator, leaves, grad
        self.output: torch.Tensor | None = None

    def __call__(self) -> object:
        if self.output is None:
            self.output = self.operator(*self.leaves)
        return torch.autograd.grad(self.output, self.leaves, self.grad, retain_graph=True)


def host() -> Iterator[Case]:
    """Of small calls; `benchmarks/calls.py --device cuda` has more of them."""
    tensors = [randn(1, 128, 4, 64) for _ in "qkv"]
    ours, theirs = [partial(aiter.flash_attn_func, *tensors)], [partial(pytorch, *tensors)]
    others: dict[str, list[Call]] = dict.fromkeys(("FA2", "cuDNN"), theirs)
    if fa3:
        others["FA3"] = [partial(fa3.flash_attn_func, *tensors)]
    yield Case("host time of a small call", "us", 0, ours, others)


SECTIONS = {f.__name__: f for f in (forward, dims, chunks, variable, options, decode, latent, serving, backward, host)}


NAMES = (
    "aiter",
    "plain",
    "batch_invariant",
    "FA2",
    "cuDNN",
    "unfused",
    "efficient",
    "PyTorch's choice",
    "FA3",
    "FA3, one split",
)
COLORS = {name: f"C{i}" for i, name in enumerate(NAMES)} | {"product": "lightgray", "its tiles": "gray"}


def plot(rows: list[dict], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def kind_of(row: dict) -> tuple[str, str]:
        return row["case"].split()[0], row["unit"]

    sizes: dict[tuple[str, str], int] = {}
    for row in rows:
        if row["unit"] != "us":
            sizes[kind_of(row)] = sizes.get(kind_of(row), 0) + 1
    # Two columns of about equal height.
    total = list(itertools.accumulate(sizes.values()))
    left = 1 + min(range(len(total)), key=lambda i: abs(total[i] - total[-1] / 2))
    columns = [kinds for kinds in (list(sizes)[:left], list(sizes)[left:]) if kinds]
    height = max(0.3 * sum(sizes[kind] for kind in kinds) + len(kinds) for kinds in columns)
    figure = plt.figure(figsize=(9 * len(columns), height), layout="constrained")
    panels = []
    for part, kinds in zip(figure.subfigures(1, len(columns), squeeze=False)[0], columns, strict=True):
        heights = [sizes[kind] for kind in kinds]
        panels += part.subplots(len(kinds), 1, height_ratios=heights, squeeze=False)[:, 0].tolist()
    for panel, kind in zip(panels, sizes, strict=True):
        chosen = [r for r in rows if kind_of(r) == kind]
        names = list(dict.fromkeys(n for r in chosen for n, x in r.items() if isinstance(x, float) and n != "copy"))
        for i, name in enumerate(names):
            places = [y + (i + 0.5 - len(names) / 2) * 0.8 / len(names) for y in range(len(chosen))]
            color = COLORS.get(name.removesuffix(", padded"))
            panel.barh(places, [r.get(name) or 0 for r in chosen], 0.8 / len(names), label=name, color=color)
        if "copy" in chosen[0]:
            tops, bottoms = ([y + edge for y in range(len(chosen))] for edge in (-0.5, 0.5))
            panel.vlines([r["copy"] for r in chosen], tops, bottoms, "black", "dashed", label="copy")
        panel.set_yticks(range(len(chosen)), [r["case"] for r in chosen], fontsize=8)
        panel.invert_yaxis()
        panel.set_xlabel(kind[1])
        panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"Attention on one {device}, bf16")
    figure.savefig(path, dpi=100)


def compile_kernels(section: Callable[[], Iterator[Case]], jobs: int) -> None:
    """Takes each case's own calls once, `jobs` at a time: the GPU need not wait for one compiler after the other."""
    with ThreadPoolExecutor(jobs) as pool:
        owns = (own for case in section() for own in (case.ours, case.others.get("batch_invariant")) if own)
        for call in [pool.submit(own[0]) for own in owns]:
            call.exception()  # is met again, and told, where the case is measured
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels compiled at a time")
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(f"{device}, PyTorch {torch.__version__}, bf16", flush=True)
    rows = []
    for section in options.only.split(","):
        try:
            compile_kernels(SECTIONS[section], options.jobs)
            torch.cuda.empty_cache()
            for case in SECTIONS[section]():
                result = case.row()
                rows.append(result)
                figures = "".join(f"{n} {x:.3g}  " for n, x in result.items() if isinstance(x, float))
                print(f"{result['case']:40s}{result['unit']:9s}{figures}", flush=True)
        except (aiter.errors.AiterError, RuntimeError) as error:
            print(f"{section}: {error}", flush=True)
        torch.cuda.empty_cache()
        if options.out:  # after each section: a run that ends early keeps what it has
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "gpu.json").write_text(json.dumps({"device": device, "results": rows}, indent=1) + "\n")
    if options.out:
        try:
            plot(rows, device, options.out / "gpu.png")
        except ImportError:
            print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
