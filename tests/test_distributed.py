"""Attention over a sequence that is split over 2, 3 or 4 processes (gloo) is that of one process."""

import pytest
import torch

pytest.importorskip("torch.distributed")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("PyTorch without gloo", allow_module_level=True)

from distributed import cases, ranks

FP32, BF16 = torch.float32, torch.bfloat16
WORLDS = (2, 3, 4)
# batch, tokens, heads_q, heads_kv, head_dim, value_dim; tokens divide by no number of ranks.
SHAPE = (2, 71, 6, 3, 32, 32)

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
    "sinks, soft cap, ALiBi": (SHAPE, FP32, {**CAUSAL, "sinks": True, "alibi": True, "softcap": 5.0}),
    "unequal dims, heads that do not divide": ((2, 71, 10, 5, 32, 16), FP32, {"sinks": True}),
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


@pytest.mark.parametrize("options", (CAUSAL, {**DOCUMENTS, **WINDOW}, {"sinks": True}), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "zigzag"))
def test_alltoall_within_ring_between(layout, options):
    """A mesh of 2 x 2: heads are exchanged within, keys go round between."""
    ranks.run(4, cases.on_mesh, (2, 2), SHAPE, FP32, "alltoall+ring", layout, **options)


@pytest.mark.parametrize("packed", (False, True))
def test_torch_compile(packed):
    for scheme in cases.SCHEMES:
        ranks.run(2, cases.compiled, scheme, packed)
