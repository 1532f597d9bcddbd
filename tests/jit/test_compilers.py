"""Compilers that are too old, broken, or behind a wrapper; and what of the environment reaches them."""

import os
import shutil
from pathlib import Path

import pytest
from test_toolchains import program

from aiter import jit
from aiter.errors import CompilationError, CompilerNotFoundError
from aiter.jit import compiler as compilers
from aiter.jit import process, toolchain
from aiter.jit.cache import Cache
from aiter.jit.recipe import recipe_for
from aiter.jit.spec import Spec
from aiter.jit.toolchain import CPP, HIP, NVCC

pytestmark = pytest.mark.usefixtures("tree", "cache_dir")

GXX = shutil.which("g++")
GCC = "{name} (GCC) {release}\nCopyright (C) 2022 Free Software Foundation, Inc."


def fake(path: Path, says: str, otherwise: str = f'exec {GXX} "$@"') -> str:
    """A compiler that says this of its version, and is g++ otherwise."""
    return program(path, f'#!/bin/sh\ncase "$*" in --version) cat <<END\n{says}\nEND\nexit;; esac\n{otherwise}\n')


def gcc(path: Path, release: str) -> str:
    return fake(path, GCC.format(name=path.name, release=release))


@pytest.fixture
def bin(tmp_path, monkeypatch) -> Path:
    """A folder that is all of PATH, but for the system's tools."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("cat", "as", "ld"):
        (folder / tool).symlink_to(shutil.which(tool))
    monkeypatch.setenv("PATH", str(folder))
    toolchain._say_once.cache_clear()
    return folder


@pytest.fixture
def no_processes(monkeypatch):
    """no_processes() forbids to start any from now on."""
    return lambda: monkeypatch.setattr("subprocess.Popen", None)


def again(spec):
    """The kernel as a new process finds it."""
    jit._kernels.clear()
    return jit.get_kernel(spec)


def entries(cache_dir) -> list[Path]:
    return sorted(cache_dir.glob("tiny*"))


@pytest.mark.parametrize(
    "words, expected",
    [
        ("g++ (Debian 12.2.0-14) 12.2.0\nCopyright (C) 2022 Free Software Foundation, Inc.", ("gcc", "12.2.0")),
        ("g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-22)\nCopyright (C) 2018 Free Software Foundation", ("gcc", "8.5.0")),
        (
            "x86_64-conda-linux-gnu-c++ (conda-forge gcc 13.3.0-2) 13.3.0\nCopyright (C) Free Software Foundation",
            ("gcc", "13.3.0"),
        ),
        ("Debian clang version 14.0.6\nTarget: x86_64-pc-linux-gnu", ("clang", "14.0.6")),
        ("HIP version: 6.2.4\nAMD clang version 18.0.0git (https://github.com/x y)", ("clang", "18.0.0git")),
        ("Cuda compilation tools, release 12.4, V12.4.131\nDebian clang version 14.0.6", ("nvcc", "12.4")),
        ("slow 1.0", ("", "")),
    ],
)
def test_compilers_are_known_by_their_words(words, expected):
    assert compilers.family(words) == expected


def test_one_that_is_too_old_is_passed_over_once_and_for_all(spec, bin, cache_dir, caplog, no_processes):
    caplog.set_level("INFO")
    gcc(bin / "g++", "9.4.0")
    fake(bin / "clang++", "Ubuntu clang version 13.0.1")
    program(bin / "c++", "#!/bin/sh\nexit 1\n")
    gcc(bin / "g++-10", "10.5.0")
    newest = gcc(bin / "g++-12", "12.3.0")
    jit.get_kernel(spec)
    passed_over = [record.getMessage() for record in caplog.records if "assed over" in record.getMessage()]
    assert len(passed_over) == 1 and passed_over[0].startswith(f"building with {newest}. Passed over: g++ (PATH)")
    for words in ("gcc 9.4.0, which is too old: g++ 11, clang++ 14 or newer", "clang 13.0.1", "c++ fails when asked"):
        assert words in passed_over[0]
    (entry,) = entries(cache_dir)
    assert "g++-12 (GCC) 12.3.0" in (entry / "manifest.json").read_text()
    no_processes()
    again(spec)
    assert entries(cache_dir) == [entry]


def test_when_all_are_too_old_the_error_says_what_is_needed(spec, bin, monkeypatch):
    gcc(bin / "g++", "9.4.0")
    with pytest.raises(CompilerNotFoundError, match=r"gcc 9\.4\.0, which is too old: g\+\+ 11, clang\+\+ 14 or newer"):
        jit.get_kernel(spec)
    gcc(bin / "g++-12", "12.3.0")
    monkeypatch.setenv("AITER_CXX", str(bin / "g++"))  # a wish is not quietly overruled
    with pytest.raises(CompilerNotFoundError, match=r"g\+\+ \(AITER_CXX\): .*gcc 9\.4\.0, which is too old"):
        jit.get_kernel(spec)


def test_compilers_with_no_name_but_one_with_a_version_are_found(bin):
    for release in ("9", "13", "12"):
        gcc(bin / f"g++-{release}", f"{release}.1.0")
    fake(bin / "clang++-19", "clang version 19.1.0")
    assert CPP.find().path == str(bin / "g++-13")


@pytest.mark.parametrize("wish", ["", "ccache g++", "distcc g++"])
def test_launchers_are_looked_through(wish, spec, bin, tmp_path, cache_dir, monkeypatch, caplog, no_processes):
    """ccache's file says nothing of the compiler behind it, and takes dozens of settings from the environment."""
    caplog.set_level("INFO")
    launcher = program(tmp_path / "usr" / (wish.split() or ["ccache"])[0], "#!/bin/sh\nexit 9\n")
    links = tmp_path / "links"
    links.mkdir()
    (links / "g++").symlink_to(launcher)
    monkeypatch.setenv("PATH", f"{links}:{launcher.rpartition('/')[0]}:{bin}")
    monkeypatch.setenv("AITER_CXX", wish)
    assert CPP.find() is None
    gcc(bin / "g++", "12.1.0")
    jit.get_kernel(spec)
    assert CPP.find().path == str(bin / "g++")
    gcc(bin / "g++", "13.12.0")
    again(spec)
    assert "the compiler changed from g++ (GCC) 12.1.0 to g++ (GCC) 13.12.0" in caplog.text


def test_ccaches_own_choice_of_a_compiler(bin, tmp_path, monkeypatch):
    launcher = program(tmp_path / "ccache")
    (bin / "g++").symlink_to(launcher)
    monkeypatch.setenv("CCACHE_PATH", str(tmp_path / "other"))
    first = gcc(tmp_path / "other" / "g++", "12.1.0")
    assert CPP.find().path == first
    second = gcc(tmp_path / "other" / "g++-13", "13.1.0")
    monkeypatch.setenv("CCACHE_COMPILER", "g++-13")
    assert CPP.find().path == second
    monkeypatch.setenv("CCACHE_COMPILER", str(bin / "g++"))  # itself: no endless search
    assert CPP.find() is None


def test_a_compiler_behind_a_script_changes(spec, bin, tmp_path, cache_dir, caplog, monkeypatch, no_processes):
    caplog.set_level("INFO")
    real = gcc(tmp_path / "real" / "c++", "12.1.0")
    middle = program(tmp_path / "middle" / "g++", f'#!/bin/sh\nFLAGS=-O3\nexec "{real}" "$@"\n')
    program(bin / "g++", f'#!/bin/sh\nexec {middle} "$@"\n')
    jit.get_kernel(spec)
    gcc(tmp_path / "real" / "c++", "13.12.0")
    again(spec)
    assert "the compiler changed from c++ (GCC) 12.1.0 to c++ (GCC) 13.12.0" in caplog.text
    no_processes()
    again(spec)


def test_the_clang_behind_hipcc_changes(tree, bin, tmp_path, monkeypatch):
    (tree / "gpu").mkdir()
    (tree / "gpu" / "tiny.hip").write_text((tree / "cpu" / "tiny.cpp").read_text())
    clang = program(tmp_path / "clang", f'#!/bin/sh\nexec {GXX} "$@"\n')
    compiled = (
        f'case "$*" in --print*) echo {clang}; exit;; esac\n'
        f"exec {GXX} -fPIC -x c++ -Iinclude -DAITER_HEAD_DIM=64 -c gpu/tiny.hip -o kernel.o"
    )
    monkeypatch.setenv("AITER_HIPCC", fake(tmp_path / "hipcc", "HIP version: 7", compiled))
    recipe = recipe_for(Spec("tiny", "bf16", 64, True, "gfx942"))
    with Cache().obtain(recipe) as entry:
        recorded = entry.manifest["compiler"]
    assert HIP.find().wrote(recorded)
    Path(clang).write_text("#!/bin/sh\n")
    assert not HIP.find().wrote(recorded)


def test_the_host_compiler_of_nvcc(bin, monkeypatch):
    fake(bin / "nvcc", "Cuda compilation tools, release 12.4, V12.4.131")
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    spec = Spec("tiny", "fp16", 64, False, "sm_90a")
    assert NVCC.find().stamp.keys() == {"name", "bytes", "modified"}
    gcc(bin / "g++", "12.1.0")
    first = NVCC.find()
    assert first.version().endswith("12.1.0\nCopyright (C) 2022 Free Software Foundation, Inc.")
    assert not any("ccbin" in word for word in NVCC.commands(spec, "gpu/tiny.hip", first)[0])
    other = gcc(bin / "other" / "g++", "11.12.0")
    for wish in (other, str(bin / "other")):  # NVCC_CCBIN names a program or its folder
        monkeypatch.setenv("NVCC_CCBIN", wish)
        assert NVCC.find().stamp != first.stamp
        assert f"-ccbin={other}" in NVCC.commands(spec, "gpu/tiny.hip", first)[0]


def test_programs_without_times_are_told_apart_by_their_paths(tmp_path):
    """Nix and Guix set all times to 0 or 1."""
    stamps = []
    for name in ("1", "2"):
        path = gcc(tmp_path / name / "g++", "12.1.0")
        os.utime(path, (1, 1))
        stamps.append(compilers.stamp(path))
    assert stamps[0] != stamps[1]


HIDDEN = """
CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH OBJC_INCLUDE_PATH LIBRARY_PATH LD_RUN_PATH COMPILER_PATH GCC_EXEC_PREFIX
DEPENDENCIES_OUTPUT SUNPRO_DEPENDENCIES GCC_COMPARE_DEBUG SOURCE_DATE_EPOCH CCC_OVERRIDE_OPTIONS CL CFLAGS CXXFLAGS
LDFLAGS HIPCC_COMPILE_FLAGS_APPEND HIPCC_LINK_FLAGS_APPEND HIP_DEVICE_LIB_PATH HIPCC_VERBOSE NVCC_APPEND_FLAGS
NVCC_PREPEND_FLAGS NVCC_CCBIN NIX_CFLAGS_COMPILE NIX_LDFLAGS LD_PRELOAD LANG LANGUAGE MAKEFLAGS TMP TEMP CCACHE_DIR
CCACHE_PREFIX
"""
OURS = {"PATH", "LC_ALL", "TMPDIR", "HIP_PLATFORM"}
THE_SHELLS = {"PWD", "OLDPWD", "SHLVL", "_"}


def test_compilers_see_what_they_need_of_the_environment(spec, compiler, cache_dir, tmp_path, monkeypatch):
    for name in HIDDEN.split():
        monkeypatch.setenv(name, "" if name == "LD_PRELOAD" else str(tmp_path / "evil"))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/lib/of/modules")
    compiler(f'env > {tmp_path}/environment\nexec "$REAL" "$@"')
    jit.get_kernel(spec)
    seen = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines())
    assert not seen.keys() & set(HIDDEN.split())
    assert seen.keys() <= {*process.PASSED_ON, *OURS, *THE_SHELLS}
    assert seen["LC_ALL"] == "C" and seen["LD_LIBRARY_PATH"] == "/lib/of/modules"
    assert Path(seen["TMPDIR"]).is_relative_to(cache_dir) and seen["PATH"] == os.environ["PATH"]
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("path", [None, ""])
def test_without_path_the_linker_is_found_where_the_compiler_was(path, spec, monkeypatch):
    monkeypatch.delenv("PATH")
    if path is not None:
        monkeypatch.setenv("PATH", path)
    if not CPP.find():
        pytest.skip("no compiler in the system's own folders")
    assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64


def test_compilers_for_gpus_do_not_build_for_cpus_unless_asked(bin, monkeypatch):
    program(bin / "hipcc")
    gcc(bin / "g++", "12.1.0")
    for name in ("hipcc", str(bin / "hipcc"), "nvcc"):
        monkeypatch.setenv("CXX", name)
        assert CPP.find().path == str(bin / "g++")


def test_a_library_that_a_compiler_brings_along_is_not_linked(spec, tree, compiler, tmp_path):
    """As hipcc does with libamdhip64, and mpicxx with libmpi."""
    compiler(
        f'echo "int unneeded;" | "$REAL" -shared -fPIC -x c++ - -o {tmp_path}/libunneeded.so\n'
        f'exec "$REAL" -Wl,--no-as-needed "$@" {tmp_path}/libunneeded.so'
    )
    with Cache().obtain(recipe_for(spec)) as entry:
        assert b"libunneeded" not in entry.library.read_bytes()


@pytest.mark.parametrize(
    "words, hint",
    [
        ("nvcc fatal   : Unsupported gpu architecture 'compute_120'", "sm_120 CUDA 12.8"),
        ("clang: error: invalid target ID 'gfx950'", "gfx950 ROCm 7"),
        ("g++: fatal error: Killed signal terminated program cc1plus", "aiter prewarm --jobs"),
        ("error: so it is", None),
    ],
)
def test_errors_say_what_to_do_where_the_words_tell(words, hint, spec, compiler):
    compiler(f'echo "{words}" >&2; exit 1')
    with pytest.raises(CompilationError) as error:
        jit.get_kernel(spec)
    assert ("it seems" in str(error.value)) == (hint is not None) and (hint or "") in str(error.value)


def test_words_and_paths_in_any_encoding(spec, tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    path = Path(os.fsdecode(folder + b"/g++"))
    program(path, "#!/bin/sh\nprintf 'erreur : caf\\351 na\\303\\257ve\\n' >&2; exit 1\n")
    monkeypatch.setenv("AITER_CXX", str(path))
    with pytest.raises(CompilationError, match=r"erreur : caf\\xe9 naïve") as error:
        jit.get_kernel(spec)
    assert "caf\\xe9 na\u00efve" in Path(error.value.log).read_text(encoding="utf-8")
    path.write_text(f'#!/bin/sh\nexec {GXX} "$@"\n')
    jit.get_kernel(spec)
