"""Small questions to the file system and the kernel, answered without surprises."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

# Less room than this, and a failed build is put down to the full disk.
SCARCE_BYTES = 4 << 20


def sync(path: Path) -> None:
    """Returns when a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
