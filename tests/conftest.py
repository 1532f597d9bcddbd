"""Shared fixtures: a cache of kernels that lasts for one test run (or longer, where AITER_TEST_CACHE_DIR names one)."""

import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "aiter", derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck)
)
settings.load_profile("aiter")


def pytest_configure(config):
    """Kernels compile into a folder of this run's own, shared by its workers; the user's is neither read nor filled."""
    if hasattr(config, "workerinput"):
        return  # inherits the folder of the process that started it
    chosen = os.environ.get("AITER_TEST_CACHE_DIR")
    config.aiter_own_cache = None if chosen else tempfile.mkdtemp(prefix="aiter-test-kernels-")
    os.environ["AITER_CACHE_DIR"] = chosen or config.aiter_own_cache
    # Several workers have more threads than there are cores: one that spins holds up the one that it waits for.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_unconfigure(config):
    if getattr(config, "aiter_own_cache", None):
        shutil.rmtree(config.aiter_own_cache, ignore_errors=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)
