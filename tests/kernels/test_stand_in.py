"""What stands in for instructions does as they do: compared bit for bit where the CPU has them. Elsewhere the real ones
are at least assembled, which no other test does."""

import subprocess

import pytest
from driver import STAND_IN
from test_cpu_builds import HERE, command, run

from aiter.jit.arch import runs_here

CASES = (
    ("bf16", "x86-64-v4"),
    ("bf16", "x86-64-v4+avx512bf16"),
    ("bf16", "x86-64-v4+avx512bf16+amxbf16"),
    ("fp16", "x86-64-v4+avx512bf16+amxbf16+amxfp16"),
)


@pytest.mark.parametrize(("dtype", "arch"), CASES, ids=map("-".join, CASES))
@pytest.mark.skipif(STAND_IN is None, reason="no CPU with AVX2, or no g++")
def test_same_results(dtype, arch, tmp_path):
    def results_of(compiler: str) -> str:
        program = str(tmp_path / "check")
        run(*command([compiler], "check_stand_in", dtype, arch), "-O1", str(HERE / "check_stand_in.cpp"), "-o", program)
        if not runs_here(arch):
            pytest.skip("assembled, but this CPU lacks the instructions")
        return subprocess.run([program], capture_output=True, text=True, check=True).stdout

    assert results_of("g++") == results_of(str(STAND_IN))
