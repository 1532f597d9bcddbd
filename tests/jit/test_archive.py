"""Export and import: the same bytes for the same entries, and nothing but a faultless archive is taken."""

import io
import os
import random
import shutil
import tarfile
import threading

import pytest
from tiny import left_behind, tiny_spec

from aiter import jit
from aiter.errors import CacheError
from aiter.jit.archive import export_entries, import_entries
from aiter.jit.entry import MANIFEST
from aiter.jit.maintenance import clear, items, verify


@pytest.fixture
def archive(entry, tmp_path):
    jit.get_kernel(tiny_spec(128))
    path = tmp_path / "kernels.tar"
    export_entries(entry.folder.parent, [item.name for item in items(entry.folder.parent)], path)
    return path


def test_there_and_back(archive, cache_dir, tmp_path, monkeypatch, spec):
    names = [item.name for item in items(cache_dir)]
    other = tmp_path / "other"
    assert import_entries(other, archive) == (names, [])
    assert import_entries(other, archive) == ([], names)
    assert verify(other) == dict.fromkeys(names, "")
    assert left_behind(other) == []
    export_entries(other, reversed(names), tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    monkeypatch.setenv("AITER_CACHE_DIR", str(other))
    monkeypatch.setenv("AITER_NO_COMPILE", "1")
    jit._kernels.clear()
    assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64


def test_import_mends_a_damaged_entry(archive, entry):
    entry.library.write_bytes(b"damaged")
    new, present = import_entries(entry.folder.parent, archive)
    assert (new, len(present)) == ([entry.folder.name], 1)
    assert verify(entry.folder.parent)[entry.folder.name] == ""


def test_a_damaged_entry_is_not_exported(entry, tmp_path):
    entry.library.write_bytes(b"damaged")
    with pytest.raises(CacheError, match=r"kernel\.so has 7 bytes"):
        export_entries(entry.folder.parent, [entry.folder.name], tmp_path / "kernels.tar")
    assert not list(tmp_path.glob("*kernels.tar*"))


def member(name: str, content: bytes = b"x", **fields) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


NAME = "tiny-fp32-d64-x86-64-v3-" + "0" * 32
HOSTILE = {
    "absolute path": member("/tmp/evil"),
    "absolute path of an entry": member(f"/{NAME}/kernel.so"),
    "dot dot": member("../evil"),
    "dot dot inside": member(f"{NAME}/../../evil"),
    "folder": member(NAME, b"", type=tarfile.DIRTYPE),
    "symbolic link": member(f"{NAME}/kernel.so", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": member(f"{NAME}/kernel.so", b"", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
    "device": member(f"{NAME}/kernel.so", b"", type=tarfile.CHRTYPE),
    "pipe": member(f"{NAME}/kernel.so", b"", type=tarfile.FIFOTYPE),
    "another file": member(f"{NAME}/evil.so"),
    "hidden folder": member(".building/evil"),
    "newline": member(f"{NAME}\n/kernel.so"),
    "incomplete entry": member(f"{NAME}/kernel.so"),
    "garbage manifest": member(f"{NAME}/{MANIFEST}", b"{}"),
    "deep manifest": member(f"{NAME}/{MANIFEST}", b"[" * 100000),
    "huge manifest": member(f"{NAME}/{MANIFEST}", bytes(2 << 20)),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_members_are_refused_and_nothing_is_imported(kind, archive, tmp_path):
    info, content = HOSTILE[kind]
    with tarfile.open(archive, "a") as tar:
        tar.addfile(info, io.BytesIO(content))
    _refused(archive, tmp_path)


def _refused(archive, tmp_path):
    outside = sorted(os.listdir(tmp_path))
    with pytest.raises(CacheError, match="is not an archive made by"):
        import_entries(tmp_path / "into", archive)
    assert items(tmp_path / "into") == []
    assert left_behind(tmp_path / "into") == []
    assert sorted(os.listdir(tmp_path)) == sorted([*outside, "into"])
    assert not os.path.exists("/tmp/evil")


def test_a_size_that_is_a_lie_is_refused_before_it_is_believed(archive, tmp_path):
    info, _ = member(f"{NAME}/kernel.so", size=1 << 40)
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    _refused(archive, tmp_path)


def test_a_sparse_file_is_refused(tmp_path, archive):
    info, _ = member(f"{NAME}/kernel.so", type=tarfile.GNUTYPE_SPARSE, size=512)
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    _refused(archive, tmp_path)


def test_the_same_file_twice_is_refused(archive, tmp_path):
    with tarfile.open(archive) as tar:
        first = tar.getmembers()[0]
        content = tar.extractfile(first).read()
    with tarfile.open(archive, "a") as tar:
        tar.addfile(first, io.BytesIO(content))
    _refused(archive, tmp_path)


def test_truncated_and_flipped_archives_are_refused(archive, tmp_path):
    whole = archive.read_bytes()
    with tarfile.open(archive) as tar:
        data = [(m.offset_data, m.size) for m in tar.getmembers()]
    for offset, size in data:
        content = bytearray(whole)
        content[offset + size // 2] ^= 1
        archive.write_bytes(content)
        _refused(archive, tmp_path)
        shutil.rmtree(tmp_path / "into")
        archive.write_bytes(whole[: offset + size // 2])
        _refused(archive, tmp_path)
        shutil.rmtree(tmp_path / "into")


NOISE = random.Random(0).randbytes(4096)
NO_ARCHIVES = {"text": b"not a tar file at all", "noise": NOISE, "gzip": b"\x1f\x8b" + bytes(600)}


@pytest.mark.parametrize("kind", NO_ARCHIVES)
def test_what_is_no_archive(kind, tmp_path):
    (tmp_path / "kernels.tar").write_bytes(NO_ARCHIVES[kind])
    _refused(tmp_path / "kernels.tar", tmp_path)


def test_clear_by_age_and_by_size(entry, cache_dir):
    jit.get_kernel(tiny_spec(128))
    old, young = entry.folder, next(cache_dir.glob("tiny-fp32-d128-*"))
    for path in old.iterdir():
        os.utime(path, (1e9, 1e9))
    total = sum(item.bytes for item in items(cache_dir))
    assert [item.folder for item in clear(cache_dir, older_than=3600, dry_run=True)] == [old]
    assert old.exists()
    assert [item.folder for item in clear(cache_dir, max_bytes=total - 1)] == [old]
    assert clear(cache_dir, max_bytes=total, older_than=3600) == []
    assert young.exists() and not old.exists()
    (cache_dir / "precious").write_text("not an entry")
    assert [item.folder for item in clear(cache_dir)] == [young]
    assert sorted(os.listdir(cache_dir)) == [".building", ".locks", "CACHEDIR.TAG", "precious"]


def test_clear_leaves_what_is_not_of_ours(entry, cache_dir, tmp_path):
    """Neither a name nor a folder like those of a cache makes a file an entry."""
    foreign = [
        f"thesis-{'d' * 32}/chapter",
        f"build-{'0' * 32}/build.log",
        f"app-{'1' * 32}/manifest.json",
        ".failed/mine",
        ".failed/mine.log",
        ".damaged/mine/file",
        ".building/mine",
        ".building/mine~elsewhere~1~x",
        ".locks/mine.lock",
    ]
    for folder in (cache_dir, tmp_path / "documents"):
        for name in foreign:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text("{}")
            os.utime(folder / name, (1, 1))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".building").symlink_to(tmp_path / "documents")
    for folder in (tmp_path / "documents", tmp_path / "linked"):
        assert items(folder) == [] == clear(folder) and verify(folder) == {}
    os.rename(cache_dir / f"build-{'0' * 32}", cache_dir / "build")  # in a cache it would be a damaged entry
    os.rename(cache_dir / f"app-{'1' * 32}", cache_dir / "app")
    assert [item.name for item in clear(cache_dir)] == [entry.folder.name]
    for name in foreign:
        assert (tmp_path / "documents" / name).read_text() == "{}"
        assert (cache_dir / name.replace("-" + "0" * 32, "").replace("-" + "1" * 32, "")).read_text() == "{}"


def test_clear_removes_damaged_entries_of_a_cache_and_what_was_left_there(entry, spec, cache_dir):
    (entry.folder / MANIFEST).write_text("garbage")
    (cache_dir / ".failed").mkdir()
    (cache_dir / ".failed" / f"{entry.folder.name}.log").write_text("")
    shutil.copytree(entry.folder, cache_dir / ".damaged" / entry.folder.name)
    assert [item.name for item in clear(cache_dir)] == [entry.folder.name]
    assert sorted(os.listdir(cache_dir)) == [".building", ".locks", "CACHEDIR.TAG"]


def test_an_archive_is_written_to_what_is_there(archive, cache_dir, tmp_path):
    names, whole = [item.name for item in items(cache_dir)], archive.read_bytes()
    (tmp_path / "link.tar").symlink_to(tmp_path / "target.tar")
    export_entries(cache_dir, names, tmp_path / "link.tar")
    assert (tmp_path / "link.tar").is_symlink() and (tmp_path / "target.tar").read_bytes() == whole
    (tmp_path / "target.tar").chmod(0o600)
    export_entries(cache_dir, names, tmp_path / "link.tar")
    assert (tmp_path / "target.tar").stat().st_mode & 0o777 == 0o600

    os.mkfifo(tmp_path / "pipe")
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    export_entries(cache_dir, names, tmp_path / "pipe")
    reader.join()
    assert received == [whole] and (tmp_path / "pipe").is_fifo()
    (tmp_path / "null").symlink_to("/dev/null")
    export_entries(cache_dir, names, tmp_path / "null")
    assert (tmp_path / "null").is_char_device() and (tmp_path / "null").is_symlink()
    with pytest.raises(CacheError, match=f"{tmp_path} is not a file"):
        export_entries(cache_dir, names, tmp_path)
    with pytest.raises(CacheError, match=f"{tmp_path}/nowhere/k.tar cannot be written"):
        export_entries(cache_dir, names, tmp_path / "nowhere" / "k.tar")


def test_an_archive_without_kernels_is_none(tmp_path, cache_dir):
    with pytest.raises(CacheError, match="there is nothing to write"):
        export_entries(cache_dir, [], tmp_path / "kernels.tar")
    assert not (tmp_path / "kernels.tar").exists()
    with tarfile.open(tmp_path / "kernels.tar", "w"):
        pass
    _refused(tmp_path / "kernels.tar", tmp_path)


def test_half_an_archive_is_never_left(archive, entry, cache_dir, mount):
    disk = mount("tmpfs", "size=16k,mode=0755")
    before = sorted(os.listdir(archive.parent))
    with pytest.raises(CacheError, match=r"disk/k\.tar cannot be written \(No space left on device\)"):
        export_entries(cache_dir, [entry.folder.name], disk / "k.tar")
    assert os.listdir(disk) == [] and sorted(os.listdir(archive.parent)) == before


def test_import_from_a_pipe(archive, cache_dir, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(archive.read_bytes()))
    writer.start()
    names = [item.name for item in items(cache_dir)]
    assert import_entries(tmp_path / "other", tmp_path / "pipe") == (names, [])
    writer.join()


def test_damage_in_the_middle_is_not_the_end(archive, tmp_path):
    """tarfile itself takes a spoilt header for the end of an archive."""
    with tarfile.open(archive) as tar:
        third = tar.getmembers()[3]  # the first file of the second entry
    content = bytearray(archive.read_bytes())
    content[third.offset] ^= 1
    archive.write_bytes(content)
    _refused(archive, tmp_path)


def test_a_kernel_that_is_in_use_survives_clearing(entry, spec, cache_dir):
    kernel = jit.get_kernel(spec)
    clear(cache_dir)
    assert kernel.workspace_raw(bytes(512)) == 64
