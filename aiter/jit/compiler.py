"""A compiler that is here: the program behind a name, what tells it from another, and whether it is new enough."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

from aiter.jit import process

# Programs that go by a compiler's name and run the next one of that name on PATH. They are looked through: their file
# tells nothing of the compiler, and their own settings stay outside.
LAUNCHERS = ("ccache", "sccache", "distcc", "icecc", "colorgcc")
# A script that is longer is more than a wrapper.
MAX_SCRIPT_BYTES = 64 << 10


@dataclass
class Compiler:
    """A compiler. `stamp` tells it from another without running it; so do those of the compilers that it uses
    (`others`), and of those that were passed over for it (`instead_of`)."""

    path: str
    stamp: dict
    others: tuple[str, ...] = ()
    instead_of: tuple[dict, ...] = ()
    _answer: tuple[bool, str] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    def version(self) -> str:
        """Its own words, less what depends on where it is installed."""
        return self._ask()[1]

    def answers(self) -> bool:
        """Whether it ends well when it is asked for its version."""
        return self._ask()[0]

    def _ask(self) -> tuple[bool, str]:
        """Runs it, once."""
        if self._answer is None:
            answers = [process.ask([path, "--version"]) for path in (self.path, *self.others)]
            lines = (line.rstrip() for _, words in answers for line in words.splitlines())
            kept = (line for line in lines if line and not line.startswith("InstalledDir:"))
            self._answer = not any(status for status, _ in answers), "\n".join(kept)
        return self._answer

    def release(self) -> str:
        """The line of `version` that says most, for people."""
        lines = self.version().splitlines()
        return next((line for line in lines if re.search(r"\d\.\d", line)), "a compiler that does not tell its version")

    def record(self, commands: list[list[str]]) -> dict:
        """What an entry keeps of the compiler that built it with these command lines, for `wrote`."""
        behind = {path: stamp(path) for path in _behind(self.path)}
        behind |= {command[0]: stamp(command[0]) for command in commands if command[0] != self.path}
        return {
            "stamp": self.stamp,
            "version": self.version(),
            **({"behind": behind} if behind else {}),
            **({"instead_of": list(self.instead_of)} if self.instead_of else {}),
        }

    def wrote(self, recorded: dict) -> bool:
        """Whether an entry with this record is of this compiler, as far as can be told without running anything."""
        known = self.stamp == recorded.get("stamp") or self.stamp in recorded.get("instead_of", ())
        return known and all(stamp(path) == then for path, then in recorded.get("behind", {}).items())


def stamp(path: str) -> dict | None:
    """What tells the file of a program from another; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    # Whole seconds: images and archives keep no more.
    modified = int(status.st_mtime)
    # In the stores of Nix and Guix all times are 0 or 1, and the path is what tells programs apart.
    place = {"path": os.path.realpath(path)} if modified <= 1 else {}
    return {"name": os.path.basename(path), "bytes": status.st_size, "modified": modified, **place}


def locate(candidate: str) -> str | None:
    """The absolute path of the compiler that a name, a path, or a command line such as "ccache g++" stands for."""
    path = shutil.which(candidate, path=process.search_path())
    if path is None:
        first, *rest = candidate.split()
        return locate(rest[0]) if len(rest) == 1 and os.path.basename(first) in LAUNCHERS else None
    path = os.path.abspath(path)  # builds run in another folder
    launcher = _launcher(path)
    return path if launcher in (None, os.path.basename(path)) else _looked_through(path, launcher)


def programs(pattern: str) -> list[re.Match]:
    """The names on PATH that match, each once."""
    names: dict[str, re.Match] = {}
    for folder in process.search_path().split(os.pathsep):
        try:
            found = os.listdir(folder or ".")
        except OSError:
            continue
        names |= {name: match for name in found if (match := re.fullmatch(pattern, name))}
    return list(names.values())


def family(version: str) -> tuple[str, str]:
    """(which compiler this is, its release) by what it says of its version; nothing where that is unknown."""
    if nvcc := re.search(r"Cuda compilation tools, release ([\d.]+)", version):
        return "nvcc", nvcc[1]
    if clang := re.search(r"clang version (\d\S*)", version):
        return "clang", clang[1]
    gcc = re.search(r"^\S+ \(.*\) (\d+\.\S+)", version) if "Free Software Foundation" in version else None
    return ("gcc", gcc[1]) if gcc else ("", "")


def _launcher(path: str) -> str | None:
    name = os.path.basename(os.path.realpath(path))
    return name if name in LAUNCHERS else None


def _looked_through(path: str, launcher: str) -> str | None:
    """What a link to a launcher runs: the next program of its name that is none, along its own path or PATH."""
    name, folders = os.path.basename(path), ""
    if launcher == "ccache":
        name, folders = os.environ.get("CCACHE_COMPILER") or name, os.environ.get("CCACHE_PATH", "")
    for folder in (folders or process.search_path()).split(os.pathsep):
        found = os.path.abspath(os.path.join(folder, name))
        if os.path.isfile(found) and os.access(found, os.X_OK) and _launcher(found) is None:
            return found
    return None


def _behind(path: str) -> Iterator[str]:
    """The programs that a wrapper runs, if it is a script that names them by their paths; and those behind these."""
    seen, scripts = {path}, [path]
    while scripts:
        for word in re.findall(r"/[^\s\"'`;|&()<>$]+", _script(scripts.pop())):
            if word not in seen and os.path.isfile(word) and os.access(word, os.X_OK):
                seen.add(word)
                scripts.append(word)
                yield word


def _script(path: str) -> str:
    """A script, less the line that names its interpreter; nothing for a program that is none."""
    try:
        with open(path, "rb") as file:
            if file.read(2) != b"#!" or os.fstat(file.fileno()).st_size > MAX_SCRIPT_BYTES:
                return ""
            return os.fsdecode(file.read()).partition("\n")[2]
    except OSError:
        return ""
