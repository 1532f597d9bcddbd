"""Shared fixtures: a cache of kernels that lasts for one test run (or longer, where AITER_TEST_CACHE_DIR names one)."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "aiter", derandomize=True, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck)
)
settings.load_profile("aiter")


def pytest_configure(config):
    """Kernels compile into a folder of this run's own, shared by its workers: tests neither read nor fill the user's."""
    chosen = os.environ.get("AITER_TEST_CACHE_DIR")
    if chosen:
        os.environ["AITER_CACHE_DIR"] = chosen
    elif not hasattr(config, "workerinput"):
        folder = config._tmp_path_factory.mktemp("kernels")
        os.environ["AITER_CACHE_DIR"] = str(folder)  # workers inherit it
    Path(os.environ["AITER_CACHE_DIR"]).mkdir(parents=True, exist_ok=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(20)
