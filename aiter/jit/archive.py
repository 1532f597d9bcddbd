"""Moving entries between machines: a tar file that is the same for the same entries, and is believed in nothing.

An archive holds <entry>/kernel.so, <entry>/build.log and <entry>/manifest.json, and nothing else: no folders, links,
owners or times. Whatever is not exactly that is refused, and then nothing at all is imported. Importing is trusting
who made the archive: its kernels will run.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import BinaryIO

from aiter.errors import CacheError
from aiter.jit import trust
from aiter.jit.disk import output_file
from aiter.jit.entry import FILES, MANIFEST, MAX_FILE_BYTES, MAX_MANIFEST_BYTES, NAME, DamagedEntry, read, seal
from aiter.jit.store import Store

_MEMBER = re.compile(rf"(?P<entry>{NAME.pattern})/(?P<file>{'|'.join(map(re.escape, (*FILES, MANIFEST)))})")


def export_entries(folder: Path, names: Iterable[str], path: Path) -> list[str]:
    """Writes the named entries of a cache folder to the tar file `path`, each verified first; returns their names.

    A file is replaced when the archive is complete, the file that a link points to likewise. A pipe or a device such as
    /dev/stdout is written to. Raises CacheError for anything else, and where there is nothing to write.
    """
    names = sorted(names)
    if not names:
        raise CacheError(f"there is nothing to write to {path}: no such kernel is in {folder}")
    folder = trust.check_chain(folder)
    for name in names:
        try:
            read(folder / name)
        except DamagedEntry as damage:
            raise CacheError(f"{folder / name} {damage}; `aiter cache verify` shows all such entries") from None
    with output_file(path) as file, tarfile.open(fileobj=file, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for name in names:
            for member in (MANIFEST, *FILES):
                info = tarfile.TarInfo(f"{name}/{member}")
                info.size = (folder / name / member).stat().st_size
                info.mode = 0o644
                with open(folder / name / member, "rb") as content:
                    archive.addfile(info, content)
    return names


def import_entries(folder: Path, path: Path) -> tuple[list[str], list[str]]:
    """Puts the entries of the archive `path` into a cache folder. Returns the names of those that are new and of those
    that were there already. Raises CacheError, with nothing imported, for anything but a faultless archive."""
    store = Store(folder)
    with open(path, "rb") as file, store.workplace("import") as workplace:
        try:
            _unpack(file, workplace)
            names = sorted(os.listdir(workplace))
            if not names:
                raise ValueError("it holds no kernel")
            for name in names:
                missing = {*FILES, MANIFEST}.difference(os.listdir(workplace / name))
                if missing:
                    raise ValueError(f"{name} lacks {', '.join(sorted(missing))}")
                seal(workplace / name)
                read(workplace / name)
        except (tarfile.TarError, DamagedEntry, ValueError, OverflowError, RecursionError) as error:
            raise CacheError(f"{path} is not an archive made by `aiter cache export`: {error}") from None
        new = [name for name in names if store.place(workplace / name, name, partial(_is_good, store.folder / name))]
        return new, [name for name in names if name not in new]


def _is_good(folder: Path) -> bool:
    try:
        read(folder)
    except (DamagedEntry, OSError):
        return False
    return True


def _unpack(file: BinaryIO, folder: Path) -> None:
    """Reads an archive from its first byte to its last, as it comes out of a pipe."""
    while (header := _read(file, tarfile.BLOCKSIZE)).strip(b"\0"):
        member = tarfile.TarInfo.frombuf(header, "ascii", "strict")
        match = _MEMBER.fullmatch(member.name)
        if not match or member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ValueError(f"it holds {member.name[:200]!r}, which is no file of an entry")
        entry, name = match["entry"], match["file"]
        if not 0 <= member.size <= (MAX_MANIFEST_BYTES if name == MANIFEST else MAX_FILE_BYTES):
            raise ValueError(f"{member.name} claims {member.size} bytes")
        if (folder / entry / name).exists():
            raise ValueError(f"it holds {member.name} twice")
        (folder / entry).mkdir(mode=0o700, exist_ok=True)
        with open(folder / entry / name, "xb") as target:
            for begin in range(0, member.size, 1 << 20):
                target.write(_read(file, min(member.size - begin, 1 << 20)))
        _read(file, -member.size % tarfile.BLOCKSIZE)


def _read(file: BinaryIO, count: int) -> bytes:
    content = file.read(count)
    if len(content) < count:
        raise ValueError("it ends too early")
    return content
