"""One writable cache folder: looking up an entry, and building one so that nobody ever sees half of it.

<cache>/<entry>/            see aiter/jit/entry.py
<cache>/CACHEDIR.TAG        says that the folder is a cache of ours; backup programs know such files and leave it out
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

from aiter.errors import CacheError, CompilationError, KernelUnavailableError
from aiter.jit import settings, trust
from aiter.jit.disk import is_alive, make_folder, move, refuses_writes, remove, sync
from aiter.jit.entry import (
    MANIFEST,
    NAME,
    DamagedEntry,
    Entry,
    candidates,
    looks_like_entry,
    of_compiler,
    read,
    write_manifest,
)
from aiter.jit.lock import build_lock, try_lock
from aiter.jit.log import logger
from aiter.jit.recipe import Recipe
from aiter.jit.toolchain import LIBRARY, LOG, TEMPORARY, Compiler, compile_library

BUILDING, LOCKS, DAMAGED, FAILED = ".building", ".locks", ".damaged", ".failed"
TAG = "CACHEDIR.TAG"
# The first line is that of every such file, see https://bford.info/cachedir.
TAG_TEXT = """Signature: 8a477f597d28d172789f06886806bc55
# This folder is a kernel cache of aiter. It can be deleted: kernels are compiled again when they are needed.
"""
# What is made under BUILDING, and so locked: entries, and workplaces.
_TASK = rf"({NAME.pattern}|[a-z]+-\d+-[0-9a-f]+)"
# What another host, or a process of ours, has in the making is taken for abandoned after this time.
ABANDONED_S = 24 * 3600.0
# A compiler fails for the first file that someone deletes of the folder that it works in; the others follow.
DELETION_S = 0.1
# How much longer than a compilation a lock may be held.
LOCK_MARGIN_S = 60.0


class Stale(Exception):
    """What is there must be built again; says why. `damaged` is the name of an entry that is not what it should be;
    `entry` is one that is sound all the same, of another compiler."""

    def __init__(self, reason: str, damaged: str = "", entry: Entry | None = None) -> None:
        super().__init__(reason)
        self.damaged = damaged
        self.entry = entry


class Unwritable(CacheError):
    """The folder does not take an entry (read-only, full, not ours); says why, and whether it has vanished."""

    def __init__(self, folder: Path, reason: str, vanished: bool = False) -> None:
        super().__init__(f"{folder} cannot be written ({reason})")
        self.vanished = vanished


class Store:
    """A cache folder; it need not exist. Raises UntrustedCacheError where others could have written what it holds.

    A `fleeting` one is there, lasts as long as someone needs it, and is reached in a way that needs no trust.
    """

    def __init__(self, folder: Path, fleeting: bool = False) -> None:
        self.folder = folder
        self.fleeting = fleeting

    def find(self, recipe: Recipe) -> Entry | None:
        """The verified entry of a recipe, or None. Raises Stale where what is there must be built again.

        It is that of the compiler that is here. Where none could write another, any compiler's will do.
        """
        compiler = self._compiler_of(recipe)
        others, damage = [], None
        try:
            for path in candidates(self._checked(), recipe.name):
                try:
                    entry = read(path)
                except FileNotFoundError:
                    continue
                except DamagedEntry as error:
                    damage = damage or Stale(f"the entry in the cache is damaged: {error}", path.name)
                    continue
                if compiler is None or compiler.wrote(entry.compiler):
                    return entry
                others.append(entry)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise Stale(f"the entry in the cache cannot be read: {error}", recipe.name) from None
        if compiler is not None and others:
            try:
                version = recipe.toolchain.require(recipe.spec.name).version()
            except KernelUnavailableError:
                return others[0]  # not a compiler that could build it anew
            for entry in others:
                if version == entry.compiler["version"]:
                    return entry
            was = str(others[0].compiler["version"]).splitlines()
            lines = itertools.zip_longest(was, version.splitlines(), fillvalue="nothing")
            differing = next(pair for pair in lines if pair[0] != pair[1])
            damage = damage or Stale("the compiler changed from {} to {}".format(*differing))
            damage.entry = others[0]
        if damage is not None:
            raise damage
        return None

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
                if stale.damaged:
                    self._set_aside(stale.damaged, reason)
                    reason = "the one there was damaged"
            begin = time.monotonic()
            try:
                # Beside another compiler's, which machines that share the cache may be using.
                name = of_compiler(recipe.name, compiler.version()) if entry else recipe.name
                entry = self._build_now(recipe, compiler, name)
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
                compiler.name,
                time.monotonic() - begin,
                reason,
            )
            return entry

    def _build_now(self, recipe: Recipe, compiler: Compiler, name: str) -> Entry:
        with self._writing():
            temporary = self._temporary(recipe.name)
        try:
            with self._writing():
                _lay_out(recipe, temporary)
            self._compile(recipe, compiler, temporary)
            with self._writing():
                return self._install(recipe, temporary, name)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _compile(self, recipe: Recipe, compiler: Compiler, folder: Path) -> None:
        """Turns the sources in `folder` into a complete entry."""
        begin = time.monotonic()
        try:
            commands = recipe.toolchain.commands(recipe.spec, recipe.main, compiler)
            with self._writing():
                compile_library(commands, folder, settings.compile_timeout())
            built_by = compiler.record(commands)
        except CompilationError as error:
            time.sleep(DELETION_S)
            if not all(os.path.exists(folder / name) for name in (*recipe.files, TEMPORARY)):
                raise Unwritable(self.folder, "it was deleted while a kernel was built", vanished=True) from None
            refused = refuses_writes(folder, error.output)
            if refused:
                raise Unwritable(self.folder, refused) from None
            raise self._report(recipe, error) from None
        build = {
            "compiler": built_by,
            "commands": commands,
            "built_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - begin, 3),
        }
        with self._writing():
            for path in list(folder.iterdir()):  # the sources
                if path.name not in (LIBRARY, LOG):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            write_manifest(folder, recipe.spec, recipe.key, build)

    def _install(self, recipe: Recipe, temporary: Path, name: str) -> Entry:
        """Puts the entry in place, and checks it where it is."""

        def good() -> bool:
            try:
                return self.find(recipe) is not None
            except Stale:
                return False

        self.place(temporary, name, good)
        remove(self.folder / FAILED / f"{recipe.name}.log")
        try:
            return read(self._checked() / name)
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
        make_folder(self.folder / BUILDING)
        trash = self.folder / BUILDING / (self._prefix(name) + f"{time.monotonic_ns():x}")
        with contextlib.suppress(FileNotFoundError):
            move(self.folder / name, trash, first=MANIFEST)
        remove(trash)

    @contextlib.contextmanager
    def workplace(self, purpose: str) -> Iterator[Path]:
        """A private folder in the cache's file system, for as long as the context lasts. Raises CacheError where the
        cache cannot be written."""
        name = f"{purpose}-{os.getpid()}-{time.monotonic_ns():x}"
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

    def names(self) -> list[str]:
        """Names of what are entries, sound or not, sorted."""
        try:
            in_cache = self._is_tagged()
            return sorted(name for name in os.listdir(self.folder) if _is_entry(self.folder / name, in_cache))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sweep(self) -> None:
        """Clears what killed processes left behind."""
        self._sweep(None)

    def clear_reports(self) -> None:
        """Removes what was set aside, and the logs of failed builds."""
        for folder, pattern in ((self.folder / DAMAGED, NAME.pattern), (self.folder / FAILED, rf"{NAME.pattern}\.log")):
            for path in _matching(folder, pattern):
                remove(path)
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _is_tagged(self) -> bool:
        with contextlib.suppress(OSError), open(self.folder / TAG) as tag:
            return tag.read(len(TAG_TEXT)) == TAG_TEXT
        return False

    def _checked(self) -> Path:
        """The folder without links, if nobody else could have written there."""
        return self.folder if self.fleeting else trust.check_chain(self.folder)

    def _compiler_of(self, recipe: Recipe) -> Compiler | None:
        """The compiler that would build the recipe here, or None where nothing is built."""
        if settings.flag("AITER_NO_COMPILE") or not os.access(self.folder, os.W_OK):
            return None
        return recipe.toolchain.find()

    def _prepare(self) -> None:
        if not self.fleeting:
            folder = Path(os.path.realpath(self.folder))
            trust.check_parents(folder)  # before anything is made there
            make_folder(folder, 0o700 if self.folder in settings.private_dirs() else 0o755)
        self.folder = self._checked()
        for name in (BUILDING, LOCKS):
            make_folder(self.folder / name)
            if not os.access(self.folder / name, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.folder / name))
        tag = self.folder / TAG
        if not os.path.lexists(tag) or not tag.lstat().st_size:  # there was no room for it
            tag.write_text(TAG_TEXT)
            tag.chmod(0o644)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what the file system says into Unwritable."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            raise Unwritable(self.folder, reason, error.errno in (errno.ENOENT, errno.ESTALE)) from error

    def _report(self, recipe: Recipe, error: CompilationError) -> CompilationError:
        """The error with its log kept, in the user's terms."""
        log: Path | None = None
        if not self.fleeting:
            with contextlib.suppress(OSError):
                make_folder(self.folder / FAILED)
                path = self.folder / FAILED / f"{recipe.name}.log"
                path.write_text(error.output, encoding="utf-8", errors="surrogateescape")
                path.chmod(0o644)
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
            make_folder(aside.parent)
            remove(aside)
            with contextlib.suppress(FileNotFoundError):
                move(self.folder / name, aside, first=MANIFEST)
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
            for path in _matching(self.folder / BUILDING, rf"{_TASK}~[^~]*~\d+~[^~]*"):
                name, host, process, _ = path.name.split("~")
                if host != socket.gethostname() or is_alive(process):
                    if time.time() - path.stat().st_mtime > ABANDONED_S:
                        remove(path)
                elif name == locked:
                    remove(path)
                else:
                    with try_lock(self.folder / LOCKS / f"{name}.lock") as free:
                        if free:
                            remove(path)
            for path in _matching(self.folder / LOCKS, rf"{_TASK}\.lock"):
                if path.name != f"{locked}.lock":
                    with try_lock(path):
                        pass  # it goes when it is released


def _is_entry(folder: Path, in_cache: bool) -> bool:
    try:
        return looks_like_entry(folder, in_cache)
    except OSError:
        return False  # it went while we looked


def _matching(folder: Path, pattern: str) -> list[Path]:
    """What a folder holds whose name is of ours; nothing where the folder is none, or a link to one."""
    if os.path.islink(folder) or not os.path.isdir(folder):
        return []
    return [folder / name for name in os.listdir(folder) if re.fullmatch(pattern, name)]


def _lay_out(recipe: Recipe, folder: Path) -> None:
    """Writes the sources. Only these: an include that the key does not cover cannot be found."""
    for name, content in recipe.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / TEMPORARY).mkdir()
