"""Shared fixtures: a cache of kernels that all tests use and that lasts from run to run."""

import contextlib
import io
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# What is kept between runs: beyond this the kernels that were not used for longest go.
KEPT_FOR, KEPT_BYTES = "30d", "1G"

settings.register_profile(
    "aiter", derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck)
)
settings.load_profile("aiter")


def pytest_configure(config):
    """Kernels compile into a folder of the tests' own, shared by its workers; the user's is neither read nor filled.

    It is kept, as an entry's key is the content of all that it is made of: what a change does not touch need not be
    compiled again, and what it touches is never found.
    """
    if hasattr(config, "workerinput"):
        return  # inherits the folder of the process that started it
    folder = _kept_folder()
    config.aiter_temporary_cache = None if folder else tempfile.mkdtemp(prefix="aiter-test-kernels-")
    os.environ["AITER_CACHE_DIR"] = str(folder or config.aiter_temporary_cache)
    # Several workers have more threads than there are cores: one that spins holds up the one that it waits for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _kept_folder() -> Path | None:
    """AITER_TEST_CACHE_DIR, or aiter-tests in the user's cache folder; None where that cannot be written."""
    chosen = os.environ.get("AITER_TEST_CACHE_DIR")
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(chosen or base / "aiter-tests").absolute()
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        if chosen:
            raise
        return None
    return folder if os.access(folder, os.W_OK) else None


def pytest_unconfigure(config):
    if hasattr(config, "workerinput") or not hasattr(config, "aiter_temporary_cache"):
        return
    if config.aiter_temporary_cache:
        shutil.rmtree(config.aiter_temporary_cache, ignore_errors=True)
        return
    from aiter.cli import main

    kept = Path(os.environ["AITER_CACHE_DIR"])
    with contextlib.redirect_stdout(io.StringIO()):
        for cache in (kept, *kept.glob("stand-in-*")):  # kernels/driver.py makes a cache for each state of the stand-in
            main(["cache", "clear", "--older-than", KEPT_FOR, "--max-size", KEPT_BYTES, "--cache-dir", str(cache)])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")),
    ]
)
def device(request):
    """For tests that say the same of the CPU and of a GPU."""
    return request.param
