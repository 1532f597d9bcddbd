"""Where a kernel comes from: the read-only layers, then the writable cache, then a build.

A folder that cannot be used is passed over with one warning: a layer for the next one, the cache for a private folder
(aiter/jit/private.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

from aiter.errors import CacheError, CompilationDisabledError
from aiter.jit import private, settings
from aiter.jit.disk import forbids_execution
from aiter.jit.entry import DamagedEntry, Entry, candidates, read
from aiter.jit.log import logger
from aiter.jit.recipe import Recipe
from aiter.jit.store import Stale, Store, Unwritable
from aiter.jit.trust import check_chain


class Cache:
    """The layers as the environment names them, or as given."""

    def __init__(self, folder: Path | None = None, prebuilt: list[Path] | None = None) -> None:
        folder = folder or settings.user_cache_dir()
        self._refusals = [] if folder else ["there is no home folder to keep it in"]
        self.store = Store(folder or settings.private_dirs()[0])
        self.prebuilt = settings.prebuilt_dirs() if prebuilt is None else prebuilt

    def find(self, recipe: Recipe) -> tuple[Entry | None, str]:
        """The verified entry, or None and why it must be built. Compiles nothing."""
        entry = self._find_prebuilt(recipe)
        return (entry, "") if entry else _find(self.store, recipe)

    def build(self, recipe: Recipe, reason: str, store: Store | None = None) -> Entry:
        """Builds into the writable cache, or another store. Raises Unwritable where it cannot be written."""
        store = store or self.store
        if settings.flag("AITER_NO_COMPILE"):
            places = ", ".join(str(folder) for folder in [*self.prebuilt, self.store.folder])
            raise CompilationDisabledError(
                f"no usable kernel {recipe.name} ({reason}) in {places}, and AITER_NO_COMPILE is set. "
                "Fill a cache with `aiter prewarm`, or unset AITER_NO_COMPILE."
            )
        compiler = recipe.toolchain.require(recipe.spec.name)
        for _ in range(3):
            try:
                return store.build(recipe, compiler, reason)
            except Unwritable as error:
                if not error.vanished:
                    raise
                refused = error  # someone deletes the cache while we build; that is no reason not to have one
        raise refused

    @contextlib.contextmanager
    def obtain(self, recipe: Recipe) -> Iterator[Entry]:
        """The verified entry, built if need be; it may be gone when the context ends, so load it inside."""
        entry = self._find_prebuilt(recipe)
        if entry is not None:
            yield entry
            return
        refusals = list(self._refusals)
        with contextlib.closing(self._stores()) as stores:
            for store in stores:
                try:
                    entry = self._take(store, recipe, refusals)
                except CacheError as error:
                    refusals += [str(error)] if str(error) not in refusals else []
                    continue
                if refusals:
                    _warn_once(
                        "the kernel cache cannot be used: %s. What is built now %s. Set AITER_CACHE_DIR to a folder "
                        "that belongs to you, can be written by you alone and is not mounted noexec.",
                        "; ".join(refusals),
                        "lasts as long as this process" if store.fleeting else f"is kept in {store.folder}",
                    )
                yield entry
                return
        raise CacheError(
            f"no folder takes a kernel: {'; '.join(refusals)}. Set AITER_CACHE_DIR, or TMPDIR, to a folder that "
            "belongs to you, can be written by you alone and is not mounted noexec."
        )

    def _find_prebuilt(self, recipe: Recipe) -> Entry | None:
        for folder in self.prebuilt:
            try:
                for path in candidates(check_chain(folder), recipe.name):
                    try:
                        entry = read(path)
                    except FileNotFoundError:
                        continue
                    except DamagedEntry as damage:
                        _warn_once("the prebuilt kernel %s is passed over: it %s", path, damage)
                        continue
                    _require_execution(folder)
                    return entry
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (CacheError, OSError) as error:
                _warn_once("the prebuilt kernels in %s are passed over: %s", folder, error)
        return None

    def _stores(self) -> Generator[Store]:
        yield self.store
        for store in private.stores():
            if store.folder != self.store.folder:
                yield store

    def _take(self, store: Store, recipe: Recipe, refusals: list[str]) -> Entry:
        """The entry from one store, built if need be. Raises CacheError where the store cannot be used."""
        _require_execution(store.folder)
        entry, reason = _find(store, recipe)
        if refusals:  # of which a warning will tell, unless nothing is built
            reason = "; ".join(refusals) if settings.flag("AITER_NO_COMPILE") else "the cache cannot be used"
        return entry or self.build(recipe, reason, store)


def _find(store: Store, recipe: Recipe) -> tuple[Entry | None, str]:
    try:
        entry = store.find(recipe)
    except Stale as stale:
        return None, str(stale)
    return entry, "" if entry else "first use"


def _require_execution(folder: Path) -> None:
    if forbids_execution(folder):
        raise CacheError(f"{folder} is on a file system that is mounted noexec, from which no kernel can be loaded")


_warned: set[tuple] = set()


def _warn_once(message: str, *values: object) -> None:
    line = (message, *map(str, values))
    if line not in _warned:
        _warned.add(line)
        logger.warning(message, *values)
