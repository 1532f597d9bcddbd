"""No compiler, one that fails or hangs, nowhere to write: a clear error or a way round it, and nothing left behind."""

import os
import stat
from pathlib import Path

import pytest
from tiny import ends, left_behind, tiny_spec

from aiter import jit
from aiter.errors import CacheError, CompilationError, CompilerNotFoundError, SettingError
from aiter.jit import settings

pytestmark = pytest.mark.usefixtures("tree", "cache_dir")


@pytest.fixture
def small_disk(mount, monkeypatch):
    """small_disk(bytes) is a file system of that size, holding the cache."""

    def make(size: int) -> Path:
        folder = mount("tmpfs", f"size={size},mode=0755")
        monkeypatch.setenv("AITER_CACHE_DIR", str(folder / "cache"))
        return folder

    return make


def test_no_compiler_says_where_it_looked(spec, cache_dir, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "ccache g++")
    with pytest.raises(CompilerNotFoundError) as error:
        jit.get_kernel(spec)
    for place in ("ccache g++ (CXX)", "g++ (PATH)", "clang++ (PATH)", "AITER_CXX", "aiter prewarm"):
        assert place in str(error.value)
    assert not cache_dir.exists()


def test_a_compiler_that_is_named_and_not_there(spec, monkeypatch):
    monkeypatch.setenv("AITER_CXX", "/nowhere/g++")
    with pytest.raises(CompilerNotFoundError, match=r"/nowhere/g\+\+ \(AITER_CXX\)"):
        jit.get_kernel(spec)


def test_a_failing_compiler_is_quoted_and_its_log_kept_until_it_succeeds(spec, tree, cache_dir):
    good = (tree / "cpu" / "tiny.cpp").read_text()
    (tree / "cpu" / "tiny.cpp").write_text(good + "#error this is wrong\n")
    with pytest.raises(CompilationError) as error:
        jit.get_kernel(spec)
    assert "#error this is wrong" in str(error.value) and "#error this is wrong" in error.value.output
    assert "-DAITER_HEAD_DIM=64" in error.value.command
    assert "this is wrong" in Path(error.value.log).read_text()
    assert not list(cache_dir.glob("tiny*"))
    assert left_behind(cache_dir) == []


def test_a_failed_log_goes_when_the_build_succeeds(spec, cache_dir, compiler):
    calls = compiler(f'[ -e {cache_dir.parent}/mended ] || exit 3\nexec "$REAL" "$@"')
    with pytest.raises(CompilationError, match="ended with status 3") as error:
        jit.get_kernel(spec)
    assert Path(error.value.log).exists()
    (cache_dir.parent / "mended").touch()
    jit.get_kernel(spec)
    assert len(calls.read_text().split()) == 2
    assert not Path(error.value.log).exists()


def test_an_include_that_the_key_does_not_cover_is_not_found(spec, tree):
    (tree / "cpu" / "secret.h").write_text("int secret;\n")
    (tree / "cpu" / "tiny.cpp").write_text('#define FILE "secret.h"\n#include FILE\n')
    with pytest.raises(CompilationError, match=r"secret\.h: No such file"):
        jit.get_kernel(spec)


def test_a_hanging_compiler_is_stopped_with_its_children(spec, cache_dir, compiler, monkeypatch):
    calls = compiler("sleep 1000 & sleep 1000")
    monkeypatch.setenv("AITER_COMPILE_TIMEOUT", "0.3")
    with pytest.raises(CompilationError, match=r"took longer than AITER_COMPILE_TIMEOUT=0\.3 s"):
        jit.get_kernel(spec)
    assert all(ends(int(group)) for group in calls.read_text().split())
    assert left_behind(cache_dir) == []


def test_a_compiler_that_makes_nothing_and_one_that_cannot_run(spec, compiler, monkeypatch, tmp_path):
    compiler("exit 0")
    with pytest.raises(CompilationError, match=r"made no kernel\.so"):
        jit.get_kernel(spec)
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "empty").chmod(0o755)
    monkeypatch.setenv("AITER_CXX", str(tmp_path / "empty"))
    with pytest.raises(CompilationError, match=r"cannot run .*empty"):
        jit.get_kernel(spec)


def test_a_cache_that_cannot_be_written_is_warned_of_once_and_done_without(
    spec, cache_dir, temporary, compiler, monkeypatch, caplog
):
    cache_dir.parent.joinpath("file").write_text("")
    monkeypatch.setenv("AITER_CACHE_DIR", str(cache_dir.parent / "file" / "cache"))
    calls = compiler()
    assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64
    assert jit.get_kernel(tiny_spec(128)).workspace_raw(bytes(512)) == 128
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    private = temporary / f"aiter-{os.geteuid()}"
    for words in ("file/cache cannot be written (Not a directory)", f"is kept in {private}", "Set AITER_CACHE_DIR"):
        assert words in warning
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert left_behind(private) == [] and list(temporary.iterdir()) == [private]
    jit._kernels.clear()
    jit.get_kernel(spec)
    assert len(calls.read_text().split()) == 2, "another process builds none of them anew"


def test_a_failure_without_a_cache_keeps_its_log_where_the_kernel_would_have_been(spec, tree, temporary, monkeypatch):
    monkeypatch.setenv("AITER_CACHE_DIR", "/proc/nowhere")
    (tree / "cpu" / "tiny.cpp").write_text("#error this is wrong\n")
    with pytest.raises(CompilationError, match="this is wrong") as error:
        jit.get_kernel(spec)
    assert Path(error.value.log).is_relative_to(temporary) and Path(error.value.log).exists()


@pytest.mark.parametrize("room", [0, 8192, 24576])
def test_a_full_disk_is_warned_of_and_done_without(room, spec, small_disk, temporary, caplog):
    disk = small_disk(1 << 20)
    _fill(disk, room)
    assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64
    assert "No space left on device" in caplog.text
    assert list(temporary.iterdir()) == [temporary / f"aiter-{os.geteuid()}"]
    assert not list(disk.glob("cache/tiny*")) and left_behind(disk / "cache") == []
    (disk / "filler").unlink()
    jit._kernels.clear()
    jit.get_kernel(spec)
    assert len(list(disk.glob("cache/tiny*"))) == 1


def _fill(disk: Path, room: int) -> None:
    status = os.statvfs(disk)
    with open(disk / "filler", "wb") as filler:
        filler.write(bytes(max(0, status.f_bavail * status.f_frsize - room)))


def test_nowhere_to_write_at_all(spec, small_disk, monkeypatch):
    disk = small_disk(1 << 20)
    _fill(disk, 0)
    monkeypatch.setenv("TMPDIR", str(disk))
    with pytest.raises(CacheError, match="Set AITER_CACHE_DIR, or TMPDIR"):
        jit.get_kernel(spec)
    assert not [path for path in disk.rglob("*") if path.is_file() and path.name not in ("filler", "CACHEDIR.TAG")]


@pytest.mark.parametrize(
    "name, value",
    [
        ("AITER_COMPILE_TIMEOUT", "soon"),
        ("AITER_COMPILE_TIMEOUT", "0"),
        ("AITER_COMPILE_TIMEOUT", "nan"),
        ("AITER_NO_COMPILE", "perhaps"),
        ("AITER_CACHE_DIR", "relative/path"),
        ("AITER_PREBUILT_DIRS", "/fine:relative"),
        ("AITER_CPU_ARCH", "x86-64-v9"),
    ],
)
def test_settings_that_make_no_sense_are_named_with_what_would(name, value, monkeypatch):
    from aiter.jit.arch import cpu_arch

    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=f"{name}=.*expected"):
        cpu_arch()
        settings.compile_timeout()
        settings.flag("AITER_NO_COMPILE")
        settings.cache_dir()
        settings.prebuilt_dirs()


def test_every_variable_that_the_package_reads_is_in_the_list():
    import re

    package = Path(settings.__file__).parent.parent
    read = set()
    for path in package.rglob("*.py"):
        read |= set(re.findall(r"\"(AITER_[A-Z_]+)\"", path.read_text()))
    macros = {name for name in read if name.startswith(("AITER_HEAD_DIM", "AITER_CAUSAL", "AITER_DTYPE"))}
    assert read - macros <= set(settings.VARIABLES)


def test_nothing_from_the_environment_or_a_path_reaches_a_shell(spec, tmp_path, monkeypatch):
    folder = tmp_path / "a cache; touch $(echo pwned) `touch pwned` &"
    monkeypatch.setenv("AITER_CACHE_DIR", str(folder))
    monkeypatch.setenv("CXX", "g++; touch pwned")
    monkeypatch.chdir(tmp_path)
    jit.get_kernel(spec)
    assert len(list(folder.glob("tiny*"))) == 1
    assert not (tmp_path / "pwned").exists()
