"""What each kernel costs on each AMD arch, counted while the emulator of the test tree executes its machine code.

    AITER_HIPCC=... python benchmarks/emulated_profile.py [--json FILE] [--archs gfx942,gfx950] [--head-dims 64,128]

The stand-in for a profile where there is no AMD GPU. Registers, LDS and waves per SIMD are the kernel's own figures.
The cycles are for one iteration of the main loop in one wave, by the issue cost of each instruction: matrix and vector
for its SIMD, LDS for the whole CU (so the LDS cycles of all of a CU's waves add up, those of one SIMD's waves do not
shrink). "share" is the matrix cycles' share of the larger of matrix and vector: what the matrix unit could reach if
nothing but issuing bounded it.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "kernels")]

import torch  # noqa: E402
from driver import DTYPES, EMULATED, attend, gradients  # noqa: E402

# kernel -> query tokens, keys: enough iterations that the first and the last do not show in the average
KERNELS = {"attention_forward": (128, 1024), "attention_decode": (1, 2048), "attention_backward": (512, 512)}
PASSES = ("gradient of queries", "gradients of keys and values", "gradient of keys", "gradient of values")
COLUMNS = (
    "kernel",
    "arch",
    "dtype",
    "head_dim",
    "registers",
    "of them AGPRs",
    "SGPRs",
    "LDS KB",
    "scratch",
    "waves per SIMD",
    "matrix",
    "vector",
    "LDS",
    "share",
    "LDS conflicts",
    "lines / least",
    "narrowest load",
)


def aligned(tokens: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A random tensor that begins with a cache line, as those that a GPU's allocator hands out do."""
    memory = torch.randn(tokens * head_dim + 128).to(dtype)
    begin = -memory.data_ptr() % 256 // memory.element_size()
    return memory[begin : begin + tokens * head_dim].view(1, tokens, 1, head_dim)


def profile(kernel: str, arch: str, dtype: str, head_dim: int) -> Iterator[dict]:
    """A row for the kernel, or for each pass of the backward one."""
    seq_q, seq_k = KERNELS[kernel]
    query, key, value, grad = (aligned(n, head_dim, DTYPES[dtype]) for n in (seq_q, seq_k, seq_k, seq_q))
    stats: dict[str, dict] = {}
    if kernel == "attention_backward":
        gradients(arch, query, key, value, query, torch.zeros(1, 1, seq_q), grad, stats=stats)
        for name, seen in stats.items():
            if match := re.search(r"attention_backwardILi(\d)E", name):
                yield figures(PASSES[int(match[1])], arch, dtype, head_dim, seen)
        return
    attend(arch, query, key, value, name=kernel, stats=stats)
    seen = max(stats.values(), key=lambda costs: costs["total"]["cycles"]["matrix"])  # a merge has none
    yield figures(kernel, arch, dtype, head_dim, seen)


def figures(kernel: str, arch: str, dtype: str, head_dim: int, seen: dict) -> dict:
    loop = seen["main_loop"]
    cycles = loop["cycles"]
    costs = (
        seen["registers"],
        seen["agprs"],
        seen["sgprs"],
        seen["lds_bytes"] / 1024,
        seen["scratch_bytes"],
        seen["waves_per_simd"],
        round(cycles["matrix"]),
        round(cycles["vector"]),
        round(cycles["lds"]),
        cycles["matrix"] / max(cycles["matrix"], cycles["vector"], 1),
        loop["lds_conflicts"],
        loop["lines"] / loop["lines_least"] if loop["lines_least"] else math.nan,
        loop["narrowest_load"],
    )
    return dict(zip(COLUMNS, (kernel, arch, dtype, head_dim, *costs), strict=True))


def shown(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--archs", default=",".join(EMULATED))
    parser.add_argument("--head-dims", default="64,128,256")
    parser.add_argument("--dtypes", default="bf16")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for kernel in options.kernels.split(","):
        for dtype in options.dtypes.split(","):
            for head_dim in map(int, options.head_dims.split(",")):
                for arch in options.archs.split(","):
                    for row in profile(kernel, arch, dtype, head_dim):
                        rows.append(row)
                        print("| " + " | ".join(shown(value) for value in row.values()) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
