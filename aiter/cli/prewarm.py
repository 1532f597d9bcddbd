"""`aiter prewarm`: from options, a model's configuration or a recorded run to the kernels to build; and a report."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from aiter.cli.model_config import Model, Variant, read_model
from aiter.cli.table import count_kernels, size, table
from aiter.errors import AiterError, UnsupportedError
from aiter.jit import arch, settings
from aiter.jit.cache import Cache
from aiter.jit.disk import closed_to_others
from aiter.jit.log import logger
from aiter.jit.prewarm import BUILT, FAILED, MISSING, PRESENT, Outcome, prewarm
from aiter.jit.record import read_record
from aiter.jit.spec import DTYPES, Spec
from aiter.jit.trust import check_chain
from aiter.kernels import CACHE_DTYPES, HEAD_DIM_MAX, HEAD_DIM_STEP, LATENT_HEAD_DIM, OPERATIONS, specs_for

STATES = {BUILT: "built", PRESENT: "already there", MISSING: "to be built", FAILED: "failed"}


# What is built where nothing says which.
COMMON = tuple(Variant(head_dim, causal, head_dim) for head_dim in (64, 128) for causal in (False, True))

# Options of calls that select code, sorted; each is an option of this command.
CODE_OPTIONS = ("alibi", "batch_invariant", "chunk", "dropout", "softcap", "window")
# What keys and values may be kept in: `same` is the dtype of queries.
SAME = "same"
FLAGS = {"yes": (True,), "no": (False,), "both": (False, True)}


class UsageError(AiterError):
    """Options that make no sense; the message says which would."""


def run(options: argparse.Namespace) -> int:
    specs = choose(options)
    cache = Cache(Path(options.cache_dir).absolute() if options.cache_dir else settings.cache_dir(), prebuilt=[])
    logger.setLevel("WARNING")  # the report below says what is compiled
    progress = Progress(len(specs), quiet=options.json)
    begin = time.monotonic()
    with _ends_as_if_interrupted(), contextlib.closing(progress):
        outcomes = prewarm(specs, cache, options.jobs, options.dry_run, progress)
    seconds = time.monotonic() - begin
    if cache.store.folder.is_dir():
        check_chain(cache.store.folder)
    failed = [outcome for outcome in outcomes if outcome.state == FAILED]
    if options.json:
        kernels = [
            {"name": o.name, "spec": o.spec.to_json(), "state": o.state, "seconds": o.seconds, "bytes": o.bytes}
            | ({"error": o.error} if o.error else {})
            for o in outcomes
        ]
        report = {"folder": str(cache.store.folder), "seconds": round(seconds, 3), "kernels": kernels}
        print(json.dumps(report, indent=2))
    else:
        print(_summary(outcomes, seconds, cache.store.folder))
        closed = closed_to_others(cache.store.folder) if options.cache_dir and cache.store.folder.is_dir() else None
        if closed and os.geteuid() == 0:
            print(f"\nOther users cannot read these kernels: `chmod a+rx {closed}` lets them.")
        _print_failures(failed)
    return 1 if failed else 0


def choose(options: argparse.Namespace) -> list[Spec]:
    """The specs that the options ask for, sorted out by kind of call."""
    if options.replay:
        shapes = ("arch", "ops", "dtypes", "cache_dtypes", "head_dims", "value_dims", "causal")
        if any(getattr(options, name) for name in (*shapes, *CODE_OPTIONS, "model", "backward")):
            raise UsageError("--replay builds exactly what was recorded: it takes no --arch, --ops, --dtypes, …")
        try:
            return read_record(options.replay)
        except ValueError as error:
            raise UsageError(str(error)) from None

    model = read_model(Path(options.model)) if options.model else Model(COMMON, ())
    for note in model.notes:
        print(f"--model {options.model}: {note}", file=sys.stderr)
    operations = _list(options.ops, OPERATIONS, "operation") or list(OPERATIONS)
    dtypes = _list(options.dtypes, DTYPES, "dtype") or model.dtypes
    cache_dtypes = _list(options.cache_dtypes, (SAME, *CACHE_DTYPES), "cache dtype") or [SAME]
    kept = [None if name == SAME else name for name in cache_dtypes]
    kernels = _narrowed(model.kernels, options)
    specs: dict[Spec, None] = {}
    for name in _archs(options.arch or "native"):
        supported = ("fp16", "bf16") if arch.is_gpu(name) else DTYPES
        chosen = [dtype for dtype in dtypes or supported if dtype in supported]
        if not chosen:
            raise UsageError(f"{name} has no kernels for {', '.join(dtypes)}; it has: {', '.join(supported)}")
        for operation in operations:
            for dtype in chosen:
                for (head_dim, causal, value_dim, chosen_options), cache_dtype in itertools.product(kernels, kept):
                    rest = options.backward, value_dim, chosen_options, cache_dtype
                    for spec in specs_for(operation, dtype, head_dim, causal, name, *rest):
                        specs[spec] = None
    return list(specs)


def _narrowed(kernels: Iterable[Variant], options: argparse.Namespace) -> list[Variant]:
    """What the command line says, and what `kernels` have where it says nothing."""
    head_dims = [_head_dim(text) for text in _split(options.head_dims)]
    value_dims = [_head_dim(text, value=True) for text in _split(options.value_dims)]
    always = ("batch_invariant",) if settings.flag("AITER_BATCH_INVARIANT") else ()
    chosen: dict[Variant, None] = {}
    for own in kernels:
        causals = FLAGS.get(options.causal, (own.causal,))
        code = [FLAGS.get(getattr(options, name), (name in (*own.options, *always),)) for name in CODE_OPTIONS]
        for head_dim, causal, flags in itertools.product(
            head_dims or [own.head_dim], causals, itertools.product(*code)
        ):
            for value_dim in value_dims or [min(head_dim, HEAD_DIM_MAX) if head_dims else own.value_dim]:
                names = tuple(name for name, flag in zip(CODE_OPTIONS, flags, strict=True) if flag)
                chosen[Variant(head_dim, causal and "window" not in names, value_dim, names)] = None
    return list(chosen)


class Progress:
    """One line that fills up on a terminal; one line per kernel in a build log."""

    def __init__(self, total: int, quiet: bool) -> None:
        self.total, self.done = total, 0
        self.bar = sys.stderr.isatty() and not quiet
        self.lines = not self.bar and not quiet
        self._draw("")

    def __call__(self, outcome: Outcome) -> None:
        self.done += 1
        if self.lines:
            took = f" in {outcome.seconds:.1f} s" if outcome.state == BUILT else ""
            self._write(f"[{self.done}/{self.total}] {STATES[outcome.state]}{took}: {outcome.spec.name}\n", sys.stdout)
        self._draw(outcome.spec.name)

    def _draw(self, name: str) -> None:
        if self.bar:
            filled = 30 * self.done // max(1, self.total)
            line = f"[{'█' * filled}{'·' * (30 - filled)}] {self.done}/{self.total} {name}"
            width = shutil.get_terminal_size().columns
            self._write("\r\033[K" + line[: max(20, width - 1)], sys.stderr)

    def close(self) -> None:
        if self.bar:
            self._write("\r\033[K", sys.stderr)

    def _write(self, text: str, stream: TextIO) -> None:
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # a full disk, a reader that has gone: kernels are built all the same
            self.bar = self.lines = False


@contextlib.contextmanager
def _ends_as_if_interrupted() -> Iterator[None]:
    """Told to end by a container engine, or by a terminal that goes away, do as at Ctrl-C: leave nothing half done."""
    # Under nohup, one of these is ignored, and stays so.
    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _summary(outcomes: list[Outcome], seconds: float, folder: Path) -> str:
    rows = []
    for name in dict.fromkeys(outcome.spec.arch for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.spec.arch == name]
        count = {state: sum(o.state == state for o in mine) for state in STATES}
        compiling = sum(o.seconds for o in mine if o.state == BUILT)
        numbers = (*(str(count[state]) for state in STATES), f"{compiling:.1f} s", size(sum(o.bytes for o in mine)))
        rows.append((name, *numbers))
    head = ("arch", *STATES.values(), "compiling", "size")
    return f"{table(head, rows)}\n\n{count_kernels(len(outcomes))} in {seconds:.1f} s; cache: {folder}"


def _print_failures(failed: list[Outcome]) -> None:
    """Each failure's own words; those that differ in nothing but names and paths are named and not repeated."""
    seen: dict[tuple[str, ...], str] = {}
    for outcome in failed:
        lines = outcome.error.splitlines()
        words = tuple(line for line in lines[1:] if not line.startswith(("$ ", "Log: "))) or tuple(lines)
        if words in seen:
            print(f"failed likewise: {outcome.spec.name}", file=sys.stderr)
        else:
            seen[words] = outcome.spec.name
            print(f"\nfailed: {outcome.spec.name}\n{outcome.error}", file=sys.stderr)


def _archs(text: str) -> list[str]:
    names: list[str] = []
    for name in _split(text):
        if name == "cpu":
            names.append(arch.cpu_arch())
        elif name == "native":
            names += _native()
        else:
            names.append(arch.check(name))
    return list(dict.fromkeys(names))


def _native() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return [arch.cpu_arch()]
    return [arch.arch_of(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _list(text: str | None, known, what: str) -> list[str]:
    chosen = _split(text)
    for name in chosen:
        if name not in known:
            raise UsageError(f"there is no {what} {name!r}; there are: {', '.join(known)}")
    return chosen


def _head_dim(text: str, value: bool = False) -> int:
    size = int(text) if text.isdecimal() else 0
    if not (0 < size <= HEAD_DIM_MAX and size % HEAD_DIM_STEP == 0) and (value or size != LATENT_HEAD_DIM):
        latent = "" if value else f", and {LATENT_HEAD_DIM}"
        name = "value head_dim" if value else "head_dim"
        raise UnsupportedError(
            f"{name} {text} is not supported; supported: every multiple of {HEAD_DIM_STEP} up to {HEAD_DIM_MAX}{latent}"
        )
    return size
