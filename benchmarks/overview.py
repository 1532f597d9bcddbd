"""What a user gains, on one page: the figures in docs/figures/*.json as one table and one small picture.

    python benchmarks/overview.py [--plot docs/figures/overview.png]

Nothing is measured here. The JSON files are what benchmarks/cpu.py and benchmarks/gpu.py wrote on the machine that each
names; docs/benchmarks.md holds the table that this prints, and a test compares the two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
# A column of the table: whose speed ours is compared with, and where.
CPUS = {
    "2 cores of an EPYC, AVX2": "cpu-avx2",
    "2 cores of an EPYC, AVX-512": "cpu-avx512bf16",
    "2 cores of a Xeon, AMX": "cpu-amx",
}
COLUMNS = (*CPUS, "H100, FA3", "H100, cuDNN")
# A row: its name, the case of cpu.py, and the cases of gpu.py with their shares of the operations.
ROWS = (
    ("prefill, causal", "forward (1, 4096, 8, 128) causal", {"forward D128 16/16 4096 causal": 2}),
    (
        "training step, causal",
        "forward + backward (1, 2048, 8, 128) causal",
        {"forward D128 16/16 4096 causal": 2, "backward D128 4096 causal": 5},
    ),
    (
        "packed batch of different lengths",
        "variable length, packed, 16 x [1, 1024]",
        {"variable length to 4096, D128 16/16 causal": 1},
    ),
    ("decoding, grouped heads", "decoding 32/8 heads, 4 x 8192 tokens", {"decode 64 x 4096, 32/8, D128": 1}),
    ("decoding from a paged cache", "decoding through pages of 16", {}),
)


def ratios() -> dict[str, list[float | None]]:
    """For each row, how many times PyTorch's speed ours is, by column; None where there is no such figure."""
    on_cpus = [
        {case["name"]: case for case in _read(name)["cases"] if case["dtype"] == "bf16"} for name in CPUS.values()
    ]
    on_gpu = {case["case"]: case for case in _read("h100")["results"]}
    table: dict[str, list[float | None]] = {}
    for name, cpu_case, gpu_cases in ROWS:
        table[name] = [cases[cpu_case]["ratio"] for cases in on_cpus]
        for other in ("FA3", "cuDNN"):
            rates = [(on_gpu[case].get(other) or on_gpu[case].get(f"{other}, padded")) for case in gpu_cases]
            if not rates or None in rates:
                table[name].append(None)
                continue
            # Rates become times, as those are what add up.
            ours = sum(share / on_gpu[case]["aiter"] for case, share in gpu_cases.items())
            theirs = sum(share / rate for share, rate in zip(gpu_cases.values(), rates, strict=True))
            table[name].append(theirs / ours)
    return table


def _read(name: str) -> dict:
    return json.loads((FIGURES / f"{name}.json").read_text())


def markdown() -> str:
    lines = [f"| bf16 | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    for name, row in ratios().items():
        lines.append(f"| {name} | {' | '.join('—' if ratio is None else _short(ratio) for ratio in row)} |")
    return "\n".join(lines)


def _short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 3 else f"{ratio:.2f}"


def plot(path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = ratios()
    figure, axes = pyplot.subplots(figsize=(8, 3.3))
    styles = (("o", "#1f77b4"), ("s", "#1f77b4"), ("^", "#1f77b4"), ("D", "#76b900"), ("D", "none"))
    axes.axvline(1, color="black", linewidth=1)
    for row in range(len(table)):
        axes.axhline(row, color="#dddddd", linewidth=0.8, zorder=0)
    for column, (name, (marker, color)) in enumerate(zip(COLUMNS, styles, strict=True)):
        on_gpu = name not in CPUS
        offset = 0.13 if on_gpu else -0.13
        points = [(row[column], i + offset) for i, row in enumerate(table.values()) if row[column] is not None]
        edge = "#76b900" if on_gpu else color
        axes.scatter(
            *zip(*points, strict=True), marker=marker, s=52, color=color, edgecolors=edge, label=name, zorder=3
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(0.6, 160)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(table)), table)
    axes.set_ylim(len(table) - 0.5, -0.5)
    axes.set_xlabel(
        "times the speed of PyTorch's own operator, or of FA3, bf16 (right of 1: aiter is faster)", loc="right"
    )
    axes.legend(loc="upper right", fontsize=8, framealpha=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    print(markdown())
    if options.plot:
        plot(options.plot)


if __name__ == "__main__":
    main()
