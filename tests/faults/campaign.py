"""Faults on purpose: killed processes, full disks, damaged entries, hostile archives, and what becomes of them.

    python tests/faults/campaign.py [--seed N]       the whole campaign, some minutes; prints what it counted
    pytest tests/faults                              a short one

After every fault a kernel is asked for as a program would. It must be the right one (or the error must be one of the
package's own), nothing may be left in the making or locked, and every entry that is there must be sound. The kernel is
a tiny one for the CPU, whose answer tells which spec it was built for. Some faults take root to arrange, and without it
are skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1] / "jit")]

import filelock  # noqa: E402, F401, here and now, because nobody may be kept from where it is installed
from tiny import left_behind, make_tree, tiny_spec  # noqa: E402

from aiter import jit  # noqa: E402
from aiter.errors import AiterError, CacheError  # noqa: E402
from aiter.jit import settings, sources  # noqa: E402
from aiter.jit.archive import export_entries, import_entries  # noqa: E402
from aiter.jit.entry import FILES, MANIFEST, DamagedEntry, read  # noqa: E402
from aiter.jit.maintenance import items, verify  # noqa: E402
from aiter.jit.spec import Spec  # noqa: E402
from aiter.jit.store import Store  # noqa: E402

SPECS = [tiny_spec(8 * (i + 1)) for i in range(4)]


class Wrong(Exception):
    """What must never happen; says what did."""


def ask(spec: Spec) -> str:
    """Asks for a kernel from a new process: "right", or the name of the package's own error."""
    return result(in_child(lambda: ask_here(spec)))


def ask_here(spec: Spec) -> str:
    try:
        answer = jit.get_kernel(spec).workspace_raw(bytes(512))
    except AiterError as error:
        return type(error).__name__
    if answer != spec.head_dim:
        raise Wrong(f"asked for head_dim {spec.head_dim}, got the kernel of {answer}")
    return "right"


def in_child(function: Callable[[], object]) -> int:
    """Starts function in a forked process; its result, as text, or how it failed, is what `result` reads."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(function())
        except BaseException as error:
            text = f"WRONG: {type(error).__name__}: {error}"
        os.write(write_end, text.encode())
        os._exit(0)
    os.close(write_end)
    _pipes[pid] = read_end
    return pid


_pipes: dict[int, int] = {}  # of each child, the end from which its result is read


def result(pid: int) -> str:
    with os.fdopen(_pipes.pop(pid)) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    if text.startswith("WRONG"):
        raise Wrong(text)
    return text


def killed_within(function: Callable[[], object], seconds: float) -> None:
    pid = in_child(function)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.close(_pipes.pop(pid))
    os.waitpid(pid, 0)


def check_sound(cache: Path) -> None:
    """Every entry is sound, and the next build leaves nothing in the making, locked or in the temporary folder."""
    faults = {name: fault for name, fault in verify(cache).items() if fault}
    if faults:
        raise Wrong(f"bad entries: {faults}")
    Store(cache).sweep()  # as the next build does
    if left_behind(cache):
        raise Wrong(f"left behind: {left_behind(cache)}")
    private = {folder.name: folder for folder in settings.private_dirs()}
    for folder in private.values():
        Store(folder).sweep()
        if left_behind(folder):
            raise Wrong(f"left behind: {left_behind(folder)}")
    others = set(os.listdir(os.environ["TMPDIR"])) - {*private, "aiter-65534"}  # nobody's
    if others:
        raise Wrong(f"left in the temporary folder: {others}")


def kills_of_a_build(cache: Path, count: int, rng: random.Random) -> Counter:
    outcomes: Counter = Counter()
    for _ in range(count):
        shutil.rmtree(cache, ignore_errors=True)
        killed_within(lambda: ask_here(SPECS[0]), rng.uniform(0, 0.25))
        outcomes["left a build unfinished"] += bool(left_behind(cache))
        outcomes[ask(SPECS[0])] += 1
        outcomes["left something for the next build to clear"] += bool(left_behind(cache))
        check_sound(cache)
    return outcomes


def kills_of_an_import(cache: Path, count: int, rng: random.Random) -> Counter:
    outcomes: Counter = Counter()
    archive = _archive(cache)
    for _ in range(count):
        shutil.rmtree(cache, ignore_errors=True)
        killed_within(lambda: import_entries(cache, archive), rng.uniform(0, 0.04))
        outcomes["entries in place when killed"] += len(items(cache))
        check_sound(cache)
        import_entries(cache, archive)
        outcomes[in_no_compile(lambda: ask(rng.choice(SPECS)))] += 1
        check_sound(cache)
    return outcomes


def in_no_compile(function: Callable[[], str]) -> str:
    os.environ["AITER_NO_COMPILE"] = "1"
    try:
        return function()
    finally:
        del os.environ["AITER_NO_COMPILE"]


def full_disks(cache: Path, count: int, rng: random.Random) -> Counter:
    outcomes: Counter = Counter()
    with small_disk(cache.parent / "disk", 1 << 20) as disk:
        os.environ["AITER_CACHE_DIR"] = str(disk / "cache")
        for _ in range(count):
            status = os.statvfs(disk)
            room = rng.choice((0, 4096, rng.randrange(80_000), rng.randrange(400_000)))
            (disk / "filler").write_bytes(bytes(max(0, status.f_bavail * status.f_frsize - room)))
            outcomes[ask(SPECS[0])] += 1
            outcomes["entry kept"] += len(items(disk / "cache"))
            check_sound(disk / "cache")
            shutil.rmtree(disk / "cache", ignore_errors=True)
            (disk / "filler").unlink()
    os.environ["AITER_CACHE_DIR"] = str(cache)
    return outcomes


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size},mode=0755", "aiter-faults", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def every_byte_damaged(cache: Path, count: int, rng: random.Random) -> Counter:
    """`count` bytes of each file, spread evenly (all of them if it has no more), each with one bit flipped."""
    outcomes: Counter = Counter()
    ask(SPECS[0])
    folder = items(cache)[0].folder
    for file in (*FILES, MANIFEST):
        whole = (folder / file).read_bytes()
        for position in range(0, len(whole), max(1, len(whole) // count)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            (folder / file).write_bytes(damaged)
            try:
                read(folder)
                raise Wrong(f"{file} is taken for sound with byte {position} changed")
            except DamagedEntry:
                outcomes[f"noticed in {file}"] += 1
        outcomes[f"rebuilt: {ask(SPECS[0])}"] += 1
    check_sound(cache)
    return outcomes


def permissions_taken_away(cache: Path, count: int, rng: random.Random) -> Counter:
    """From an ordinary user's process, while it builds."""
    outcomes: Counter = Counter()
    for _ in range(count):
        shutil.rmtree(cache, ignore_errors=True)
        cache.mkdir()
        os.chown(cache, 65534, 65534)

        def ask_as_nobody() -> str:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            return ask_here(SPECS[0])

        child = in_child(ask_as_nobody)
        time.sleep(rng.uniform(0, 0.2))
        victim = rng.choice([cache, cache / ".building", cache / ".locks", *(cache / ".building").glob("*")])
        with contextlib.suppress(FileNotFoundError):
            os.chmod(victim, rng.choice((0, 0o500)))
        outcomes[result(child)] += 1
        for path in (cache, *cache.glob(".*")):
            path.chmod(0o755)
        shutil.rmtree(cache)
        outcomes[ask(SPECS[0])] += 1
        check_sound(cache)
    return outcomes


def cache_deleted_meanwhile(cache: Path, count: int, rng: random.Random) -> Counter:
    """Four processes ask again and again while the folder is deleted `count` times."""
    end = cache.parent / "end"

    def ask_until_the_end() -> dict:
        mine: Counter = Counter()
        while not end.exists():
            mine[ask(SPECS[os.getpid() % 4])] += 1
        return dict(mine)

    children = [in_child(ask_until_the_end) for _ in range(4)]
    for _ in range(count):
        time.sleep(rng.uniform(0.02, 0.3))
        shutil.rmtree(cache, ignore_errors=True)
    end.touch()
    outcomes: Counter = Counter()
    for child in children:
        outcomes.update(eval(result(child)))
    end.unlink()
    outcomes[ask(SPECS[0])] += 1
    check_sound(cache)
    return outcomes


def processes_at_once(cache: Path, count: int, rng: random.Random) -> Counter:
    compilations = cache.parent / "compilations"
    compiler = cache.parent / "c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo 1 >> {compilations};; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    os.environ["AITER_CXX"] = str(compiler)
    shutil.rmtree(cache, ignore_errors=True)
    children = [in_child(lambda: ask_here(SPECS[0])) for _ in range(count)]
    outcomes = Counter(result(child) for child in children)
    outcomes["compilations"] = len(compilations.read_text().split())
    if outcomes["compilations"] != 1:
        raise Wrong(f"compiled {outcomes['compilations']} times")
    del os.environ["AITER_CXX"]
    check_sound(cache)
    return outcomes


def clock_set_back(cache: Path, count: int, rng: random.Random) -> Counter:
    """Files of a cache that claim to be from the future, and from long ago."""
    outcomes: Counter = Counter()
    for _ in range(count):
        stamp = time.time() + rng.choice((-1, 1)) * rng.uniform(0, 3e9)
        killed_within(lambda: ask_here(SPECS[1]), rng.uniform(0, 0.2))
        ask(SPECS[0])
        for path in (cache, *cache.rglob("*")):
            os.utime(path, (stamp, stamp))
        outcomes[in_no_compile(lambda: ask(SPECS[0]))] += 1
        outcomes[ask(SPECS[1])] += 1
        check_sound(cache)
        shutil.rmtree(cache)
    return outcomes


def entries_swapped(cache: Path, count: int, rng: random.Random) -> Counter:
    """Files, and whole entries, exchanged between kernels."""
    outcomes: Counter = Counter()
    for spec in SPECS:
        ask(spec)
    whole = [(a, b, file) for a, b in itertools.permutations(range(4), 2) for file in (*FILES, MANIFEST, "")]
    for a, b, file in rng.sample(whole, min(count, len(whole))):
        first, second = (next(cache.glob(f"{SPECS[i].name}-*")) for i in (a, b))
        if (first / file).read_bytes() == (second / file).read_bytes() if file else False:
            continue
        aside = cache / "aside"
        (first / file).rename(aside)
        (second / file).rename(first / file)
        aside.rename(second / file)
        for spec in SPECS:
            outcomes[ask(spec)] += 1
        outcomes["swaps"] += 1
        check_sound(cache)
    return outcomes


def hostile_archives(cache: Path, count: int, rng: random.Random) -> Counter:
    """Archives with members that have no place there, and with random damage."""
    outcomes: Counter = Counter()
    archive = _archive(cache)
    whole = archive.read_bytes()
    name = items(cache)[0].name
    outside = sorted(path for path in cache.parent.rglob("*") if cache not in (path, *path.parents))
    evil = [
        *((path, tarfile.REGTYPE, "") for path in ("/tmp/evil", "../evil", f"{name}/../../evil", ".locks/x", "x" * 99)),
        *((f"{name}/kernel.so", kind, "/etc/passwd") for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE)),
        *((f"{name}/kernel.so", kind, "") for kind in (tarfile.DIRTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE)),
    ]
    for number in range(count):
        shutil.rmtree(cache, ignore_errors=True)
        if number < len(evil):
            info = tarfile.TarInfo(evil[number][0])
            info.type, info.linkname = evil[number][1:]
            archive.write_bytes(whole)
            with tarfile.open(archive, "a") as tar:
                tar.addfile(info, io.BytesIO())
        elif number == len(evil):
            info = tarfile.TarInfo(f"{name}/kernel.so")
            info.size = 1 << 50
            archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
        else:
            damaged = bytearray(whole[: rng.choice((len(whole), rng.randrange(len(whole))))])
            for _ in range(rng.choice((1, 4, 64))):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            archive.write_bytes(damaged)
        try:
            import_entries(cache, archive)
            outcomes["sound all the same"] += 1  # the damage was in the padding
        except CacheError:
            outcomes["refused"] += 1
            if items(cache):
                raise Wrong("a refused archive left entries") from None
        check_sound(cache)
    now = sorted(path for path in cache.parent.rglob("*") if cache not in (path, *path.parents))
    if now != outside or Path("/tmp/evil").exists():
        raise Wrong(f"something was written outside the cache: {set(now) - set(outside)}")
    return outcomes


def _archive(cache: Path) -> Path:
    for spec in SPECS:
        ask(spec)
    path = cache.parent / "kernels.tar"
    export_entries(cache, [item.name for item in items(cache)], path)
    return path


# Each fault, how often in the whole campaign and in the short one, and whether it takes root.
FAULTS = {
    kills_of_a_build: (200, 5, False),
    kills_of_an_import: (100, 5, False),
    full_disks: (60, 6, True),
    every_byte_damaged: (1 << 30, 200, False),
    permissions_taken_away: (30, 4, True),
    cache_deleted_meanwhile: (60, 6, False),
    processes_at_once: (64, 64, False),
    clock_set_back: (20, 3, False),
    entries_swapped: (48, 3, False),
    hostile_archives: (300, 40, False),
}


def run(fault: Callable, count: int, seed: int) -> Counter:
    """One kind of fault, `count` times, in folders of its own."""
    if FAULTS[fault][2] and os.geteuid() != 0:
        return Counter({"skipped: takes root": count})
    base = Path(tempfile.mkdtemp(prefix="aiter-faults-"))
    base.chmod(0o755)
    (base / "tmp").mkdir()
    (base / "tmp").chmod(0o1777)
    kept = settings.TEMPORARY_DIRS, sources.find_root, dict(os.environ), logging.root.manager.disable
    try:
        root = make_tree(base / "kernels_src")
        sources.find_root = lambda: root
        settings.TEMPORARY_DIRS = ()
        os.environ["TMPDIR"] = str(base / "tmp")
        os.environ["AITER_CACHE_DIR"] = str(base / "cache")
        logging.disable(logging.CRITICAL)  # what is reported is counted here
        return fault(base / "cache", count, random.Random(seed))
    finally:
        settings.TEMPORARY_DIRS, sources.find_root = kept[:2]
        os.environ.clear()
        os.environ.update(kept[2])
        logging.disable(kept[3])
        shutil.rmtree(base, ignore_errors=True)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--only", metavar="FAULT", choices=[fault.__name__ for fault in FAULTS])
    options = options.parse_args()
    failed = 0
    for fault, (count, _, _) in FAULTS.items():
        if options.only in (None, fault.__name__):
            begin = time.monotonic()
            try:
                counts = run(fault, count, options.seed)
                outcomes = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
            except Wrong as wrong:
                outcomes, failed = f"WRONG: {wrong}", 1
            print(f"{fault.__name__.replace('_', ' '):<26} {time.monotonic() - begin:5.0f} s  {outcomes}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
