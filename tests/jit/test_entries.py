"""Entries on disk: built once, found again, and never loaded when they are not what they should be."""

import json
import logging
import os
import shutil
import time
from pathlib import Path

import pytest
from tiny import left_behind, tiny_spec

from aiter import jit
from aiter.errors import CompilationDisabledError
from aiter.jit.archive import export_entries, import_entries
from aiter.jit.cache import Cache
from aiter.jit.entry import FILES, MANIFEST
from aiter.jit.maintenance import verify
from aiter.jit.recipe import recipe_for

pytestmark = pytest.mark.usefixtures("tree", "cache_dir")


def use(spec):
    """What a program does that uses a kernel for the first time."""
    jit._kernels.clear()
    return jit.get_kernel(spec)


def test_built_once_and_found_again(spec, cache_dir, compiler, caplog):
    calls = compiler()
    caplog.set_level(logging.INFO, "aiter")
    first = use(spec)
    assert jit.get_kernel(spec) is first
    assert caplog.records[0].message.startswith(f"compiled {spec.name} with c++ in ")
    assert "(first use)" in caplog.text
    caplog.clear()
    use(spec)
    assert caplog.records == []
    assert len(calls.read_text().split()) == 1
    assert left_behind(cache_dir) == []


def test_an_entry_tells_all_about_itself(entry, spec):
    manifest = json.loads((entry.folder / MANIFEST).read_text())
    assert manifest["spec"] == spec.to_json()
    assert entry.folder.name == f"{spec.name}-{manifest['key']}"
    assert set(manifest["files"]) == set(FILES)
    assert "AITER_HEAD_DIM=64" in " ".join(manifest["commands"][0])
    assert manifest["compiler"]["version"]
    assert sorted(os.listdir(entry.folder)) == sorted([*FILES, MANIFEST])


def test_no_path_of_this_machine_is_in_the_library(entry, tree, cache_dir):
    content = entry.library.read_bytes()
    assert str(tree).encode() not in content
    assert str(cache_dir).encode() not in content


def test_a_warm_start_runs_no_program(spec, compiler, monkeypatch):
    compiler()
    use(spec)

    def refuse(*arguments, **options):
        raise AssertionError(f"a warm start ran {arguments}")

    monkeypatch.setattr("subprocess.Popen", refuse)
    use(spec)


def test_a_changed_source_is_built_and_the_old_entry_kept(spec, tree, cache_dir):
    problem_free = use(spec)
    (tree / "include" / "answer.h").write_text("#define ANSWER 2\n")
    changed = use(spec)
    assert (problem_free.workspace_raw(bytes(512)), changed.workspace_raw(bytes(512))) == (64, 128)
    assert len(list(cache_dir.glob("tiny-*"))) == 2


def test_a_touched_source_is_not_built_again(spec, tree, compiler):
    calls = compiler()
    use(spec)
    for path in tree.rglob("*"):
        os.utime(path)
    use(spec)
    assert len(calls.read_text().split()) == 1


def damage_truncate(folder, file):
    with open(folder / file, "r+b") as stream:
        stream.truncate(os.path.getsize(folder / file) // 2)


def damage_empty(folder, file):
    (folder / file).write_bytes(b"")


def damage_flip(folder, file):
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 4
    (folder / file).write_bytes(content)


def damage_append(folder, file):
    with open(folder / file, "ab") as stream:
        stream.write(b"\n")


def damage_remove(folder, file):
    (folder / file).unlink()


def damage_folder(folder, file):
    (folder / file).unlink()
    (folder / file).mkdir()


def damage_swap(folder, file):
    use(tiny_spec(128))
    other = next(path for path in folder.parent.glob("tiny-fp32-d128-*"))
    shutil.copy(other / file, folder / file)


DAMAGES = [damage_truncate, damage_empty, damage_flip, damage_append, damage_remove, damage_folder, damage_swap]


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_entry_is_set_aside_reported_and_rebuilt(damage, file, entry, spec, cache_dir, compiler, caplog):
    shutil.copytree(entry.folder, cache_dir / "before")
    damage(entry.folder, file)
    calls = compiler()
    os.environ.pop("AITER_CXX")  # count nothing but what the rebuild itself runs
    kernel = use(spec)
    assert kernel.workspace_raw(bytes(512)) == 64
    assert calls.read_text() == ""
    assert "is damaged" in caplog.text and "set aside" in caplog.text
    assert file in caplog.text or damage is damage_swap
    assert (cache_dir / ".damaged" / entry.folder.name).is_dir()
    assert (entry.folder / "kernel.so").read_bytes() == (cache_dir / "before" / "kernel.so").read_bytes()
    assert left_behind(cache_dir) == []


def test_whole_entries_swapped_are_noticed(entry, spec, cache_dir, caplog):
    use(tiny_spec(128))
    other = next(cache_dir.glob("tiny-fp32-d128-*"))
    entry.folder.rename(cache_dir / "x")
    other.rename(entry.folder)
    (cache_dir / "x").rename(other)
    assert use(spec).workspace_raw(bytes(512)) == 64
    assert use(tiny_spec(128)).workspace_raw(bytes(512)) == 128
    assert caplog.text.count("set aside") == 2 and "under another name" in caplog.text


def test_an_entry_that_is_a_file_or_an_empty_folder(entry, spec):
    shutil.rmtree(entry.folder)
    entry.folder.write_text("not a folder")
    assert use(spec)
    shutil.rmtree(entry.folder)
    entry.folder.mkdir()
    assert use(spec)


def change_version(calls, version):
    """Makes the compiler that counts in `calls` say that it is of another version."""
    path = calls.parent / "c++"
    path.write_text(path.read_text().replace('exec "$REAL" --version', f"echo {version}; exit"))


def test_another_compiler_builds_anew_and_none_takes_what_is_there(entry, spec, compiler, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "aiter")
    calls = compiler()  # another file, but it says that it is the same version
    use(spec)
    assert calls.read_text() == ""
    change_version(calls, "newer 99.1")
    monkeypatch.setenv("AITER_NO_COMPILE", "1")
    use(spec)
    monkeypatch.delenv("AITER_NO_COMPILE")
    use(spec)
    assert len(calls.read_text().split()) == 1
    assert "the compiler changed from " in caplog.text and "newer 99.1" in caplog.text
    monkeypatch.setenv("AITER_CXX", "/nowhere/c++")
    use(spec)


def test_machines_with_two_compilers_share_a_cache_without_building_anew_for_ever(
    entry, spec, cache_dir, compiler, monkeypatch, tmp_path
):
    calls = compiler()
    change_version(calls, "newer 99.1")
    newer, older = os.environ["AITER_CXX"], shutil.which("g++")
    for path in (newer, older, newer, older):
        monkeypatch.setenv("AITER_CXX", path)
        use(spec)
    assert len(calls.read_text().split()) == 1
    first, second = sorted(path.name for path in cache_dir.glob("tiny-*"))
    assert first == entry.folder.name and second.startswith(first + ".")
    assert verify(cache_dir) == {first: "", second: ""}

    # Either will do where nothing is built: without a compiler, in a prebuilt layer, on another machine.
    shutil.rmtree(entry.folder)
    monkeypatch.setenv("AITER_CXX", "/nowhere/c++")
    assert use(spec).workspace_raw(bytes(512)) == 64
    export_entries(cache_dir, [second], tmp_path / "kernels.tar")
    assert import_entries(tmp_path / "layer", tmp_path / "kernels.tar") == ([second], [])
    monkeypatch.setenv("AITER_PREBUILT_DIRS", str(tmp_path / "layer"))
    monkeypatch.setenv("AITER_CACHE_DIR", str(tmp_path / "empty"))
    assert use(spec).workspace_raw(bytes(512)) == 64

    # A name is no proof of who built an entry.
    (cache_dir / second).rename(cache_dir / f"{first}.00000000")
    assert "under another name" in verify(cache_dir)[f"{first}.00000000"]


def test_a_damaged_entry_of_another_compiler_costs_nobody_a_sound_one(entry, spec, cache_dir, compiler, monkeypatch):
    calls = compiler()
    change_version(calls, "newer 99.1")
    use(spec)
    entry.library.write_bytes(b"damaged")
    use(spec)
    assert len(calls.read_text().split()) == 1
    monkeypatch.delenv("AITER_CXX")
    use(spec)
    assert sorted(verify(cache_dir).values()) == ["", ""]


def test_a_sound_entry_is_used_where_another_compiler_cannot_build_it(entry, spec, compiler, caplog):
    change_version(compiler("echo cannot; exit 1"), "older 4.2")
    assert use(spec).workspace_raw(bytes(512)) == 64
    assert "older 4.2" in caplog.text and "using the one there" in caplog.text and "cannot" in caplog.text


def test_prebuilt_layers_come_first_and_are_used_as_they_are(
    entry, spec, tmp_path, cache_dir, compiler, monkeypatch, caplog
):
    shutil.copytree(cache_dir, tmp_path / "layer")
    monkeypatch.setenv("AITER_PREBUILT_DIRS", f"{tmp_path / 'missing'}:{tmp_path / 'layer'}")
    monkeypatch.setenv("AITER_CACHE_DIR", str(tmp_path / "other"))
    calls = compiler('echo another; exec "$REAL" "$@"')
    use(spec)
    assert calls.read_text() == "" and not (tmp_path / "other").exists() and caplog.records == []
    damage_flip(tmp_path / "layer" / entry.folder.name, "kernel.so")
    use(spec)
    assert len(calls.read_text().split()) == 1
    assert "passed over" in caplog.text


def test_no_compile_names_the_key_and_where_it_looked(spec, cache_dir, monkeypatch):
    monkeypatch.setenv("AITER_NO_COMPILE", "1")
    with pytest.raises(CompilationDisabledError) as error:
        use(spec)
    assert recipe_for(spec).name in str(error.value) and str(cache_dir) in str(error.value)
    assert not cache_dir.exists()


@pytest.mark.parametrize("what", [".", "entry", *FILES, MANIFEST])
def test_what_others_can_write_is_refused_with_the_command_that_mends_it(what, entry, spec, cache_dir, caplog):
    path = {".": cache_dir, "entry": entry.folder}.get(what, entry.folder / what)
    mode = path.stat().st_mode & 0o777
    path.chmod(mode | 0o020)
    warning = refused(spec, entry, caplog, f"{path} can be written by others")
    assert f"`chmod -R go-w {path}`" in warning
    os.system(warning.split("`")[1])
    use(spec)
    assert caplog.records == []


def refused(spec, entry, caplog, words) -> str:
    """Sees to it that nothing is loaded from the cache that holds `entry`; returns the warning, which has `words`."""
    assert not Path(use(spec).library._name).is_relative_to(entry.folder.parent)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert words in warning and "Set AITER_CACHE_DIR" in warning
    caplog.clear()
    return warning


def test_a_folder_above_that_others_can_write_is_refused_unless_it_is_like_tmp(entry, spec, tmp_path, caplog):
    tmp_path.chmod(0o777)
    try:
        refused(spec, entry, caplog, f"{tmp_path} can be written by others")
        tmp_path.chmod(0o1777)
        use(spec)
        assert caplog.records == []
    finally:
        tmp_path.chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("what", ["entry", "kernel.so"])
def test_what_belongs_to_someone_else_is_refused(what, entry, spec, caplog):
    path = entry.folder if what == "entry" else entry.folder / what
    os.chown(path, 12345, 12345)
    refused(spec, entry, caplog, "belongs to user 12345")


def test_a_link_is_refused(entry, spec, tmp_path, caplog):
    entry.library.rename(tmp_path / "kernel.so")
    entry.library.symlink_to(tmp_path / "kernel.so")
    refused(spec, entry, caplog, "is a symbolic link")


def test_the_umask_opens_nothing(spec, cache_dir):
    before = os.umask(0)
    try:
        use(spec)
    finally:
        os.umask(before)
    assert all(not path.stat().st_mode & 0o022 for path in [cache_dir, *cache_dir.rglob("*")])


def test_first_call_from_a_warm_cache_takes_milliseconds(entry, spec):
    times = []
    for _ in range(5):
        begin = time.process_time()  # whatever else the machine is doing
        use(spec)
        times.append(time.process_time() - begin)
    assert min(times) < 0.010


def test_abandoned_builds_are_cleared_and_live_ones_are_not(entry, spec, cache_dir):
    import socket

    building = cache_dir / ".building"
    dead = building / f"{entry.folder.name}~{socket.gethostname()}~999999999~abc"
    old_elsewhere = building / f"{entry.folder.name}~elsewhere~1~abc"
    new_elsewhere = building / f"{entry.folder.name}~elsewhere~1~def"
    for folder in (dead, old_elsewhere, new_elsewhere):
        (folder / "src").mkdir(parents=True)
    os.utime(old_elsewhere, (1, 1))
    with Cache().obtain(recipe_for(tiny_spec(72))):
        pass
    assert list(building.iterdir()) == [new_elsewhere]
