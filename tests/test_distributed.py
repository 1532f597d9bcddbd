"""Attention over a sequence that is split over 2, 3 or 4 processes (gloo) is that of one process."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("PyTorch without gloo", allow_module_level=True)

from distributed import cases, ranks

from aiter.distributed import allgather, context_parallel_attention, ring
from aiter.distributed.alltoall import heads_of
from aiter.distributed.cost import Machine, Problem, choose, predict
from aiter.distributed.layout import Run, by_documents, from_runs, named, runs_of
from aiter.distributed.needs import Mask

FP32, BF16 = torch.float32, torch.bfloat16
WORLDS = (2, 3, 4)
# batch, tokens, heads_q, heads_kv, head_dim, value_dim; tokens divide by no number of ranks. Up to head_dim 16 a score
# has the same bits in a part as in the whole: scores of few keys are summed in shorter parts (cpu/packed.h).
SHAPE = (2, 71, 6, 3, 16, 16)

CAUSAL = {"causal": True}
WINDOW = {"window_size": (9, 4)}
# Documents that cross ranks, an empty one, and rows behind the last that are in none.
DOCUMENTS = {"cu_seqlens": [0, 5, 5, 37, 61, 68]}
CALLS = {
    "full": (SHAPE, FP32, {}),
    "causal": (SHAPE, FP32, CAUSAL),
    "causal bf16": (SHAPE, BF16, CAUSAL),
    "full bf16, one KV head": ((1, 71, 4, 1, 32, 32), BF16, {}),
    "window": (SHAPE, FP32, WINDOW),
    "causal window": (SHAPE, FP32, {**CAUSAL, "window_size": (11, -1)}),
    "documents": (SHAPE, FP32, DOCUMENTS),
    "causal documents": (SHAPE, FP32, {**DOCUMENTS, **CAUSAL}),
    "documents, window": (SHAPE, FP32, {**DOCUMENTS, **WINDOW}),
    "sinks, soft cap, ALiBi": (SHAPE, FP32, {"sinks": True, "alibi": True, "softcap": 5.0}),
    "unequal dims, heads that do not divide": ((2, 71, 10, 5, 16, 32), FP32, {"sinks": True}),
    "few tokens and heads": ((1, 3, 2, 1, 32, 32), FP32, CAUSAL),
    "output alone": (SHAPE, FP32, {**CAUSAL, "with_lse": False, "softmax_scale": 0.3}),
}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("scheme", cases.SCHEMES)
@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
def test_equals_one_process(world, scheme, layout):
    """Results and gradients, every kind of call. Load balancing with a full mask is one of them (others crash), and so
    are documents across ranks (others have wrong gradients)."""
    for name, (shape, dtype, options) in CALLS.items():
        try:
            ranks.run(world, cases.attention, shape, dtype, scheme, layout, **options)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_positions_of_any_layout():
    """A layout that no name has: runs of uneven length, one rank with few rows."""
    positions = [[*range(20, 30), *range(50, 71)], [*range(0, 20), 40], [*range(30, 40), *range(41, 50)]]
    for scheme in cases.SCHEMES:
        for options in (CAUSAL, WINDOW, {**DOCUMENTS, **CAUSAL}):
            ranks.run(3, cases.attention, SHAPE, FP32, scheme, positions, **options)
        ranks.run(3, cases.attention, SHAPE, FP32, scheme, "zigzag of documents", **DOCUMENTS, **CAUSAL)


def test_documents_cut_one_by_one_give_all_ranks_the_same_to_do():
    """Pairs of query and key, of long documents between short ones; a layout of the whole sequence is far off."""
    ends, total, world = (0, 3000, 11000, 11010, 11030, 12000, 20000, 29000, 32000), 32000, 4
    mask = Mask(-1, 0, ends)

    def imbalance(layout):
        work = [
            sum(
                part.length * (part.start + part.stop - 2 * document.start) / 2
                for run in runs
                for document in mask.documents(run)
                for part in [run.within(document)]
            )
            for runs in layout.runs
        ]
        return max(work) * world / sum(work)

    cut = by_documents("zigzag", ends, total, world)
    assert from_runs(cut.runs) == cut
    assert imbalance(cut) < 1.03 < 1.15 < imbalance(named("zigzag", total, world))
    assert max(map(cut.rows, range(world))) - min(map(cut.rows, range(world))) <= 2 * len(ends)
    assert max(len(runs) for runs in cut.runs) <= 2 * len(ends)


@pytest.mark.parametrize("options", (CAUSAL, {**DOCUMENTS, **WINDOW}, {"sinks": True}), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
def test_alltoall_within_ring_between(layout, options):
    """A mesh of 2 x 2: heads are exchanged within, keys go round between."""
    ranks.run(4, cases.on_mesh, (2, 2), SHAPE, FP32, "alltoall+ring", layout, **options)


@pytest.mark.parametrize("packed", (False, True))
def test_torch_compile(packed):
    for scheme in cases.SCHEMES:
        ranks.run(2, cases.compiled, scheme, packed)


@pytest.mark.parametrize("scheme", cases.SCHEMES)
def test_results_repeat_bit_for_bit(scheme):
    ranks.run(3, cases.twice, scheme)


@pytest.mark.parametrize(
    ("kind", "told"),
    (
        ("option", r"window \(left, right\): \(-1, 0\) on ranks 0, 1, \(3, 0\) on rank 2"),
        ("shape", r"query \(batch, heads, head_dim\): \(1, 4, 32\) on ranks 0, 1, \(2, 4, 32\) on rank 2"),
        ("heads", "query .*on ranks 0, 1, .* on rank 2"),
        ("rows", r"the ranks have \[8, 8, 5\] rows"),
        ("gradient", "gradients wanted: False on ranks 0, 1, True on rank 2"),
        ("lse", "return_lse: False on ranks 0, 1, True on rank 2"),
        ("scheme", "scheme: ring on ranks 0, 1, allgather on rank 2"),
        ("positions", "layout: contiguous on ranks 0, 1, positions on rank 2"),
        ("documents", r"cu_seqlens: \(0, 4, 16\) on ranks 0, 1, \(0, 3, 16\) on rank 2"),
    ),
)
def test_ranks_that_disagree_all_raise(kind, told):
    """Nobody hangs, everybody is told who differs, and the next call works."""
    for raised in ranks.run(3, cases.disagreement, kind):
        assert re.search(told, raised), raised


def test_positions_are_told_once():
    assert ranks.run(2, cases.positions_are_told_once) == [[1, 2, 2, 2, 3, 3]] * 2


@pytest.mark.parametrize("scheme", cases.SCHEMES)
def test_a_rank_that_made_ready_for_other_rows_begins_again(scheme):
    assert ranks.run(2, cases.others_have_other_rows, scheme) == [[35] * 4, [36, 35, 36, 35]]


def test_what_one_rank_refuses_ends_the_call_on_all():
    *others, own = ranks.run(3, cases.disagreement, "refused")
    assert own.startswith("ValueError: key has dtype") or "key" in own, own
    for raised in others:
        assert raised.startswith("RankMismatchError") and "rank 2 raised" in raised and own.split(": ", 1)[1] in raised


@pytest.mark.parametrize("scheme", ("allgather", "ring"))
def test_a_rank_that_dies_ends_the_others(scheme):
    mortal = ranks.Ranks(3)
    with pytest.raises(AssertionError, match="rank 2: the process ended") as ended:
        mortal.run(cases.dies, scheme)
    # The others answered: mostly at once, by the connection's end; where one waits for the other, by gloo's timeout.
    assert "rank 0" not in str(ended.value) and "rank 1" not in str(ended.value)


@pytest.mark.parametrize("layout", ("contiguous", "zigzag", "positions"))
def test_shard_and_unshard(layout):
    if layout == "positions":
        ranks.run(2, cases.shards_by_positions, [[0, 1, 2, 9, *range(15, 23)], [*range(3, 9), *range(10, 15)]])
        return
    ranks.run(3, cases.shards, layout)


@pytest.mark.parametrize(
    ("seq_q", "options"),
    (
        (1, {}),
        (1, {"sinks": True, "window_size": (6, 0)}),
        (3, {"causal": True}),
    ),
    ids=str,
)
def test_decoding_over_a_split_cache(seq_q, options):
    ranks.run(3, cases.decoding, (4, 2), seq_q, options)


def test_allgather_takes_one_further_part_of_keys_and_values():
    """Beside output, log-sum-exp, and the log-sum-exp of a piece: with two KV heads a rank, or more. Backward three."""
    for heads_q, heads_kv in ((8, 8), (16, 4)):
        for peak, output, part, lse, backward, gradients in ranks.run(2, cases.peak_memory, heads_q, heads_kv):
            assert output < peak <= output + part + 1.5 * lse
            assert backward <= gradients + 3 * part + output


@pytest.mark.parametrize("name", ("contiguous", "zigzag"))
def test_layouts_hold_every_position_once(name):
    for world in (1, 2, 3, 7):
        for total in (1, 2, 6, 7, 100, 101):
            layout = named(name, total, world)
            assert from_runs(layout.runs) == layout and layout.total == total
            assert max(map(layout.rows, range(world))) - min(map(layout.rows, range(world))) <= (1, 2)[name == "zigzag"]
    assert named("zigzag", 16, 2).runs == ((Run(0, 4), Run(12, 16)), (Run(4, 12),))
    assert named("zigzag", 16, 4).merged(2) == named("zigzag", 16, 2)


def test_layouts_that_are_none():
    with pytest.raises(ValueError, match="must ascend"):
        runs_of(torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="position 2 is held twice"):
        from_runs(((Run(0, 3),), (Run(2, 5),)))
    with pytest.raises(ValueError, match="position 3 is held by no rank"):
        from_runs(((Run(0, 3),), (Run(4, 5),)))


def test_windows_send_only_what_is_seen():
    """8 ranks of 100 rows, 30 keys back: each rank is sent the 30 before its own, from its neighbour alone."""
    layout, mask = named("contiguous", 800, 8), Mask(30, 0, (0, 800))
    for rank in range(1, 8):
        plan = allgather.plan_of(layout, rank, mask, False)
        assert [(peer, rows.length) for peer, rows in plan.receives] == [(rank - 1, 30)]
        assert plan.rows == 130
        halves = ring.halves_of(layout, rank, mask, False)
        assert sum(half.rows for half in halves[1:]) == 30
    documents = Mask(-1, 0, (0, 150, 800))  # of a causal document that ends, nothing is sent on
    assert [peer for peer, _ in allgather.plan_of(layout, 1, documents, False).receives] == [0]
    assert [peer for peer, _ in allgather.plan_of(layout, 3, documents, False).receives] == [1, 2]


def test_pieces_are_as_many_as_memory_asks_for():
    """Two of them hold no more rows of a head than a rank has: few where a window wants little of others."""
    causal = Mask(-1, 0, (0, 800))
    assert allgather.pieces_for(named("zigzag", 800, 4), causal) == 8
    assert allgather.pieces_for(named("zigzag", 800, 2), causal) == 4
    assert allgather.pieces_for(named("contiguous", 800, 8), Mask(30, 0, (0, 800))) == 3
    assert allgather.pieces_for(named("contiguous", 800, 8), Mask(-1, 0, tuple(range(0, 900, 100)))) == 2


@pytest.mark.parametrize("heads", ((10, 5), (6, 3), (4, 1), (2, 2), (32, 8), (3, 1)))
def test_heads_are_dealt_out_evenly(heads):
    heads_q, heads_kv = heads
    for world in (1, 2, 3, 4, 5, 8):
        dealt = [heads_of(rank, world, heads_q, heads_kv) for rank in range(world)]
        pairs = [
            (q, part.keys.start + (q - part.queries.start) * part.keys.length // part.queries.length)
            for parts in dealt
            for part in parts
            for q in range(part.queries.start, part.queries.stop)
        ]
        assert pairs == [(q, q * heads_kv // heads_q) for q in range(heads_q)]
        counts = [sum(part.queries.length for part in parts) for parts in dealt]
        assert max(counts) - min(counts) <= 1 and max(map(len, dealt)) <= 3


@pytest.mark.parametrize(
    ("model_type", "config"),
    (
        ("llama", {}),
        ("mistral", {"sliding_window": 7}),
        ("llama", {"documents": True}),
    ),
    ids=str,
)
def test_a_transformers_model_trains_as_on_one_process(model_type, config):
    pytest.importorskip("transformers")
    ranks.run(4, cases.training, model_type, 4, "allgather", **config)


def test_what_transformers_asks_of_one_rank_is_refused_on_all():
    pytest.importorskip("transformers")
    own, *others = ranks.run(3, cases.refused_by_transformers)
    assert "attention_mask hides tokens" in own
    assert all("rank 0 raised" in other and "attention_mask hides tokens" in other for other in others)


@pytest.mark.parametrize("checkpoint", (False, True))
def test_fsdp_and_activation_checkpointing(checkpoint):
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this PyTorch has no fully_shard")
    ranks.run(4, cases.sharded_model, checkpoint)


def test_beside_tensor_parallelism():
    ranks.run(4, cases.beside_tensor_parallelism)


def test_the_cost_model():
    """Of any machine: shares of time are shares, more bandwidth is no slower, and auto takes the fastest."""
    causal = Problem(131072, 1, 32, 8, 128, 128, 2, 0.5, 7 / 8, 1.0, 2, True)
    window = causal._replace(seen=0.01, span=0.02, runs=1)
    machine = Machine()
    for problem in (causal, window, causal._replace(backward=False)):
        times = {scheme: predict(scheme, problem, 8, machine).total for scheme in cases.SCHEMES}
        assert min(times, key=times.get) == choose(problem, 8, machine)
        for scheme in (*cases.SCHEMES, "alltoall+ring"):
            slow, fast = (predict(scheme, problem, 8, machine._replace(within=rate), 4) for rate in (1e11, 1e12))
            assert 0 < fast.efficiency <= 1 and fast.total <= slow.total and fast.compute == slow.compute
    # A network, heads enough for all, and a mask that wants every key: exchanges within nodes, keys between them.
    far = causal._replace(tokens=2097152)
    assert predict("alltoall+ring", far, 64, machine, 8).total < predict("ring", far, 64, machine).total
    assert predict("ring", window, 8, machine).total < predict("alltoall", window, 8, machine).total
    with pytest.raises(ValueError, match="there are allgather"):
        predict("gather", causal, 8, machine)


@pytest.mark.parametrize("world", (2, 4))
def test_auto_takes_what_was_measured_to_be_fastest(world, monkeypatch):
    """Or what is within 6 % of it, in every case of the figures."""
    root = Path(__file__).parents[1]
    monkeypatch.setattr(sys, "path", [str(root / "benchmarks"), *sys.path])
    from context_parallel_model import problem

    figures = json.loads((root / "docs" / "figures" / f"context-parallel-{world}-h200.json").read_text())
    for case in figures["cases"]:
        heads, options = (case["heads_q"], case["heads_kv"]), (case["backward"], case["window"])
        of_case = problem(case["tokens"], world, heads, *options, documents=case["documents"])
        measured = {scheme: case["FLOP/s"][scheme] for scheme in cases.SCHEMES}
        assert measured[choose(of_case, world, Machine())] > 0.94 * max(measured.values()), case["case"]
    assert len(figures["cases"]) >= 10


def test_the_page_runs_on_four_processes_as_on_one():
    pytest.importorskip("transformers")
    path = str(Path(__file__).parents[1] / "docs" / "context_parallel.md")
    (alone,) = ranks.run(1, cases.page, path)
    for losses in ranks.run(4, cases.page, path):
        assert losses == pytest.approx(alone, abs=2e-4)


def test_no_collective_waits_for_a_compiler():
    """A rank that has nothing to compile waits for one that has, beyond the patience of the group."""
    fresh = ranks.Ranks(2)
    try:
        assert fresh.run(cases.slow_compiler) == [[2.5], []]
    finally:
        fresh.end()


def test_bad_arguments():
    ranks.run(1, cases.bad_arguments)
    with pytest.raises(RuntimeError, match="init_process_group"):
        context_parallel_attention(*(torch.randn(1, 8, 2, 32) for _ in range(3)))


def test_the_model_of_larger_machines_says_that_it_predicts(monkeypatch, capsys, tmp_path):
    """And prints what was measured beside it."""
    root = Path(__file__).parents[1]
    monkeypatch.setattr(sys, "path", [str(root / "benchmarks"), *sys.path])
    import context_parallel_model

    measured = {
        "case": "forward", "ranks": 4, "tokens": 65536, "heads_q": 32, "heads_kv": 8, "head_dim": 128,
        "backward": False, "window": None, "one GPU, FLOP/s": 5e14, "FLOP/s": {"allgather": 4.5e14, "other": 1e14},
    }  # fmt: skip
    (tmp_path / "measured.json").write_text(json.dumps({"cases": [measured]}))
    monkeypatch.setattr(sys, "argv", ["model", "--measured", str(tmp_path / "measured.json")])
    context_parallel_model.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("predicted")
    assert [int(line.split()[0]) for line in lines[3:11]] == list(context_parallel_model.WORLDS)
    assert "measured  0.90   predicted  0.8" in lines[-1]


def test_the_operator_is_a_good_one():
    ranks.run(1, cases.operator_checks)
