"""Compilers as processes: what of the environment they see, their time limit, and that none outlives us."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from aiter.errors import CompilationError

# What compilers see of the environment. Everything else stays outside, for there are dozens of variables by which they
# take options, folders and other programs (CPATH, LIBRARY_PATH, LD_RUN_PATH, NVCC_APPEND_FLAGS, ...) or write files
# elsewhere (DEPENDENCIES_OUTPUT): they would change a kernel behind its key.
PASSED_ON = (
    "HOME",
    "USER",
    "LOGNAME",
    # How programs find their own libraries: module systems, NixOS.
    "LD_LIBRARY_PATH",
    "NIX_LD",
    "NIX_LD_LIBRARY_PATH",
    # Where the rest of the compiler is.
    "ROCM_PATH",
    "HIP_PATH",
    "HIP_CLANG_PATH",
)

NO_MORE_PROCESSES = "no further process may be started (see `ulimit -u`, and the limit of processes of the container)"


def search_path() -> str:
    """Where programs are looked for, here and by the compilers: PATH, or the system's own where that is not set."""
    return os.environ.get("PATH") or os.confstr("CS_PATH") or os.defpath


def run(
    command: list[str], timeout: float, output: IO, errors: IO | None, folder: Path | str, temporary: Path | None = None
) -> int:
    """Runs a compiler to its end; returns its exit status. Its words go to `output`, those on stderr to `errors`, or
    nowhere. Temporary files go to `temporary`.

    Raises CompilationError where it cannot be started, and TimeoutError. Whatever ends the wait, a signal that ends
    this whole process included, ends the compiler with all its children.
    """
    import subprocess  # here, because a warm start runs nothing

    environment = _environment() | ({"TMPDIR": str(temporary)} if temporary else {})
    nothing = subprocess.DEVNULL
    process = None
    with _guard() as watch, _before_default_action():
        try:
            # A session of its own: its children must go when it does.
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=nothing,
                stdout=output,
                stderr=nothing if errors is None else errors,
                start_new_session=True,
            )
            watch(process.pid)
            _running.add(process.pid)
            if _stopped:
                _stop()
            return process.wait(timeout)
        except BaseException as error:
            if process is None and isinstance(error, OSError):
                words = f"cannot run {command[0]}: {error.strerror or error}{_hint(error)}"
                raise CompilationError(words, shlex.join(command), str(error)) from error
            if process is not None:
                _kill(process.pid)
                process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError from None
            raise
        finally:
            if process is not None:
                _running.discard(process.pid)


def ask(command: list[str]) -> tuple[int, str]:
    """(exit status, words) of a compiler that is asked about itself."""
    with open(os.memfd_create("aiter"), "w+b") as answer:
        try:
            status = run(command, 60.0, answer, None, "/")
        except TimeoutError:
            raise CompilationError(f"{shlex.join(command)} does not end", shlex.join(command)) from None
        answer.seek(0)
        return status, decode(answer.read())


def decode(words: bytes) -> str:
    """A compiler's words, in whatever encoding: what is not UTF-8 stays readable as \\xe9."""
    return words.decode("utf-8", "backslashreplace")


@contextlib.contextmanager
def compilers_stopped() -> Iterator[None]:
    """Ends the compilers that this process runs, now and as long as this lasts: for whoever waits for threads that
    build to end."""
    global _stopped
    _stopped = True
    try:
        _stop()
        yield
    finally:
        _stopped = False


def _stop() -> None:
    for group in list(_running):
        _kill(group)


_running: set[int] = set()  # their process groups
_stopped = False
_pipes: set[IO] = set()  # to the guards of these


@contextlib.contextmanager
def _before_default_action() -> Iterator[None]:
    """While this lasts in the main thread, a signal whose default action would end this program ends its compilers
    first. `_guard` would, too; but this leaves no dead process behind that nobody waits for."""

    def end(number: int, frame: object) -> None:
        for group in list(_running):
            _kill(group)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(group, 0)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    ours = []
    try:
        if threading.current_thread() is threading.main_thread():
            for number in filter(_has_default_action, (signal.SIGTERM, signal.SIGHUP)):
                with contextlib.suppress(ValueError):  # not the main interpreter
                    signal.signal(number, end)
                    ours.append(number)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _has_default_action(number: int) -> bool:
    """Whether neither this program nor a library of it does something of its own at a signal, or ignores it, as the
    first process of a container does by default."""
    if signal.getsignal(number) != signal.SIG_DFL or os.getpid() == 1:
        return False
    try:
        with open("/proc/self/status") as status:  # handlers that were not set by Python
            masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigCgt", "SigIgn"))]
    except OSError:
        return False
    return not any(mask >> (number - 1) & 1 for mask in masks)


@contextlib.contextmanager
def _guard() -> Iterator[Callable[[int], None]]:
    """A small shell that ends a compiler and its children when this process is gone, be it killed: a compiler is in a
    session of its own, where no signal to us reaches it, and no time limit would hold for it any more.

    The shell notices by the end of a pipe whose other end only we have. Yields the function that tells it the group.
    """
    import subprocess

    quiet = subprocess.DEVNULL
    script = 'read -r group && { read -r _; kill -KILL "-$group"; }'
    try:
        shell = subprocess.Popen(
            ["/bin/sh", "-c", script],
            cwd="/",
            env={},
            stdin=subprocess.PIPE,
            stdout=quiet,
            stderr=quiet,
            bufsize=0,
            start_new_session=True,
        )
    except OSError:  # no shell here, or no further process: then without
        yield lambda group: None
        return
    pipe = shell.stdin
    assert pipe is not None

    def watch(group: int) -> None:
        with contextlib.suppress(OSError):
            pipe.write(b"%d\n" % group)

    _pipes.add(pipe)
    try:
        yield watch
    finally:
        _pipes.discard(pipe)
        shell.kill()
        pipe.close()
        shell.wait()


def _forget_compilers() -> None:
    """A forked child has no compilers, and must not keep the pipes of its parent's guards open."""
    _running.clear()
    for pipe in _pipes:
        pipe.close()
    _pipes.clear()


os.register_at_fork(after_in_child=_forget_compilers)


def _hint(error: OSError) -> str:
    if error.errno == errno.EAGAIN:
        return f": {NO_MORE_PROCESSES}"
    if error.errno == errno.ENOMEM:
        return ": there is no memory to start it"
    return ""


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    # hipcc takes an nvcc on PATH for a wish to build for NVIDIA.
    return {**kept, "PATH": search_path(), "LC_ALL": "C", "HIP_PLATFORM": "amd"}
