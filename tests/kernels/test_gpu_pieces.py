"""Keys that are cut (kernels_src/gpu/pieces.h): each piece dealt to a block of its own or, with batch_invariant, all of
a row tile's taken in turn, on emulated AMD GPUs. What a GPU of few compute units takes in turn, one of many deals; of
few rows several blocks share a piece (kernels_src/gpu/arch/gfx9_scored_pieces.h). (For sm_90a: tests/test_cuda.py.)

With batch_invariant pieces are 2048 or 4096 keys, so these sequences are long; lengths lie around their ends.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from driver import DTYPES, attend, ints
from test_gpu_options import FORWARD, Kernel, check

from aiter import reference

WINDOW = (2500, 0)  # begins within a piece and ends in the next
FEW, MANY = 8, 304  # compute units; as few as there are chiplets
SHARED = ["score_keys", "sum_values", "add_up_pieces"]


def names(launched):
    """Of kernels, from their statistics."""
    known = "clear_counters", "attention_forward", *SHARED
    return [word for word in known if any(word in name for name in launched)]


@dataclass(frozen=True)
class Cut(Kernel):
    """A kernel, by how many keys it cuts, and its cache's dtype."""

    keys: int = 2048
    cache: torch.dtype | None = None

    def __str__(self):
        return super().__str__() + (f"-{str(self.cache).removeprefix('torch.')}" if self.cache else "")


# Each loop of each arch: by waves, alternating and in pairs.
KERNELS = (
    ("gfx90a", Cut(FORWARD, "fp16", 64, 64, "window", softcap=True, alibi=True)),
    ("gfx90a", Cut(FORWARD, "bf16", 128, 128, "causal", paged=True)),
    ("gfx942", Cut(FORWARD, "bf16", 128, 128, "window", paged=True)),
    ("gfx942", Cut(FORWARD, "fp16", 40, 88, "causal", softcap=True)),
    ("gfx942", Cut(FORWARD, "bf16", 192, 128, "causal")),
    ("gfx942", Cut(FORWARD, "bf16", 64, 64, "causal", cache=torch.float8_e4m3fnuz)),
    ("gfx950", Cut(FORWARD, "fp16", 128, 128, "window", chunk=True)),
    ("gfx950", Cut(FORWARD, "bf16", 256, 256, "", alibi=True, keys=4096)),
    ("gfx950", Cut(FORWARD, "bf16", 72, 40, "window", paged=True, cache=torch.float8_e4m3fn)),
)


def on_kernels(only=lambda kernel: True):
    cases = [case for case in KERNELS if only(case[1])]
    return pytest.mark.parametrize("target, kernel", cases, ids=[f"{t}-{k}" for t, k in cases], scope="module")


def around(keys, most_rows=40):
    """(rows, keys) of sequences that end at, before and after the end of a piece, some without rows or keys."""
    return [(9, 2 * keys + 1), (1, keys), (3, keys + 1), (0, 70), (5, 0), (1, 2 * keys), (most_rows, keys + 300)]


@on_kernels(only=lambda kernel: kernel.cache is None)
@pytest.mark.parametrize("how", ("dealt", "in turn", "shared", "no invariance"))
def test_accuracy(target, kernel, how):
    lengths = around(kernel.keys, most_rows=16 if how == "shared" else 40)
    offsets = [-3, 0, 1, 2, 3, -kernel.keys, 4]
    offsets = [n - rows + o for (rows, n), o in zip(lengths, offsets, strict=True)]
    options = {
        "cut": True,
        "batch_invariant": how != "no invariance",
        "compute_units": FEW if how == "in turn" else MANY,
    }
    for layout, sinks, where in (("starts", True, None), ("padded", False, offsets)):
        launched = {}
        check(target, kernel, lengths, (4, 2), layout, WINDOW, sinks, where, stats=launched, **options)
        assert (names(launched) == SHARED) == (how == "shared")


class Rows:
    """The last rows of a sequence of so many keys, and what a kernel makes of some of them at a time."""

    def __init__(self, target, kernel, rows, keys):
        torch.manual_seed(40)
        self.target, self.kernel, self.rows, self.keys = target, kernel, rows, keys
        heads, heads_kv, dtype = 4, 2, DTYPES[kernel.dtype]
        self.query = torch.randn(rows, heads, kernel.head_dim).to(dtype)
        self.pair = [torch.randn(keys, heads_kv, dim).to(dtype) for dim in (kernel.head_dim, kernel.value_dim)]
        options = {"window": WINDOW} if kernel.mask == "window" else {"causal": kernel.mask == "causal"}
        options |= {"softcap": 3.0} if kernel.softcap else {}
        options |= {"alibi_slopes": torch.tensor([0.3, 0.01, 0.1, 0.03])} if kernel.alibi else {}
        options |= {"chunk": 2900} if kernel.chunk else {}
        options |= {"sinks": torch.randn(heads), "batch_invariant": True}
        if kernel.cache:
            self.pair = [tensor.to(kernel.cache) for tensor in self.pair]
            options |= {"key_descale": torch.tensor([0.5]), "value_descale": torch.tensor([1.5])}
        self.options = options
        self.launched = []  # statistics of the kernels of each call
        self.whole = self.attend(0, rows)
        assert self.whole[0].isfinite().all()

    def attend(self, first, last, others=(), page_size=16, compute_units=MANY):
        """Of these rows, whose sequence stands after `others`: (rows, keys) of each."""
        lengths = [*others, (last - first, self.keys)]
        most = [max(n[side] for n in lengths) for side in (0, 1)]
        tensors = [torch.zeros(len(lengths), n, *t.shape[1:]).to(t.dtype) for n, t in zip(
            (most[0], most[1], most[1]), (self.query, *self.pair), strict=True)]  # fmt: skip
        for tensor, own in zip(tensors, (self.query[first:last], *self.pair), strict=True):
            tensor[-1, : len(own)] = own
        offsets = ints([0] * len(others) + [self.keys - self.rows + first])
        given = {"seqlens_q": ints([n[0] for n in lengths]), "seqlens_k": ints([n[1] for n in lengths])}
        if self.kernel.paged:
            pages = -(-most[1] // page_size)
            order = torch.randperm(len(lengths) * pages)
            for i in (1, 2):
                padded = tensors[i].new_zeros(len(lengths), pages * page_size, *tensors[i].shape[2:])
                padded[:, : most[1]] = tensors[i]
                tensors[i] = torch.empty_like(padded).view(len(order), page_size, *padded.shape[2:])
                tensors[i][order] = padded.view_as(tensors[i])
            given["page_table"] = order.view(len(lengths), pages).int()
        self.launched.append({})
        output, lse = attend(
            self.target, *tensors, query_offsets=offsets, compute_units=compute_units, stats=self.launched[-1],
            **given, **self.options,
        )  # fmt: skip
        return output[-1, : last - first], lse[-1, :, : last - first]

    def assert_same(self, first, last, **how):
        output, lse = self.attend(first, last, **how)
        assert torch.equal(output, self.whole[0][first:last]), (first, last, how)
        assert torch.equal(lse, self.whole[1][:, first:last]), (first, last, how)

    def kernels(self):
        """Of the last call."""
        return names(self.launched[-1])


@on_kernels()
def test_bits(target, kernel):
    """A prompt, its chunks and its tokens, on a GPU of any size, alone and in a batch, in pages of any size."""
    rows = Rows(target, kernel, 150, 2 * kernel.keys + 130)
    rows.assert_same(0, 64)
    assert rows.kernels() == ["attention_forward", "add_up_pieces"]  # dealt
    for first, last in ((64, 65), (65, 69), (149, 150)):
        rows.assert_same(first, last)
        assert rows.kernels() == SHARED
    rows.assert_same(141, 150, others=[(3, 700), (16, 1), (0, kernel.keys + 9), (2, kernel.keys)])
    assert rows.kernels() == SHARED  # though others have one piece, or none
    rows.assert_same(141, 150, others=[(16, 1)] * 4, compute_units=64)
    assert rows.kernels() == ["attention_forward", "add_up_pieces"]  # as scores of many rows go through memory
    rows.assert_same(149, 150, compute_units=FEW)
    assert rows.kernels() == ["attention_forward", "add_up_pieces"]  # as many pieces as compute units, or nearly
    rows.assert_same(90, 150, others=[(3, 700), (60, 1)])
    rows.assert_same(0, 150, compute_units=FEW, others=[(1, 900)])
    assert "add_up_pieces" not in rows.kernels()  # in turn
    rows.assert_same(149, 150, compute_units=FEW, others=[(1, 9)] * 20)
    assert rows.kernels() == ["clear_counters", "attention_forward"]  # by blocks that have several row tiles each
    for page_size in (1, 80, 7) if kernel.paged else ():
        rows.assert_same(140, 150, page_size=page_size)


@on_kernels(only=lambda kernel: kernel.cache is None)
def test_beside_what_is_seen(target, kernel):
    """Shared pieces are read in whole tiles: what stands before a window adds nothing, nor what is read past an end."""
    rows = Rows(target, kernel, 40, 2 * kernel.keys + 70)
    mask = {name: rows.options.get(name, 0) for name in ("causal", "chunk")}
    seen = reference.visible_keys(40, rows.keys, window=rows.options.get("window"), **mask)[-1]
    for tensor in rows.pair:
        tensor[~seen] = math.nan
    rows.assert_same(39, 40)
    assert rows.kernels() == SHARED
    rows.pair[1][-1] = math.inf
    assert (rows.attend(39, 40)[0] == math.inf).all()
