"""Where kernels are kept on machines that are not like one's own: no home folder, any umask, volumes that belong to
others, file systems that forbid execution or renaming."""

import os
import shutil
import stat
import sys
import types
from pathlib import Path

import pytest
from tiny import left_behind, tiny_spec

from aiter import cli, jit
from aiter.errors import CacheError, CompilationDisabledError
from aiter.jit import disk, settings
from aiter.jit.cache import Cache
from aiter.jit.maintenance import clear, items, verify
from aiter.jit.recipe import recipe_for

pytestmark = pytest.mark.usefixtures("tree", "cache_dir")


def use(spec) -> int:
    """The answer of a kernel in a process that has loaded none; a right one is the spec's head_dim."""
    jit._kernels.clear()
    return jit.get_kernel(spec).workspace_raw(bytes(512))


def warnings(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


@pytest.fixture
def private(temporary) -> Path:
    return temporary / f"aiter-{os.geteuid()}"


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """The folder that the program is in, where nothing may be written."""
    folder = tmp_path / "working"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []


# What releases of platformdirs do for a user without a home, and what HOME and XDG_CACHE_HOME can make of it.
def _raises(name):
    raise RuntimeError("could not determine the home directory")


NO_HOMES = {"none": _raises, "tilde": lambda name: Path("~/.cache", name), "relative": lambda name: Path("x", name)}


@pytest.mark.parametrize("kind", NO_HOMES)
def test_a_user_without_a_home(kind, spec, entry, private, working_folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "platformdirs", types.SimpleNamespace(user_cache_path=NO_HOMES[kind]))
    monkeypatch.delenv("AITER_CACHE_DIR")
    monkeypatch.setenv("AITER_PREBUILT_DIRS", str(entry.folder.parent))
    monkeypatch.setenv("AITER_NO_COMPILE", "1")
    assert use(spec) == 64 and warnings(caplog) == []
    with pytest.raises(CompilationDisabledError, match="there is no home folder"):
        use(tiny_spec(128))
    monkeypatch.delenv("AITER_NO_COMPILE")
    assert use(tiny_spec(128)) == 128
    (warning,) = warnings(caplog)
    assert "no home folder" in warning and str(private) in warning and "Set AITER_CACHE_DIR" in warning
    assert settings.cache_dir() == private and [item.kernel for item in items(private)] == [tiny_spec(128).name]


def test_a_home_that_is_not_there(spec, private, working_folder, monkeypatch, caplog):
    for name in ("AITER_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nowhere")
    assert use(spec) == 64 and len(warnings(caplog)) == 1
    assert [item.kernel for item in items(private)] == [spec.name]


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o027, 0o077])
def test_the_umask_decides_nothing(umask, spec, tmp_path, monkeypatch, caplog):
    old = tmp_path / "there before"
    old.mkdir(mode=0o750)
    monkeypatch.setenv("AITER_CACHE_DIR", str(old / "new" / "cache"))
    before = os.umask(umask)
    try:
        assert use(spec) == 64
    finally:
        os.umask(before)
    assert use(spec) == 64 and warnings(caplog) == []
    assert stat.S_IMODE(old.stat().st_mode) == 0o750
    for path in (old / "new", *(old / "new").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path


def volume_for_all(folder):
    folder.chmod(0o777)


def volume_of_a_group(folder):
    folder.chmod(0o2775)


def volume_of_another(folder):
    if os.geteuid():
        pytest.skip("only root can give folders away")
    os.chown(folder, 12345, 0)


@pytest.mark.parametrize("volume", [volume_for_all, volume_of_a_group, volume_of_another])
@pytest.mark.parametrize("below", ["", "aiter"])
def test_nothing_is_taken_from_or_left_on_a_volume_that_others_can_write(
    volume, below, spec, entry, private, tmp_path, monkeypatch, caplog
):
    folder = tmp_path / "volume"
    folder.mkdir()
    volume(folder)
    monkeypatch.setenv("AITER_CACHE_DIR", str(folder / below))
    assert use(spec) == 64
    (warning,) = warnings(caplog)
    assert f"{folder} " in warning and "Set AITER_CACHE_DIR" in warning and f"is kept in {private}" in warning
    assert list(folder.iterdir()) == []

    if below:
        shutil.copytree(entry.folder.parent, folder / below)
        assert use(spec) == 64 and use(tiny_spec(128)) == 128
        assert len(warnings(caplog)) == 1
        assert len(items(folder / below)) == 1 and len(items(private)) == 2


def test_a_layer_that_others_can_write_is_passed_over_for_the_next(spec, entry, tmp_path, monkeypatch, caplog):
    for name in ("bad", "good"):
        shutil.copytree(entry.folder.parent, tmp_path / name)
    (tmp_path / "bad").chmod(0o777)
    monkeypatch.setenv("AITER_PREBUILT_DIRS", f"{tmp_path / 'bad'}:{tmp_path / 'good'}")
    monkeypatch.setenv("AITER_NO_COMPILE", "1")
    shutil.rmtree(entry.folder)
    assert use(spec) == 64 and use(spec) == 64
    (warning,) = warnings(caplog)
    assert f"{tmp_path / 'bad'} can be written by others" in warning and "passed over" in warning


def test_sixteen_processes_without_a_cache_compile_once(spec, private, compiler, processes, monkeypatch):
    calls = compiler('sleep 0.2; exec "$REAL" "$@"')
    monkeypatch.setenv("AITER_CACHE_DIR", "/proc/nowhere")
    assert processes(16, lambda index: use(spec)) == ["64"] * 16
    assert len(calls.read_text().split()) == 1
    assert left_behind(private) == []


@pytest.mark.parametrize("trap", ["open to all", "of another", "link", "file"])
def test_a_private_folder_that_is_not_ours(trap, spec, entry, private, temporary, tmp_path, monkeypatch, caplog):
    """Whoever may write among the temporary files may have been there first."""
    if trap == "file":
        private.write_text("")
    elif trap == "link":
        shutil.copytree(entry.folder.parent, tmp_path / "evil")
        (tmp_path / "evil").chmod(0o777)
        private.symlink_to(tmp_path / "evil")
    else:
        if trap == "of another" and os.geteuid():
            pytest.skip("only root can give folders away")
        shutil.copytree(entry.folder.parent, private)
        private.chmod(0o777) if trap == "open to all" else os.chown(private, 12345, 12345)
    monkeypatch.setenv("AITER_CACHE_DIR", "/proc/nowhere")
    assert use(spec) == 64
    (warning,) = warnings(caplog)
    assert "lasts as long as this process" in warning
    assert list(temporary.iterdir()) == [private]


def test_a_temporary_folder_where_others_can_rename(spec, temporary, compiler, monkeypatch, caplog):
    """As where /tmp is an emptyDir of Kubernetes, and the rest of the container read-only."""
    temporary.chmod(0o777)
    swapped = temporary.parent / "swapped"
    # While the compiler runs, someone puts another folder in the place of the one that it works in.
    compiler(f'for d in {temporary}/aiter-*; do mv "$d" {swapped}; mkdir "$d"; done\nexec "$REAL" "$@"')
    monkeypatch.setenv("AITER_CACHE_DIR", "/proc/nowhere")
    assert use(spec) == 64
    assert "lasts as long as this process" in warnings(caplog)[0]
    assert list(temporary.iterdir()) == [] and list(swapped.glob("tiny-*/kernel.so"))


def test_what_a_killed_process_left_among_the_temporary_files_is_cleared(spec, temporary, monkeypatch):
    temporary.chmod(0o777)
    monkeypatch.setenv("AITER_CACHE_DIR", "/proc/nowhere")
    left, young = (temporary / f"aiter-{os.geteuid()}-{name}" for name in ("left", "young"))
    for folder in (left, young):
        folder.mkdir()
    os.utime(left, (1, 1))
    assert use(spec) == 64
    assert list(temporary.iterdir()) == [young]


def test_noexec_folders_are_passed_over_and_named(spec, entry, private, mount, tmp_path, monkeypatch, caplog, capsys):
    noexec = mount("tmpfs", "noexec,mode=0755", "noexec")
    shutil.copytree(entry.folder.parent, noexec / "layer")
    monkeypatch.setenv("AITER_PREBUILT_DIRS", str(noexec / "layer"))
    assert use(spec) == 64
    (warning,) = warnings(caplog)
    assert f"{noexec / 'layer'} is on a file system that is mounted noexec" in warning and "passed over" in warning

    assert cli.main(["info"]) == 0
    assert "mounted noexec: kernels cannot be loaded from there" in capsys.readouterr().out

    monkeypatch.delenv("AITER_PREBUILT_DIRS")
    monkeypatch.setenv("AITER_CACHE_DIR", str(noexec / "cache"))
    monkeypatch.setenv("TMPDIR", str(noexec))
    monkeypatch.setattr(settings, "TEMPORARY_DIRS", (str(private.parent),))
    assert use(spec) == 64
    assert "noexec" in warnings(caplog)[1] and f"is kept in {private}" in warnings(caplog)[1]
    assert not (noexec / "cache").exists()

    monkeypatch.setattr(settings, "TEMPORARY_DIRS", ())
    with pytest.raises(CacheError, match=r"mounted noexec.*Set AITER_CACHE_DIR, or TMPDIR, to a folder"):
        use(spec)
    assert sorted(os.listdir(noexec)) == ["layer"]

    # A layer for other machines can be filled there all the same.
    monkeypatch.setenv("AITER_CACHE_DIR", str(noexec / "cache"))
    Cache().build(recipe_for(spec), "wanted")
    assert len(items(noexec / "cache")) == 1


def test_a_folder_from_which_the_system_maps_no_library(spec, entry, private, monkeypatch, caplog):
    """As rules of SELinux have it, of which statvfs says nothing."""
    real = jit.load

    def load(spec, path):
        if path.is_relative_to(entry.folder):
            raise jit.LoadError("cannot load: failed to map segment from shared object")
        return real(spec, path)

    monkeypatch.setattr(jit, "load", load)
    monkeypatch.setattr(disk, "_unmappable", set())
    assert use(spec) == 64
    assert "noexec" in warnings(caplog)[0] and len(items(private)) == 1


@pytest.fixture
def overlay(entry, mount):
    """A cache that came with an image: it lies in the lower layer of an overlay file system."""
    base = mount("tmpfs", "mode=0755", "base")
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    shutil.copytree(entry.folder.parent, base / "lower" / "cache")
    layers = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    return mount("overlay", f"{layers},redirect_dir=off", "merged") / "cache"


def test_entries_of_an_image_are_replaced_and_cleared(spec, entry, overlay, compiler, monkeypatch, caplog):
    calls = compiler()
    monkeypatch.setenv("AITER_CACHE_DIR", str(overlay))
    folder = overlay / entry.folder.name
    assert use(spec) == 64 and calls.read_text() == ""
    (folder / "kernel.so").write_bytes(b"damaged")
    assert use(spec) == 64 and use(spec) == 64
    assert len(calls.read_text().split()) == 1
    assert len(warnings(caplog)) == 1 and "set aside" in warnings(caplog)[0]
    assert (overlay / ".damaged" / folder.name / "kernel.so").read_bytes() == b"damaged"
    assert left_behind(overlay) == []
    assert [item.folder for item in clear(overlay)] == [folder]
    assert verify(overlay) == {} and left_behind(overlay) == []


def test_an_entry_of_an_image_that_is_cleared_is_at_no_time_taken_for_whole(entry, overlay, monkeypatch):
    seen = []
    real = os.rename

    def rename(source, target):
        real(source, target)
        seen.append(verify(overlay)[entry.folder.name])

    monkeypatch.setattr(os, "rename", rename)
    clear(overlay)
    assert seen == ["manifest.json is missing"] * 3


def test_a_link_to_a_folder_that_is_not_there_yet(spec, tmp_path, monkeypatch, caplog):
    (tmp_path / "link").symlink_to(tmp_path / "scratch" / "aiter")
    monkeypatch.setenv("AITER_CACHE_DIR", str(tmp_path / "link"))
    assert use(spec) == 64
    assert len(items(tmp_path / "scratch" / "aiter")) == 1 and warnings(caplog) == []


def test_a_link_that_leads_nowhere(spec, private, tmp_path, monkeypatch, caplog):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setenv("AITER_CACHE_DIR", str(tmp_path / "loop"))
    assert use(spec) == 64
    assert len(warnings(caplog)) == 1 and len(items(private)) == 1


def test_a_cache_that_only_others_fill(spec, entry, private, cache_dir, monkeypatch, caplog):
    """Read-only for this user, who is warned once and not once more for the locks."""
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(cache_dir) not in str(path) and real(path, mode))
    assert use(spec) == 64 and warnings(caplog) == []
    assert use(tiny_spec(128)) == 128
    assert len(warnings(caplog)) == 1 and f"{cache_dir} cannot be written (Permission denied)" in warnings(caplog)[0]
    assert [item.kernel for item in items(private)] == [tiny_spec(128).name]
