"""In which order the backward pass in one go adds to the gradients of queries (kernels_src/gpu/backward.h), run on the
CPU: a block waits only for blocks with earlier tickets, each tile has a place of its own, and no pair is left out."""

import subprocess

import pytest
from test_cpu_builds import COMPILER, HERE, SOURCES, run

MASKS = {"full": "000", "causal": "100", "window": "010", "chunks": "011"}


@pytest.mark.skipif(COMPILER is None, reason="no g++ or clang++")
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_turns(tmp_path, mask):
    program = str(tmp_path / "check")
    defines = [f"-DAITER_{name}={bit}" for name, bit in zip(("CAUSAL", "WINDOW", "CHUNK"), mask, strict=True)]
    flags = [
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Wno-parentheses",
        "-Wno-unused-parameter",
        "-Wno-unknown-pragmas",
    ]
    run(
        COMPILER,
        *flags,
        *defines,
        f"-I{SOURCES}",
        f"-I{SOURCES / 'include'}",
        str(HERE / "check_turns.cpp"),
        "-o",
        program,
    )
    checked = subprocess.run([program, "1000"], capture_output=True, text=True, timeout=60)
    assert (checked.returncode, checked.stdout) == (0, "")
