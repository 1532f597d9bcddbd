"""Every case on the GPU at hand, with PyTorch's operators (FlashAttention-2, cuDNN, unfused) in the same run.

    python benchmarks/gpu.py [--out FOLDER] [--only forward,decode,variable,backward,host]

Prints a table; with --out also writes gpu.json and, where matplotlib is installed, gpu.png. Times are medians of device
events over repeated calls on random data that is larger than the caches, or for the small ones rotates among copies.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import aiter

BACKENDS = {
    "FA2": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "unfused": SDPBackend.MATH,
}
BF16 = torch.bfloat16
CACHE_BYTES = 100e6  # inputs smaller than this rotate among copies


def seconds(calls: list[Callable[[], object]], budget: float = 0.25) -> float:
    """Median device time of one call; `calls` are taken in turn."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    events = []
    end = time.perf_counter() + budget
    while len(events) < 200 and (time.perf_counter() < end or len(events) < 5):
        start, stop = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        calls[len(events) % len(calls)]()
        stop.record()
        events.append((start, stop))
        if len(events) % 5 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events) / 1e3


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=BF16)


def pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def backends(names: str, run: Callable[[], float]) -> dict[str, float | None]:
    """What `run` returns under each of PyTorch's operators; None where it cannot or runs out of memory."""
    found: dict[str, float | None] = {}
    for name in names.split():
        try:
            with sdpa_kernel(BACKENDS[name]):
                found[name] = run()
        except (RuntimeError, torch.OutOfMemoryError):
            found[name] = None
            torch.cuda.empty_cache()
    return found


def row(case: str, unit: str, ours: float, others: dict[str, float | None]) -> dict:
    return {"case": case, "unit": unit, "aiter": ours, **others}


def forward() -> Iterator[dict]:
    for head_dim in (64, 128):
        heads = 2048 // head_dim
        for length in (1024, 4096, 16384):
            batch = 16384 // length
            q, k, v = (randn(batch, length, heads, head_dim) for _ in "qkv")
            for causal in (False, True):
                work = 4 * batch * heads * length * length * head_dim / (2 if causal else 1) / 1e12
                ours = work / seconds([lambda c=causal: aiter.flash_attn_func(q, k, v, causal=c)])
                names = "FA2 cuDNN unfused" if length <= 1024 else "FA2 cuDNN"  # unfused takes 60 times as long
                run = lambda c=causal, w=work: w / seconds([lambda: pytorch(q, k, v, is_causal=c)])  # noqa: E731
                yield row(f"forward D{head_dim} {length}{' causal' * causal}", "TFLOP/s", ours, backends(names, run))


def decode() -> Iterator[dict]:
    heads_q, heads_kv, head_dim = 32, 8, 128
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds([lambda: target.copy_(source)]) / 1e12
    del source, target
    for batch, length in ((1, 32768), (16, 8192), (64, 4096)):
        moved = 2 * batch * length * heads_kv * head_dim * 2 / 1e12
        copies = max(1, math.ceil(CACHE_BYTES / (moved * 1e12)))
        sets = [
            (randn(batch, 1, heads_q, head_dim), *(randn(batch, length, heads_kv, head_dim) for _ in "kv"))
            for _ in range(copies)
        ]
        ours = moved / seconds([lambda s=s: aiter.flash_attn_func(*s) for s in sets])
        run = lambda: moved / seconds([lambda s=s: pytorch(*s, enable_gqa=True) for s in sets])  # noqa: B023, E731
        yield row(f"decode {batch} x {length}", "TB/s", ours, {**backends("FA2 cuDNN", run), "copy": copy})
        for page_size in (16, 128):
            pages = batch * length // page_size
            table = torch.randperm(pages, device="cuda").to(torch.int32).view(batch, -1)
            paged = [
                (q, tuple(t.view(pages, page_size, heads_kv, head_dim).transpose(1, 2).contiguous() for t in (k, v)))
                for q, k, v in sets
            ]
            calls = [lambda q=q, kv=kv: aiter.flash_attn_with_kvcache(q, kv, table, page_size) for q, kv in paged]
            yield row(f"decode {batch} x {length}, pages of {page_size}", "TB/s", moved / seconds(calls), {"copy": copy})


def variable() -> Iterator[dict]:
    """Lengths uniform in [1, 4096], packed, against PyTorch on the padded batch with a mask."""
    batch, longest, heads, head_dim = 16, 4096, 16, 128
    lengths = torch.randint(1, longest + 1, (batch,), generator=torch.Generator().manual_seed(20))
    total = int(lengths.sum())
    packed = [randn(total, heads, head_dim) for _ in "qkv"]
    padded = [randn(batch, longest, heads, head_dim) for _ in "qkv"]
    on_gpu = lengths.to("cuda", torch.int32)
    work = float((4 * lengths.double() ** 2 * heads * head_dim).sum()) / 1e12
    ours = work / seconds([lambda: aiter.variable_length_attention(*packed, on_gpu, longest)])
    mask = (torch.arange(longest, device="cuda") < on_gpu.view(-1, 1)).view(batch, 1, 1, longest)
    run = lambda: work / seconds([lambda: pytorch(*padded, attn_mask=mask)])  # noqa: E731
    with contextlib.suppress(RuntimeError):
        yield row("variable length, uniform to 4096", "TFLOP/s", ours, {"padded, masked": run()})


def backward() -> Iterator[dict]:
    """Counted as 2.5 times the forward's work, the five products of matrices that the mathematics needs."""
    for head_dim in (64, 128):
        heads = 2048 // head_dim
        for length in (4096, 16384):
            batch = 16384 // length
            grad = randn(batch, length, heads, head_dim)
            leaves = [randn(batch, length, heads, head_dim).requires_grad_() for _ in "qkv"]
            for causal in (False, True):
                work = 10 * batch * heads * length * length * head_dim / (2 if causal else 1) / 1e12

                def time_of(operator: Callable[..., torch.Tensor], leaves=leaves, grad=grad, work=work) -> float:
                    output = operator(*leaves)
                    return work / seconds([lambda: torch.autograd.grad(output, leaves, grad, retain_graph=True)])

                ours = time_of(lambda q, k, v, c=causal: aiter.flash_attn_func(q, k, v, causal=c))
                run = lambda t=time_of, c=causal: t(lambda q, k, v: pytorch(q, k, v, is_causal=c))  # noqa: E731
                case = f"backward D{head_dim} {length}{' causal' * causal}"
                yield row(case, "TFLOP/s", ours, backends("FA2 cuDNN", run))


def host() -> Iterator[dict]:
    """How long the CPU is busy with one small call: calls in a row, not waited for."""
    q, k, v = (randn(1, 128, 4, 64) for _ in "qkv")

    def busy(call: Callable[[], object]) -> float:
        times = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            times.append((time.perf_counter() - start) / 100)
        return statistics.median(times) * 1e6

    ours = busy(lambda: aiter.flash_attn_func(q, k, v))
    yield row("host time of a small call", "us", ours, backends("FA2", lambda: busy(lambda: pytorch(q, k, v))))


SECTIONS = {f.__name__: f for f in (forward, decode, variable, backward, host)}


def plot(rows: list[dict], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    units = [unit for unit in ("TFLOP/s", "TB/s") if any(r["unit"] == unit for r in rows)]
    figure, panels = plt.subplots(len(units), 1, figsize=(11, 5 * len(units)), squeeze=False)
    for panel, unit in zip(panels[:, 0], units, strict=True):
        chosen = [r for r in rows if r["unit"] == unit]
        names = list(dict.fromkeys(name for r in chosen for name in r if name not in ("case", "unit")))
        for i, name in enumerate(names):
            places = [x + (i - len(names) / 2) * 0.8 / len(names) for x in range(len(chosen))]
            panel.bar(places, [r.get(name) or 0 for r in chosen], 0.8 / len(names), label=name)
        panel.set_xticks(range(len(chosen)), [r["case"] for r in chosen], rotation=60, ha="right", fontsize=7)
        panel.set_ylabel(unit)
        panel.legend()
    panels[0, 0].set_title(f"Attention on one {device}, bf16")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default=",".join(SECTIONS))
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(f"{device}, PyTorch {torch.__version__}, bf16")
    rows = []
    for section in options.only.split(","):
        try:
            for result in SECTIONS[section]():
                rows.append(result)
                figures = "".join(f"{n} {x:.3g}  " for n, x in result.items() if isinstance(x, float))
                print(f"{result['case']:40s}{result['unit']:9s}{figures}", flush=True)
        except (aiter.errors.AiterError, RuntimeError) as error:
            print(f"{section}: {error}", flush=True)
        torch.cuda.empty_cache()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps({"device": device, "results": rows}, indent=1) + "\n")
        try:
            plot(rows, device, options.out / "gpu.png")
        except ImportError:
            print("no plot: matplotlib is not installed")


if __name__ == "__main__":
    main()
