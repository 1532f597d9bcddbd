"""Where a kernel comes from: the read-only layers, then the writable cache, then a build.

Where the cache cannot be written (read-only, full, no home folder), a kernel is built in a private temporary folder
that goes as soon as the kernel is loaded.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from aiter.errors import CacheError, CompilationDisabledError
from aiter.jit import settings
from aiter.jit.disk import is_alive, remove
from aiter.jit.entry import DamagedEntry, Entry, read
from aiter.jit.log import logger
from aiter.jit.recipe import Recipe
from aiter.jit.store import Stale, Store, Unwritable
from aiter.jit.trust import check_chain


class Cache:
    """The layers as the environment names them, or as given."""

    def __init__(self, folder: Path | None = None, prebuilt: list[Path] | None = None) -> None:
        self.store = Store(folder or settings.cache_dir())
        self.prebuilt = settings.prebuilt_dirs() if prebuilt is None else prebuilt

    def find(self, recipe: Recipe) -> tuple[Entry | None, str]:
        """The verified entry, or None and why it must be built. Compiles nothing."""
        for folder in self.prebuilt:
            try:
                return read(check_chain(folder) / recipe.name), ""
            except FileNotFoundError:
                continue
            except (DamagedEntry, OSError) as error:
                _warn_once("the prebuilt kernel %s is passed over: it %s", folder / recipe.name, error)
        try:
            entry = self.store.find(recipe)
        except Stale as stale:
            return None, str(stale)
        return entry, "" if entry else "first use"

    def build(self, recipe: Recipe, reason: str) -> Entry:
        """Builds into the writable cache. Raises Unwritable where it cannot be written."""
        if settings.flag("AITER_NO_COMPILE"):
            places = ", ".join(str(folder) for folder in [*self.prebuilt, self.store.folder])
            raise CompilationDisabledError(
                f"no usable kernel {recipe.name} ({reason}) in {places}, and AITER_NO_COMPILE is set. "
                "Fill a cache with `aiter prewarm`, or unset AITER_NO_COMPILE."
            )
        compiler = recipe.toolchain.require(recipe.spec.name)
        for _ in range(3):
            try:
                return self.store.build(recipe, compiler, reason)
            except Unwritable as error:
                if not error.vanished:
                    raise
                refused = error  # someone deletes the cache while we build; that is no reason not to have one
        raise refused

    @contextlib.contextmanager
    def obtain(self, recipe: Recipe) -> Iterator[Entry]:
        """The verified entry, built if need be; it may be gone when the context ends, so load it inside."""
        entry, reason = self.find(recipe)
        if entry is None:
            try:
                entry = self.build(recipe, reason)
            except Unwritable as error:
                _warn_once(
                    "the kernel cache %s cannot be written (%s): what is built now lasts as long as this process. "
                    "Set AITER_CACHE_DIR to a folder that can be written.",
                    self.store.folder,
                    error,
                )
                with _private_folder() as folder:
                    private = Cache(folder, [])
                    private.store.keep_logs = False
                    try:
                        yield private.build(recipe, "the cache cannot be written")
                    except Unwritable as private:
                        raise CacheError(
                            f"no folder takes a kernel: {self.store.folder} ({error}), {folder} ({private}). "
                            "Set AITER_CACHE_DIR, or TMPDIR, to a folder that can be written."
                        ) from None
                return
        yield entry


@contextlib.contextmanager
def _private_folder() -> Iterator[Path]:
    try:
        owner = f"aiter-{os.geteuid()}-{socket.gethostname()}-"
        # What killed processes have left, unless it may be of a process that we cannot see, in another container.
        for path in Path(tempfile.gettempdir()).glob(owner + "*"):
            old = time.time() - path.stat().st_mtime > 2 * settings.compile_timeout()
            if old and path.stat().st_uid == os.geteuid() and not is_alive(path.name[len(owner) :].split("-")[0]):
                remove(path)
        temporary = tempfile.TemporaryDirectory(prefix=f"{owner}{os.getpid()}-", ignore_cleanup_errors=True)
    except OSError as error:
        raise CacheError(f"no temporary folder can be made ({error}); set AITER_CACHE_DIR or TMPDIR") from None
    with temporary as folder:
        yield Path(folder)


_warned: set[tuple] = set()


def _warn_once(message: str, *values: object) -> None:
    line = (message, *map(str, values))
    if line not in _warned:
        _warned.add(line)
        logger.warning(message, *values)
