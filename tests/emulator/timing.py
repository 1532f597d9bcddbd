"""When a kernel does what: plays recorded workgroups on one CU of the timing model (timing.cpp) and sums up.

with timing.recorded([0, 1]):                  # launches run these workgroups only, and record them
    stats = {}
    attend("gfx942", ..., stats=stats)
seen = timing.play("gfx942", name, stats[name])
seen.matrix_util, seen.stalls, seen.period
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from . import load_runtime

SIMDS = 4
FLOPS_A_CYCLE = {"gfx90a": 256, "gfx942": 512, "gfx950": 1024}  # of a SIMD's matrix unit in 16 bit
_FOREVER = 1 << 62


def _runtime() -> ctypes.CDLL:
    library = load_runtime()
    library.emulator_replay.restype = library.emulator_timing_parameters.restype = ctypes.c_char_p
    library.emulator_replay.argtypes = [
        ctypes.c_char_p, ctypes.c_int, ctypes.c_int, ctypes.c_double, ctypes.c_double, ctypes.c_uint32, ctypes.c_uint64,
        ctypes.c_uint64, ctypes.c_int,
    ]  # fmt: skip
    library.emulator_timing_set.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_double]
    library.emulator_trace.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_int]
    return library


def parameters(arch: str) -> dict[str, tuple[float, str]]:
    """Every number of the model for the arch: its value and where it is from."""
    lines = _runtime().emulator_timing_parameters(arch.encode()).decode().splitlines()
    return {name: (float(value), source) for name, value, source in (line.split("\t") for line in lines)}


def values(arch: str) -> dict[str, float]:
    return {name: value for name, (value, _) in parameters(arch).items()}


def peak(arch: str) -> float:
    """TFLOP/s of the matrix units in 16 bit at the data sheet's clock."""
    known = values(arch)
    return FLOPS_A_CYCLE[arch] * SIMDS * known["cus"] * known["clock_mhz"] * 1e-6


def clock_at(arch: str, util: float) -> float:
    """The clock in MHz that the power limit allows where matrix units are so busy.

    power_tflops is what a card does with matrix units at work all the time. Power goes with their use, the clock and
    the voltage's square, and voltage with the clock: the clock that is allowed goes with use to the power of -1/3, and
    is never above the data sheet's. gfx90a: the data sheet's, as no such figure was published."""
    known = values(arch)
    if not known["power_tflops"]:
        return known["clock_mhz"]
    busy = known["power_tflops"] / peak(arch) * known["clock_mhz"]
    return min(known["clock_mhz"], busy * max(util, 1e-3) ** (-1 / 3))


def tflops(arch: str, util: float) -> float:
    """TFLOP/s under the power limit of matrix units that are so busy."""
    return util * peak(arch) * clock_at(arch, util) / values(arch)["clock_mhz"]


def replace(arch: str, values: dict[str, float]) -> None:
    """Other values for parameters, from a card's measurements for one, until the process ends."""
    for name, value in values.items():
        if not _runtime().emulator_timing_set(arch.encode(), name.encode(), value):
            raise ValueError(f"the timing model has no parameter {name!r}; it has {', '.join(parameters(arch))}")


@contextlib.contextmanager
def recorded(groups: Iterable[int]) -> Iterator[None]:
    """Launches within run only these workgroups (by number, x first) and record them; what others would write stays."""
    numbers = list(groups)
    library = _runtime()
    library.emulator_trace((ctypes.c_uint64 * len(numbers))(*numbers), len(numbers))
    try:
        yield
    finally:
        library.emulator_trace(None, 0)


@dataclass
class Played:
    """What the model says of a recording. Cycles, bytes and shares are those of `window`: the main loop while all waves
    that began together are in it, or everything where a kernel has no loop."""

    arch: str
    resident: int  # workgroups on the CU at a time
    window: tuple[int, int]
    cycles: int  # of the whole recording
    groups: list[tuple[int, int]]  # begin and end of each workgroup
    iterations: int  # of the main loop, of one wave
    period: float  # cycles from one iteration to the next, all resident workgroups at work
    drift: float  # by how much the matrix unit's use in the window's halves differs: 0 where it is periodic
    total: dict[str, int]  # work of the whole recording
    work: dict[str, int]
    stalls: dict[int, dict[str, int]]  # by instruction (its index): cycles of waves, by reason
    texts: dict[int, tuple[str, str]]  # of these: unit, and what the assembler calls it
    events: list[tuple[int, int, int, int, str, int]] = field(repr=False, default_factory=list)

    @property
    def _length(self) -> int:
        return max(self.window[1] - self.window[0], 1)

    @property
    def cycles_a_group(self) -> float:
        """For how long a workgroup has its place on the CU, all others being taken, until the next one has it."""
        ends = sorted(end for _, end in self.groups)
        if len(ends) < 3 * self.resident:
            return float(self.cycles)
        first, last = self.resident - 1, len(ends) - self.resident
        return (ends[last] - ends[first]) / (last - first) * self.resident

    @property
    def matrix_util(self) -> float:
        """Share of the cycles of the four SIMDs in which their matrix unit works, as rocprof's MfmaUtil."""
        return self.work["matrix"] / (SIMDS * self._length)

    @property
    def vector_util(self) -> float:
        return self.work["vector"] / (SIMDS * self._length)

    @property
    def lds_util(self) -> float:
        return self.work["lds"] / self._length

    def bytes_per_cycle(self, level: str) -> float:
        """level: l1, l2 or memory."""
        return self.work[f"{level}_bytes"] / self._length

    @property
    def reasons(self) -> dict[str, float]:
        """Share of the waves' time, by reason; "issued" is the time in which they issue."""
        total = Counter()
        for reasons in self.stalls.values():
            total.update(reasons)
        everything = sum(total.values()) or 1
        return {reason: count / everything for reason, count in total.most_common()}

    @property
    def bound(self) -> str:
        """The reason that most of the waves' waiting has."""
        return next((reason for reason in self.reasons if reason not in ("issued", "other")), "issued")


def resident_groups(seen: dict) -> int:
    """Workgroups that a CU holds at a time, from statistics of a kernel."""
    waves = -(-seen["block"] // 64)
    return max(1, int(seen["waves_per_simd"] * SIMDS // waves))


def play(
    arch: str,
    kernel: str,
    seen: dict,
    *,
    resident: int | None = None,
    groups: int | None = None,
    clock_mhz: float | None = None,
    sharers: float = 1,
    events: bool = False,
    skip: int = 2,
) -> Played:
    """Plays the last recording of the kernel; `seen`: its statistics.

    groups: in all, as many as are resident unless more are named; each that ends makes room for the next.
    sharers: CUs that load the same cache lines at the same time.
    skip: iterations of the main loop that do not count yet.
    """
    resident = resident or resident_groups(seen)
    groups = groups or resident
    clock = clock_mhz or parameters(arch)["clock_mhz"][0]
    loop = seen["main_loop"]
    marker = loop["begin"] if loop else 0xFFFFFFFF

    def replay(begin: int, end: int, listed: bool = False) -> dict:
        text = _runtime().emulator_replay(
            kernel.encode(), resident, groups, clock, sharers, marker, begin, end, int(listed)
        )
        if not text:
            raise ValueError(f"no workgroup of {kernel} was recorded")
        return _parse(text.decode())

    whole = replay(0, _FOREVER)
    marks = [times for (group, _), times in whole["marks"].items() if group < resident]
    window, period, iterations, drift = (0, whole["work"]["cycles"]), 0.0, 0, 0.0
    if marks and min(map(len, marks)) > skip + 2:
        iterations = max(map(len, marks))
        begin, end = max(times[skip] for times in marks), min(times[-1] for times in marks)
        spans = sorted((times[-1] - times[skip]) / (len(times) - 1 - skip) for times in marks)
        period = spans[len(spans) // 2]
        if end > begin:
            window = (begin, end)
            middle = (begin + end) // 2
            halves = [replay(begin, middle)["work"]["matrix"], replay(middle, end)["work"]["matrix"]]
            drift = abs(halves[0] - halves[1]) / max(sum(halves) / 2, 1)
    counted = replay(*window, events)
    return Played(
        arch, resident, window, whole["work"]["cycles"], whole["groups"], iterations, period, drift,
        whole["work"], counted["work"], counted["stalls"], counted["texts"], counted["events"],
    )  # fmt: skip


def _parse(text: str) -> dict:
    work, groups, events, texts = {}, [], [], {}
    marks: dict[tuple[int, int], list[int]] = defaultdict(list)
    stalls: dict[int, dict[str, int]] = defaultdict(dict)
    for line in text.splitlines():
        kind, *fields = line.split("\t")
        if kind == "work":
            work[fields[0]] = int(fields[1])
        elif kind == "group":
            groups.append((int(fields[1]), int(fields[2])))
        elif kind == "mark":
            marks[int(fields[0]), int(fields[1])].append(int(fields[2]))
        elif kind == "stall":
            stalls[int(fields[0])][fields[2]] = int(fields[3])
            texts[int(fields[0])] = (fields[1], fields[4])
        else:
            group, wave, cycle, length = map(int, fields[:4])
            events.append((group, wave, cycle, length, fields[4], int(fields[5])))
    return {"work": work, "groups": groups, "marks": marks, "stalls": dict(stalls), "texts": texts, "events": events}


def makespan(durations: Sequence[float], slots: int) -> float:
    """When the last workgroup ends if each, in order, takes the first free slot."""
    free = [0.0] * min(slots, len(durations))
    for duration in durations:
        heapq.heappush(free, heapq.heappop(free) + duration)
    return max(free, default=0.0)
