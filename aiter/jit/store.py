"""One writable cache folder: looking up an entry, and building one so that nobody ever sees half of it.

<cache>/<entry>/            see aiter/jit/entry.py
<cache>/.building/          entries in the making; a rename puts them in place. What a killed process left there is
                            cleared by the next build
<cache>/.locks/             one lock file per key, while it is built
<cache>/.damaged/<entry>/   set aside because it was not what its manifest says; the latest of each key
<cache>/.failed/<entry>.log what the compiler said
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

from aiter.errors import CacheError, CompilationError
from aiter.jit import settings, trust
from aiter.jit.disk import is_alive, refuses_writes, remove, sync
from aiter.jit.entry import DamagedEntry, Entry, read, write_manifest
from aiter.jit.lock import build_lock, try_lock
from aiter.jit.log import logger
from aiter.jit.recipe import Recipe
from aiter.jit.toolchain import LIBRARY, LOG, TEMPORARY, Compiler, compile_library

BUILDING, LOCKS, DAMAGED, FAILED = ".building", ".locks", ".damaged", ".failed"
# What another host, or a process of ours, has in the making is taken for abandoned after this time.
ABANDONED_S = 24 * 3600.0
# How much longer than a compilation a lock may be held.
LOCK_MARGIN_S = 60.0


class Stale(Exception):
    """An entry that is there must be built again; says why. `entry` is that entry where it is sound all the same."""

    def __init__(self, reason: str, entry: Entry | None = None) -> None:
        super().__init__(reason)
        self.entry = entry


class Unwritable(Exception):
    """The folder does not take an entry (read-only, full, not ours); says why, and whether it has vanished."""

    def __init__(self, reason: str, vanished: bool = False) -> None:
        super().__init__(reason)
        self.vanished = vanished


class Store:
    """A cache folder; it need not exist. Raises UntrustedCacheError where others could have written what it holds."""

    def __init__(self, folder: Path, keep_logs: bool = True) -> None:
        self.folder = folder
        self.keep_logs = keep_logs  # of failed builds

    def find(self, recipe: Recipe) -> Entry | None:
        """The verified entry of a recipe, or None. Raises Stale where there is one that must not be used."""
        try:
            folder = trust.check_chain(self.folder)
            entry = read(folder / recipe.name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DamagedEntry as damage:
            raise Stale(f"the entry in the cache is damaged: {damage}") from None
        except OSError as error:
            raise Stale(f"the entry in the cache cannot be read: {error}") from None
        self._check_compiler(entry, recipe)
        return entry

    def build(self, recipe: Recipe, compiler: Compiler, reason: str) -> Entry:
        """Builds a recipe's entry unless someone else does so first; returns it verified.

        Raises CompilationError, or Unwritable.
        """
        with self._writing():
            self._prepare()
        lock = self.folder / LOCKS / f"{recipe.name}.lock"
        patience = settings.compile_timeout() + LOCK_MARGIN_S
        with build_lock(lock, patience, lambda: self._who_builds(recipe.name)) as held:
            if held:  # or locks do not work here, and asking for more of them may take for ever
                self._sweep(recipe.name)
            try:
                entry = self.find(recipe)  # again: someone may have built it while we waited
                if entry is not None:
                    return entry
            except Stale as stale:
                reason, entry = str(stale), stale.entry
                if entry is None:
                    self._set_aside(recipe.name, reason)
                    reason = "the one there was damaged"
            begin = time.monotonic()
            try:
                entry = self._build_now(recipe, compiler)
            except CompilationError as error:
                if entry is None:
                    raise
                logger.warning(
                    "%s, which failed to build %s anew; using the one there. %s", reason, entry.folder, error
                )
                return entry
            logger.info(
                "compiled %s with %s in %.1f s (%s)",
                recipe.spec.name,
                compiler.stamp["name"],
                time.monotonic() - begin,
                reason,
            )
            return entry

    def _build_now(self, recipe: Recipe, compiler: Compiler) -> Entry:
        with self._writing():
            temporary = self._temporary(recipe.name)
        try:
            with self._writing():
                _lay_out(recipe, temporary)
            self._compile(recipe, compiler, temporary)
            with self._writing():
                return self._install(recipe, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _compile(self, recipe: Recipe, compiler: Compiler, folder: Path) -> None:
        """Turns the sources in `folder` into a complete entry."""
        begin = time.monotonic()
        try:
            commands = recipe.toolchain.commands(recipe.spec, recipe.main, compiler.path)
            with self._writing():
                compile_library(commands, folder, settings.compile_timeout())
            version = compiler.version()
        except CompilationError as error:
            if not all(os.path.exists(folder / name) for name in (*recipe.files, TEMPORARY)):
                raise Unwritable("it was deleted while a kernel was built", vanished=True) from None
            refused = refuses_writes(folder, error.output)
            if refused:
                raise Unwritable(refused) from None
            raise self._report(recipe, error) from None
        build = {
            "compiler": {"stamp": compiler.stamp, "version": version},
            "commands": commands,
            "built_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - begin, 3),
        }
        with self._writing():
            for path in list(folder.iterdir()):  # the sources
                if path.name not in (LIBRARY, LOG):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_manifest(folder, recipe.spec, recipe.key, build)

    def _install(self, recipe: Recipe, temporary: Path) -> Entry:
        """Puts the entry in place, and checks it where it is."""

        def good() -> bool:
            try:
                return self.find(recipe) is not None
            except Stale:
                return False

        self.place(temporary, recipe.name, good)
        remove(self.folder / FAILED / f"{recipe.name}.log")
        try:
            return read(trust.check_chain(self.folder) / recipe.name)
        except DamagedEntry as damage:
            raise OSError(errno.EIO, f"what was written is not what is read back: {damage}") from None

    def place(self, complete: Path, name: str, good: Callable[[], bool]) -> bool:
        """Puts the complete entry in the folder `complete` in place by one rename. Where there is one already that is
        `good`, built by someone who could not be locked out, that one stays and the result is False."""
        for _ in range(10):
            try:
                os.rename(complete, self.folder / name)
                sync(self.folder)
                return True
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            if good():
                return False
            self.discard(name)
        raise OSError(errno.EBUSY, f"{self.folder / name} is replaced again and again")

    def discard(self, name: str) -> None:
        """Removes an entry: first from its place, at once, then from the disk. Who has it loaded keeps it."""
        (self.folder / BUILDING).mkdir(mode=0o755, exist_ok=True)
        trash = self.folder / BUILDING / (self._prefix(name) + f"{time.monotonic_ns():x}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.folder / name, trash)
        remove(trash)

    @contextlib.contextmanager
    def workplace(self, purpose: str) -> Iterator[Path]:
        """A private folder in the cache's file system, for as long as the context lasts. Raises CacheError where the
        cache cannot be written."""
        name = f"{purpose}-{os.getpid()}-{time.monotonic_ns():x}"
        try:
            with self._writing():
                self._prepare()
            with build_lock(self.folder / LOCKS / f"{name}.lock", 60.0, lambda: name):
                with self._writing():
                    folder = self._temporary(name)
                try:
                    with self._writing():
                        yield folder
                finally:
                    remove(folder)
        except Unwritable as error:
            raise CacheError(f"the cache {self.folder} cannot be written: {error}") from None

    def names(self) -> list[str]:
        """Names of what looks like entries, sorted."""
        try:
            return sorted(entry.name for entry in os.scandir(self.folder) if re.search(r"-[0-9a-f]{32}$", entry.name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sweep(self) -> None:
        """Clears what killed processes left behind."""
        self._sweep(None)

    def _check_compiler(self, entry: Entry, recipe: Recipe) -> None:
        """Raises Stale if a compiler is here, could write the entry anew, and is not the one that built it."""
        if settings.flag("AITER_NO_COMPILE"):
            return
        compiler = recipe.toolchain.find()
        recorded = entry.manifest.get("compiler", {})
        if compiler is None or compiler.stamp == recorded.get("stamp") or not os.access(self.folder, os.W_OK):
            return
        try:
            version = compiler.version()
        except CompilationError:
            return  # not a compiler that could build it anew
        if version != recorded.get("version"):
            was = str(recorded.get("version", "")).splitlines()
            lines = itertools.zip_longest(was, version.splitlines(), fillvalue="nothing")
            differing = next(pair for pair in lines if pair[0] != pair[1])
            raise Stale("the compiler changed from {} to {}".format(*differing), entry)

    def _prepare(self) -> None:
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.folder = trust.check_chain(self.folder)
        for name in (BUILDING, LOCKS):
            (self.folder / name).mkdir(mode=0o755, exist_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what the file system says into Unwritable."""
        try:
            yield
        except OSError as error:
            raise Unwritable(error.strerror or str(error), error.errno in (errno.ENOENT, errno.ESTALE)) from error

    def _report(self, recipe: Recipe, error: CompilationError) -> CompilationError:
        """The error with its log kept, in the user's terms."""
        log: Path | None = None
        if self.keep_logs:
            with contextlib.suppress(OSError):
                (self.folder / FAILED).mkdir(mode=0o755, exist_ok=True)
                path = self.folder / FAILED / f"{recipe.name}.log"
                path.write_text(error.output)
                log = path
        words = error.output if len(error.output) < 6000 else "…\n" + error.output[-6000:]
        return CompilationError(
            f"building {recipe.spec.name} failed: the compiler {error}\n{words.rstrip()}"
            + (f"\nLog: {log}" if log else ""),
            error.command,
            error.output,
            str(log) if log else None,
        )

    def _set_aside(self, name: str, reason: str) -> None:
        aside = self.folder / DAMAGED / name
        with self._writing():
            aside.parent.mkdir(mode=0o755, exist_ok=True)
            remove(aside)
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.folder / name, aside)
        logger.warning("%s: %s; set aside in %s and built anew", name, reason, aside)

    def _temporary(self, name: str) -> Path:
        """A private folder whose name tells what it is for and who made it."""
        return Path(tempfile.mkdtemp(prefix=self._prefix(name), dir=self.folder / BUILDING))

    def _prefix(self, name: str) -> str:
        return f"{name}~{socket.gethostname()}~{os.getpid()}~"

    def _who_builds(self, name: str) -> str:
        """What the log says we wait for; names of folders in the making tell who makes them."""
        with contextlib.suppress(OSError):
            for path in (self.folder / BUILDING).glob(f"{name}~*"):
                _, host, process, *_ = path.name.split("~")
                return f"{name[:-33]}, which process {process} on {host} builds"
        return f"{name[:-33]}, which another process builds"

    def _sweep(self, locked: str | None) -> None:
        """Removes what nobody makes any more: its maker is dead, and the key is the one that is `locked`, or its lock
        is free. The maker is asked about because locks may be granted to everybody."""
        with contextlib.suppress(OSError):
            for path in (self.folder / BUILDING).iterdir():
                name, host, process, *_ = [*path.name.split("~"), "", ""]
                if host != socket.gethostname() or is_alive(process):
                    if time.time() - path.stat().st_mtime > ABANDONED_S:
                        remove(path)
                elif name == locked:
                    remove(path)
                else:
                    with try_lock(self.folder / LOCKS / f"{name}.lock") as free:
                        if free:
                            remove(path)
            for path in (self.folder / LOCKS).iterdir():
                if path.name != f"{locked}.lock":
                    with try_lock(path):
                        pass  # it goes when it is released


def _lay_out(recipe: Recipe, folder: Path) -> None:
    """Writes the sources. Only these: an include that the key does not cover cannot be found."""
    for name, content in recipe.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / TEMPORARY).mkdir()
