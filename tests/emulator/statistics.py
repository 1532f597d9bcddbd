"""From the emulator's counts of each instruction to what a kernel cost, in whole and in its main loop."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

PIPES = ("scalar", "vector", "matrix", "lds", "memory")
_SIMD_REGISTERS = 512  # vector registers of a lane, AGPRs counted
_LDS_OF_CU = {"gfx90a": 64 * 1024, "gfx942": 64 * 1024, "gfx950": 160 * 1024}
_MOST_WAVES_OF_SIMD = 8
_SIMDS = 4


@dataclass
class _Row:
    """One instruction of the kernel: where it is, and what all its executions cost."""

    index: int
    pipe: str
    cycles: int
    target: int
    count: int
    active_lanes: int
    lds_cycles: int
    lds_least: int
    lines: int
    lines_least: int
    bytes: int
    text: str

    @property
    def mnemonic(self) -> str:
        return self.text.split()[0]


def summarize(text: str) -> dict[str, dict]:
    """For each kernel a dict:

    registers, agprs, sgprs, lds_bytes, scratch_bytes, block, waves_per_simd: what it occupies;
    launches, workgroups, waves: how often it ran;
    total, main_loop: dicts of costs. The main loop is the innermost loop that executes most of the matrix instructions
    (without any, of the instructions); its costs are for one iteration of one wave, `begin` is its first instruction.
    main_loop is None without a loop.

    Costs: instructions (by mnemonic), cycles (by pipe: matrix, vector, scalar, lds), lds_conflicts (share of LDS cycles
    that conflicts cost), lines and lines_least (128-byte cache lines of global memory touched, and the fewest that hold
    as many bytes), narrowest_load (bytes a lane of the narrowest global load, None without one), bytes.
    """
    kernels: dict[str, tuple[list[str], list[_Row]]] = {}
    rows: list[_Row] = []
    for line in text.splitlines():
        fields = line.split("\t")
        if fields[0] == "kernel":
            rows = []
            kernels[fields[1]] = (fields[2:], rows)
        else:
            index, pipe, *numbers = (int(field) for field in fields[:11])
            rows.append(_Row(index, PIPES[pipe], *numbers, fields[11]))
    return {name: _kernel(fields, rows) for name, (fields, rows) in kernels.items()}


def _kernel(fields: list[str], rows: list[_Row]) -> dict:
    arch = fields[0]
    numbers = map(int, fields[1:])
    launches, workgroups, waves, registers, accumulation_offset, sgprs, lds_bytes, scratch_bytes, block, entry = numbers
    waves_of_group = max(1, -(-block // 64))
    by_registers = _SIMD_REGISTERS // max(-(-registers // 8) * 8, 8)
    groups_by_lds = _LDS_OF_CU[arch] // lds_bytes if lds_bytes else 10**6
    by_lds = groups_by_lds * waves_of_group / _SIMDS
    loop = _main_loop(rows)
    return {
        "arch": arch, "launches": launches, "workgroups": workgroups, "waves": waves,
        "registers": registers, "agprs": registers - accumulation_offset, "sgprs": sgprs,
        "lds_bytes": lds_bytes, "scratch_bytes": scratch_bytes, "block": block,
        "waves_per_simd": min(_MOST_WAVES_OF_SIMD, by_registers, by_lds),
        "total": _costs(rows, 1),
        "main_loop": loop and _costs(*loop) | {"iterations": loop[1], "begin": loop[0][0].index},
        "listing": [(row.index - entry, row.count, row.text) for row in rows],
    }  # fmt: skip


def _main_loop(rows: list[_Row]) -> tuple[list[_Row], int] | None:
    """The instructions of the main loop and how often all waves together went through it."""
    loops = []
    for branch in rows:
        if 0 <= branch.target <= branch.index:
            body = [row for row in rows if branch.target <= row.index <= branch.index]
            if 2 * body[0].count < branch.count:
                continue  # a jump back from what the compiler has moved out of the way, rarely taken
            if 2 * branch.count < max((row.count for row in body if row.pipe == "matrix"), default=0):
                continue  # a loop around the one that multiplies, or a branch that is rarely come to
            loops.append((sum(row.count for row in body if row.pipe == "matrix"), sum(row.count for row in body), body))
    if not loops:
        return None
    # Outer loops execute a little more than the loop inside that does the work: the shortest with most of it is meant.
    measure = 0 if any(matrix for matrix, _, _ in loops) else 1
    most = max(loop[measure] for loop in loops)
    body = min((loop[2] for loop in loops if 2 * loop[measure] >= most), key=len)
    return body, max(body[0].count, 1)


def _costs(rows: list[_Row], times: int) -> dict:
    cycles = Counter({pipe: 0 for pipe in ("matrix", "vector", "scalar", "lds")})
    instructions: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    loads = []
    for row in rows:
        instructions[row.mnemonic] += row.count
        if row.pipe == "lds":
            cycles["lds"] += row.lds_cycles
        elif row.pipe in cycles:
            cycles[row.pipe] += row.cycles * row.count
        for name in ("lds_cycles", "lds_least", "lines", "lines_least", "bytes"):
            totals[name] += getattr(row, name)
        if row.mnemonic.startswith(("global_load", "buffer_load", "flat_load")):
            loads.append(_load_bytes(row.mnemonic))
    conflicts = totals["lds_cycles"] - totals["lds_least"]
    return {
        "instructions": {name: count / times for name, count in instructions.most_common()},
        "cycles": {pipe: count / times for pipe, count in cycles.items()},
        "lds_conflicts": conflicts / totals["lds_cycles"] if totals["lds_cycles"] else 0.0,
        "lines": totals["lines"] / times, "lines_least": totals["lines_least"] / times,
        "bytes": totals["bytes"] / times,
        "narrowest_load": min(loads, default=None),
    }  # fmt: skip


def _load_bytes(mnemonic: str) -> int:
    if "dwordx" in mnemonic:
        return 4 * int(mnemonic.rsplit("dwordx")[1][0])
    return 4 if "dword" in mnemonic else 2 if "short" in mnemonic else 1
