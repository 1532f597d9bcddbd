"""Moving entries between machines: a tar file that is the same for the same entries, and is believed in nothing.

An archive holds <entry>/kernel.so, <entry>/build.log and <entry>/manifest.json, and nothing else: no folders, links,
owners or times. Whatever is not exactly that is refused, and then nothing at all is imported. Importing is trusting
who made the archive: its kernels will run.
"""

from __future__ import annotations

import os
import re
import tarfile
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from aiter.errors import CacheError
from aiter.jit import trust
from aiter.jit.disk import sync
from aiter.jit.entry import FILES, MANIFEST, MAX_FILE_BYTES, MAX_MANIFEST_BYTES, DamagedEntry, read, seal
from aiter.jit.store import Store

_MEMBER = re.compile(rf"([a-z0-9_+-]{{1,200}}-[0-9a-f]{{32}})/({'|'.join(map(re.escape, (*FILES, MANIFEST)))})")


def export_entries(folder: Path, names: Iterable[str], path: Path) -> list[str]:
    """Writes the named entries of a cache folder to the tar file `path`, each verified first; returns their names."""
    folder = trust.check_chain(folder)
    names = sorted(names)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for name in names:
                try:
                    entry = read(folder / name)
                except DamagedEntry as damage:
                    raise CacheError(f"{folder / name} {damage}; `aiter cache verify` shows all such entries") from None
                for member in (MANIFEST, *FILES):
                    info = tarfile.TarInfo(f"{name}/{member}")
                    info.size = (entry.folder / member).stat().st_size
                    info.mode = 0o644
                    with open(entry.folder / member, "rb") as content:
                        archive.addfile(info, content)
        os.chmod(temporary, 0o644)
        sync(Path(temporary))
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return names


def import_entries(folder: Path, path: Path) -> tuple[list[str], list[str]]:
    """Puts the entries of the archive `path` into a cache folder. Returns the names of those that are new and of those
    that were there already. Raises CacheError, with nothing imported, for anything but a faultless archive."""
    store = Store(folder)
    with open(path, "rb") as file, store.workplace("import") as workplace:
        try:
            _unpack(file, workplace)
            names = sorted(os.listdir(workplace))
            for name in names:
                missing = {*FILES, MANIFEST}.difference(os.listdir(workplace / name))
                if missing:
                    raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
                seal(workplace / name)
                read(workplace / name)
        except (tarfile.TarError, DamagedEntry, ValueError, EOFError, OverflowError, RecursionError) as error:
            raise CacheError(f"{path} is not an archive made by `aiter cache export`: {error}") from None
        new, present = [], []
        for name in names:
            placed = store.place(workplace / name, name, lambda name=name: _is_good(store.folder / name))
            (new if placed else present).append(name)
        return new, present


def _is_good(folder: Path) -> bool:
    try:
        read(folder)
    except (DamagedEntry, OSError):
        return False
    return True


def _unpack(file: BinaryIO, folder: Path) -> None:
    size = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (member := archive.next()) is not None:
            match = _MEMBER.fullmatch(member.name)
            if not match or not member.isreg() or member.issparse():
                raise ValueError(f"it holds {member.name[:200]!r}, which is no file of an entry")
            entry, name = match.groups()
            limit = MAX_MANIFEST_BYTES if name == MANIFEST else MAX_FILE_BYTES
            if member.size > min(limit, size):
                raise ValueError(f"{member.name} claims {member.size} bytes")
            if (folder / entry / name).exists():
                raise ValueError(f"it holds {member.name} twice")
            (folder / entry).mkdir(mode=0o700, exist_ok=True)
            with open(folder / entry / name, "xb") as target:
                _copy(archive.extractfile(member), target, member)
            archive.members = []  # or a long archive would be kept in memory


def _copy(source: BinaryIO, target: BinaryIO, member: tarfile.TarInfo) -> None:
    left = member.size
    while left:
        chunk = source.read(min(left, 1 << 20))
        if not chunk:
            raise ValueError(f"{member.name} ends before its {member.size} bytes")
        target.write(chunk)
        left -= len(chunk)
