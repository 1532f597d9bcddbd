"""Every environment variable that aiter reads, and what its value may be. Read at the time of use, so that a program
may set them after the import."""

from __future__ import annotations

import os
from pathlib import Path

from aiter.errors import SettingError

DEFAULT_COMPILE_TIMEOUT = 600.0
# Folders for temporary files, besides those that the environment names.
TEMPORARY_DIRS = ("/tmp", "/var/tmp", "/dev/shm")

VARIABLES = {
    "AITER_CACHE_DIR": "folder of the kernel cache; default: the user's cache folder, such as ~/.cache/aiter",
    "AITER_PREBUILT_DIRS": "read-only cache folders searched first, separated by ':'; used as they are",
    "AITER_NO_COMPILE": "1: never compile; a kernel that no cache holds is an error that names its key",
    "AITER_COMPILE_TIMEOUT": f"seconds that one compilation may take; default {DEFAULT_COMPILE_TIMEOUT:.0f}",
    "AITER_CXX": "the C++ compiler for CPU kernels; default: $CXX, then g++, then clang++",
    "AITER_HIPCC": "hipcc for AMD GPUs; default: PATH, $ROCM_PATH, $HIP_PATH, /opt/rocm*",
    "AITER_NVCC": "nvcc for NVIDIA GPUs; default: PATH, $CUDA_HOME, /usr/local/cuda",
    "AITER_CPU_ARCH": "CPU level to build for, such as x86-64-v3, if lower than the CPU's; set before the first call",
    "AITER_RECORD": "file to which each kernel that the program uses is appended once, for `aiter prewarm --replay`",
    "AITER_LOG": "what to say on stderr: debug, info (the default), warning, error",
    "AITER_BATCH_INVARIANT": "1: no bit of a sequence's result depends on the rest of its batch; read at import",
    "AITER_VLLM": "1: in vLLM on CPUs, attention is ours; 0: not, even where VLLM_PLUGINS names aiter",
    "AITER_CHECK_VALUES": "1: check page numbers and lengths that live on a GPU too, which waits for the GPU",
}

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


def text(name: str) -> str:
    """The variable's value, empty where it is not set."""
    # What is not set costs os.environ.get() an exception, half a microsecond at every call that asks; the dictionary
    # behind it none. A program may have put a mapping of its own there.
    environ = os.environ
    values = getattr(environ, "_data", None)
    if values is not None and environ.encodekey(name) not in values:
        return ""
    return environ.get(name, "").strip()


def flag(name: str) -> bool:
    value = text(name).lower()
    if value in _TRUE or value in _FALSE:
        return value in _TRUE
    raise SettingError(f"{name}={os.environ[name]!r}: expected 1 or 0")


def compile_timeout() -> float:
    """Seconds that one compilation may take."""
    value = text("AITER_COMPILE_TIMEOUT")
    if not value:
        return DEFAULT_COMPILE_TIMEOUT
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e7:
        raise SettingError(f"AITER_COMPILE_TIMEOUT={value!r}: expected a number of seconds greater than 0, such as 600")
    return seconds


def cache_dir() -> Path:
    """The writable cache folder; it need not exist yet. Without a home folder it is the first of `private_dirs`."""
    return user_cache_dir() or private_dirs()[0]


def user_cache_dir() -> Path | None:
    """The cache folder that AITER_CACHE_DIR names, else that of the user's home, else None."""
    value = text("AITER_CACHE_DIR")
    if value:
        return _absolute("AITER_CACHE_DIR", value)
    import platformdirs  # here, because most calls never need it

    try:
        path = Path(platformdirs.user_cache_path("aiter"))
    except RuntimeError:
        return None
    # Some releases give "~/.cache/aiter" for a user without a home. That, like any relative path, would be a folder of
    # whatever folder the program is in.
    return path if path.is_absolute() else None


def private_dirs() -> list[Path]:
    """Folders of this user's own, at least one, for the kernels of processes whose cache cannot be used. Processes that
    see the same temporary folder share them."""
    return [base / f"aiter-{os.geteuid()}" for base in temporary_dirs()] or [Path(f"/tmp/aiter-{os.geteuid()}")]


def temporary_dirs() -> list[Path]:
    """Folders for temporary files that are there, best first; never the working folder."""
    candidates = (text("TMPDIR"), *TEMPORARY_DIRS, text("XDG_RUNTIME_DIR"))
    return [Path(path) for path in dict.fromkeys(candidates) if os.path.isabs(path) and os.path.isdir(path)]


def prebuilt_dirs() -> list[Path]:
    """Read-only cache folders, in the order in which they are searched."""
    values = text("AITER_PREBUILT_DIRS").split(os.pathsep)
    return [_absolute("AITER_PREBUILT_DIRS", value.strip()) for value in values if value.strip()]


def record_file() -> Path | None:
    """Where the specs that a program uses are written down, or None."""
    value = text("AITER_RECORD")
    return _absolute("AITER_RECORD", value) if value else None


def _absolute(name: str, value: str) -> Path:
    if "\0" in value:
        raise SettingError(f"{name}={value!r}: not a path")
    path = Path(value)
    try:
        path = path.expanduser()
    except RuntimeError:
        raise SettingError(f"{name}={value!r}: there is no home folder here; give an absolute path") from None
    if not path.is_absolute():
        # A relative path would name another cache after every change of folder.
        raise SettingError(f"{name}={value!r}: expected an absolute path, such as {Path.cwd() / value}")
    return path
