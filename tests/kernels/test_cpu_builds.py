"""The CPU kernels build without a warning, by g++ and clang++, for every level; and they run on other CPU families."""

import shutil
import subprocess
from pathlib import Path

import pytest
from emulator.assembly import zig

from aiter.jit.arch import CPU_ARCHS
from aiter.jit.spec import Spec
from aiter.jit.toolchain import CppToolchain

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels_src"
KERNELS = [source.stem for source in sorted((SOURCES / "cpu").glob("*.cpp"))]
DTYPES = ("fp32", "bf16", "fp16")
COMPILERS = {
    name: next(filter(shutil.which, candidates), None)
    for name, candidates in (("g++", ("g++",)), ("clang++", ("clang++", *(f"clang++-{n}" for n in range(30, 13, -1)))))
}


def command(compiler: list[str], kernel: str, dtype: str, arch: str) -> list[str]:
    spec = Spec(kernel, dtype, 72, True, arch)
    macros = [f"-DAITER_DTYPE_{dtype.upper()}=1", "-DAITER_HEAD_DIM=72", "-DAITER_CAUSAL=1"]
    includes = [f"-I{SOURCES}", f"-I{SOURCES / 'include'}"]
    return [*compiler, *CppToolchain().flags(spec), "-Wall", "-Wextra", "-Werror", *macros, *includes]


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("arch", ("x86-64", "x86-64-v3", "x86-64-v4", list(CPU_ARCHS)[-1]))
def test_builds_without_warnings(compiler, arch):
    if COMPILERS[compiler] is None:
        pytest.skip(f"no {compiler}")
    for kernel in KERNELS:
        for dtype in DTYPES:
            source = str(SOURCES / "cpu" / f"{kernel}.cpp")
            run(*command([COMPILERS[compiler]], kernel, dtype, arch), "-fsyntax-only", source)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ("x86-64", "aarch64"))
def test_runs_without_vector_extensions(target, dtype, tmp_path):
    """The plainest level of this CPU's family, and another family, cross-compiled and emulated where the tools for it
    are installed (ziglang from PyPI, Debian's qemu-user)."""
    program = str(tmp_path / "check")
    emulator = []
    if target == "aarch64":
        if zig() is None:
            pytest.skip("no ziglang to cross-compile with")
        compiler = [zig(), "c++", "-target", "aarch64-linux-musl", "-static"]
        emulator = [shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")]
    else:
        compiler = [COMPILERS["g++"] or COMPILERS["clang++"]]
    sources = [str(HERE / "check_forward.cpp"), str(SOURCES / "cpu" / "attention_forward.cpp")]
    run(*command(compiler, "attention_forward", dtype, target), *sources, "-o", program)
    if None in emulator:
        pytest.skip("compiled, but there is no qemu-user to run it")
    run(*emulator, program)
