"""One build of a kernel at a time, whoever asks for it, on any file system.

The lock only saves work: entries are put in place by one rename, so that without a lock (or with one that a file system
grants to everybody) a kernel is built twice at worst. Hence a lock that cannot be had is reported and done without, and
nobody waits for ever. The operating system releases the lock when its holder dies, however it dies.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiter.jit.log import logger

FIRST_NOTICE_S = 2.0
LATER_NOTICES_S = 30.0
POLL_S = 0.05


@contextlib.contextmanager
def build_lock(path: Path, patience: float, waiting_for: Callable[[], str]) -> Iterator[bool]:
    """Holds the lock file `path`; yields False where it had to go on without it.

    `patience` is how many seconds a holder may take; `waiting_for` says what we wait for, for the log.
    """
    attempt = _Attempt(path)
    begin = time.monotonic()
    notice = FIRST_NOTICE_S
    try:
        while not attempt.done.wait(max(0.0, min(notice, patience) - (time.monotonic() - begin))):
            waited = time.monotonic() - begin
            if waited >= patience:
                logger.warning(
                    "gave up waiting for %s after %.0f s: the lock %s is held by something that does not build, or "
                    "this file system's locks do not work. Building it here too.",
                    waiting_for(),
                    waited,
                    path,
                )
                break
            if waited >= notice:
                logger.info("waiting for %s (%.0f s so far)", waiting_for(), waited)
                notice += LATER_NOTICES_S
        if attempt.error is not None:
            logger.warning(
                "locks do not work in %s (%s): building without one, which is safe, but several processes may build "
                "the same kernel",
                path.parent,
                attempt.error,
            )
        yield attempt.held
    finally:
        attempt.end()


def try_lock(path: Path) -> contextlib.AbstractContextManager[bool]:
    """Holds the lock if nobody else does, and yields whether it does. Does not wait."""
    return _try_lock(path)


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    from filelock import Timeout

    lock = _file_lock(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        _unlink(path)
        lock.release()


class _Attempt:
    """Takes the lock in a thread of its own, because on a network file system whose lock service is gone even the call
    that must not wait may never return."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = threading.Event()
        self.error: Exception | None = None  # why there is no lock
        self.held = False
        self._ended = False
        self._mutex = threading.Lock()
        self._lock = _file_lock(path)
        try:
            threading.Thread(target=self._run, name=f"aiter lock {path.name}", daemon=True).start()
        except RuntimeError as error:  # a limit of threads: better no lock than no kernel
            self.error = error
            self.done.set()

    def _run(self) -> None:
        from filelock import Timeout

        while not self._ended:
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                time.sleep(POLL_S)
                continue
            except (OSError, NotImplementedError) as error:
                self.error = error
                self.done.set()
                return
            with self._mutex:
                if self._ended:
                    self._lock.release()
                else:
                    self.held = True
            self.done.set()
            return

    def end(self) -> None:
        with self._mutex:
            self._ended = True
            if self.held:
                self.held = False
                # Still held here, so that who finds it gone makes a new one, and none is left behind.
                _unlink(self.path)
                self._lock.release()


def _file_lock(path: Path):
    import filelock  # here, because its import takes longer than a warm start

    options: dict[str, Any] = {"thread_local": False, "mode": 0o644}
    try:
        # A lock that is a mere file outlives its holder: better none.
        return filelock.FileLock(path, fallback_to_soft=False, **options)
    except TypeError:
        return filelock.FileLock(path, **options)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
