"""Compilers: finding one, telling it from another, running it with a time limit.

Each kind of chip has one Toolchain, which says where its compiler may be and with which command lines a source becomes
a .so. All paths on a command line are relative to the folder that the build runs in, so that neither the machine's
paths nor anything from the environment ends up in a .so or in a shell that a compiler driver may start.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aiter.errors import CompilationError, CompilerNotFoundError
from aiter.jit import settings, sources
from aiter.jit.arch import CPU_ARCHS, is_amd, is_nvidia
from aiter.jit.spec import Spec

LIBRARY = "kernel.so"
LOG = "build.log"
# Where compilers put temporary files: they go with the folder of the build, whatever happens to it.
TEMPORARY = "tmp"

# Variables by which compilers take further options or include folders: they would change a build behind its key.
_HIDDEN_OPTIONS = (
    "CPATH",
    "C_INCLUDE_PATH",
    "CPLUS_INCLUDE_PATH",
    "CCC_OVERRIDE_OPTIONS",
    "HIPCC_COMPILE_FLAGS_APPEND",
    "HIPCC_LINK_FLAGS_APPEND",
    "NVCC_APPEND_FLAGS",
    "NVCC_PREPEND_FLAGS",
)


@dataclass(frozen=True)
class Compiler:
    """A compiler that is here. `stamp` tells it from another without running it."""

    path: str
    stamp: dict

    def version(self) -> str:
        """Its own words, less what depends on where it is installed. Runs it."""
        lines = _ask([self.path, "--version"]).splitlines()
        return "\n".join(line.rstrip() for line in lines if line.strip() and not line.startswith("InstalledDir:"))

    def release(self) -> str:
        """The line of `version` that says most, for people."""
        lines = self.version().splitlines()
        return next((line for line in lines if re.search(r"\d\.\d", line)), "a compiler that does not tell its version")


class Toolchain:
    """One kind of compiler. Subclasses say where it may be and how it is called."""

    language: str  # for messages
    variable: str  # the environment variable that names the compiler
    folder: str  # of the kernel sources
    suffix: str

    def candidates(self) -> Iterator[tuple[str, str]]:
        """(where this comes from, name or path) of each compiler that may be there, best first."""
        raise NotImplementedError

    def commands(self, spec: Spec, source: str, compiler: str) -> list[list[str]]:
        """Command lines that turn `source` into LIBRARY. They start with `compiler`, or a tool that belongs to it."""
        raise NotImplementedError

    def flags(self, spec: Spec) -> list[str]:
        """The options that decide what code comes out, as far as they follow from the spec."""
        raise NotImplementedError

    def find(self) -> Compiler | None:
        """The first candidate that is there, or None."""
        for _, candidate in self.candidates():
            path = shutil.which(candidate)
            if path is not None:
                path = os.path.abspath(path)  # builds run in another folder
                status = os.stat(path)
                # Whole seconds: images and archives keep no more.
                stamp = {"name": Path(path).name, "bytes": status.st_size, "modified": int(status.st_mtime)}
                return Compiler(path, stamp)
        return None

    def require(self, purpose: str) -> Compiler:
        """The compiler, or an error that says where it was looked for."""
        compiler = self.find()
        if compiler is None:
            looked = "".join(f"\n  {candidate} ({origin})" for origin, candidate in self.candidates())
            raise CompilerNotFoundError(
                f"no {self.language} compiler to build {purpose}. Looked for:{looked}\n"
                f"Install one, or set {self.variable} to its path, or use a cache that was filled on another machine "
                "(`aiter prewarm`, AITER_PREBUILT_DIRS)."
            )
        return compiler

    def _configured(self) -> Iterator[tuple[str, str]]:
        value = settings.text(self.variable)
        if value:
            yield self.variable, value


class CppToolchain(Toolchain):
    language, variable, folder, suffix = "C++", "AITER_CXX", "cpu", ".cpp"

    def candidates(self) -> Iterator[tuple[str, str]]:
        yield from self._configured()
        if settings.text(self.variable):
            return
        # CXX may be a command line ("ccache g++"): then it is passed over, because it names no program.
        if settings.text("CXX"):
            yield "CXX", settings.text("CXX")
        yield from (("PATH", name) for name in ("g++", "clang++", "c++"))

    def flags(self, spec: Spec) -> list[str]:
        arch = CPU_ARCHS.get(spec.arch)
        tuning = arch.flags if arch else ()
        features = [f"-DAITER_CPU_{feature.upper()}=1" for feature in arch.features] if arch else []
        return ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-pthread", *tuning, *features]

    def commands(self, spec: Spec, source: str, compiler: str) -> list[list[str]]:
        return [[compiler, *self.flags(spec), *_common(spec), "-shared", source, "-o", LIBRARY]]


class HipToolchain(Toolchain):
    language, variable, folder, suffix = "HIP", "AITER_HIPCC", "gpu", ".hip"

    def candidates(self) -> Iterator[tuple[str, str]]:
        yield from self._configured()
        if settings.text(self.variable):
            return
        yield "PATH", "hipcc"
        for variable in ("ROCM_PATH", "HIP_PATH"):
            if settings.text(variable):
                yield variable, os.path.join(settings.text(variable), "bin", "hipcc")
        yield "the usual place", "/opt/rocm/bin/hipcc"
        for path in sorted(Path("/opt").glob("rocm-*/bin/hipcc"), reverse=True):
            yield "the usual place", str(path)

    def flags(self, spec: Spec) -> list[str]:
        offload = ["-x", "hip", f"--offload-arch={spec.arch}", "-nogpulib"]
        return [*offload, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]

    def commands(self, spec: Spec, source: str, compiler: str) -> list[list[str]]:
        # In two steps, because hipcc links its own libamdhip64 into every .so. A kernel must use the one that PyTorch
        # has loaded, which may be of another version: its hip* symbols stay undefined until it is loaded.
        linker = _ask([compiler, "--print-prog-name=clang"]).strip().splitlines()[-1:]
        if not linker or shutil.which(linker[0]) is None:
            raise CompilationError(f"{compiler} --print-prog-name=clang names no program: {linker}", compiler)
        return [
            [compiler, *self.flags(spec), *_common(spec), "-c", source, "-o", "kernel.o"],
            [linker[0], "-shared", "kernel.o", "-o", LIBRARY],
        ]


class NvccToolchain(Toolchain):
    language, variable, folder, suffix = "CUDA", "AITER_NVCC", "gpu", ".hip"

    def candidates(self) -> Iterator[tuple[str, str]]:
        yield from self._configured()
        if settings.text(self.variable):
            return
        yield "PATH", "nvcc"
        for variable in ("CUDA_HOME", "CUDA_PATH"):
            if settings.text(variable):
                yield variable, os.path.join(settings.text(variable), "bin", "nvcc")
        yield "the usual place", "/usr/local/cuda/bin/nvcc"

    def flags(self, spec: Spec) -> list[str]:
        code = f"-gencode=arch={spec.arch.replace('sm_', 'compute_')},code={spec.arch}"
        host = "-Xcompiler=-fPIC,-fvisibility=hidden"
        # -O is the host's code alone, which does nothing but launch; the device's is optimised fully by default.
        return ["-x", "cu", code, "-std=c++17", "-O1", "-cudart=static", host]

    def commands(self, spec: Spec, source: str, compiler: str) -> list[list[str]]:
        return [[compiler, *self.flags(spec), *_common(spec), "-shared", source, "-o", LIBRARY]]


CPP, HIP, NVCC = CppToolchain(), HipToolchain(), NvccToolchain()
TOOLCHAINS = (CPP, HIP, NVCC)


def toolchain_for(arch: str) -> Toolchain:
    return HIP if is_amd(arch) else NVCC if is_nvidia(arch) else CPP


_running: set = set()
_stopped = False


def stop_compilers() -> None:
    """Ends the compilers that this process runs, now and from now on: for a program that is told to end while its
    threads build."""
    global _stopped
    _stopped = True
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def compile_library(commands: list[list[str]], folder: Path, timeout: float) -> None:
    """Runs `commands` in `folder`, their output in LOG there. Raises CompilationError with the compiler's words."""
    import subprocess  # here, because a warm start runs nothing

    temporary = folder / TEMPORARY
    temporary.mkdir(exist_ok=True)
    env = {**_environment(), "TMPDIR": str(temporary)}
    deadline = time.monotonic() + timeout
    with open(folder / LOG, "wb") as log:
        for command in commands:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            try:
                # A session of its own: on a time-out the compiler's children must go too.
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                raise CompilationError(f"cannot run {command[0]}: {error}", shlex.join(command), str(error)) from error
            _running.add(process)
            if _stopped:
                stop_compilers()
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                what = f"took longer than AITER_COMPILE_TIMEOUT={timeout:g} s and was stopped"
                raise CompilationError(what, shlex.join(command), _read(folder / LOG)) from None
            finally:
                _running.discard(process)
            if status:
                what = f"ended with status {status}" if status > 0 else f"was killed by signal {-status}"
                raise CompilationError(what, shlex.join(command), _read(folder / LOG))
    if not (folder / LIBRARY).is_file():
        raise CompilationError(f"made no {LIBRARY}", shlex.join(commands[-1]), _read(folder / LOG))


def _common(spec: Spec) -> list[str]:
    includes = [f"-I{folder}" for folder in sources.INCLUDE_DIRS]
    return [*includes, *(f"-D{name}={value}" for name, value in spec.defines().items())]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _HIDDEN_OPTIONS}
    # hipcc takes an nvcc on PATH for a wish to build for NVIDIA.
    return {**kept, "LC_ALL": "C", "HIP_PLATFORM": "amd"}


def _ask(command: list[str]) -> str:
    """What a compiler says when asked about itself."""
    import subprocess

    try:
        done = subprocess.run(
            command,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompilationError(f"cannot run {shlex.join(command)}: {error}", shlex.join(command), str(error)) from error
    return done.stdout.decode(errors="replace")


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
