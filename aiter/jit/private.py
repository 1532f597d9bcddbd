"""Where kernels go when the cache cannot be used: it cannot be written, is not the user's own, or is mounted noexec.

First a folder of the user's own among the temporary files, aiter-<uid>, which is a cache like any other: processes that
start at once compile a kernel once. Where nothing can be trusted there either, as on a volume whose top everybody may
write, a new folder that lasts until the kernel is loaded. It is reached through an open descriptor: whoever can rename
it cannot put another in its place.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from aiter.jit import settings
from aiter.jit.disk import forbids_execution, remove
from aiter.jit.store import Store


def stores() -> Iterator[Store]:
    """Each folder that may do, best first; what one holds may be gone when the next is asked for."""
    for folder in settings.private_dirs():
        yield Store(folder)
    for base in settings.temporary_dirs():
        if not forbids_execution(base):
            with contextlib.suppress(OSError), _fleeting_folder(base) as folder:
                yield Store(folder, fleeting=True)


@contextlib.contextmanager
def _fleeting_folder(base: Path) -> Iterator[Path]:
    _remove_leftovers(base)
    folder = tempfile.mkdtemp(prefix=f"aiter-{os.geteuid()}-", dir=base)
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            status = os.fstat(descriptor)
            if status.st_uid == os.geteuid() and not status.st_mode & 0o077 and not os.listdir(descriptor):
                yield Path(f"/proc/{os.getpid()}/fd/{descriptor}")
        finally:
            os.close(descriptor)
    finally:
        remove(Path(folder))


def _remove_leftovers(base: Path) -> None:
    """Removes what killed processes have left, which no build can still be using."""
    for path in base.glob(f"aiter-{os.geteuid()}-*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if status.st_uid == os.geteuid() and time.time() - status.st_mtime > 2 * settings.compile_timeout():
                remove(path)
