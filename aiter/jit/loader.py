"""From an entry on disk to a function to call."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from aiter import abi
from aiter.errors import LaunchError, LoadError
from aiter.jit.arch import is_amd
from aiter.jit.spec import Spec


class Kernel:
    """A loaded kernel, ready to launch; safe to use from any number of threads.

    launch_raw(call, executor) is the launch itself, without checks: the call struct as bytes, and the stream or the
    address of a CPU executor. It returns 0, or a code for `check`. workspace_raw(call) is how many bytes of scratch
    memory the launch needs; the call's last field, the workspace, may be missing.
    """

    __slots__ = ("launch_raw", "library", "spec", "workspace_raw")

    def __init__(self, spec: Spec, library: ctypes.CDLL) -> None:
        self.spec = spec
        self.library = library
        self.launch_raw = library.aiter_launch
        self.launch_raw.argtypes = (ctypes.c_char_p, ctypes.c_void_p)
        self.launch_raw.restype = ctypes.c_int
        self.workspace_raw = library.aiter_workspace_bytes
        self.workspace_raw.argtypes = (ctypes.c_char_p,)
        self.workspace_raw.restype = ctypes.c_int64
        library.aiter_error_text.argtypes = (ctypes.c_int,)
        library.aiter_error_text.restype = ctypes.c_char_p

    def __repr__(self) -> str:
        return f"<aiter kernel {self.spec.name}>"

    def check(self, code: int) -> None:
        """Raises LaunchError with the kernel's own words if `code`, which a launch returned, is not 0."""
        if code:
            text = (self.library.aiter_error_text(code) or b"").decode(errors="replace")
            raise LaunchError(f"{self.spec.name}: {text} (code {code})", code)


def load(spec: Spec, path: Path) -> Kernel:
    """Loads the .so at `path` and checks that it speaks our launch ABI. Raises LoadError."""
    if is_amd(spec.arch):
        share_hip_runtime()
    try:
        library = ctypes.CDLL(os.fspath(path))
        describe = library.aiter_describe
        kernel = Kernel(spec, library)
    except (OSError, AttributeError) as error:
        raise LoadError(f"cannot load the kernel {spec.name}: {error}") from None
    describe.argtypes, describe.restype = (ctypes.c_void_p,), None
    said = abi.Description()
    describe(ctypes.byref(said))
    expected = (abi.ABI_VERSION, ctypes.sizeof(abi.call_struct(spec.kernel)))
    actual = (said.abi_version, said.call_bytes)
    if actual != expected:
        raise LoadError(
            f"the kernel {spec.name} has another launch ABI: version and bytes of a call are {actual}, "
            f"expected {expected}. kernels_src/include/aiter_abi.h and aiter/abi.py disagree."
        )
    return kernel


def share_hip_runtime() -> None:
    """Makes the hip* functions that PyTorch uses visible to kernels, which are not linked with any: a stream of one HIP
    runtime means nothing to another."""
    runtimes = _mapped("libamdhip64")
    everywhere = _home(ctypes.CDLL(None))  # what kernels would be bound to as things are
    mine = _runtime_of_torch(runtimes)
    if not runtimes and everywhere is None:
        raise LoadError(
            "kernels for AMD GPUs need the HIP runtime, and no libamdhip64.so is loaded in this process: PyTorch loads "
            "it where it is built for ROCm (torch.version.hip is not None)."
        )
    # A profiler may stand before all of them; that is fine, because it stands before PyTorch's too.
    clash = everywhere in runtimes and mine not in (None, everywhere)
    if clash or (mine is None and len(runtimes) > 1):
        raise LoadError(
            f"there are several HIP runtimes in this process: {', '.join(runtimes)}, and kernels must use the one that "
            f"PyTorch does, which is {mine or 'none that can be told'}. Find what loads another one (LD_PRELOAD, "
            "LD_LIBRARY_PATH, an extension that is linked with /opt/rocm), and load PyTorch before it, or let both use "
            "the same file."
        )
    if everywhere is None:
        ctypes.CDLL(mine or runtimes[0], mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL | os.RTLD_NOW)


def _runtime_of_torch(runtimes: list[str]) -> str | None:
    """Which of these HIP runtimes PyTorch is bound to: the one that its own library finds, or that came with it."""
    for path in [*_mapped("libc10_hip.so"), *_mapped("libtorch_hip.so")]:
        home = _home(ctypes.CDLL(path, mode=os.RTLD_NOLOAD))
        if home:
            return home
    return next((path for path in runtimes if Path(path).parent.parts[-2:] == ("torch", "lib")), None)


def _home(library: ctypes.CDLL) -> str | None:
    """The file that holds the HIP runtime's functions, as `library` and what it is linked with see them."""
    function = getattr(library, "hipLaunchKernel", None)
    if function is None:
        return None
    address = ctypes.cast(function, ctypes.c_void_p)
    information = (ctypes.c_char_p * 4)()  # struct Dl_info: the file's name comes first
    ctypes.CDLL(None).dladdr(address, information)
    return os.path.realpath(os.fsdecode(information[0])) if information[0] else None


def _mapped(stem: str) -> list[str]:
    """Paths of the shared libraries in this process whose names begin with `stem`."""
    with open("/proc/self/maps", encoding=sys.getfilesystemencoding(), errors="surrogateescape") as maps:
        paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line}
    return sorted(path for path in paths if os.path.basename(path).startswith(stem))
