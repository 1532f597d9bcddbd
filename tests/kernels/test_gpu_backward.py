"""The backward kernel, on emulated AMD GPUs and on a CUDA device, against float64 autograd: the error is at most twice
that of PyTorch's own backward in the same dtype (tests/accuracy.py), taken over all sequences of a call.

Compiling takes longer than running: each test sends many problems through one kernel.
"""

import math

import torch
from accuracy import assert_as_accurate, pytorch_attend_one
from driver import DTYPES, EMULATED, GPU_DTYPES, GPUS, gradients, on_targets

from aiter import reference

ROWS = 128  # own rows of a block (sm_90a has other numbers too: what matters is that there is more than one block)
TILE = 32  # passing rows of a tile; 64 on sm_90a, 128 in one pass at 64 columns
NAMES = ("grad_query", "grad_key", "grad_value")

# On the emulated GPUs, every head_dim on every arch, and all combinations on one; on CUDA, everything on everything.
CASES = {
    arch: [
        (("fp16", "bf16")[(i + j) % 2], head_dim, (i + j // 2) % 2 == 1)
        for j, head_dim in enumerate((40, 64, 80, 128, 256))
    ]
    for i, arch in enumerate(EMULATED)
}
CASES["gfx942"] += [("bf16", 8, True), ("bf16", 128, True), ("fp16", 128, True)]
CASES["gfx942"] += [("bf16", 64, False), ("fp16", 64, True)]
CASES["cuda"] = [(d, h, c) for h in (8, 40, 64, 80, 96, 128, 192, 256) for d in GPU_DTYPES for c in (False, True)]
PARAMETERS = [(target, *case) for target in GPUS for case in dict.fromkeys(CASES[target])]


class Sequence:
    """One sequence: query, key, value and the gradients of output and log-sum-exp; what they must give."""

    def __init__(self, dtype, head_dim, causal, seq_q, seq_k, heads_q, heads_kv, grad_lse, scale, score=None):
        query, grad_output = (torch.randn(seq_q, heads_q, head_dim).to(dtype) for _ in "qg")
        key, value = (torch.randn(seq_k, heads_kv, head_dim).to(dtype) for _ in "kv")
        if score is not None:  # about all of them
            query, key = 1 + query / 16, (score * head_dim**-0.5 + key / 16).to(dtype)
        self.inputs = query, key, value, grad_output
        self.grad_lse = torch.randn(heads_q, seq_q) if grad_lse else None

        # PyTorch has no answer for rows that see nothing; theirs is known.
        blind = min(max(seq_q - seq_k, 0), seq_q) if causal else seq_q * (seq_k == 0)
        leaves = [t.double().requires_grad_() for t in (query, key, value)]
        output, lse = reference.attend_one(*leaves, causal, scale)
        self.output, self.lse = output.detach().to(dtype), lse.detach().float()
        if blind == seq_q:
            self.expected = self.pytorch = [torch.zeros_like(t) for t in (query, key, value)]
            return
        loss = (output * grad_output).sum()
        if grad_lse:
            loss = loss + (lse * self.grad_lse)[:, blind:].sum()
        self.expected = torch.autograd.grad(loss, leaves)

        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        loss = (pytorch_attend_one(leaves[0][blind:], *leaves[1:], causal, scale) * grad_output[blind:]).sum()
        if grad_lse:  # in float32, as autograd's formula for it would
            scores = torch.einsum("qhd,khd->hqk", leaves[0], leaves[1].repeat_interleave(heads_q // heads_kv, 1))
            scores = scores.float() * (head_dim**-0.5 if scale is None else scale)
            if causal:
                hidden = torch.arange(seq_k) > torch.arange(seq_q).unsqueeze(1) + (seq_k - seq_q)
                scores = scores.masked_fill(hidden, -math.inf)
            loss = loss + (scores[:, blind:].logsumexp(2) * self.grad_lse[:, blind:]).sum()
        self.pytorch = torch.autograd.grad(loss, leaves)


def batch(tensors, longest, filling):
    """Sequences of different lengths as one padded batch."""
    padded = torch.full((len(tensors), longest, *tensors[0].shape[1:]), filling, dtype=tensors[0].dtype)
    for b, tensor in enumerate(tensors):
        padded[b, : len(tensor)] = tensor
    return padded


def check(
    target, dtype, head_dim, causal, lengths, heads, form="padded", grad_lse=False, scale=None, longest=None, score=None
):
    """lengths: (queries, keys) of each sequence. Everything in the padding is NaN."""
    made = [Sequence(DTYPES[dtype], head_dim, causal, *n, *heads, grad_lse, scale, score) for n in lengths]
    longest = longest or [max(n[side] for n in lengths) for side in (0, 1)]
    seqlens = [torch.tensor([n[side] for n in lengths], dtype=torch.int32) for side in (0, 1)]
    sides = (0, 1, 1, 0)
    if form == "packed":
        *tensors, grad_output = (torch.cat(tensors) for tensors in zip(*(s.inputs for s in made), strict=True))
        output = torch.cat([s.output for s in made])
        lse = torch.cat([s.lse for s in made], 1)
        grad = torch.cat([s.grad_lse for s in made], 1) if grad_lse else None
        options = {"max_seqlen": longest}
        results = gradients(target, *tensors, output, lse, grad_output, grad, causal, scale, *seqlens, **options)
    else:
        *tensors, grad_output = (
            batch(tensors, longest[side], math.nan)
            for side, tensors in zip(sides, zip(*(s.inputs for s in made), strict=True), strict=True)
        )
        output = batch([s.output for s in made], longest[0], math.nan)
        lse, grad = (
            None if terms[0] is None else batch([t.T for t in terms], longest[0], math.nan).transpose(1, 2).contiguous()
            for terms in ([s.lse for s in made], [s.grad_lse for s in made])
        )
        if form == "dense":
            seqlens = (None, None)
        results = gradients(target, *tensors, output, lse, grad_output, grad, causal, scale, *seqlens)
    for i, (name, result) in enumerate(zip(NAMES, results, strict=True)):
        if form != "packed":
            for b, n in enumerate(lengths):
                assert not result[b, n[sides[i]] :].any(), f"{name}: padding rows must be zero"
            result = torch.cat([result[b, : n[sides[i]]] for b, n in enumerate(lengths)])
        expected, pytorch = (torch.cat([getattr(s, which)[i] for s in made]) for which in ("expected", "pytorch"))
        try:
            assert_as_accurate(result, expected, pytorch)
        except AssertionError as error:
            raise AssertionError(f"{name}, {form}, lengths {lengths}, heads {heads}: {error}") from None
    return results


@on_targets(PARAMETERS)
def test_dense(target, dtype, head_dim, causal):
    """More and fewer queries than keys, lengths around the tiles, query heads that share a KV head."""
    check(target, dtype, head_dim, causal, [(ROWS + 1, TILE + 1)], (2, 1), "dense")
    check(target, dtype, head_dim, causal, [(TILE - 1, ROWS + 3)] * 2, (2, 2), "dense", grad_lse=True)
    check(target, dtype, head_dim, causal, [(2 * TILE, 2 * TILE)], (1, 1), "dense", scale=-0.3)


@on_targets(PARAMETERS)
def test_padded_and_packed(target, dtype, head_dim, causal):
    lengths = [(TILE + 1, ROWS + 2), (0, 3), (1, 1), (67, 20), (5, 0)]
    for form in ("padded", "packed"):
        check(target, dtype, head_dim, causal, lengths, (2, 1), form, grad_lse=form == "packed")


@on_targets([p for p in PARAMETERS if p[0] == "cuda"])
def test_many_tiles_twice_the_same(target, dtype, head_dim, causal):
    """Long enough for every stage to be used many times over; a second run gives the same bits."""
    torch.manual_seed(1)
    first = check(target, dtype, head_dim, causal, [(1000, 1300), (700, 333)], (4, 2), "padded", grad_lse=True)
    torch.manual_seed(1)
    second = check(target, dtype, head_dim, causal, [(1000, 1300), (700, 333)], (4, 2), "padded", grad_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_targets([p for p in PARAMETERS if p[0] == "cuda" and p[2] in (64, 96, 128, 256)])
def test_one_pass(target, dtype, head_dim, causal):
    """On NVIDIA, the longest lengths decide whether all gradients come from one pass, as here. There are enough
    sequences for it to go through some from the first keys on, through others from the last. Twice the same bits.
    """
    lengths, how = [(150 + 13 * i, 400 - 21 * i) for i in range(18)], {"grad_lse": True, "longest": (1024, 1024)}
    for form in ("padded", "packed"):
        torch.manual_seed(1)
        first = check(target, dtype, head_dim, causal, lengths, (4, 1), form, **how)
        torch.manual_seed(1)
        second = check(target, dtype, head_dim, causal, lengths, (4, 1), form, **how)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_targets([p for p in PARAMETERS if not p[3]])
def test_low_scores(target, dtype, head_dim, causal):
    """A key that a tile has room for and the sequence does not have is zeros, and so is its score. Where all others are
    very low, its weight by their log-sum-exp is infinite: it must not get into any gradient, not even times zero."""
    low = {"fp16": -25, "bf16": -100}[dtype]
    check(target, dtype, head_dim, causal, [(TILE + 1, ROWS + 3)], (2, 1), "dense", score=low)
    if target == "cuda":  # all gradients in one pass: as in test_one_pass
        lengths = [(150 + 13 * i, 400 - 21 * i) for i in range(18)]
        check(target, dtype, head_dim, causal, lengths, (4, 1), "packed", longest=(1024, 1024), score=low)


@on_targets([p for p in PARAMETERS if not p[3] and p[2] in (64, 128, 256)])
def test_tokens_far_apart(target, dtype, head_dim, causal):
    """2^23 elements, which are 2^24 bytes."""
    sequence = Sequence(DTYPES[dtype], head_dim, causal, 4, 4, 1, 1, False, None)
    results = (sequence.output[None], sequence.lse[None])
    for far in range(4):
        inputs = [t[None] for t in sequence.inputs]
        memory = torch.zeros(4 << 23, dtype=DTYPES[dtype]).as_strided(
            inputs[far].shape, (4 << 23, 1 << 23, head_dim, 1)
        )
        inputs[far] = memory.copy_(inputs[far])
        *tensors, grad_output = inputs
        for got, expected, pytorch in zip(
            gradients(target, *tensors, *results, grad_output), sequence.expected, sequence.pytorch, strict=True
        ):
            assert_as_accurate(got[0], expected, pytorch)


@on_targets([p for p in PARAMETERS if p[0] != "cuda"])
def test_cost(target, dtype, head_dim, causal):
    """What the design promises of the machine code, counted by the emulator."""
    query, key, value, grad = (torch.randn(1, 2 * ROWS, 1, head_dim).to(DTYPES[dtype]) for _ in range(4))
    stats = {}
    gradients(target, query, key, value, query, torch.zeros(1, 1, 2 * ROWS), grad, causal=causal, stats=stats)
    for name, cost in stats.items():
        if "lse_and_delta" in name:
            continue
        loop = cost["main_loop"]
        assert loop["lds_conflicts"] < 0.05, name
        assert loop["narrowest_load"] is None or loop["narrowest_load"] >= 8, name
        if head_dim <= 128:
            assert cost["scratch_bytes"] == 0, name
