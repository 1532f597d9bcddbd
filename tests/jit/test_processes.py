"""No compiler outlives the process that runs it, and what limits processes and threads is told."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from hearing import hear_signals
from tiny import ends, left_behind, tiny_spec

from aiter import jit
from aiter.errors import CompilationError
from aiter.jit import process
from aiter.jit.cache import Cache
from aiter.jit.prewarm import BUILT, FAILED, prewarm
from aiter.jit.recipe import recipe_for

pytestmark = pytest.mark.usefixtures("tree", "cache_dir")


@pytest.fixture
def program(tree, compiler):
    """program(body) starts one that runs `body`, in which `build()` compiles a kernel that takes for ever; returns it
    and the group of its compiler, which is at work."""
    calls = compiler("sleep 1000 & sleep 1000")
    started = []

    def start(body: str) -> tuple[subprocess.Popen, int]:
        script = f"""
import os, pathlib, signal, sys, threading, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
from tiny import tiny_spec
from aiter import jit
from aiter.jit import sources
sources.find_root = lambda: pathlib.Path({str(tree)!r})
spec = tiny_spec()  # asks which CPU this is, and may import torch for that, which a thread cannot when the program ends
build = lambda: jit.get_kernel(spec)
{body}
"""
        command = [sys.executable, "-c", script]
        pipe = subprocess.PIPE
        one = subprocess.Popen(command, stderr=pipe, text=True, start_new_session=True, preexec_fn=hear_signals)
        started.append(one)
        deadline = time.monotonic() + 60
        while not calls.read_text() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)
        return one, int(calls.read_text())

    yield start
    for one in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(one.pid, signal.SIGKILL)  # and what it has forked
        one.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, signal.SIGQUIT])
@pytest.mark.parametrize("where", ["build()", "threading.Thread(target=build).start()"])
def test_a_program_that_is_ended_leaves_no_compiler(where, number, program):
    process, group = program(where)
    process.send_signal(number)
    assert process.wait(60) == -number, "as it would without us"
    assert ends(group)


def test_a_program_that_ends_while_a_thread_builds(program):
    process, group = program("threading.Thread(target=build, daemon=True).start()\ntime.sleep(1)")
    assert process.wait(60) == 0 and ends(group)


def test_forked_children_do_not_keep_a_compiler_alive(program):
    body = "threading.Thread(target=build).start()\ntime.sleep(0.5)\nos.fork() or (os.close(2), time.sleep(1000))"
    process, group = program(body)
    time.sleep(0.7)
    process.kill()
    process.wait(60)
    assert ends(group), "although a child of the program is still there"


def test_a_forked_child_does_not_stop_its_parents_compilers(spec, compiler):
    calls = compiler('sleep 0.5; exec "$REAL" "$@"')
    thread = threading.Thread(target=jit.get_kernel, args=(spec,))
    thread.start()
    while not calls.read_text():
        time.sleep(0.01)
    child = os.fork()
    if child == 0:
        with process.compilers_stopped():
            os._exit(0)
    os.waitpid(child, 0)
    thread.join()
    assert spec in jit._kernels


@pytest.mark.parametrize("kind", [signal.SIG_IGN, "its own"])
def test_what_a_program_does_at_signals_stays(kind, spec, compiler):
    """And while a kernel is built, too."""
    calls = compiler(f'kill -TERM {os.getpid()}; kill -HUP {os.getpid()}; exec "$REAL" "$@"')
    seen = []
    own = kind if kind == signal.SIG_IGN else lambda number, frame: seen.append(number)
    before = {number: signal.signal(number, own) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        jit.get_kernel(spec)
        assert all(signal.getsignal(number) == own for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert sorted(seen) == ([] if own == signal.SIG_IGN else sorted(before)) and calls.read_text()


def test_default_actions_are_there_again_after_a_build(spec):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` ignores it
    try:
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        jit.get_kernel(spec)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_a_shell_compilers_run_unwatched(spec, monkeypatch):
    popen = subprocess.Popen

    def no_shell(command, **options):
        if command[0] == "/bin/sh":
            raise FileNotFoundError(errno.ENOENT, "no shell")
        return popen(command, **options)

    monkeypatch.setattr("subprocess.Popen", no_shell)
    assert jit.get_kernel(spec).workspace_raw(bytes(512)) == 64


def test_a_limit_of_processes_is_named(spec, monkeypatch):
    def refuse(command, **options):
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr("subprocess.Popen", refuse)
    with pytest.raises(CompilationError, match=r"no further process may be started \(see `ulimit -u`"):
        jit.get_kernel(spec)
    (outcome,) = prewarm([spec], Cache())
    assert outcome.state == FAILED and "ulimit -u" in outcome.error


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_a_limit_of_threads_costs_time_alone(allowed, cache_dir, monkeypatch, caplog):
    specs = [tiny_spec(head_dim) for head_dim in (8, 16, 24)]
    start, left = threading.Thread.start, [allowed]

    def limited(thread):
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    assert [outcome.state for outcome in prewarm(specs, Cache(), jobs=4)] == [BUILT] * 3
    assert jit.get_kernel(tiny_spec(32)).workspace_raw(bytes(512)) == 32
    assert "building without one" in caplog.text and left_behind(cache_dir) == []


FAILURES = {"memory": "kill -KILL $$", "processes": "echo 'vfork: Resource temporarily unavailable' >&2; exit 1"}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
def test_compilers_that_lacked_something_are_tried_again_alone(failure, cache_dir, compiler, tmp_path):
    specs = [tiny_spec(head_dim) for head_dim in (8, 16, 24)]
    # As the kernel does it to the largest process where two are too many.
    one_at_a_time = f"mkdir {tmp_path}/busy || {{ {failure}; }}; trap 'rmdir {tmp_path}/busy' EXIT"
    calls = compiler(f'{one_at_a_time}\nsleep 0.5\n"$REAL" "$@"')
    told = []
    outcomes = prewarm(specs, Cache(), jobs=3, progress=told.append)
    assert [outcome.state for outcome in outcomes] == [BUILT] * 3
    assert {outcome.spec for outcome in told} == set(specs) and len(told) == 3
    assert len(calls.read_text().split()) == 5


def test_one_that_has_too_little_memory_alone_says_so(spec, compiler):
    compiler("kill -KILL $$")
    with pytest.raises(CompilationError, match=r"killed by signal 9 for want of memory, it seems.*--jobs 1"):
        jit.get_kernel(spec)
    with pytest.raises(CompilationError, match="signal 9"), Cache().obtain(recipe_for(spec)):
        pass
