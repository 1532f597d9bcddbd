"""`aiter selftest` on this machine's CPU, and what it says of kernels that are wrong or end their process."""

import json
import os
import signal

import pytest
import torch

import aiter
from aiter.cli import main, selftest, selftest_cases
from aiter.cli.selftest_cases import Problem, families
from aiter.jit.log import logger
from aiter.jit.record import read_record

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def log_level():
    level = logger.level
    yield
    logger.setLevel(level)


def test_every_family_is_right(capsys, tmp_path, monkeypatch):
    path, record = tmp_path / "report.json", tmp_path / "record.jsonl"
    monkeypatch.setenv("AITER_RECORD", str(record))
    assert main(["selftest", "--device", "cpu", "--errors-only", "--report", str(path)]) == 0
    text = capsys.readouterr().out
    report = json.loads(path.read_text())
    names = [family.name for family in families(on_gpu=False)]
    assert [row["name"] for row in report["families"]] == ["cache write", *names]
    assert all(0 < row["error"] <= row["allowed"] < 1e-3 for row in report["families"][1:])
    assert f"{len(names) + 1} of {len(names) + 1} families are right" in text and str(path) in text
    assert report["versions"]["aiter"] == aiter.__version__ and report["tried"]["dtype"] == "fp32"
    assert all(kernel["state"] in ("built", "present") for kernel in report["compiling"]["kernels"])
    # What is called was compiled ahead of the calls, side by side.
    assert {spec.name for spec in read_record(record)} == {kernel["name"] for kernel in report["compiling"]["kernels"]}


def test_a_wrong_result_is_named():
    family = families(on_gpu=False)[0]
    problem = Problem(family, family.small, torch.float32, CPU)
    right = problem.run()
    problem.run = lambda: (right[0] + 1e-3,)
    error, allowed = problem.errors()
    assert error > 100 * allowed
    problem.run = lambda: (right[0] * torch.nan,)
    assert problem.errors()[0] == float("inf")


def test_rates_are_of_the_work_that_is_seen():
    family = families(on_gpu=False)[0]
    causal = family.products(family.large)
    rows, heads = family.large.rows, family.large.heads_kv
    assert causal == 4.0 * 64 * heads * rows * (rows + 1) / 2
    row = selftest.try_family(family, torch.float32, CPU, {"products": 1e12, "bytes": 1e15})
    assert row["ok"] and row["bounded_by"] == "products"
    assert row["share"] == pytest.approx(causal / 1e12 / row["seconds"])


def one_that_dies():
    """Of the families the first ends its process, the second never returns."""

    def answer(task):
        if task == 0:
            os.kill(os.getpid(), signal.SIGSEGV)
        if task == 1:
            signal.pause()
        return {"ok": True}

    return answer


def test_a_kernel_that_ends_its_process_or_hangs_is_one_row(monkeypatch):
    monkeypatch.setattr(selftest, "PATIENCE_S", 3.0)
    tried = families(on_gpu=False)[:4]
    rows = list(selftest.work_through(tried, one_that_dies))
    assert [row["ok"] for row in rows] == [True, True, False, False, True, True]
    assert rows[2]["problem"] == f"ended its process, by signal {int(signal.SIGSEGV)}"
    assert rows[3]["problem"] == "did not return within 3 s"
    report = {"device": rows[0], "families": rows[1:], "seconds": 1.0}
    assert "forward, D 64: ended its process" in selftest.text(report, None)


def test_the_cache_write_is_checked(monkeypatch):
    assert selftest_cases.check_cache_write(torch.float32, CPU)
    monkeypatch.setattr(selftest_cases.kv_cache, "reshape_and_cache", lambda *arguments: None)
    assert not selftest_cases.check_cache_write(torch.float32, CPU)


def test_what_was_predicted_stands_beside_what_was_measured(monkeypatch):
    predictions = {"dtype": "bf16", "error": {"median": 0.08, "worst": 0.25}, "seconds": {"gfx942": {"decoding": 1e-3}}}
    monkeypatch.setattr(selftest, "PREDICTIONS", predictions)
    row = {"name": "decoding", "ok": True, "error": 1e-3, "allowed": 2e-3, "seconds": 2e-3, "share": 0.5}
    row |= {"products": 1e9, "bytes": 4e9, "bounded_by": "bytes"}
    for dtype, arch in (("fp16", "gfx942"), ("bf16", "sm_90a")):
        selftest.predict([row], arch, dtype)
        assert "predicted_seconds" not in row
    selftest.predict([row], "gfx942", "bf16")
    text = selftest.text({"device": {}, "families": [row], "seconds": 1.0}, None)
    assert "2 TB/s" in text and "4 TB/s" in text and "25% at worst" in text
