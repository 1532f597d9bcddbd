"""What the tests share: our wheel as a user installs it, and what vLLM's engine does with either backend."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.insert(0, str(HERE))


@dataclass
class Installed:
    """A folder with our package, installed: vLLM finds the plugin by the distribution's entry points. Kernels are kept
    where those of all tests are, tests/conftest.py."""

    folder: Path

    def environment(self, **more: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "HF_HUB_OFFLINE": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": "1",  # so that a busy machine costs no more than its share
            **more,
        }


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    base = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(base / "site"), str(ROOT)], check=True)
    # The command `vllm` looks its own version up by that name; this build of it is called vllm-cpu.
    version = importlib.metadata.version("vllm-cpu")
    about = base / "site" / f"vllm-{version}+cpu.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    return Installed(base / "site")


@pytest.fixture(scope="session")
def run_engine(installed: Installed, tmp_path_factory: pytest.TempPathFactory):
    """run_engine(jobs, ours): what `engine.py` makes of the jobs, with our backend or vLLM's own, and its log."""

    def run(jobs: list[dict], ours: bool, **variables: str) -> tuple[dict, str]:
        folder = tmp_path_factory.mktemp("engine")
        (folder / "jobs.json").write_text(json.dumps(jobs))
        environment = installed.environment(AITER_VLLM=str(int(ours)), VLLM_ENABLE_V1_MULTIPROCESSING="0", **variables)
        command = [sys.executable, str(HERE / "engine.py"), "jobs.json", "results.json"]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads((folder / "results.json").read_text()), done.stdout + done.stderr

    return run
