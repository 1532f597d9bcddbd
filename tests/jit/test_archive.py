"""Export and import: the same bytes for the same entries, and nothing but a faultless archive is taken."""

import io
import os
import random
import shutil
import tarfile

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
    assert sorted(os.listdir(cache_dir)) == [".building", ".locks", "precious"]


def test_a_kernel_that_is_in_use_survives_clearing(entry, spec, cache_dir):
    kernel = jit.get_kernel(spec)
    clear(cache_dir)
    assert kernel.workspace_raw(bytes(512)) == 64
