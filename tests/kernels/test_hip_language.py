"""kernels_src/gpu/hip_language.h stands for HIP's own headers: where those are installed, it must say what they say."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from aiter.jit import sources

PLACES = "/usr/include", "/opt/rocm/include"
INCLUDES = [folder for folder in PLACES if Path(folder, "hip", "hip_runtime_api.h").is_file()]


@pytest.mark.skipif(not INCLUDES or not shutil.which("g++"), reason="no hip/hip_runtime_api.h here, or no g++")
@pytest.mark.parametrize("include", INCLUDES)
def test_functions_and_numbers_are_those_of_hips_headers(include, tmp_path):
    """A second declaration that contradicts the first does not compile."""
    ours = (sources.find_root() / "gpu" / "hip_language.h").read_text()
    (functions,) = re.findall(r'^extern "C" {\n.*?^}\n', ours, re.M | re.S)
    assert functions.count("hipError_t hip") == 5
    numbers = re.findall(r"enum hip\w+ : int { (hip\w+) = (\d+) };", ours)
    assert dict(numbers).keys() == {"hipSuccess", "hipDeviceAttributeMultiprocessorCount"}

    def compiled(functions, numbers):
        code = ["#include <hip/hip_runtime_api.h>", functions, "static_assert(sizeof(dim3) == 3 * sizeof(uint32_t));"]
        code += [f"static_assert({name} == {number});" for name, number in numbers]
        (tmp_path / "both.cpp").write_text("\n".join(code))
        command = ["g++", "-std=c++17", "-fsyntax-only", "-D__HIP_PLATFORM_AMD__", f"-I{include}", "both.cpp"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    result = compiled(functions, numbers)
    assert result.returncode == 0, result.stderr
    assert "conflicting declaration" in compiled(functions.replace("int *count", "long *count"), numbers).stderr
    assert "static assertion" in compiled(functions, [(numbers[1][0], int(numbers[1][1]) + 1)]).stderr
