"""What each kernel costs on each AMD arch, counted while the emulator of the test tree executes its machine code.

    AITER_HIPCC=... python benchmarks/emulated_profile.py [--json FILE] [--archs gfx942,gfx950] [--head-dims 64,128]

The stand-in for a profile where there is no AMD GPU. Registers, LDS and waves per SIMD are the kernel's own figures. The
cycles are for one iteration of the main loop in one wave, by the issue cost of each instruction: matrix and vector for
its SIMD, LDS for the whole CU (so the LDS cycles of all of a CU's waves add up, those of one SIMD's waves do not
shrink). "share" is the matrix cycles' share of the larger of matrix and vector: what the matrix unit could reach if
nothing but issuing bounded it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "kernels")]

import torch  # noqa: E402
from gpu_driver import DTYPES, EMULATED, attend  # noqa: E402

# kernel -> query tokens, keys: enough iterations that the first and the last do not show in the average
KERNELS = {"attention_forward": (128, 1024), "attention_decode": (1, 2048)}
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


def profile(kernel: str, arch: str, dtype: str, head_dim: int) -> dict:
    seq_q, seq_k = KERNELS[kernel]
    query, key, value = (aligned(n, head_dim, DTYPES[dtype]) for n in (seq_q, seq_k, seq_k))
    stats: dict[str, dict] = {}
    attend(arch, kernel, query, key, value, stats=stats)
    seen = max(stats.values(), key=lambda costs: costs["total"]["cycles"]["matrix"])  # a merge has none
    loop = seen["main_loop"]
    cycles = loop["cycles"]
    figures = (
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
    return dict(zip(COLUMNS, (kernel, arch, dtype, head_dim, *figures), strict=True))


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
                    rows.append(profile(kernel, arch, dtype, head_dim))
                    print("| " + " | ".join(shown(value) for value in rows[-1].values()) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
