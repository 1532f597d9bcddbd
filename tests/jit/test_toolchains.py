"""Finding compilers and chips, and the command lines that come of it."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from tiny import TINY

from aiter.errors import CompilationError, SettingError, UnsupportedArchError
from aiter.jit import arch
from aiter.jit.cache import Cache
from aiter.jit.compiler import Compiler
from aiter.jit.recipe import recipe_for
from aiter.jit.spec import Spec
from aiter.jit.toolchain import CPP, HIP, NVCC, toolchain_for

pytestmark = pytest.mark.usefixtures("cache_dir")


def program(path, text="#!/bin/sh\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_each_kind_of_chip_has_its_compiler():
    assert [toolchain_for(name) for name in ("gfx942", "sm_90a", "x86-64-v3", "aarch64")] == [HIP, NVCC, CPP, CPP]


@pytest.mark.parametrize(
    "toolchain, name, variable",
    [(HIP, "hipcc", "ROCM_PATH"), (HIP, "hipcc", "HIP_PATH"), (NVCC, "nvcc", "CUDA_HOME")],
)
def test_gpu_compilers_are_found_in_order(toolchain, name, variable, tmp_path, monkeypatch):
    for other in ("ROCM_PATH", "HIP_PATH", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(other, raising=False)
    third = program(tmp_path / "root" / "bin" / name)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv(variable, str(tmp_path / "root"))
    assert toolchain.find().path == third
    second = program(tmp_path / "path" / name)
    assert toolchain.find().path == second
    first = program(tmp_path / "first")
    monkeypatch.setenv(toolchain.variable, first)
    assert toolchain.find().path == first
    monkeypatch.setenv(toolchain.variable, str(tmp_path / "missing"))  # a wrong wish is not quietly overruled
    assert toolchain.find() is None


def test_cxx_is_honoured_if_it_names_a_program(tmp_path, monkeypatch):
    mine = program(tmp_path / "my-c++")
    monkeypatch.setenv("CXX", mine)
    assert CPP.find().path == mine
    monkeypatch.setenv("CXX", f"{mine} -m64")
    assert CPP.find().path == os.path.abspath(shutil.which("g++"))


def test_a_build_sees_relative_paths_and_no_hidden_options(tree, tmp_path, monkeypatch):
    """hipcc is a script that passes words through a shell: nothing of this machine's paths may be among them."""
    (tree / "gpu").mkdir()
    (tree / "gpu" / "tiny.hip").write_text(TINY)
    log = tmp_path / "log"
    linker = program(tmp_path / "clang", f'#!/bin/sh\necho "$@" >> {log}\nexec g++ "$@"\n')
    script = f"""#!/bin/sh
case "$1" in
    --version) echo "HIP version: 9"; echo "InstalledDir: /somewhere"; exit;;
    --print-prog-name=clang) echo noise; echo {linker}; exit;;
esac
echo "$HIP_PLATFORM [$HIPCC_COMPILE_FLAGS_APPEND] [$CPATH]" >> {log}
echo "$@" >> {log}
for word; do case "$word" in *.hip) source=$word;; -D*|-I*) flags="$flags $word";; esac; done
exec g++ -fPIC -x c++ $flags -c $source -o kernel.o
"""
    monkeypatch.setenv("AITER_HIPCC", program(tmp_path / "hipcc", script))
    monkeypatch.setenv("HIPCC_COMPILE_FLAGS_APPEND", "-DEVIL")
    monkeypatch.setenv("CPATH", "/evil")
    recipe = recipe_for(Spec("tiny", "bf16", 64, True, "gfx942", (("paged", 1),)))
    with Cache().obtain(recipe) as entry:
        assert entry.manifest["compiler"]["version"] == "HIP version: 9"
    environment, compile_line, link_line = log.read_text().splitlines()
    assert environment == "amd [] []"
    assert compile_line == (
        "-x hip --offload-arch=gfx942 -DAITER_GFX942=1 -nogpulib -nogpuinc -std=c++17 -O3 "
        "-fno-slp-vectorize -fPIC -fvisibility=hidden -Iinclude -I. "
        "-DAITER_DTYPE_BF16=1 -DAITER_HEAD_DIM=64 -DAITER_CAUSAL=1 -DAITER_PAGED=1 "
        "-c gpu/tiny.hip -o kernel.o"
    )
    assert link_line == "-shared kernel.o -o kernel.so"


def test_a_hipcc_without_a_clang(tree, tmp_path, monkeypatch):
    (tree / "gpu").mkdir()
    (tree / "gpu" / "tiny.hip").write_text(TINY)
    monkeypatch.setenv("AITER_HIPCC", program(tmp_path / "hipcc", "#!/bin/sh\necho clang-of-nowhere\n"))
    with (
        pytest.raises(CompilationError, match="names no program"),
        Cache().obtain(recipe_for(Spec("tiny", "bf16", 64, True, "gfx942"))),
    ):
        pass


def nvcc(release):
    return Compiler("nvcc", {}, _answer=(True, f"Cuda compilation tools, release {release}, V{release}.1"))


def test_nvcc_is_told_the_exact_chip():
    spec = Spec("tiny", "fp16", 64, False, "sm_90a")
    compile_line, link_line = NVCC.commands(spec, "gpu/tiny.hip", nvcc("13.0"))
    assert "-gencode=arch=compute_90a,code=sm_90a" in compile_line
    assert "-cudart=none" in link_line and "gpu/cuda_runtime.cpp" in link_line


@pytest.mark.parametrize("release, known", [("11.8", False), ("12.9", False), ("13.0", True), ("14.1", True)])
def test_nvcc_has_two_threads_where_there_are_several_kernels(release, known):
    for options, several in (((), False), ((("cut", 1),), True)):
        spec = Spec("tiny", "fp16", 64, False, "sm_90a", options)
        compile_line = NVCC.commands(spec, "gpu/tiny.hip", nvcc(release))[0]
        assert ("-split-compile=2" in compile_line) == (known and several)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("", "x86-64"),
        ("cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3", "x86-64-v2"),
        (arch.CPU_ARCHS["x86-64-v3"].cpuinfo, "x86-64-v3"),
        (arch.CPU_ARCHS["x86-64-v3"].cpuinfo | {"avx512f", "amx_tile", "amx_bf16"}, "x86-64-v3"),
        (arch.CPU_ARCHS["x86-64-v4+avx512bf16"].cpuinfo, "x86-64-v4+avx512bf16"),
    ],
)
def test_the_cpu_is_named_by_what_it_has(flags, expected, monkeypatch):
    monkeypatch.setattr(arch, "_cpuinfo_flags", lambda: set(flags.split() if isinstance(flags, str) else flags))
    monkeypatch.setattr(arch.platform, "machine", lambda: "x86_64")
    assert arch.detect_cpu.__wrapped__() == expected


@pytest.mark.parametrize(
    "vendor, able, expected",
    [
        ("GenuineIntel", "x86-64-v4+avx512bf16", "x86-64-v4"),
        ("GenuineIntel", "x86-64-v4+avx512bf16+amxbf16", "x86-64-v4+avx512bf16+amxbf16"),
        ("AuthenticAMD", "x86-64-v4+avx512bf16", "x86-64-v4+avx512bf16"),
    ],
)
def test_dot_products_only_where_they_are_fast(vendor, able, expected, monkeypatch):
    monkeypatch.setattr(arch, "cpuinfo", {"vendor_id": vendor}.get)
    monkeypatch.setattr(arch, "_slow_dot_products", arch._slow_dot_products.__wrapped__)
    monkeypatch.setattr(arch, "detect_cpu", lambda: able)
    monkeypatch.delenv("AITER_CPU_ARCH", raising=False)
    assert arch.cpu_arch() == expected
    monkeypatch.setenv("AITER_CPU_ARCH", "x86-64-v4+avx512bf16")
    assert arch.cpu_arch() == "x86-64-v4+avx512bf16", "who asks for them gets them"


def test_the_arch_of_the_cpu_can_be_lowered_and_not_raised(monkeypatch):
    monkeypatch.setattr(arch, "detect_cpu", lambda: "x86-64-v3")
    monkeypatch.setenv("AITER_CPU_ARCH", "x86-64-v2")
    assert arch.arch_of(torch.device("cpu")) == "x86-64-v2"
    monkeypatch.setenv("AITER_CPU_ARCH", "x86-64-v4")
    with pytest.raises(SettingError, match="cannot run it; the most that it has is x86-64-v3"):
        arch.cpu_arch()


@pytest.mark.parametrize(
    "name, expected", [("gfx942:sramecc+:xnack-", "gfx942"), ("gfx90a", "gfx90a"), ("gfx1100", None)]
)
def test_amd_gpus(name, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=name))
    if expected:
        assert arch.arch_of(torch.device("cuda", 0)) == expected
    else:
        with pytest.raises(UnsupportedArchError, match=r"'gfx1100' is not supported; supported: AMD gfx90a"):
            arch.arch_of(torch.device("cuda", 0))


CAPABILITIES = {(8, 0): "sm_80", (8, 9): "sm_89", (9, 0): "sm_90a", (10, 0): "sm_100", (7, 5): None}


@pytest.mark.parametrize("capability, expected", CAPABILITIES.items())
def test_nvidia_gpus(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if expected:
        assert arch.arch_of(torch.device("cuda", 0)) == expected
    else:
        with pytest.raises(UnsupportedArchError):
            arch.arch_of(torch.device("cuda", 0))


def test_other_devices_are_refused():
    with pytest.raises(UnsupportedArchError, match="device 'meta' is not supported"):
        arch.arch_of(torch.device("meta"))
