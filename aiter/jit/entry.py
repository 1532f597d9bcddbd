"""One kernel on disk: a folder that holds the .so, the build's log, and a manifest that vouches for both.

    attention_forward-fp16-d64-causal-gfx942-3f9c.../
        kernel.so
        build.log
        manifest.json     spec, key, size and SHA-256 of each file, compiler, command line, build time

The manifest's last field is a digest of itself, so that no bit of an entry can change unnoticed. The folder's name ends
in the key; where compilers of two versions share a cache, entries of the second one's go on after it with a dot and a
digest of what that compiler says of its version.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiter.jit import trust
from aiter.jit.disk import sync
from aiter.jit.spec import Spec

MANIFEST = "manifest.json"
FILES = ("kernel.so", "build.log")
# No real manifest or log comes near; more would only fill the memory of who reads it.
MAX_MANIFEST_BYTES = 1 << 20
MAX_FILE_BYTES = 1 << 30
NAME = re.compile(r"[a-z0-9_+-]{1,200}-[0-9a-f]{32}(\.[0-9a-f]{8})?")


class DamagedEntry(Exception):
    """An entry is not what its manifest says, with the reason. Never leaves this package: the entry is rebuilt."""


@dataclass(frozen=True)
class Entry:
    """An entry that was verified when this was made."""

    folder: Path
    manifest: dict

    @property
    def library(self) -> Path:
        return self.folder / FILES[0]

    @property
    def spec(self) -> Spec:
        return Spec.from_json(self.manifest["spec"])

    @property
    def compiler(self) -> dict:
        """`stamp` and `version` of the compiler that built it."""
        return self.manifest["compiler"]

    @property
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.manifest["files"].values())


def of_compiler(name: str, version: str) -> str:
    """The name of an entry beside the one called `name`, which a compiler of another version has built."""
    return f"{name}.{hashlib.sha256(version.encode()).hexdigest()[:8]}"


def candidates(folder: Path, name: str) -> Iterator[Path]:
    """Where a cache folder may have entries for the key in `name`: the first that was built, then other compilers'."""
    yield folder / name
    yield from sorted(path for path in folder.glob(f"{name}.*") if NAME.fullmatch(path.name))


def looks_like_entry(folder: Path, in_cache: bool) -> bool:
    """Whether a folder is an entry by its name and its manifest, sound or not. In a folder that is a cache (`in_cache`)
    one with a spoilt manifest is an entry too, if it holds nothing that an entry does not hold."""
    if not NAME.fullmatch(folder.name) or not stat.S_ISDIR(os.lstat(folder).st_mode):
        return False
    try:
        manifest = json.loads(_read_file(folder / MANIFEST))
        if folder.name.startswith(f"{Spec.from_json(manifest['spec']).name}-{manifest['key']}"):
            return True
    except (OSError, DamagedEntry, KeyError, TypeError, ValueError, RecursionError):
        pass
    return in_cache and {*FILES, MANIFEST}.issuperset(os.listdir(folder))


def write_manifest(folder: Path, spec: Spec, key: str, build: dict) -> None:
    """Completes an entry whose files are in `folder`, and seals it. `build` says how it came about: compiler, commands,
    times."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in FILES}
    manifest = {"key": key, "spec": spec.to_json(), "files": files, **build}
    (folder / MANIFEST).write_text(_render(manifest))
    seal(folder)


def seal(folder: Path) -> None:
    """Gives a complete entry the permissions that `read` wants, and returns when it is on the disk."""
    for name in (*FILES, MANIFEST):
        os.chmod(folder / name, 0o644)  # whatever the umask says: all may read, none but us may write
        sync(folder / name)
    os.chmod(folder, 0o755)
    sync(folder)


def read(folder: Path, name: str | None = None) -> Entry:
    """The entry in `folder`, checked file by file.

    Raises FileNotFoundError where there is none, UntrustedCacheError where others could have written it, and
    DamagedEntry where it is not what its manifest says, or not the entry called `name`.
    """
    if not stat.S_ISDIR(trust.check(folder).st_mode):
        raise DamagedEntry("is not a folder")
    manifest = _read_manifest(folder)
    try:
        actual = f"{Spec.from_json(manifest['spec']).name}-{manifest['key']}"
        compiler = str(manifest["compiler"]["version"])
        files = {file: (manifest["files"][file]["bytes"], manifest["files"][file]["sha256"]) for file in FILES}
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedEntry(f"{MANIFEST} lacks or garbles a field: {error}") from None
    name = name or folder.name
    if name not in (actual, of_compiler(actual, compiler)):
        raise DamagedEntry(f"is the entry {actual} under another name")
    for file, (size, digest) in files.items():
        path = folder / file
        try:
            status = trust.check(path)
        except FileNotFoundError:
            raise DamagedEntry(f"{file} is missing") from None
        if not stat.S_ISREG(status.st_mode):
            raise DamagedEntry(f"{file} is not a regular file")
        if status.st_size != size:
            raise DamagedEntry(f"{file} has {status.st_size} bytes, its manifest says {size}")
        if _sha256(path) != digest:
            raise DamagedEntry(f"{file} does not have the SHA-256 that its manifest says")
    return Entry(folder, manifest)


def _read_manifest(folder: Path) -> dict:
    try:
        trust.check(folder / MANIFEST)
        content = _read_file(folder / MANIFEST)
    except FileNotFoundError:
        os.stat(folder)  # gone altogether since we looked: that is a miss, not damage
        raise DamagedEntry(f"{MANIFEST} is missing") from None
    try:
        manifest = json.loads(content)
        intact = _render({k: v for k, v in manifest.items() if k != "digest"}).encode() == content
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedEntry(f"{MANIFEST} does not match its own digest")
    return manifest


def _read_file(path: Path) -> bytes:
    """The content of what may be a manifest. Raises DamagedEntry for a device, a link or too large a file."""
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
        raise DamagedEntry(f"{path.name} is not a manifest")
    return path.read_bytes()


def _render(manifest: dict) -> str:
    body = json.dumps(manifest, indent=1)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**manifest, "digest": digest}, indent=1) + "\n"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
