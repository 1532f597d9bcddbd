"""Dropout: which weights the operations leave out, how often, and that both passes leave out the same."""

import math

import pytest
import torch
from accuracy import assert_gradient_as_accurate, pytorch_attend_one
from problems import DEVICE, DTYPES
from torch.utils.checkpoint import checkpoint

import aiter
from aiter import dropout, kernels, reference
from aiter.errors import UnsupportedError
from aiter.layout import Sizes
from aiter.options import Options


def philox(counter, key):
    """Philox 4x32-10 as it is published, on Python's integers."""
    for _ in range(10):
        high_0, low_0 = divmod(0xD2511F53 * counter[0], 1 << 32)
        high_2, low_2 = divmod(0xCD9E8D57 * counter[2], 1 << 32)
        counter = high_2 ^ counter[1] ^ key[0], low_2, high_0 ^ counter[3] ^ key[1], low_0
        key = (key[0] + 0x9E3779B9) % (1 << 32), (key[1] + 0xBB67AE85) % (1 << 32)
    return counter


def test_philox_itself():
    """Known answers, of the authors' library (Random123)."""
    ones = 0xFFFFFFFF
    assert philox((0,) * 4, (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert philox((ones,) * 4, (ones,) * 2) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    assert philox(*pi) == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def state(seed, offset):
    return torch.tensor([seed, offset], dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize("seed, offset", ((0, 0), (-1, -1), (0x299F31D0A4093822, 0x103707344)))
def test_mask_is_made_of_philox(seed, offset):
    batch, heads, rows, keys, p = 2, 3, 21, 37, 0.37
    mask = dropout.keep_mask(state(seed, offset), p, batch, heads, rows, keys)
    for b, h, row, key in torch.cartesian_prod(*(torch.arange(n) for n in mask.shape)).tolist()[::7]:
        words = philox((key & ~9, row & ~8, b * heads + h, offset % 2**32), (seed % 2**32, (seed >> 32) % 2**32))
        bits = words[2 * bool(row & 8) + bool(key & 8)] >> 16 * (key & 1) & 0xFFFF
        assert bool(mask[b, h, row, key]) == (bits >= round(p * 65536))


def drawn(p, rng_state, rows, keys, batch=2, heads=(6, 2), dtype=DTYPES[0]):
    """The mask that an operation draws: uniform weights of unit vectors, summed."""
    query = torch.zeros(batch, rows, heads[0], 64, dtype=dtype, device=DEVICE)
    key = torch.zeros(batch, keys, heads[1], 64, dtype=dtype, device=DEVICE)
    dim = 136  # one kernel for all
    value = torch.eye(keys, dim, dtype=dtype, device=DEVICE).view(1, keys, 1, dim).expand(batch, -1, heads[1], -1)
    output = aiter.flash_attn_func(query, key, value, dropout_p=p, rng_state=rng_state)
    weights = output[..., :keys].transpose(1, 2)
    expected = dropout.scale(p) / keys
    assert ((weights == 0) | ((weights - expected).abs() <= 0.01 * expected)).all()
    return weights != 0


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("rows, keys", ((1, 70), (5, 33), (200, 130)))
def test_operations_draw_that_mask(dtype, rows, keys):
    """In every path: one row, few rows, many."""
    rng_state = state(-(2**62) + 12345, 7)
    mask = drawn(0.3, rng_state, rows, keys, dtype=dtype)
    assert torch.equal(mask, dropout.keep_mask(rng_state, 0.3, 2, 6, rows, keys))


def test_statistics():
    """Counts of what is left out, by sequence, head, row, key and among neighbours, within five standard deviations."""
    mask = dropout.keep_mask(state(2026, 1), 0.25, 3, 4, 256, 320)
    dropped = (~mask).double()
    for dims in ((1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (2,), (3,)):
        counts = dropped.sum(dims)
        trials = dropped.numel() / counts.numel()
        deviations = (counts - trials * 0.25) / math.sqrt(trials * 0.25 * 0.75)
        assert deviations.abs().max() < 5 and abs(float(deviations.square().mean()) - 1) < 5 * math.sqrt(
            2 / counts.numel()
        )
    for shift, dim in ((1, 3), (8, 3), (1, 2), (8, 2), (1, 1), (1, 0), (16, 3), (64, 2)):
        both = dropped.narrow(dim, 0, dropped.shape[dim] - shift) * dropped.narrow(
            dim, shift, dropped.shape[dim] - shift
        )
        assert abs(float(both.mean()) - 1 / 16) < 5 * math.sqrt(1 / 16 * 15 / 16 / both.numel())
    others = [dropout.keep_mask(state(*s), 0.25, 3, 4, 256, 320) for s in ((2027, 1), (2026, 2), (2026 + 2**32, 1))]
    for other in others:
        assert abs(float((mask == other).double().mean()) - 0.625) < 0.005


def test_nothing_but_places_counts():
    """Packed, padded and paged calls, other threads, more keys: a row and a key of a sequence have one decision."""
    rng_state, p = state(5, 5), 0.4
    query, key, value = (torch.randn(2, 50, 4, 64, dtype=DTYPES[0], device=DEVICE) for _ in "qkv")
    how = {"causal": True, "dropout_p": p, "rng_state": rng_state}
    whole = aiter.flash_attn_func(query, key, value, **how)
    lengths = torch.tensor([50, 50], dtype=torch.int32, device=DEVICE)
    packed = aiter.variable_length_attention(*(t.flatten(0, 1) for t in (query, key, value)), lengths, 50, **how)
    cache = tuple(t.view(10, 10, 4, 64).transpose(1, 2) for t in (key, value))
    table = torch.arange(10, dtype=torch.int32, device=DEVICE).view(2, 5)
    paged = aiter.flash_attn_with_kvcache(query, cache, table, 10, **how)
    longer = aiter.flash_attn_func(
        query[:, :30], key, value, query_offsets=torch.zeros_like(lengths), **how
    )  # the rows at the beginning
    for other, rows in ((packed.view_as(whole), 50), (paged, 50), (longer, 30)):
        torch.testing.assert_close(other, whole[:, :rows], rtol=0, atol=2e-6 if DTYPES[0] == torch.float32 else 2e-2)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(aiter.flash_attn_func(query, key, value, **how), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype, causal", ((DTYPES[0], True), (DTYPES[1], False)))
@pytest.mark.parametrize("seq_q, seq_k", ((100, 150), (40, 20), (1, 300)))
def test_against_float64(dtype, causal, seq_q, seq_k):
    torch.manual_seed(seq_q)
    shapes = (2, seq_q, 4, 64), (2, seq_k, 2, 64), (2, seq_k, 2, 64)
    tensors = [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]
    rng_state = dropout.draw_rng_state(DEVICE)
    output, lse = aiter.flash_attn_func(*tensors, causal, dropout_p=0.2, rng_state=rng_state, return_lse=True)
    grad = torch.randn_like(output)
    got = [output, *torch.autograd.grad(output, tensors, grad)]
    kept = dropout.keep_mask(rng_state, 0.2, 2, 4, seq_q, seq_k)
    exact, pytorch = [[] for _ in got], [[] for _ in got]
    for b in range(2):
        for results, attend, to in ((exact, reference.attend_one, torch.float64), (pytorch, pytorch_attend_one, dtype)):
            leaves = [t.detach()[b].to(to).requires_grad_() for t in tensors]
            result = attend(*leaves, causal, kept=kept[b], dropout_p=0.2)
            result, own_lse = result if isinstance(result, tuple) else (result, None)
            if own_lse is not None:
                torch.testing.assert_close(lse[b].double(), own_lse, rtol=1e-4, atol=2e-4)
            for into, tensor in zip(
                results, (result, *torch.autograd.grad(result, leaves, grad[b].to(to))), strict=True
            ):
                into.append(tensor.detach())
    for mine, own, theirs in zip(got, exact, pytorch, strict=True):
        assert_gradient_as_accurate(mine, torch.stack(own), torch.stack(theirs))


def linear_in_values(call):
    """<output, g> = <value, its gradient>, whatever the mask, if that was one and the same."""
    query, key, value = (torch.randn(1, 60, 2, 64, dtype=torch.float32).requires_grad_() for _ in "qkv")
    output = call(query, key, value)
    grad = torch.randn_like(output)
    (of_value,) = torch.autograd.grad(output, value, grad)
    torch.testing.assert_close((output * grad).sum(), (value * of_value).sum(), rtol=1e-3, atol=1e-3)
    return output.detach()


@pytest.mark.skipif(DEVICE != "cpu", reason="float32")
def test_both_passes_of_every_kind_of_autograd():
    def call(query, key, value):
        return aiter.flash_attn_func(query, key, value, True, dropout_p=0.5)

    linear_in_values(call)
    torch._dynamo.reset()
    linear_in_values(torch.compile(call, fullgraph=True, backend="aot_eager"))
    linear_in_values(lambda *tensors: checkpoint(call, *tensors, use_reentrant=False))
    query, key, value = (torch.randn(1, 60, 2, 64) for _ in "qkv")
    rng_state, grad = dropout.draw_rng_state("cpu"), torch.randn(1, 60, 2, 64)

    def loss(value):
        return (aiter.flash_attn_func(query, key, value, True, dropout_p=0.5, rng_state=rng_state) * grad).sum()

    torch.testing.assert_close(loss(value), (value * torch.func.grad(loss)(value)).sum(), rtol=1e-3, atol=1e-3)

    def of_one(query):
        return aiter.flash_attn_func(query[None], key, value, True, dropout_p=0.5, rng_state=rng_state)[0]

    rows = torch.func.vmap(of_one)(query.expand(3, -1, -1, -1))
    together = aiter.flash_attn_func(
        *(t.expand(3, -1, -1, -1) for t in (query, key, value)), causal=True, dropout_p=0.5, rng_state=rng_state
    )
    torch.testing.assert_close(rows, together, rtol=0, atol=0)


def test_pytorchs_generator_decides():
    tensors = [torch.randn(1, 40, 2, 64, dtype=DTYPES[0], device=DEVICE) for _ in "qkv"]
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append([aiter.flash_attn_func(*tensors, True, dropout_p=0.3) for _ in range(2)])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not torch.equal(results[0][0], results[0][1]) and not torch.equal(results[0][0], results[2][0])
    assert torch.equal(aiter.flash_attn_func(*tensors, True, dropout_p=0.0), aiter.flash_attn_func(*tensors, True))


def test_gradients_of_a_given_output():
    query, key, value = (torch.randn(1, 40, 2, 64, dtype=DTYPES[0], device=DEVICE).requires_grad_() for _ in "qkv")
    how = {"causal": True, "dropout_p": 0.3, "rng_state": state(1, 2)}
    output, lse = aiter.flash_attn_func(query, key, value, return_lse=True, **how)
    grad = torch.randn_like(output)
    expected = torch.autograd.grad(output, (query, key, value), grad)
    got = aiter.attention_backward(grad, query, key, value, output, lse, **how)
    for mine, other in zip(got[:3], expected, strict=True):
        torch.testing.assert_close(mine.float(), other.float(), rtol=2e-2, atol=1e-5 if DEVICE == "cpu" else 2e-2)
    with pytest.raises(ValueError, match="dropout_p needs the rng_state"):
        aiter.attention_backward(grad, query, key, value, output, lse, dropout_p=0.3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    (
        ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0; it must be from 0"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
        ({"dropout_p": math.nan}, ValueError, "dropout_p is nan"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p must be a float"),
        ({"dropout_p": 0.1, "rng_state": torch.zeros(2)}, ValueError, "rng_state is torch.float32"),
        ({"dropout_p": 0.1, "rng_state": torch.zeros(3, dtype=torch.int64)}, ValueError, "it must be torch.int64"),
        ({"dropout_p": 0.1, "rng_state": 5}, TypeError, "rng_state must be a torch.Tensor"),
    ),
)
def test_bad_arguments(options, error, words):
    query = torch.randn(1, 4, 2, 64)
    with pytest.raises(error, match=words):
        aiter.flash_attn_func(query, query, query, **options)


def test_no_kernel_of_a_gpu_that_knows_no_dropout():
    sizes = Sizes(**dict.fromkeys(Sizes._fields, 0) | {"batch": 1, "heads_q": 8, "heads_kv": 1, "seqlen_q": 1})
    assert kernels.forward_kernel(sizes, 64, Options()) == "attention_decode"
    assert kernels.forward_kernel(sizes, 64, Options(dropout_p=0.1)) == "attention_forward"
    with pytest.raises(UnsupportedError, match="576 has no dropout"):
        kernels.forward_kernel(sizes, 576, Options(dropout_p=0.1))
    names = {s.kernel for s in kernels.specs_for("flash_attn_func", "bf16", 64, True, "gfx942", options=("dropout",))}
    assert names == {"attention_forward"}
