"""From an entry on disk to a function to call."""

from __future__ import annotations

import ctypes
import os
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

    __slots__ = ("_library", "launch_raw", "spec", "workspace_raw")

    def __init__(self, spec: Spec, library: ctypes.CDLL) -> None:
        self.spec = spec
        self._library = library
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
            text = (self._library.aiter_error_text(code) or b"").decode(errors="replace")
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
    """Makes the hip* functions that are already in the process visible to kernels, which are not linked with any.

    They must be those that PyTorch uses: a stream of one HIP runtime means nothing to another.
    """
    if hasattr(ctypes.CDLL(None), "hipLaunchKernel"):
        return
    for path in _mapped("libamdhip64"):
        ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_GLOBAL | os.RTLD_NOW)
        return
    raise LoadError(
        "kernels for AMD GPUs need the HIP runtime, and no libamdhip64.so is loaded in this process: PyTorch loads it "
        "where it is built for ROCm (torch.version.hip is not None)."
    )


def _mapped(stem: str) -> list[str]:
    """Paths of the shared libraries in this process whose names begin with `stem`."""
    with open("/proc/self/maps") as maps:
        paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if "/" in line}
    return sorted(path for path in paths if os.path.basename(path).startswith(stem))
