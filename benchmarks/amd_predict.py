"""From one CU of the timing model to a whole launch; and what the model's figures are worth."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "kernels")]

from emulator import timing  # noqa: E402

TURNS = 4  # how many workgroups have each place on the CU, one after the other
VALIDATION = ROOT / "docs" / "figures" / "amd-validation.json"


@dataclass
class Cost:
    """What a workgroup costs that sees so many keys: cycles, and matrix cycles of one SIMD, both linear in the keys."""

    cycles: tuple[float, float]  # at 0 keys, for each key
    matrix: tuple[float, float]

    @staticmethod
    def between(points: list[tuple[int, timing.Played]]) -> Cost:
        """From two lengths, played with all places on the CU taken."""
        (keys, less), (more, played) = points
        cycles = (played.cycles_a_group - less.cycles_a_group) / (more - keys)
        each = [p.total["matrix"] / timing.SIMDS / len(p.groups) for p in (less, played)]
        matrix = (each[1] - each[0]) / (more - keys)
        return Cost((less.cycles_a_group - cycles * keys, cycles), (each[0] - matrix * keys, matrix))

    def at(self, keys: float) -> tuple[float, float]:
        return self.cycles[0] + self.cycles[1] * keys, self.matrix[0] + self.matrix[1] * keys


@dataclass
class Whole:
    """A launch from the first workgroup's beginning to the last one's end."""

    cycles: float
    matrix_util: float
    matrix: float  # cycles of one SIMD's matrix unit, all workgroups together


def workgroups(
    batch: int, heads: int, seq: int, rows: int, causal: bool, order: str = "late tiles first", equal: bool = False
) -> list[int]:
    """Keys that each workgroup sees, in the order of their numbers.

    order: "late tiles first" or "early tiles first" of one head after the other; "heads together": of each tile, early
    ones first, all heads of a batch. equal: a workgroup has a late tile and an early one.
    """
    tiles = math.ceil(seq / rows)
    early_first = [seq] * tiles if equal or not causal else [min(seq, (i + 1) * rows) for i in range(tiles)]
    if order == "heads together":
        return [keys for keys in early_first for _ in range(heads)] * batch
    return (early_first if order == "early tiles first" else early_first[::-1]) * (batch * heads)


def launch(arch: str, cost: Cost, resident: int, keys: list[int]) -> Whole:
    """keys: of every workgroup. They go to XCDs in turn; there each takes the first place on a CU that is free."""
    known = timing.values(arch)
    each = {k: cost.at(k) for k in set(keys)}
    xcds = int(known["xcds"])
    slots = int(known["cus"]) // xcds * resident
    span = max(timing.makespan([each[k][0] for k in keys[xcd::xcds]], slots) for xcd in range(xcds))
    matrix = sum(each[k][1] for k in keys)
    return Whole(span, matrix / (span * known["cus"]), matrix)


def sharers(arch: str, seq: int, rows: int) -> float:
    """CUs of an XCD that attend to the same head: workgroups go to XCDs in turn."""
    known = timing.values(arch)
    return max(1.0, min(known["cus"] / known["xcds"], seq / rows / known["xcds"]))


def useful(arch: str, matrix: float, flops: float) -> float:
    """The share of the matrix unit's work that is counted: the rest is masked out, or computed twice."""
    return flops / (matrix * timing.SIMDS * timing.FLOPS_A_CYCLE[arch])


def trust() -> str:
    """The model's error on kernels of others, as it stands beside every prediction."""
    if not VALIDATION.exists():
        return "error of the model not known"
    seen = json.loads(VALIDATION.read_text())["summary"]["all"]
    return f"±{seen['median']:.0%} (median), {seen['worst']:.0%} (worst of {seen['figures']} published figures)"
