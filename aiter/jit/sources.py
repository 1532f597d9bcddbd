"""The kernel sources: where they are, and which files one kernel is made of."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from aiter.errors import UnsupportedError

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*[<"]([^>"\n]+)[>"]', re.MULTILINE)

# Where an #include is looked for, after the folder of the file that has it. The compile line says the same.
INCLUDE_DIRS = ("include", ".")


def find_root() -> Path:
    """kernels_src/: inside the package in an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for root in (package / "kernels_src", package.parent / "kernels_src"):
        if (root / "include" / "aiter_abi.h").is_file():
            return root
    raise UnsupportedError(f"the kernel sources are missing: no {package / 'kernels_src'}; reinstall aiter-jit")


def collect(root: Path, *mains: str) -> dict[str, bytes]:
    """The files `mains` and every file under `root` that they include, directly or not, by path relative to `root`.

    Includes that are not under `root` are the system's and not followed. Conditional includes count too: a kernel's key
    may change more often than its code, never less.
    """
    files: dict[str, bytes] = {}
    todo = list(mains)
    while todo:
        name = todo.pop()
        if name in files:
            continue
        files[name] = (root / name).read_bytes()
        for match in _INCLUDE.finditer(files[name]):
            found = _resolve(root, posixpath.dirname(name), match[1].decode(errors="replace"))
            if found is not None:
                todo.append(found)
    return dict(sorted(files.items()))


def kernels(root: Path, folder: str, suffix: str) -> list[str]:
    """Names of the kernels that have a source in `folder`."""
    return sorted(path.name.removesuffix(suffix) for path in (root / folder).glob("*" + suffix))


def _resolve(root: Path, folder: str, include: str) -> str | None:
    for base in (folder, *INCLUDE_DIRS):
        name = posixpath.normpath(posixpath.join(base, include))
        if not name.startswith(("../", "/")) and (root / name).is_file():
            return name
    return None
