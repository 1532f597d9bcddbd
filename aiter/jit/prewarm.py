"""Building many kernels ahead of time, in parallel, for chips that need not be here."""

from __future__ import annotations

import collections
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass

from aiter.errors import AiterError, CompilationError
from aiter.jit.cache import Cache
from aiter.jit.machine import compilers_at_once
from aiter.jit.process import compilers_stopped
from aiter.jit.recipe import recipe_for
from aiter.jit.spec import Spec
from aiter.jit.toolchain import starved

BUILT, PRESENT, MISSING, FAILED = "built", "present", "missing", "failed"


@dataclass(frozen=True)
class Outcome:
    """What became of one spec. `seconds` is the time of its compilation, as its entry records it."""

    spec: Spec
    state: str  # BUILT, PRESENT, FAILED, or, in a dry run, MISSING
    name: str = ""
    seconds: float = 0.0
    bytes: int = 0
    error: str = ""
    starved: bool = False  # failed for want of memory or processes


def prewarm(
    specs: Iterable[Spec],
    cache: Cache,
    jobs: int | None = None,
    dry_run: bool = False,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Sees to it that `cache` has each spec's kernel; returns what became of each, in their order.

    What counts as there has been looked up as a call would look it up, after it was built too. `jobs` compilers run at
    once: by default as many as this machine, or container, has CPUs and memory for; fewer where no more threads can be
    started. One that failed for want of memory or processes is tried once more alone. An interrupt stops the compilers
    and leaves nothing half done.
    """
    specs = list(dict.fromkeys(specs))
    outcomes: dict[Spec, Outcome] = {}
    again: list[Outcome] = []
    jobs = min(jobs or compilers_at_once(), len(specs))
    with contextlib.closing(_side_by_side(lambda spec: _one(spec, cache, dry_run), specs, jobs)) as coming:
        for outcome in coming:
            if outcome.starved and jobs > 1:
                again.append(outcome)
                continue
            outcomes[outcome.spec] = outcome
            progress(outcome)
    for outcome in again:
        outcomes[outcome.spec] = _one(outcome.spec, cache, dry_run)
        progress(outcomes[outcome.spec])
    return [outcomes[spec] for spec in specs]


def _side_by_side(task: Callable[[Spec], Outcome], specs: list[Spec], threads: int) -> Generator[Outcome, None, None]:
    """The outcomes of `task` for each spec, as they come, from that many threads, or as many as can be started. When
    the caller stops asking, or is interrupted, compilers are stopped and the threads end."""
    waiting = collections.deque(specs)
    done: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            while True:
                try:
                    spec = waiting.popleft()
                except IndexError:
                    return
                done.put(task(spec))
        except BaseException as error:
            done.put(error)

    started = []
    try:
        for number in range(threads):
            thread = threading.Thread(target=work, name=f"aiter prewarm {number}")
            try:
                thread.start()
            except RuntimeError:  # a limit of threads: go on with those that there are
                break
            started.append(thread)
        if not started:
            yield from map(task, specs)
            return
        for _ in specs:
            outcome = _next(done)
            if isinstance(outcome, BaseException):
                raise outcome
            yield outcome
        for thread in started:
            thread.join()
    except BaseException:
        waiting.clear()
        with compilers_stopped():
            for thread in started:
                thread.join()
        raise


def _next(done: queue.SimpleQueue[Outcome | BaseException]) -> Outcome | BaseException:
    """What comes next. Wakes up now and then: a signal may be delivered to another thread than this one, which would
    then not hear of it before something comes."""
    while True:
        with contextlib.suppress(queue.Empty):
            return done.get(timeout=0.5)


def _one(spec: Spec, cache: Cache, dry_run: bool) -> Outcome:
    begin = time.monotonic()
    name = ""
    try:
        recipe = recipe_for(spec)
        name = recipe.name
        entry, reason = cache.find(recipe)
        state = PRESENT if entry else BUILT
        if entry is None and dry_run:
            return Outcome(spec, MISSING, name)
        if entry is None:
            cache.build(recipe, reason)
            entry, reason = cache.find(recipe)
        if entry is None:
            return Outcome(spec, FAILED, name, error=f"a call would not take what is there: {reason}")
        return Outcome(spec, state, name, entry.manifest.get("seconds", 0.0), entry.bytes)
    except (AiterError, OSError) as error:
        alone = isinstance(error, CompilationError) and starved(error)
        return Outcome(spec, FAILED, name, time.monotonic() - begin, error=str(error), starved=alone)
