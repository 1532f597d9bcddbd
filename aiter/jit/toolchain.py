"""Compilers: finding one, and the command lines that make a kernel of a source.

Each kind of chip has one Toolchain, which says where its compiler may be and with which command lines a source becomes
a .so. All paths on a command line are relative to the folder that the build runs in, so that neither the machine's
paths nor anything from the environment ends up in a .so or in a shell that a compiler driver may start.
"""

from __future__ import annotations

import errno
import functools
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from aiter.errors import CompilationError, CompilerNotFoundError
from aiter.jit import process, settings, sources
from aiter.jit.arch import CPU_ARCHS, is_amd, is_nvidia
from aiter.jit.compiler import Compiler, family, locate, programs, stamp
from aiter.jit.log import logger
from aiter.jit.spec import Spec

LIBRARY = "kernel.so"
LOG = "build.log"
# Where compilers put temporary files: they go with the folder of the build, whatever happens to it.
TEMPORARY = "tmp"


class Toolchain:
    """One kind of compiler. Subclasses say where it may be and how it is called."""

    language: str  # for messages
    variable: str  # the environment variable that names the compiler
    folder: str  # of the kernel sources
    suffix: str
    beside: tuple[str, ...] = ()  # sources that every kernel is linked with
    oldest: dict[str, int]  # first major release that knows our code, of each family of compilers that has such a one
    needed: str  # the same for people

    def candidates(self) -> Iterator[tuple[str, str]]:
        """(where this comes from, name or path) of each compiler that may be there, best first."""
        raise NotImplementedError

    def commands(self, spec: Spec, source: str, compiler: Compiler) -> list[list[str]]:
        """Command lines that turn `source` into LIBRARY. They start with `compiler`, or a tool that belongs to it."""
        raise NotImplementedError

    def flags(self, spec: Spec) -> list[str]:
        """The options that decide what code comes out, as far as they follow from the spec."""
        raise NotImplementedError

    def find(self) -> Compiler | None:
        """The first candidate that is there, or None. Runs nothing."""
        return next((compiler for _, _, compiler in self._candidates_here() if compiler), None)

    def choose(self) -> tuple[Compiler | None, dict[str, str]]:
        """The compiler to build with, having asked it for its version; and where one was looked for before it, with
        what is wrong with that one, or nothing where there is none. One that is too old is never built with."""
        looked: dict[str, str] = {}
        passed_over: dict[str, Compiler] = {}
        for origin, candidate, compiler in self._candidates_here():
            if compiler is None:
                looked[f"{candidate} ({origin})"] = ""
            elif os.path.realpath(compiler.path) not in passed_over:
                fault = self.fault(compiler, named=origin == self.variable)
                if fault is None:
                    compiler.instead_of = tuple(other.stamp for other in passed_over.values())
                    return compiler, looked
                passed_over[os.path.realpath(compiler.path)] = compiler
                looked[f"{candidate} ({origin})"] = f": {compiler.path} {fault}"
        return None, looked

    def require(self, purpose: str) -> Compiler:
        """The compiler to build with, or an error that says where it was looked for."""
        compiler, looked = self.choose()
        if compiler is None:
            places = "".join(f"\n  {place}{fault}" for place, fault in looked.items())
            raise CompilerNotFoundError(
                f"no {self.language} compiler to build {purpose}. Looked for:{places}\n"
                f"Install one ({self.needed}), or set {self.variable} to its path, or use a cache that was filled on "
                "another machine (`aiter prewarm`, AITER_PREBUILT_DIRS)."
            )
        if compiler.instead_of:
            passed_over = "; ".join(f"{place}{fault}" for place, fault in looked.items() if fault)
            _say_once(f"building with {compiler.path}. Passed over: {passed_over}")
        return compiler

    def fault(self, compiler: Compiler, named: bool) -> str | None:
        """Why it cannot be built with, if so. One that was `named` on purpose may speak for itself when it is run."""
        try:
            kind, release = family(compiler.version())
            if kind in self.oldest and int(release.split(".")[0]) < self.oldest[kind]:
                return f"is {kind} {release}, which is too old: {self.needed} is needed"
            return None if named or compiler.answers() else "fails when asked for its version"
        except CompilationError as error:
            if getattr(error.__cause__, "errno", None) in (errno.EAGAIN, errno.ENOMEM):
                raise  # no program could be started
            return None if named else str(error)

    def _candidates_here(self) -> Iterator[tuple[str, str, Compiler | None]]:
        for origin, candidate in self.candidates():
            path = locate(candidate)
            yield origin, candidate, self._compiler(path) if path else None

    def _compiler(self, path: str) -> Compiler:
        return Compiler(path, stamp(path) or {})

    def _configured(self) -> Iterator[tuple[str, str]]:
        value = settings.text(self.variable)
        if value:
            yield self.variable, value


class CppToolchain(Toolchain):
    language, variable, folder, suffix = "C++", "AITER_CXX", "cpu", ".cpp"
    oldest, needed = {"gcc": 11, "clang": 14}, "g++ 11, clang++ 14 or newer"

    def candidates(self) -> Iterator[tuple[str, str]]:
        yield from self._configured()
        if settings.text(self.variable):
            return
        # CXX may be a command line with options, or a compiler for GPUs: then it is passed over.
        cxx = settings.text("CXX")
        if cxx and os.path.basename(cxx) not in ("hipcc", "nvcc"):
            yield "CXX", cxx
        yield from (("PATH", name) for name in ("g++", "clang++", "c++"))
        for language in (r"g\+\+", r"clang\+\+"):
            versions = sorted(programs(rf"{language}-(\d+)(\.\d+)*"), key=lambda match: int(match[1]), reverse=True)
            yield from (("PATH", match[0]) for match in versions)
        # Newer compilers beside the system's own, on RHEL and its kin.
        for path in sorted(Path("/opt/rh").glob("gcc-toolset-*/root/usr/bin/g++"), key=_numbers, reverse=True):
            yield "the usual place", str(path)

    def flags(self, spec: Spec) -> list[str]:
        arch = CPU_ARCHS.get(spec.arch)
        tuning = arch.flags if arch else ()
        features = [f"-DAITER_CPU_{feature.upper()}=1" for feature in arch.features] if arch else []
        return ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", *tuning, *features]

    def commands(self, spec: Spec, source: str, compiler: Compiler) -> list[list[str]]:
        # Only what a kernel uses is linked: some compilers bring libraries along, hipcc libamdhip64, mpicxx libmpi.
        link = ["-shared", "-Wl,--as-needed"]
        return [[compiler.path, *self.flags(spec), *_common(spec), *link, source, "-o", LIBRARY]]


class HipToolchain(Toolchain):
    language, variable, folder, suffix = "HIP", "AITER_HIPCC", "gpu", ".hip"
    oldest, needed = {"clang": 17}, "hipcc with clang 17 (ROCm 6.0) or newer"

    def candidates(self) -> Iterator[tuple[str, str]]:
        yield from self._configured()
        if settings.text(self.variable):
            return
        yield "PATH", "hipcc"
        for variable in ("ROCM_PATH", "HIP_PATH"):
            if settings.text(variable):
                yield variable, os.path.join(settings.text(variable), "bin", "hipcc")
        yield "the usual place", "/opt/rocm/bin/hipcc"
        for path in sorted(Path("/opt").glob("rocm-*/bin/hipcc"), key=_numbers, reverse=True):
            yield "the usual place", str(path)

    def flags(self, spec: Spec) -> list[str]:
        # clang tells the arch to the device's half of the compilation only.
        offload = ["-x", "hip", f"--offload-arch={spec.arch}", f"-DAITER_{spec.arch.upper()}=1"]
        # Neither libraries of device code nor clang's headers for it: kernels_src/gpu/hip_language.h is all they use.
        alone = ["-nogpulib", "-nogpuinc"]
        # clang would pack float32 in pairs, and packed instructions do not run beside the matrix unit.
        return [*offload, *alone, "-std=c++17", "-O3", "-fno-slp-vectorize", "-fPIC", "-fvisibility=hidden"]

    def commands(self, spec: Spec, source: str, compiler: Compiler) -> list[list[str]]:
        # In two steps, because hipcc links its own libamdhip64 into every .so. A kernel must use the one that PyTorch
        # has loaded, which may be of another version: its hip* symbols stay undefined until it is loaded.
        linker = _clang_behind(compiler.path, str(compiler.stamp))
        return [
            [compiler.path, *self.flags(spec), *_common(spec), "-c", source, "-o", "kernel.o"],
            [linker, "-shared", "kernel.o", "-o", LIBRARY],
        ]


class NvccToolchain(Toolchain):
    language, variable, folder, suffix = "CUDA", "AITER_NVCC", "gpu", ".hip"
    beside = ("gpu/cuda_runtime.cpp",)
    oldest, needed = {"nvcc": 11}, "nvcc of CUDA 11 or newer"

    def candidates(self) -> Iterator[tuple[str, str]]:
        yield from self._configured()
        if settings.text(self.variable):
            return
        yield "PATH", "nvcc"
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            if settings.text(variable):
                yield variable, os.path.join(settings.text(variable), "bin", "nvcc")
        yield "the usual place", "/usr/local/cuda/bin/nvcc"

    def host(self) -> str | None:
        """The C++ compiler that nvcc uses: NVCC_CCBIN, a program or its folder, or g++."""
        wanted = settings.text("NVCC_CCBIN")
        return locate(os.path.join(wanted, "g++") if os.path.isdir(wanted) else wanted or "g++")

    def _compiler(self, path: str) -> Compiler:
        host = self.host()
        others = {"host": stamp(host)} if host else {}
        return Compiler(path, {**(stamp(path) or {}), **others}, (host,) if host else ())

    def _threads(self, spec: Spec, compiler: Compiler) -> list[str]:
        # Where keys are cut there are three kernels: by two threads they take a fifth less time (docs/gpu.md).
        kind, release = family(compiler.version())
        several = dict(spec.options).get("cut") and kind == "nvcc" and int(release.split(".")[0]) >= 13
        return ["-split-compile=2"] if several else []

    def flags(self, spec: Spec) -> list[str]:
        code = f"-gencode=arch={spec.arch.replace('sm_', 'compute_')},code={spec.arch}"
        host = "-Xcompiler=-fPIC,-fvisibility=hidden"
        # -O is the host's code alone, which does nothing but launch; the device's is optimised fully by default.
        return [code, "-Xfatbin=-compress-all", "-std=c++17", "-O1", "-cudart=none", host]

    def commands(self, spec: Spec, source: str, compiler: Compiler) -> list[list[str]]:
        # What the environment says goes where it can be seen, and is part of the compiler's stamp.
        host = self.host() if settings.text("NVCC_CCBIN") else None
        line = [compiler.path, *self.flags(spec), *([f"-ccbin={host}"] if host else [])]
        return [
            [*line, *self._threads(spec, compiler), *_common(spec), "-x", "cu", "-c", source, "-o", "kernel.o"],
            [*line, "-shared", "kernel.o", *self.beside, "-ldl", "-o", LIBRARY],
        ]


@functools.cache
def _clang_behind(hipcc: str, stamped: str) -> str:
    """The clang that a hipcc runs. Each file, as its stamp tells, is asked once: it may be a slow script."""
    named = process.ask([hipcc, "--print-prog-name=clang"])[1].strip().splitlines()[-1:]
    if not named or shutil.which(named[0], path=process.search_path()) is None:
        raise CompilationError(f"{hipcc} --print-prog-name=clang names no program: {named}", hipcc)
    return named[0]


CPP, HIP, NVCC = CppToolchain(), HipToolchain(), NvccToolchain()
TOOLCHAINS = (CPP, HIP, NVCC)


def toolchain_for(arch: str) -> Toolchain:
    return HIP if is_amd(arch) else NVCC if is_nvidia(arch) else CPP


# What compilers say for want of memory, of processes that may be started, and of knowledge of a chip.
_NO_MEMORY = re.compile(
    r"\bKilled\b|signal 9|signal terminated program|out of memory|bad_alloc|memory exhausted|Cannot allocate memory"
)
_NO_PROCESS = re.compile(r"Resource temporarily unavailable")
_UNKNOWN_CHIP = re.compile(
    r"[Uu]nsupported gpu architecture|invalid target ID|unknown target CPU|is not defined for option"
)


def starved(error: CompilationError) -> bool:
    """Whether a compiler seems to have failed for want of memory or processes: alone, it may have enough."""
    return any(pattern.search(f"{error}\n{error.output}") for pattern in (_NO_MEMORY, _NO_PROCESS))


def compile_library(commands: list[list[str]], folder: Path, timeout: float) -> None:
    """Runs `commands` in `folder`, their output in LOG there. Raises CompilationError with the compiler's words."""
    temporary = folder / TEMPORARY
    temporary.mkdir(exist_ok=True)
    deadline = time.monotonic() + timeout
    with open(folder / LOG, "wb") as log:
        for command in commands:
            log.write(f"$ {shlex.join(command)}\n".encode("utf-8", "surrogateescape"))
            log.flush()
            try:
                left = max(0.0, deadline - time.monotonic())
                status = process.run(command, left, log, log, folder, temporary)
            except TimeoutError:
                what = f"took longer than AITER_COMPILE_TIMEOUT={timeout:g} s and was stopped"
                raise CompilationError(what, shlex.join(command), _read(folder / LOG)) from None
            if status:
                what = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
                raise _explained(CompilationError(what, shlex.join(command), _read(folder / LOG)))
    if not (folder / LIBRARY).is_file():
        raise CompilationError(f"made no {LIBRARY}", shlex.join(commands[-1]), _read(folder / LOG))


def _explained(error: CompilationError) -> CompilationError:
    """The error with what to do about it, where the compiler's words tell."""
    hint, words = "", f"{error}\n{error.output}"
    if _NO_MEMORY.search(words):
        hint = " for want of memory, it seems: leave it more, or let fewer run at once (`aiter prewarm --jobs 1`)"
    elif _NO_PROCESS.search(words):
        hint = f": {process.NO_MORE_PROCESSES}"
    elif _UNKNOWN_CHIP.search(words):
        hint = (
            ", because it is too old for this chip, it seems: gfx942 needs ROCm 6, gfx950 ROCm 7, sm_90a CUDA 12.0, "
            "sm_100 and sm_120 CUDA 12.8, or newer"
        )
    return CompilationError(f"{error}{hint}", error.command, error.output)


def _common(spec: Spec) -> list[str]:
    includes = [f"-I{folder}" for folder in sources.INCLUDE_DIRS]
    return [*includes, *(f"-D{name}={value}" for name, value in spec.defines().items())]


@functools.cache
def _say_once(message: str) -> None:
    logger.info(message)


def _numbers(path: Path) -> list[int]:
    """For sorting by version: 6.10 comes after 6.4."""
    return [int(number) for number in re.findall(r"\d+", str(path))]


def _read(path: Path) -> str:
    try:
        return process.decode(path.read_bytes())
    except OSError:
        return ""
