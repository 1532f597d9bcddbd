"""Building ahead of time: what is reported is what a call will find, and an interrupt leaves nothing half done."""

import json
import signal
import subprocess
import sys
import time

import pytest
from hearing import hear_signals
from tiny import ends, left_behind, tiny_spec

from aiter import jit
from aiter.jit.cache import Cache
from aiter.jit.prewarm import BUILT, FAILED, MISSING, PRESENT, prewarm
from aiter.jit.recipe import recipe_for
from aiter.jit.spec import Spec

SPECS = [tiny_spec(d) for d in (8, 16, 24)]


def states(outcomes):
    return [outcome.state for outcome in outcomes]


def test_builds_then_finds_then_a_call_compiles_nothing(tree, cache_dir, monkeypatch):
    assert states(prewarm(SPECS, Cache(), dry_run=True)) == [MISSING] * 3
    assert not cache_dir.exists()
    outcomes = prewarm([*SPECS, SPECS[0]], Cache(), jobs=3)
    assert states(outcomes) == [BUILT] * 3
    assert [outcome.name for outcome in outcomes] == [recipe_for(spec).name for spec in SPECS]
    monkeypatch.setattr("subprocess.Popen", None)
    assert states(prewarm(SPECS, Cache())) == [PRESENT] * 3
    assert jit.get_kernel(SPECS[1]).workspace_raw(bytes(512)) == 16


def test_failures_are_told_in_their_own_words_and_the_rest_is_built(tree, cache_dir):
    broken = Spec("broken", "fp32", 8, False, SPECS[0].arch)
    (tree / "cpu" / "broken.cpp").write_text("#error so it is\n")
    outcomes = prewarm([broken, SPECS[0], Spec("unknown", "fp32", 8, False, SPECS[0].arch)], Cache())
    assert states(outcomes) == [FAILED, BUILT, FAILED]
    assert "#error so it is" in outcomes[0].error and "there is no kernel 'unknown'" in outcomes[2].error


def test_a_cache_that_cannot_be_written_is_a_failure(tree, cache_dir):
    cache_dir.write_text("a file")
    outcomes = prewarm(SPECS[:1], Cache())
    assert states(outcomes) == [FAILED] and "cannot be written" in outcomes[0].error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_leaves_nothing_half_done(number, tree, cache_dir, compiler, tmp_path):
    calls = compiler("sleep 1000 & sleep 1000")
    script = f"""
import sys, pathlib
from aiter.cli import main
from aiter.jit import sources
sources.find_root = lambda: pathlib.Path({str(tree)!r})
sys.exit(main(sys.argv[1:]))
"""
    record = tmp_path / "record"
    record.write_text("".join(f"{json.dumps(spec.to_json())}\n" for spec in SPECS))
    command = [sys.executable, "-c", script, "prewarm", "--replay", str(record), "--jobs", "2"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=hear_signals)
    deadline = time.monotonic() + 60
    while len(calls.read_text().split()) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "nothing was left half done" in errors and "Traceback" not in errors
    assert left_behind(cache_dir) == [] and not list(cache_dir.glob("tiny*"))
    assert all(ends(int(group)) for group in calls.read_text().split())
