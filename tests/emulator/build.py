"""Builds the emulator's shared library from the C++ files beside this one, once for each content."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

_HERE = Path(__file__).parent
_FLAGS = ["-std=c++17", "-O2", "-ftree-vectorize", "-fPIC", "-march=native", "-Wall", "-Wextra",
          # Instructions round one by one, as they are written; registers are viewed as several types.
          "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing", "-pthread"]  # fmt: skip


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "aiter-emulator"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return platform.processor()


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++")) or shutil.which("g++") or shutil.which("clang++")


def build() -> Path:
    """Returns the library; compiles it when these sources were not built on this machine before."""
    sources = sorted(_HERE.glob("*.cpp"))
    digest = hashlib.sha256(repr((_FLAGS, compiler(), _cpu())).encode())
    for path in sorted(_HERE.glob("*.h")) + sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = _cache_folder()
    library = folder / digest.hexdigest()[:20] / "libamdhip64.so"
    if library.exists():
        return library
    if compiler() is None:
        raise RuntimeError("the emulator needs a C++ compiler: g++ or clang++")
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not library.exists():
            _compile(sources, library)
    return library


def _compile(sources: list[Path], library: Path) -> None:
    folder = library.parent.parent
    with tempfile.TemporaryDirectory(dir=folder) as work:
        finished = Path(work) / "finished"
        finished.mkdir()

        def compile_one(source: Path) -> str:
            target = f"{work}/{source.stem}.o"
            subprocess.run([compiler(), *_FLAGS, "-c", str(source), "-o", target], check=True)
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        subprocess.run([compiler(), "-shared", "-pthread", "-o", str(finished / library.name), *objects], check=True)
        finished.rename(library.parent)
