"""`aiter selftest`: every family of kernels on a device of this machine, right and how fast; one file for a report.

    parent   compiles all kernels side by side, prints, writes the report
    worker   a process of its own, with the device: family after family

What a kernel can do to its process, a new device may show: a family that ends the worker, or never returns, is written
down as that, and another worker goes on with the next.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import aiter
from aiter.cli.demo import DTYPES, choose_device, timed
from aiter.cli.info import facts_of_machine
from aiter.cli.prewarm import Progress
from aiter.cli.selftest_cases import Family, Problem, cache_write_spec, check_cache_write, families
from aiter.cli.table import duration, table
from aiter.errors import AiterError
from aiter.jit import settings
from aiter.jit.arch import arch_of, is_gpu
from aiter.jit.cache import Cache
from aiter.jit.disk import output_file
from aiter.jit.log import logger
from aiter.jit.prewarm import FAILED, prewarm

PATIENCE_S = 120.0  # for one family; far more than any takes
# By arch and family: how long a large call takes by the timing model of the emulator (benchmarks/amd_selftest.py).
PREDICTIONS = json.loads(Path(__file__).with_name("selftest_predictions.json").read_text())
MEASURE, CACHE_WRITE, END = "measure", "write", "end"  # tasks beside the families' numbers


def run(options: argparse.Namespace) -> int:
    device = choose_device(options.device)
    arch = arch_of(device)
    dtype = options.dtype or ("bf16" if is_gpu(arch) else "fp32")
    tried = families(is_gpu(arch))
    quiet = options.json
    if not quiet:
        where = torch.cuda.get_device_name(device) if is_gpu(arch) else f"{torch.get_num_threads()} threads"
        print(f"aiter {aiter.__version__} on {device} ({where}, arch {arch}), {dtype}", flush=True)
    begin = time.monotonic()
    compiled = compile_all(tried, dtype, arch, quiet)
    compiling = time.monotonic() - begin
    results = list(work_through(tried, Tester, str(device), dtype, options.errors_only))
    predict(results, arch, dtype)
    report = {
        **facts_of_machine(),
        "tried": {"device": str(device), "arch": arch, "dtype": dtype},
        "compiling": {"seconds": round(compiling, 2), "kernels": compiled},
        "device": results[0],
        "families": results[1:],
        "seconds": round(time.monotonic() - begin, 1),
    }
    if options.report:
        with output_file(Path(options.report)) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
    print(json.dumps(report, indent=2) if quiet else text(report, options.report))
    return 0 if all(row["ok"] for row in report["families"]) else 1


def compile_all(tried: list[Family], dtype: str, arch: str, quiet: bool) -> list[dict]:
    """Every kernel that the families need, several at a time. What cannot be compiled fails again, with its own words,
    where it is called."""
    specs = [cache_write_spec(dtype, arch)]
    for family in tried:
        with contextlib.suppress(AiterError):
            specs += family.specs(dtype, arch)
    specs = list(dict.fromkeys(specs))
    logger.setLevel("WARNING")
    with contextlib.closing(Progress(len(specs), quiet=quiet or not sys.stderr.isatty())) as progress:
        outcomes = prewarm(specs, Cache(settings.cache_dir(), settings.prebuilt_dirs()), progress=progress)
    return [
        {"name": o.spec.name, "state": o.state, "seconds": o.seconds, "bytes": o.bytes}
        | ({"error": o.error} if o.state == FAILED else {})
        for o in outcomes
    ]


def predict(rows: list[dict], arch: str, dtype: str) -> None:
    """Writes beside each time what was predicted for it, where anything was."""
    predicted = PREDICTIONS["seconds"].get(arch, {}) if dtype == PREDICTIONS["dtype"] else {}
    for row in rows:
        if "seconds" in row and row["name"] in predicted:
            row["predicted_seconds"] = predicted[row["name"]]


# ---- the parent's side ----------------------------------------------------------------------------------------------


class Worker:
    """A process that has the device, and answers one task after the other with `answer(*arguments)(task)`."""

    def __init__(self, answer: Callable[..., Callable[[object], dict]], *arguments: object) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=_serve, args=(theirs, answer, *arguments), daemon=True)
        self.process.start()
        theirs.close()  # so that its end is seen
        with contextlib.suppress(EOFError, OSError):
            self.connection.recv()  # it has started; a task's time begins then

    def ask(self, task: object) -> dict | None:
        """Its answer; None where it has ended, or does not return."""
        with contextlib.suppress(EOFError, OSError):
            self.connection.send(task)
            if self.connection.poll(PATIENCE_S):
                return self.connection.recv()
        return None

    def end(self) -> str:
        """Ends it; says how it ended of itself, if it did."""
        with contextlib.suppress(OSError):
            self.connection.send(END)
        self.process.join(2)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            return f"did not return within {PATIENCE_S:.0f} s"
        return f"ended its process, by signal {-code}" if code < 0 else f"ended its process, with status {code}"


def work_through(
    tried: list[Family], answer: Callable[..., Callable[[object], dict]], *arguments: object
) -> Iterator[dict]:
    """What the device can do, then a row for each family, from workers that `answer`."""
    tasks: dict[str, object] = {"what the device can do": MEASURE, "cache write": CACHE_WRITE}
    tasks |= {family.name: number for number, family in enumerate(tried)}
    worker = None
    try:
        for count, (name, task) in enumerate(tasks.items(), 1):
            if sys.stderr.isatty():
                print(f"\r\033[K[{count}/{len(tasks)}] {name}", end="", file=sys.stderr, flush=True)
            worker = worker or Worker(answer, *arguments)
            row = worker.ask(task)
            if row is None:
                row, worker = {"ok": False, "problem": worker.end()}, None
            yield {"name": name, **row}
    finally:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if worker:
            worker.end()


def text(report: dict, path: str | None) -> str:
    rows = [_cells(row) for row in report["families"]]
    lines = [table(("family", "", "error", "allowed", "a call", "rate", "of the bound", "predicted"), rows), ""]
    device = report["device"]
    lines += [f"{row['name']}: {row['problem']}" for row in (device, *report["families"]) if "problem" in row]
    lines.append("Errors: the largest of any element against float64.")
    if "products" in device:
        products, moved = _rate(device["products"], "FLOP/s"), _rate(device["bytes"], "B/s")
        lines.append(f"The bound: products at {products}, as this device's own matrix multiplication does,")
        lines.append(f"or bytes at {moved}, as its own copy does.")
    if any("predicted_seconds" in row for row in report["families"]):
        median, worst = PREDICTIONS["error"]["median"], PREDICTIONS["error"]["worst"]
        lines.append("Predicted: by a model of the chip that was never held against this library on a card; on others'")
        lines.append(f"published kernels it was off by {median:.0%} in the median and {worst:.0%} at worst.")
    count, right = len(report["families"]), sum(row["ok"] for row in report["families"])
    lines.append(f"{right} of {count} families are right; {report['seconds']} s.")
    lines.append(
        f"The report: {path}" if path else "`aiter selftest --report FILE` writes one file to attach to a report."
    )
    return "\n".join(lines)


def _cells(row: dict) -> tuple[str, ...]:
    state = "ok" if row["ok"] else "FAILED" if "problem" in row else "WRONG"
    errors = [f"{row[name]:.1e}" if name in row else "" for name in ("error", "allowed")]
    if "seconds" not in row:
        return (row["name"], state, *errors, "", "", "", "")
    work, unit = (row["products"], "FLOP/s") if row["bounded_by"] == "products" else (row["bytes"], "B/s")
    return (
        *(row["name"], state, *errors, duration(row["seconds"])),
        *(_rate(work / row["seconds"], unit), f"{row['share']:.0%}"),
        _rate(work / row["predicted_seconds"], unit) if "predicted_seconds" in row else "",
    )


def _rate(value: float, unit: str) -> str:
    prefix, scale = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
    return f"{value / scale:.3g} {prefix}{unit}"


# ---- the worker's side ----------------------------------------------------------------------------------------------


def _serve(connection, answer: Callable[..., Callable[[object], dict]], *arguments: object) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        reply = answer(*arguments)
        connection.send("ready")
        while (task := connection.recv()) != END:
            connection.send(reply(task))


class Tester:
    """A device that families are tried on."""

    def __init__(self, device: str, dtype: str, errors_only: bool) -> None:
        logger.setLevel("WARNING")
        self.device, self.dtype, self.errors_only = torch.device(device), DTYPES[dtype], errors_only
        self.tried = families(self.device.type == "cuda")
        self.peaks: dict = {}

    def __call__(self, task: object) -> dict:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            if task == CACHE_WRITE:
                right = check_cache_write(self.dtype, self.device)
                return {"ok": right} | ({} if right else {"problem": "rows do not lie where they belong"})
            if not self.peaks and not self.errors_only:
                self.peaks = measure_device(self.dtype, self.device)
            if task == MEASURE:
                return {"ok": True, **self.peaks}
            assert isinstance(task, int)
            return try_family(self.tried[task], self.dtype, self.device, self.peaks)
        except (AiterError, RuntimeError, ValueError) as error:
            return {"ok": False, "problem": f"{type(error).__name__}: {str(error).strip()}"}


def try_family(family: Family, dtype: torch.dtype, device: torch.device, peaks: dict) -> dict:
    error, allowed = Problem(family, family.small, dtype, device).errors()
    row: dict = {"ok": error <= allowed, "error": error, "allowed": allowed}
    if peaks:
        problem = Problem(family, family.large, dtype, device)
        work = {"products": family.products(family.large), "bytes": family.bytes(family.large, dtype.itemsize)}
        least = {kind: amount / peaks[kind] for kind, amount in work.items()}  # seconds
        seconds = median_seconds(problem.run, device)
        bound = max(least, key=lambda kind: least[kind])
        row |= {**work, "seconds": seconds, "bounded_by": bound, "share": least[bound] / seconds}
    return row


def measure_device(dtype: torch.dtype, device: torch.device) -> dict:
    """What the device's own matrix multiplication and copy reach: FLOP/s, bytes/s (read and written)."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products = 2.0 * size**3 / median_seconds(lambda: a @ b, device)
    source = torch.empty((1 << 30 if device.type == "cuda" else 1 << 28) // 4, device=device).fill_(1.0)
    target = torch.empty_like(source)
    moved = 2.0 * source.numel() * 4 / median_seconds(lambda: target.copy_(source), device)
    return {"products": products, "bytes": moved}


def median_seconds(call: Callable[[], object], device: torch.device, budget: float = 0.6) -> float:
    """Of one call; on a GPU by its own events, several calls in a row."""
    call()
    times: list[float] = []
    end = time.monotonic() + budget
    while len(times) < 3 or (time.monotonic() < end and len(times) < 100):
        if device.type != "cuda":
            times.append(timed(call, device)[0])
            continue
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(4):
            call()
        stop.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(stop) / 4e3)
    return statistics.median(times)
