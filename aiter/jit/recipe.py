"""From a spec to everything that decides what its entry in the cache is: sources, flags, and so the key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from aiter.abi import ABI_VERSION
from aiter.errors import UnsupportedError
from aiter.jit import arch, sources
from aiter.jit.spec import Spec
from aiter.jit.toolchain import Toolchain, toolchain_for


@dataclass(frozen=True)
class Recipe:
    """How to build a spec's kernel. The files are held by content: what is compiled is what the key was made of."""

    spec: Spec
    key: str
    toolchain: Toolchain
    main: str
    files: dict[str, bytes]

    @property
    def name(self) -> str:
        """The name of the entry's folder: readable, and different for every key."""
        return f"{self.spec.name}-{self.key}"


def recipe_for(spec: Spec, root: Path | None = None) -> Recipe:
    """The recipe for `spec` from the kernel sources at `root` (by default the package's own).

    The key is a digest of the spec, the content of every file the kernel includes, the flags and the ABI version: never
    of times or absolute paths, so that the same package gives the same key on every machine.
    """
    root = root or sources.find_root()
    toolchain = toolchain_for(arch.check(spec.arch))
    main = f"{toolchain.folder}/{spec.kernel}{toolchain.suffix}"
    if not (root / main).is_file():
        known = ", ".join(sources.kernels(root, toolchain.folder, toolchain.suffix)) or "none"
        raise UnsupportedError(f"there is no kernel {spec.kernel!r} for {spec.arch}; kernels for it: {known}")
    files = sources.collect(root, main, *toolchain.beside)
    content = {
        "abi": ABI_VERSION,
        "spec": spec.to_json(),
        "flags": toolchain.flags(spec),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    return Recipe(spec, key, toolchain, main, files)
