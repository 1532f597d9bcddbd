"""The JIT runtime: from a spec to a kernel that can be launched.

    Spec ── recipe ──> key, sources, flags ── cache ──> entry on disk, built if need be ── loader ──> Kernel

It knows nothing about attention beyond the fields of a Spec. get_kernel is all that operations use.
"""

from __future__ import annotations

import itertools
import os
import threading

from aiter.errors import LoadError
from aiter.jit.cache import Cache
from aiter.jit.disk import forbid_execution
from aiter.jit.loader import Kernel, load
from aiter.jit.recipe import recipe_for
from aiter.jit.record import record
from aiter.jit.spec import Spec

__all__ = ["Kernel", "Spec", "get_kernel"]

_kernels: dict[Spec, Kernel] = {}
_loading: dict[Spec, threading.Lock] = {}


def get_kernel(spec: Spec) -> Kernel:
    """The kernel for `spec`: from this process, from a cache on disk, or compiled now.

    Safe to call from any number of threads and processes: a kernel is compiled once. A kernel that this process has
    used is found without a lock.
    """
    kernel = _kernels.get(spec)
    if kernel is None:
        with _loading.setdefault(spec, threading.Lock()):
            kernel = _kernels.get(spec)
            if kernel is None:
                kernel = _kernels[spec] = _load(spec)
    return kernel


def _load(spec: Spec) -> Kernel:
    recipe = recipe_for(spec)
    for attempt in itertools.count():
        with Cache().obtain(recipe) as entry:
            try:
                kernel = load(spec, entry.library)
                break
            except LoadError as error:
                # What a noexec mount says, and other rules of the system that statvfs does not tell: the next folder.
                if "failed to map segment" in str(error) and forbid_execution(entry.folder.parent):
                    continue
                if attempt >= 2 or entry.library.exists():
                    raise
                # Someone cleared the cache between our look and our load.
    record(spec)
    return kernel


def _forget_locks() -> None:
    """A forked child has none of the threads that may hold these."""
    _loading.clear()


os.register_at_fork(after_in_child=_forget_locks)
