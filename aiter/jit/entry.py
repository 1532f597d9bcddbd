"""One kernel on disk: a folder that holds the .so, the build's log, and a manifest that vouches for both.

    attention_forward-fp16-d64-causal-gfx942-3f9c.../
        kernel.so
        build.log
        manifest.json     spec, key, size and SHA-256 of each file, compiler, command line, build time

The manifest's last field is a digest of itself, so that no bit of an entry can change unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
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
    def bytes(self) -> int:
        return sum(file["bytes"] for file in self.manifest["files"].values())


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
        files = {file: (manifest["files"][file]["bytes"], manifest["files"][file]["sha256"]) for file in FILES}
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedEntry(f"{MANIFEST} lacks or garbles a field: {error}") from None
    if actual != (name or folder.name):
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
    path = folder / MANIFEST
    try:
        status = trust.check(path)
    except FileNotFoundError:
        os.stat(folder)  # gone altogether since we looked: that is a miss, not damage
        raise DamagedEntry(f"{MANIFEST} is missing") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_MANIFEST_BYTES:
        raise DamagedEntry(f"{MANIFEST} is not a manifest")
    content = path.read_bytes()
    try:
        manifest = json.loads(content)
        intact = _render({k: v for k, v in manifest.items() if k != "digest"}).encode() == content
    except (ValueError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedEntry(f"{MANIFEST} does not match its own digest")
    return manifest


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
