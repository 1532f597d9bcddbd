"""Small questions to the file system and the kernel, answered without surprises."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from aiter.errors import CacheError

# Less room than this, and a failed build is put down to the full disk.
SCARCE_BYTES = 4 << 20


def sync(path: Path) -> None:
    """Returns when a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def output_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write. It takes the place of the one at `path`, or of what a link there points to, when it is complete;
    a pipe or a device such as /dev/stdout is written to. Raises CacheError for anything else."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        kind = stat.S_IFREG | 0o644
    if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
        with open(path, "wb") as file:
            yield file
        return
    if not stat.S_ISREG(kind):
        raise CacheError(f"{path} is not a file, a pipe or a character device: name a file to write to")
    path = Path(os.path.realpath(path))
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise CacheError(f"{path} cannot be written ({error.strerror})") from None
    try:
        with open(handle, "wb") as file:
            yield file
        os.chmod(temporary, stat.S_IMODE(kind))
        sync(Path(temporary))
        os.rename(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:  # of the writing itself
            raise CacheError(f"{path} cannot be written ({error.strerror})") from None
        raise


def make_folder(path: Path, mode: int = 0o755) -> None:
    """Makes a folder, and those above it that are missing, which no umask closes to readers or opens to writers. One
    that is there stays as it is."""
    if os.path.isdir(path):
        return
    if path.parent != path:
        make_folder(path.parent)
    try:
        os.mkdir(path, mode)
    except FileExistsError:
        if not os.path.isdir(path):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
        return  # someone else made it meanwhile
    os.chmod(path, os.stat(path).st_mode | mode)


def move(path: Path, target: Path, first: str) -> None:
    """Renames a file or a folder, `first` being the file without which the folder is nothing.

    A folder in the lower layer of an overlay file system has to stay (EXDEV). There its files move one by one, `first`
    before all others, so that at no time it looks whole without being it.
    """
    try:
        os.rename(path, target)
        return
    except OSError as error:
        if error.errno != errno.EXDEV or os.path.islink(path) or not os.path.isdir(path):
            raise
    os.mkdir(target, 0o700)
    for name in sorted(os.listdir(path), key=lambda name: name != first):
        move(path / name, target / name, first)
    os.rmdir(path)


def closed_to_others(folder: Path) -> Path | None:
    """The folder in the path to `folder` that only its owner or a group can enter, if there is one."""
    return next((path for path in (folder, *folder.parents) if not os.stat(path).st_mode & stat.S_IXOTH), None)


_unmappable: set[Path] = set()


def forbid_execution(folder: Path) -> bool:
    """Notes, for this process, that the system does not run what is in a folder; False if that was known."""
    folder = Path(os.path.realpath(folder))
    known = folder in _unmappable
    _unmappable.add(folder)
    return not known


def forbids_execution(folder: Path) -> bool:
    """Whether libraries cannot be loaded from a folder, or from where it would be made: its file system is mounted
    noexec, or a load has failed for such a reason."""
    folder = Path(os.path.realpath(folder))
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    return folder in _unmappable or bool(os.statvfs(existing).f_flag & os.ST_NOEXEC)


def remove(path: Path) -> None:
    """Removes a file or a folder, as far as it is there and can be removed."""
    if os.path.isdir(path) and not os.path.islink(path):
        for _ in range(5):  # the compiler of a killed process may still write there
            shutil.rmtree(path, ignore_errors=True)
            if not os.path.exists(path):
                break
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def is_alive(process: str) -> bool:
    """Whether the process of this number runs on this host."""
    try:
        state = Path("/proc", process, "stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"  # killed, and its parent has not asked yet


def refuses_writes(folder: Path, output: str) -> str | None:
    """Why a compiler that failed in `folder` may have failed for want of somewhere to write, or None."""
    for code in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(code) in output:
            return os.strerror(code)
    with contextlib.suppress(OSError):
        room = os.statvfs(folder)
        if room.f_bavail * room.f_frsize < SCARCE_BYTES or (room.f_files and not room.f_favail):
            return os.strerror(errno.ENOSPC)
    return None if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)
