"""Output that cannot be written, characters that a terminal does not have, devices that are not here."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from hearing import hear_signals

from aiter.cli import main
from aiter.cli.table import duration

AITER = [sys.executable, "-m", "aiter"]
ONE_KERNEL = ["prewarm", "--arch", "x86-64", "--ops", "flash_attn_func", "--dtypes", "fp32", "--head-dims", "8"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """And a compiler that takes no time."""
    monkeypatch.setenv("AITER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in --version) echo none;; *) : > kernel.so;; esac\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("AITER_CXX", str(compiler))
    return tmp_path / "cache"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    """What becomes of a command line, in which `aiter` is our command."""
    script = f'aiter() {{ "{sys.executable}" -m aiter "$@"; }}; {line}'
    return subprocess.run(["sh", "-c", script], capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("closed", ["1>&-", "2>&-", "0<&-", "0<&- 1>&- 2>&-"])
def test_closed_streams(closed, own_cache):
    done = shell(f"aiter {' '.join(ONE_KERNEL)} {closed}")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list(own_cache.glob("attention_forward*"))) == 2
    assert shell(f"aiter cache path {closed} && aiter --help {closed}").returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_stdout(unbuffered, own_cache):
    done = shell(f"aiter {' '.join(ONE_KERNEL)} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1 and len(list(own_cache.glob("attention_forward*"))) == 2
    assert shell("aiter cache path > /dev/full", PYTHONUNBUFFERED=unbuffered).returncode == 1


def test_a_reader_that_has_seen_enough(own_cache):
    done = shell(f"(aiter {' '.join(ONE_KERNEL)}; echo status $? >&2) | true")
    assert done.stderr in ("status 0\n", "status 1\n")
    assert len(list(own_cache.glob("attention_forward*"))) == 2


@pytest.mark.parametrize("encoding", ["ascii", "euc_jp", "gbk", "cp932", "latin-1"])
def test_output_without_the_characters(encoding):
    text = duration(5e-6)
    script = f"from aiter.cli import streams; streams.prepare(); print({text!r} + ' █·… é \\udce9')"
    env = {**os.environ, "PYTHONIOENCODING": encoding}
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, env=env, check=True).stdout
    assert shown.endswith(b" \xe9\n"), "a path's byte stays what it is"
    assert shown.startswith("5.0 µs ".encode(encoding) if encoding == "latin-1" else b"5.0 us ")
    assert encoding != "ascii" or shown == b"5.0 us #.... \\xe9 \xe9\n"


def test_paths_that_are_not_text(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    done = subprocess.run([*AITER, "cache", "path", "--cache-dir", os.fsdecode(folder)], capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, folder + b"\n", b"")


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:99", "cuda:-1", "cuda:x", "meta", "0", "xpu"])
def test_devices_that_are_not_here(device, capsys, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["demo", "--device", device]) == 1
    _, errors = capsys.readouterr()
    assert errors.startswith("aiter: ") and device in errors and errors.count("\n") == 1


def test_the_demo_says_what_it_waits_for(capsys, monkeypatch):
    monkeypatch.setattr("aiter.cli.demo.cases", lambda device, dtype: exit("now"))
    with pytest.raises(SystemExit, match="now"):
        main(["demo", "--device", "cpu"])
    assert "first call compiles its kernel" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_interrupt_leaves_a_clean_line(number, tmp_path):
    """On a terminal, the bar goes before the last words come."""
    compiler = f'case "$*" in --version) echo none;; *) : > {tmp_path}/busy; sleep 99;; esac'
    (tmp_path / "c++").write_text(f"#!/bin/sh\n{compiler}\n")
    terminal, end = pty.openpty()
    process = subprocess.Popen([*AITER, *ONE_KERNEL], stdout=end, stderr=end, preexec_fn=hear_signals)
    os.close(end)
    deadline = time.monotonic() + 60
    while not (tmp_path / "busy").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    shown = b""
    with contextlib.suppress(OSError):  # its other end is closed
        while data := os.read(terminal, 4096):
            shown += data
    os.close(terminal)
    assert process.wait(60) == 130
    before, _, after = shown.decode().rpartition("\r\033[K")
    assert "] 0/2" in before and after == "aiter: interrupted; nothing was left half done\r\n"


def test_a_terminal_that_is_gone(own_cache, tmp_path):
    """As when an ssh session is lost: nothing can be written any more, and that is no reason for a traceback."""
    terminal, end = pty.openpty()
    process = subprocess.Popen([*AITER, *ONE_KERNEL], stdout=end, stderr=end)
    os.close(end)
    os.close(terminal)
    assert process.wait(60) == 1
    assert len(list(own_cache.glob("attention_forward*"))) == 2
