"""A kernel small enough to build in 0.1 s, a cache of each test's own, and compilers that count, fail, hang or wait."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

import pytest
from tiny import make_tree, tiny_spec

from aiter import jit
from aiter.jit import cache, settings, sources
from aiter.jit.cache import Cache
from aiter.jit.entry import Entry
from aiter.jit.recipe import recipe_for
from aiter.jit.spec import Spec


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A folder of kernel sources with the kernel `tiny`, in use."""
    root = make_tree(tmp_path / "kernels_src")
    monkeypatch.setattr(sources, "find_root", lambda: root)
    return root


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The one folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(settings, "TEMPORARY_DIRS", ())
    return folder


@pytest.fixture
def cache_dir(tmp_path, temporary, monkeypatch) -> Path:
    """An empty cache, in use, and a process that has loaded nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("AITER_CACHE_DIR", str(folder))
    for name in {"CXX", *settings.VARIABLES} - {"AITER_CACHE_DIR"}:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jit, "_kernels", {})
    monkeypatch.setattr(cache, "_warned", set())
    return folder


@pytest.fixture
def mount(tmp_path):
    """mount(type, options, name) is a folder on which a file system of that type is mounted."""
    mounted = []

    def install(kind: str, options: str, name: str = "disk") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        command = ["mount", "-t", kind, "-o", options, "aiter-test", str(folder)]
        if subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            pytest.skip("mounting a file system takes root")
        mounted.append(folder)
        return folder

    yield install
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def spec() -> Spec:
    return tiny_spec()


@pytest.fixture
def entry(tree, cache_dir, spec) -> Entry:
    """The entry of `spec`, built."""
    with Cache().obtain(recipe_for(spec)) as built:
        return built


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """compiler(script) installs a C++ compiler that is a shell script, in which $REAL is g++; returns the file in which
    each of its compilations leaves a line."""

    def install(script: str = 'exec "$REAL" "$@"') -> Path:
        calls = tmp_path / "compilations"
        calls.touch()
        path = tmp_path / "c++"
        path.write_text(
            f'#!/bin/sh\nREAL={shutil.which("g++")}\ncase "$*" in --version) exec "$REAL" --version;; esac\n'
            f"echo $$ >> {calls}\n{script}\n"
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("AITER_CXX", str(path))
        return calls

    return install


@pytest.fixture
def processes():
    """processes(count, function) runs function(index) in forked processes that start together; returns what each
    returned, as text, or how it failed."""

    def run(count: int, function) -> list[str]:
        start_read, start_write = os.pipe()
        children = [_fork(function, index, start_read, start_write) for index in range(count)]
        os.close(start_read)
        os.close(start_write)  # end of file: go
        results = []
        for pid, pipe in children:
            with os.fdopen(pipe) as output:
                results.append(output.read())
            os.waitpid(pid, 0)
        return results

    return run


def _fork(function, index: int, start_read: int, start_write: int) -> tuple[int, int]:
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        os.close(start_write)
        os.read(start_read, 1)
        text = str(function(index))
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
    os.write(write, text.encode())
    os._exit(0)
