"""Looking after a cache: what is in it, whether it is sound, and making room.

All of it is safe while other processes use the cache: an entry leaves its place by one rename, and a process that has
loaded it keeps it.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

from aiter.errors import UntrustedCacheError
from aiter.jit import trust
from aiter.jit.entry import MANIFEST, DamagedEntry, read
from aiter.jit.store import Store


@dataclass(frozen=True)
class Item:
    """An entry as its files show it, without a look inside. `used` is the time of the last use as far as the file
    system keeps it (most do to the day)."""

    name: str
    folder: Path
    bytes: int
    built: float
    used: float

    @property
    def kernel(self) -> str:
        """The name of its spec, which ends in the arch."""
        return self.name.partition(".")[0][:-33]

    @property
    def key(self) -> str:
        """What tells it from other entries of its spec, short enough to read."""
        key, dot, compiler = self.name[len(self.kernel) + 1 :].partition(".")
        return key[:8] + dot + compiler


def items(folder: Path) -> list[Item]:
    """What is in a cache folder, sorted by name."""
    found = []
    for name in Store(folder).names():
        with contextlib.suppress(OSError):  # it may go while we look
            files = {entry.name: entry.stat() for entry in os.scandir(folder / name)}
            built = max(file.st_mtime for file in files.values())
            # Not of the manifest, which looking at a cache reads.
            used = max((file.st_atime for other, file in files.items() if other != MANIFEST), default=built)
            found.append(Item(name, folder / name, sum(f.st_size for f in files.values()), built, max(built, used)))
    return found


def verify(folder: Path) -> dict[str, str]:
    """Each entry of a cache folder and what is wrong with it, empty where nothing is."""
    try:
        folder = trust.check_chain(folder)
    except FileNotFoundError:
        return {}
    return {name: _fault(folder / name) for name in Store(folder).names()}


def clear(
    folder: Path, older_than: float | None = None, max_bytes: int | None = None, dry_run: bool = False
) -> list[Item]:
    """Removes entries and says which: all; or those not used for `older_than` seconds; or those longest unused, until
    the rest takes no more than `max_bytes`. What was set aside or abandoned goes too; what is not of ours stays."""
    everything = older_than is None and max_bytes is None
    present = sorted(items(folder), key=lambda item: item.used)
    doomed = [
        item for item in present if everything or (older_than is not None and time.time() - item.used > older_than)
    ]
    if max_bytes is not None:
        left = [item for item in present if item not in doomed]
        excess = sum(item.bytes for item in left) - max_bytes
        for item in left:
            if excess <= 0:
                break
            doomed.append(item)
            excess -= item.bytes
    if not dry_run and os.path.isdir(folder):
        store = Store(folder)
        for item in doomed:
            store.discard(item.name)
        store.sweep()
        store.clear_reports()
    return doomed


def _fault(folder: Path) -> str:
    try:
        read(folder)
    except (DamagedEntry, UntrustedCacheError) as error:
        return str(error)
    except FileNotFoundError:
        return ""  # removed meanwhile
    except OSError as error:
        return f"cannot be read: {error}"
    return ""
