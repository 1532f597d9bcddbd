"""What FlashAttention 3's functions have beyond 2's: attention_chunk and qv, against float64."""

import math

import pytest
import torch
from accuracy import assert_as_accurate, assert_gradient_as_accurate, pytorch_attend_one
from problems import DEVICE, DTYPES, randn

import aiter
from aiter import flash_attn, flash_attn_arguments, reference


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def expected(query, key, value, causal, **options):
    """Of each sequence in float64, and PyTorch's."""
    exact = [reference.attend_one(*t, causal, **options)[0] for t in zip(query, key, value, strict=True)]
    pytorch = [pytorch_attend_one(*t, causal, **options) for t in zip(query, key, value, strict=True)]
    return torch.stack(exact), torch.stack(pytorch)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("causal, window", ((True, (-1, -1)), (False, (-1, -1)), (False, (9, 4))))
def test_chunks(dtype, causal, window):
    shapes = (2, 90, 4, 64), (2, 130, 2, 64), (2, 130, 2, 64)
    tensors = [randn(*shape, dtype=dtype).requires_grad_() for shape in shapes]
    for chunk in (32, 50, 1000):
        output = flash_attn.flash_attn_func(*tensors, causal=causal, window_size=window, attention_chunk=chunk)
        options = {"window": None if window == (-1, -1) else window, "chunk": chunk}
        exact, pytorch = expected(*(t.detach() for t in tensors), causal, **options)
        assert_gradient_as_accurate(output, exact, pytorch)
        grad = randn(*output.shape, dtype=dtype)
        leaves = [t.detach().double().requires_grad_() for t in tensors]
        rows = [reference.attend_one(*(t[b] for t in leaves), causal, **options)[0] for b in range(2)]
        own = [t.detach().requires_grad_() for t in tensors]
        theirs = [pytorch_attend_one(*(t[b] for t in own), causal, **options) for b in range(2)]
        for got, want, other in zip(
            torch.autograd.grad(output, tensors, grad),
            torch.autograd.grad(torch.stack(rows), leaves, grad.double()),
            torch.autograd.grad(torch.stack(theirs), own, grad),
            strict=True,
        ):
            assert_gradient_as_accurate(got, want, other)


def test_pages_before_a_chunk_are_not_looked_up():
    key, value = (torch.randn(5, 2, 16, 64, dtype=DTYPES[0], device=DEVICE) for _ in "kv")
    query = torch.randn(1, 1, 4, 64, dtype=DTYPES[0], device=DEVICE)
    table = ints(-1, -1, 0, 3).unsqueeze(0)
    how = {"attention_chunk": 32, "causal": True}
    output = aiter.flash_attn_with_kvcache(query, (key, value), table, 16, cache_seqlens=ints(50), **how)
    gathered = [reference.gather_pages(cache, ints(1, 1, 0, 3), 50) for cache in (key, value)]
    exact = reference.attend_one(query[0], *gathered, True, chunk=32)[0]
    torch.testing.assert_close(output[0].double(), exact, rtol=0, atol=1e-5 if DEVICE == "cpu" else 1e-2)
    if DEVICE == "cpu":
        table[0, 2] = -1
        with pytest.raises(ValueError, match=r"page_table\[0, 2\] is -1"):
            aiter.flash_attn_with_kvcache(query, (key, value), table, 16, cache_seqlens=ints(50), **how)


def latent(batch, seq_q, seq_k, dtype, dims, order):
    """Query, second query, key and value; the last two in one memory, one behind the other, or each in its own."""
    q, qv = (randn(batch, seq_q, 6, dim, dtype=dtype) for dim in dims)
    memory = randn(batch, seq_k, 2, sum(dims), dtype=dtype)
    k, v = memory.split(dims, -1) if order == "key first" else memory.split(dims[::-1], -1)[::-1]
    if order == "apart":
        k, v = k.clone(), v.clone()
    return q, qv, k, v


@pytest.mark.parametrize("order", ("key first", "value first", "apart"))
def test_second_query(order):
    dtype, dims = DTYPES[1], (64, 512)
    q, qv, k, v = latent(2, 9, 70, dtype, dims, order)
    joined = flash_attn_arguments.with_values(q, qv, k, v, None)
    assert (joined[1].data_ptr() in (k.data_ptr(), v.data_ptr())) == (order != "apart")
    assert joined[2] == sum(dims) ** -0.5
    parts = torch.cat((q, qv), -1), torch.cat((k, v), -1), v
    exact, pytorch = expected(*parts, True)
    output = flash_attn.flash_attn_func(q, k, v, causal=True, qv=qv)
    assert_as_accurate(output, exact, pytorch)
    starts_q, starts_k = ints(0, 9, 18), ints(0, 70, 140)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    packed = flash_attn.flash_attn_varlen_func(*flat, starts_q, starts_k, 9, 70, causal=True, qv=qv.flatten(0, 1))
    assert_as_accurate(packed.view_as(output), exact, pytorch)
    cached = flash_attn.flash_attn_with_kvcache(q, k, v, qv=qv, cache_seqlens=ints(70, 70), causal=True)
    assert_as_accurate(cached, exact, pytorch)
    pages = [t.reshape(14, 10, 2, -1) if order == "apart" else t.view(14, 10, 2, -1) for t in (k, v)]
    table = torch.arange(14, device=DEVICE).view(2, 7).int()
    paged = flash_attn.flash_attn_with_kvcache(
        q, *pages, qv=qv, cache_seqlens=ints(70, 70), block_table=table, causal=True
    )
    assert_as_accurate(paged, exact, pytorch)


@pytest.mark.skipif(DEVICE != "cpu", reason="head_dim 576 has no backward pass on a GPU")
def test_gradient_of_the_second_query():
    leaves = [t.float().requires_grad_() for t in latent(1, 9, 20, torch.float32, (8, 24), "apart")]
    q, qv, k, v = leaves
    output = flash_attn.flash_attn_func(q, k, v, qv=qv)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = reference.attend_one(torch.cat(exact[:2], -1)[0], torch.cat(exact[2:], -1)[0], exact[3][0])[0]
    grad = torch.randn_like(output)
    for got, own in zip(
        torch.autograd.grad(output, leaves, grad), torch.autograd.grad(want, exact, grad[0].double()), strict=True
    ):
        torch.testing.assert_close(got.double(), own, rtol=0, atol=2e-5)


def test_what_no_second_query_can_be():
    q, qv, k, v = latent(1, 3, 5, DTYPES[0], (64, 64), "apart")
    with pytest.raises(ValueError, match="it must be torch"):
        flash_attn.flash_attn_func(q, k, v, qv=qv[..., :32])
    with pytest.raises(TypeError, match="qv must be a torch"):
        flash_attn.flash_attn_func(q, k, v, qv=3)
    q, qv, k, v = latent(1, 3, 5, DTYPES[0], (128, 512), "apart")
    with pytest.raises(NotImplementedError, match="qv is not offered for head_dims of q and v that add up to 640"):
        flash_attn.flash_attn_func(q, k, v, qv=qv)


@pytest.mark.parametrize("packed", (False, True))
def test_signed_weights(packed):
    """S_dmask: normalised, with what is negative left out, it gives the output."""
    q, k, v = (randn(2, n, 4, 64, dtype=DTYPES[0]) for n in (40, 60, 60))
    how = {"causal": True, "return_attn_probs": True}
    if packed:
        starts = ints(0, 40, 80), ints(0, 60, 120)
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        output, _, weights = flash_attn.flash_attn_varlen_func(*flat, *starts, 40, 60, 0.3, **how)
        output = output.view_as(q)
    else:
        output, _, weights = flash_attn.flash_attn_func(q, k, v, 0.3, **how)
    assert weights.shape == (2, 4, 40, 60) and weights.dtype == q.dtype
    seen = reference.visible_keys(40, 60, True, device=q.device)
    assert not weights[:, :, ~seen].any() and (weights[:, :, seen] != 0).all()
    probabilities = weights.abs() / weights.abs().sum(-1, keepdim=True)
    kept = probabilities.masked_fill(weights < 0, 0.0) / 0.7
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", kept, v), output, rtol=0, atol=2e-2)
    fraction = float((weights < 0).float().sum() / (2 * 4 * seen.sum()))
    assert abs(fraction - 0.3) < 5 * math.sqrt(0.21 / (8 * int(seen.sum())))


@pytest.mark.parametrize("packed", (False, True))
def test_queries_of_8_bits(packed):
    """Times a scale for each sequence and KV head, in bfloat16."""
    kind = torch.float8_e4m3fn
    q, k, v = (torch.randn(2, n, heads, 64, device=DEVICE).to(kind) for n, heads in ((30, 4), (50, 2), (50, 2)))
    scales = {f"{name}_descale": torch.rand(2, 2, device=DEVICE) + 0.5 for name in "qkv"}
    wide = [
        t.float() * scales[f"{name}_descale"].repeat_interleave(t.shape[2] // 2, 1)[:, None, :, None]
        for name, t in (("q", q), ("k", k), ("v", v))
    ]
    exact, _ = expected(*wide, True)
    _, pytorch = expected(*(t.bfloat16() for t in wide), True)
    if packed:
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        output = flash_attn.flash_attn_varlen_func(
            *flat, ints(0, 30, 60), ints(0, 50, 100), 30, 50, causal=True, **scales
        ).view(2, 30, 4, 64)
    else:
        output = flash_attn.flash_attn_func(q, k, v, causal=True, **scales)
    assert output.dtype == torch.bfloat16
    assert_as_accurate(output, exact, pytorch)
    with pytest.raises(ValueError, match="q_descale has shape"):
        flash_attn.flash_attn_func(q, k, v, q_descale=torch.ones(2, 3, device=DEVICE))
