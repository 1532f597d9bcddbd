"""Loading: the launch ABI is checked, launches report errors, and kernels for AMD find the HIP runtime."""

import re
import subprocess
import sys

import pytest
from tiny import tiny_spec

from aiter import abi, jit
from aiter.errors import LaunchError, LoadError
from aiter.jit.record import read_record

pytestmark = pytest.mark.usefixtures("tree", "cache_dir")


def test_launch_workspace_and_error_text(spec):
    kernel = jit.get_kernel(spec)
    call = abi.AttentionCall()
    assert kernel.launch_raw(bytes(call), 0) == 0
    kernel.check(0)
    call.problem.batch = 7
    assert kernel.workspace_raw(bytes(call)) == 64 + 7
    with pytest.raises(LaunchError, match=rf"{spec.name[:12]}.*: seven \(code 7\)") as error:
        kernel.check(kernel.launch_raw(bytes(call), 0))
    assert error.value.code == 7


@pytest.mark.parametrize("field", ["abi_version", "call_bytes"])
def test_another_abi_is_refused(field, spec, tree):
    source = tree / "cpu" / "tiny.cpp"
    source.write_text(source.read_text().replace("}; }", f"}}; d->{field} += 1; }}", 1))
    with pytest.raises(LoadError, match="another launch ABI"):
        jit.get_kernel(spec)


def test_a_library_without_the_functions_is_refused(spec, tree):
    (tree / "cpu" / "tiny.cpp").write_text("int x;\n")
    with pytest.raises(LoadError, match="aiter_describe"):
        jit.get_kernel(spec)


def test_hip_kernels_need_a_hip_runtime_in_the_process():
    """In a process of its own: another test's emulator may have brought one into this."""
    script = "from aiter.jit import loader; loader.share_hip_runtime()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and re.search(r"LoadError: .*no libamdhip64\.so is loaded", done.stderr), done


def test_the_hip_runtime_in_the_process_is_shared(tmp_path):
    """A library with undefined hip symbols loads once the runtime, loaded privately as by PyTorch, is made global."""
    (tmp_path / "runtime.c").write_text("int hipLaunchKernel(void) { return 42; }\n")
    (tmp_path / "user.c").write_text("int hipLaunchKernel(void);\nint use(void) { return hipLaunchKernel(); }\n")
    for name, library in (("runtime", "libamdhip64.so.6"), ("user", "user.so")):
        subprocess.run(["cc", "-shared", "-fPIC", f"{name}.c", "-o", library], cwd=tmp_path, check=True)
    script = f"""
import ctypes
from aiter.jit import loader
ctypes.CDLL("{tmp_path}/libamdhip64.so.6")
try:
    ctypes.CDLL("{tmp_path}/user.so", mode=2)
    raise SystemExit("loaded too early")
except OSError:
    pass
loader.share_hip_runtime()
print(ctypes.CDLL("{tmp_path}/user.so", mode=2).use())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("42\n", "")


RUNTIMES = {
    "extension, then PyTorch": ('use("opt"); use("torch")', "1"),
    "PyTorch, then extension": ('use("torch"); use("opt")', "1"),
    "PyTorch alone": ('use("torch")', "1"),
    "libtorch linked with the system's": ('use("opt"); use("own"); use("linked")', "2"),
    "two, and PyTorch is not there": ('use("opt"); use("own")', "several HIP runtimes"),
    "another one visible to all": ('use("opt", ctypes.RTLD_GLOBAL); use("torch")', "several HIP runtimes"),
    "a profiler before all": ('use("profiler", ctypes.RTLD_GLOBAL); use("torch")', "9"),
}


@pytest.fixture(scope="module")
def runtimes(tmp_path_factory):
    """Stand-ins for HIP runtimes, each of which answers with its number, and for what is linked with them."""
    folder = tmp_path_factory.mktemp("runtimes")
    libraries = {
        "torch/lib/libamdhip64.so": ("int hipLaunchKernel(void) { return 1; }", "-Wl,-soname,libamdhip64.so"),
        "opt/libamdhip64.so.6": ("int hipLaunchKernel(void) { return 2; }", "-Wl,-soname,libamdhip64.so.6"),
        "own/libamdhip64.so.7": ("int hipLaunchKernel(void) { return 3; }", "-Wl,-soname,libamdhip64.so.7"),
        "profiler/libprofiler.so": ("int hipLaunchKernel(void) { return 9; }",),
        "linked/libc10_hip.so": ("int c10;", "-Wl,--no-as-needed", "-x", "none", str(folder / "opt/libamdhip64.so.6")),
        "kernel.so": ("int hipLaunchKernel(void); int launch(void) { return hipLaunchKernel(); }",),
    }
    for name, (source, *options) in libraries.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name), *options]
        subprocess.run(command, input=source.encode(), check=True)
    return folder


@pytest.mark.parametrize("loaded, expected", RUNTIMES.values(), ids=RUNTIMES)
def test_of_several_hip_runtimes_kernels_use_that_of_pytorch(loaded, expected, runtimes):
    script = f"""
import ctypes, glob, os
from aiter.errors import LoadError
from aiter.jit import loader
def use(name, mode=0):
    for path in glob.glob(f"{runtimes}/{{name}}/**/*.so*", recursive=True):
        ctypes.CDLL(path, mode)
{loaded}
try:
    loader.share_hip_runtime()
    print(ctypes.CDLL("{runtimes}/kernel.so").launch(), flush=True)
except LoadError as error:
    print(error, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert expected in done.stdout and done.stderr == "", done


def test_each_spec_is_recorded_once_per_process(spec, tmp_path, monkeypatch, processes):
    monkeypatch.setenv("AITER_RECORD", str(tmp_path / "record"))

    def use(index):
        jit.get_kernel(spec)
        jit.get_kernel(spec)
        jit.get_kernel(tiny_spec(128))
        return "used"

    assert processes(8, use) == ["used"] * 8
    lines = (tmp_path / "record").read_text().splitlines()
    assert len(lines) == 16 and len(set(lines)) == 2
    assert set(read_record(tmp_path / "record")) == {spec, tiny_spec(128)}


def test_a_bad_record_is_refused_with_its_line(tmp_path, spec):
    path = tmp_path / "record"
    path.write_text("\n" + '{"kernel": "tiny; rm"}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_record(path)


def test_a_record_that_cannot_be_written_is_a_warning(spec, monkeypatch, caplog):
    monkeypatch.setenv("AITER_RECORD", "/proc/nowhere/record")
    jit.get_kernel(spec)
    assert "AITER_RECORD=/proc/nowhere/record cannot be written" in caplog.text
