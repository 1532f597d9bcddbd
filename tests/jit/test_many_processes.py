"""Many threads and processes that want one kernel, killed builders, and file systems without locks."""

import errno
import fcntl
import os
import signal
import threading
import time

import pytest
from tiny import ends, left_behind

from aiter import jit
from aiter.jit import lock

pytestmark = pytest.mark.usefixtures("tree", "cache_dir")


def use_in_threads(spec, count: int) -> list[int]:
    """What `count` threads get that ask for a kernel at once."""
    results: list[int] = []
    barrier = threading.Barrier(count)

    def use():
        barrier.wait()
        results.append(jit.get_kernel(spec).workspace_raw(bytes(512)))

    threads = [threading.Thread(target=use) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_sixteen_processes_of_four_threads_compile_once(spec, cache_dir, compiler, processes):
    calls = compiler('sleep 0.3; exec "$REAL" "$@"')
    results = processes(16, lambda index: use_in_threads(spec, 4))
    assert results == ["[64, 64, 64, 64]"] * 16
    assert len(calls.read_text().split()) == 1
    assert left_behind(cache_dir) == []


def test_a_killed_builder_costs_the_others_nothing_but_time(spec, cache_dir, compiler, processes):
    calls = compiler('[ "$(wc -l < %s)" -gt 1 ] || sleep 100\nexec "$REAL" "$@"' % (cache_dir.parent / "compilations"))
    victim = os.fork()
    if victim == 0:
        jit.get_kernel(spec)
        os._exit(0)
    while not calls.read_text():
        time.sleep(0.01)

    def use(index):
        return jit.get_kernel(spec).workspace_raw(bytes(512))

    killer = threading.Timer(0.3, os.kill, (victim, signal.SIGKILL))
    killer.start()
    results = processes(4, use)
    os.waitpid(victim, 0)
    assert ends(int(calls.read_text().split()[0])), "the victim's compiler, which sleeps, goes with it"
    assert results == ["64"] * 4
    assert len(calls.read_text().split()) == 2
    assert left_behind(cache_dir) == []


def test_who_waits_says_for_what(spec, compiler, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(lock, "FIRST_NOTICE_S", 0.05)
    caplog.set_level("INFO", "aiter")
    building = tmp_path / "building"
    compiler(f'case "$*" in *" -o "*) touch {building}; sleep 1;; esac; exec "$REAL" "$@"')
    child = os.fork()
    if child == 0:
        jit.get_kernel(spec)
        os._exit(0)
    while not building.exists():  # a child that fails ends the wait, too
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
        time.sleep(0.01)
    jit.get_kernel(spec)
    os.waitpid(child, 0)
    assert f"waiting for {spec.name}" in caplog.text
    assert f"which process {child} on {os.uname().nodename} builds" in caplog.text
    assert "compiled" not in caplog.text


def test_a_lock_that_is_never_given_up_is_not_waited_for_for_ever(spec, cache_dir, monkeypatch, caplog):
    from filelock import FileLock

    monkeypatch.setenv("AITER_COMPILE_TIMEOUT", "50")
    monkeypatch.setattr("aiter.jit.store.LOCK_MARGIN_S", -49.5)
    from aiter.jit.recipe import recipe_for

    (cache_dir / ".locks").mkdir(parents=True)
    with FileLock(cache_dir / ".locks" / f"{recipe_for(spec).name}.lock"):
        assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64
    assert "gave up waiting" in caplog.text


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks(code, spec, cache_dir, monkeypatch, caplog, compiler):
    calls = compiler()

    def flock(descriptor, operation):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64
    assert "locks do not work" in caplog.text
    assert len(calls.read_text().split()) == 1
    assert list((cache_dir / ".building").iterdir()) == []


def test_a_lock_service_that_never_answers(spec, monkeypatch, caplog):
    answer = threading.Event()
    monkeypatch.setattr(fcntl, "flock", lambda *_: answer.wait())
    monkeypatch.setattr("aiter.jit.store.LOCK_MARGIN_S", -599.5)
    assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64
    assert "gave up waiting" in caplog.text
    answer.set()


def test_locks_that_everybody_gets(spec, cache_dir, compiler, processes, monkeypatch):
    calls = compiler('sleep 0.2; exec "$REAL" "$@"')
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    results = processes(4, lambda index: jit.get_kernel(spec).workspace_raw(bytes(512)))
    assert results == ["64"] * 4
    assert 1 <= len(calls.read_text().split()) <= 4
    assert len(list(cache_dir.glob("tiny*"))) == 1


def test_the_cache_deleted_while_it_builds(spec, cache_dir, compiler, processes):
    compiler(
        f'[ -e {cache_dir.parent}/done ] || {{ touch {cache_dir.parent}/done; rm -rf {cache_dir}; }}\nexec "$REAL" "$@"'
    )
    assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64
    assert len(list(cache_dir.glob("tiny*"))) == 1


def test_a_forked_child_does_not_inherit_a_held_lock(spec, compiler, processes):
    compiler('sleep 0.5; exec "$REAL" "$@"')
    builder = threading.Thread(target=jit.get_kernel, args=(spec,))
    builder.start()
    time.sleep(0.2)
    assert processes(1, lambda index: jit.get_kernel(spec).workspace_raw(bytes(512))) == ["64"]
    builder.join()


def test_the_cache_cleared_between_look_up_and_load(spec, entry, monkeypatch):
    import shutil

    real = jit.load
    cleared = []

    def load(spec, path):
        if not cleared:
            cleared.append(shutil.rmtree(path.parent))
        return real(spec, path)

    monkeypatch.setattr(jit, "load", load)
    assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64
