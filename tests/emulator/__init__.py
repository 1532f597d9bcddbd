"""Executes gfx90a, gfx942 and gfx950 machine code on a CPU, behind a stand-in for the HIP runtime.

README.md says how; in short:

    with emulator.session("gfx942") as gpu:
        gpu.allow(query)                     # what the kernel may read,
        gpu.allow(output, writable=True)     # and write
        library = ctypes.CDLL(path)          # a library built by hipcc: its launches now run here
        code = library.aiter_launch(...)     # 0, or an error
        gpu.check()                          # raises KernelFault with the whole report
        gpu.stats()                          # what each kernel cost
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from . import build
from .statistics import summarize

ARCHS = ("gfx90a", "gfx942", "gfx950")


class KernelFault(Exception):
    """A kernel did something that is an error, or could not be launched; the text says what, where and which lane."""


_runtime: ctypes.CDLL | None = None


def load_runtime() -> ctypes.CDLL:
    """The stand-in library, built when first needed; its symbols bind the HIP calls of libraries loaded after it."""
    global _runtime
    if _runtime is None:
        library = ctypes.CDLL(str(build.build()), mode=ctypes.RTLD_GLOBAL)
        library.emulator_begin.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
        library.emulator_allow.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]
        text, pointer = ctypes.c_char_p, ctypes.c_void_p
        library.emulator_disassemble.argtypes = [text, pointer, ctypes.c_int, pointer, pointer]
        for name in ("report", "statistics", "operations", "disassemble"):
            getattr(library, f"emulator_{name}").restype = ctypes.c_char_p
        _runtime = library
    return _runtime


class Gpu:
    """The emulated GPU of a session."""

    def __init__(self, arch: str, runtime: ctypes.CDLL):
        self.arch = arch
        self.runtime = runtime

    def allow(self, memory, nbytes: int | None = None, writable: bool = False) -> None:
        """Lets kernels read, and where writable write, a tensor's storage range or nbytes from an address."""
        if memory is None:
            return
        if hasattr(memory, "data_ptr"):
            address = memory.data_ptr()
            if nbytes is None:
                steps = sum((size - 1) * stride for size, stride in zip(memory.shape, memory.stride(), strict=True))
                nbytes = (steps + 1) * memory.element_size() if memory.numel() else 0
        else:
            address = int(memory)
            if nbytes is None:
                raise TypeError("an address needs nbytes")
        self.runtime.emulator_allow(address, nbytes, int(writable))

    def forbid_all(self) -> None:
        """Forgets every range that allow() named."""
        self.runtime.emulator_forbid_all()

    def check_addresses(self, on: bool) -> None:
        """Whether accesses outside the allowed ranges are errors; they are unless this turns it off."""
        self.runtime.emulator_check_ranges(int(on))

    def strict(self, on: bool) -> None:
        """Whether too few wait states, races in LDS and vector registers beyond AccumOffset are errors; they are unless
        this turns it off, for hand-written code of others that runs on hardware all the same."""
        self.runtime.emulator_strict(int(on))

    def launch(self, code_object: bytes, kernel: str, grid, block, arguments: bytes = b"", lds_bytes: int = 0) -> None:
        """Runs a kernel of a bare code object; arguments as the kernel lays them out. Raises KernelFault."""
        sizes = [(ctypes.c_uint32 * 3)(*[*size, 1, 1, 1][:3]) for size in (grid, block)]
        data = ctypes.create_string_buffer(code_object, len(code_object))
        self.runtime.emulator_launch(data, kernel.encode(), *sizes, arguments, ctypes.c_uint64(lds_bytes))
        self.check()

    def report(self) -> str:
        """The text of the last error, "no error" before one."""
        return self.runtime.emulator_report().decode()

    def check(self) -> None:
        """Raises KernelFault when a launch since the last call failed."""
        if self.runtime.hipGetLastError():
            raise KernelFault(self.report())

    def stats(self) -> dict[str, dict]:
        """For each kernel launched since the session began or reset_stats(): see statistics.summarize."""
        return summarize(self.runtime.emulator_statistics().decode())

    def reset_stats(self) -> None:
        self.runtime.emulator_reset_statistics()


@contextlib.contextmanager
def session(
    arch: str, threads: int = 1, instruction_limit: int = 2_000_000_000, compute_units: int = 0
) -> Iterator[Gpu]:
    """An emulated GPU of that arch. One at a time in a process. instruction_limit: for one workgroup, against endless
    loops. compute_units: that it says it has, 0 for as many as the largest GPU of the arch. With threads > 1 workgroups
    run side by side, and float atomics between them in any order."""
    if arch not in ARCHS:
        raise ValueError(f"arch is {arch!r}, must be one of {ARCHS}")
    runtime = load_runtime()
    if runtime.emulator_begin(arch.encode(), threads, instruction_limit, compute_units):
        raise ValueError(f"the emulator does not know {arch}")
    gpu = Gpu(arch, runtime)
    try:
        yield gpu
    finally:
        gpu.check_addresses(True)
        gpu.strict(True)
        gpu.forbid_all()
        runtime.hipGetLastError()


def disassemble(arch: str, words: list[int]) -> tuple[str, int, bool]:
    """What the decoder makes of the machine code at words: text, size in words, whether it can be executed."""
    buffer = (ctypes.c_uint32 * (len(words) + 2))(*words)
    size, known = ctypes.c_int(), ctypes.c_int()
    library = load_runtime()
    text = library.emulator_disassemble(arch.encode(), buffer, len(words), ctypes.byref(size), ctypes.byref(known))
    return text.decode(), size.value, bool(known.value)


def operations(arch: str) -> list[tuple[str, int, str, bool]]:
    """Every operation in the arch's tables: format, opcode, name, whether it can be executed."""
    lines = (line.split() for line in load_runtime().emulator_operations(arch.encode()).decode().splitlines())
    return [(format_, int(opcode), name, known == "1") for format_, opcode, name, known in lines]
