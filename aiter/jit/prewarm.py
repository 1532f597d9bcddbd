"""Building many kernels ahead of time, in parallel, for chips that need not be here."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from aiter.errors import AiterError
from aiter.jit.cache import Cache
from aiter.jit.recipe import recipe_for
from aiter.jit.spec import Spec
from aiter.jit.toolchain import stop_compilers

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


def prewarm(
    specs: Iterable[Spec],
    cache: Cache,
    jobs: int | None = None,
    dry_run: bool = False,
    progress: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Sees to it that `cache` has each spec's kernel; returns what became of each, in their order.

    What counts as there has been looked up as a call would look it up, after it was built too. An interrupt stops the
    compilers and leaves nothing half done.
    """
    specs = list(dict.fromkeys(specs))
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0)), thread_name_prefix="aiter prewarm") as pool:
        tasks = {pool.submit(_one, spec, cache, dry_run): spec for spec in specs}
        try:
            outcomes = {}
            for task in as_completed(tasks):
                outcomes[tasks[task]] = task.result()
                progress(task.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_compilers()
            raise
    return [outcomes[spec] for spec in specs]


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
        return Outcome(spec, FAILED, name, time.monotonic() - begin, error=str(error))
