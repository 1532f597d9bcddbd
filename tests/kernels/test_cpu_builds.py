"""The CPU kernels build without a warning, by every g++ and clang++ that is here, for every level; and they run on
other CPU families."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from aiter.jit.arch import CPU_ARCHS
from aiter.jit.spec import Spec
from aiter.jit.toolchain import CppToolchain

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels_src"
KERNELS = [source.stem for source in sorted((SOURCES / "cpu").glob("*.cpp"))]
DTYPES = ("fp32", "bf16", "fp16")
NAMES = ("g++", *(f"g++-{n}" for n in range(11, 17)), "clang++", *(f"clang++-{n}" for n in range(14, 25)))
COMPILERS = {os.path.realpath(path): name for name in reversed(NAMES) if (path := shutil.which(name))}
COMPILERS = {name: path for path, name in reversed(COMPILERS.items())}  # none of them twice
COMPILER = next(iter(COMPILERS.values()), None)
# What switches on every line of the kernels, and what switches on none.
ARCHS = ("x86-64", "x86-64-v3", "x86-64-v4+avx512bf16", list(CPU_ARCHS)[-1])  # the others have no line of their own
OPTIONS = ({}, {"CAUSAL": 1}, {"WINDOW": 1, "SOFTCAP": 1, "ALIBI": 1, "VALUE_DIM": 40})


def command(compiler: list[str], kernel: str, dtype: str, arch: str, options: dict | None = None) -> list[str]:
    spec = Spec(kernel, dtype, 72, True, arch)
    macros = {f"DTYPE_{dtype.upper()}": 1, "HEAD_DIM": 72, **({"CAUSAL": 1} if options is None else options)}
    macros = [f"-DAITER_{name}={value}" for name, value in macros.items()]
    includes = [f"-I{SOURCES}", f"-I{SOURCES / 'include'}"]
    return [*compiler, *CppToolchain().flags(spec), "-Wall", "-Wextra", "-Werror", *macros, *includes]


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize("compiler", ("g++", "clang++"))
def test_there_is_a_compiler(compiler):
    if not any(name.startswith(compiler) for name in COMPILERS):
        pytest.skip(f"no {compiler}")


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_builds_without_warnings(compiler, arch):
    """Every dtype and kernel on every level; which options are on changes from one to the next."""
    for i, kernel in enumerate(KERNELS):
        for j, dtype in enumerate(DTYPES):
            options = OPTIONS[(i + j + ARCHS.index(arch)) % len(OPTIONS)]
            source = str(SOURCES / "cpu" / f"{kernel}.cpp")
            run(*command([COMPILERS[compiler]], kernel, dtype, arch, options), "-fsyntax-only", source)


@pytest.mark.parametrize(
    ("flags", "message"),
    (
        (["-UAITER_DTYPE_BF16"], "define AITER_DTYPE_FP32, AITER_DTYPE_BF16 or AITER_DTYPE_FP16"),
        (["-DAITER_WINDOW=1"], "AITER_WINDOW without AITER_CAUSAL"),
        (["-U__clang__", "-U__GNUC__", "-D__GNUC__=10"], "CPU kernels need g\\+\\+ 11 or clang\\+\\+ 14"),
    ),
)
def test_what_cannot_be_built_is_named(flags, message):
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    words = command([COMPILER], KERNELS[0], "bf16", "x86-64")
    source = str(SOURCES / "cpu" / f"{KERNELS[0]}.cpp")
    done = subprocess.run([*words, *flags, "-fsyntax-only", source], capture_output=True, text=True)
    assert done.returncode != 0
    assert re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ("x86-64", "aarch64"))
def test_runs_without_vector_extensions(target, dtype, tmp_path):
    """The plainest level of this CPU's family, and another family, cross-compiled and emulated where the tools for it
    are installed (Debian's g++-aarch64-linux-gnu and qemu-user)."""
    program = str(tmp_path / "check")
    emulator = []
    if target == "aarch64":
        cross = shutil.which("aarch64-linux-gnu-g++")
        if cross is None:
            pytest.skip("no aarch64-linux-gnu-g++ to cross-compile with")
        compiler = [cross, "-static"]
        emulator = [shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")]
    else:
        compiler = [COMPILER]
    sources = [str(HERE / "check_forward.cpp"), str(SOURCES / "cpu" / "attention_forward.cpp")]
    run(*command(compiler, "attention_forward", dtype, target), *sources, "-o", program)
    if None in emulator:
        pytest.skip("compiled, but there is no qemu-user to run it")
    run(*emulator, program)
