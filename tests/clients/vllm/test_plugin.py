"""The plugin as its page says, docs/vllm.md: its commands and its program, run as they stand, and what turns it on."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import models
import pytest
import torch
from conftest import ROOT

from aiter.integrations import vllm as plugin

PAGE = (ROOT / "docs" / "vllm.md").read_text()
PROMPT = [11, 12, 13]


def block(language: str, about: str) -> str:
    found = [
        text for text in re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE) if about in text
    ]
    assert len(found) == 1, f"docs/vllm.md has {len(found)} blocks with {about!r}"
    return found[0]


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    folder = tmp_path_factory.mktemp("models") / "llama"
    return models.make("llama", folder), folder


def greedy(model: torch.nn.Module, count: int) -> list[int]:
    tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=count, do_sample=False, eos_token_id=None)
    return tokens[0, len(PROMPT) :].tolist()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_server(installed, llama, tmp_path):
    """`vllm serve`, whose engine and worker are processes of their own."""
    model, folder = llama
    command = block("bash", "AITER_VLLM=1 vllm serve").strip()
    port = free_port()
    # As it stands, and: where to listen, a small cache, no compiler that a test would wait for.
    command = (
        f"{command.replace('MODEL', str(folder))} --host 127.0.0.1 --port {port} --max-model-len 64 --enforce-eager"
    )
    environment = installed.environment(PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    log = tmp_path / "log"
    with log.open("w") as file:
        server = subprocess.Popen(["bash", "-c", command], env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(
                {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
            ).encode(),
            {"Content-Type": "application/json"},
        )
        end = time.monotonic() + 300
        while True:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    tokens = json.load(answer)["choices"][0]["token_ids"]
                break
            except urllib.error.HTTPError as error:
                pytest.fail(error.read().decode())
            except OSError:
                time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(60)
    assert tokens == greedy(model, 8)
    assert "Attention is aiter's" in log.read_text()


def test_program(installed, llama, tmp_path):
    _, folder = llama
    program = tmp_path / "program.py"
    program.write_text(block("python", "LLM").replace('"MODEL"', repr(str(folder))))
    environment = installed.environment(VLLM_CPU_CI_ENV="1")
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Attention is aiter's" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"AITER_VLLM": "1"}, True),
        ({"AITER_VLLM": "0"}, False),
        ({"VLLM_PLUGINS": "aiter"}, True),
        ({"VLLM_PLUGINS": "other, aiter"}, True),
        ({"VLLM_PLUGINS": "aiter", "AITER_VLLM": "0"}, False),
        ({"VLLM_PLUGINS": "aiters"}, False),
    ],
)
def test_what_turns_it_on(variables, wanted, monkeypatch):
    for name in ("AITER_VLLM", "VLLM_PLUGINS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert plugin.wanted() is wanted


def test_what_is_registered(installed):
    """CUSTOM always, where no other plugin has it; CPU_ATTN where that is wanted. Twice is as good as once."""
    program = """
import os
from vllm.v1.attention.backends.registry import AttentionBackendEnum as Names, register_backend
from aiter.integrations.vllm import register
register(); register()
print(Names.CUSTOM.get_path(), Names.CPU_ATTN.get_path())
os.environ["AITER_VLLM"] = "1"
register_backend(Names.CUSTOM, "other.Backend")
register()
print(Names.CUSTOM.get_path(), Names.CPU_ATTN.get_path())
print(Names.CPU_ATTN.get_class().get_name())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=installed.environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ours, theirs = "aiter.integrations.vllm.backend", "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"
    assert done.stdout.split() == [f"{ours}.GpuBackend", theirs, "other.Backend", f"{ours}.CpuBackend", "CPU_ATTN"]
    assert "CUSTOM is another plugin's backend, other.Backend" in done.stderr + done.stdout
