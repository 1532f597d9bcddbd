"""States of PyTorch in which a call may not go straight to a kernel: each gives the right result, or says no."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.autograd import forward_ad

import aiter
from aiter import torch_state


def qkv(batch=2, seqlen=9, heads=2, head_dim=16):
    return [torch.randn(batch, seqlen, heads, head_dim) for _ in range(3)]


def attend(q, k, v):
    return aiter.flash_attn_func(q, k, v, causal=True)


def exact(q, k, v):
    """In float64, differentiable in every way."""
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril().logical_not()
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def test_plain_is_plain():
    tensors = qkv()
    assert torch_state.is_plain(*tensors)
    with torch.inference_mode():
        assert torch_state.is_plain(*qkv())
    assert torch_state.is_plain(torch.nn.Parameter(tensors[0]), *tensors[1:])


def test_jit_trace_records_the_operator():
    tensors = qkv()
    attend(*tensors)  # the shape has been seen
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(attend, tensors)
    assert "aiter::attention" in [node.kind() for node in traced.graph.nodes()]
    other = qkv(seqlen=12)
    torch.testing.assert_close(traced(*other), attend(*other), rtol=0, atol=0)


def test_forward_mode_is_refused():
    q, k, v = qkv()
    with pytest.raises(NotImplementedError, match="forward-mode"), forward_ad.dual_level():
        attend(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda q: attend(q, k, v), (q,), (torch.ones_like(q),))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.linearize(lambda q: attend(q, k, v), q)
    with forward_ad.dual_level():  # no tangent: nothing to refuse
        torch.testing.assert_close(attend(q, k, v), exact(q, k, v).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("position", range(3))
def test_lazily_negated_tensors(position):
    tensors, negative = qkv(), qkv()
    negative = list(tensors)
    negative[position] = torch._neg_view(tensors[position])
    tensors[position] = -tensors[position]
    torch.testing.assert_close(attend(*negative), attend(*tensors), rtol=0, atol=0)


def test_vmap_over_vjp():
    q, k, v = qkv(batch=1)
    cotangents = torch.randn(3, *q.shape)
    _, pull = torch.func.vjp(attend, q, k, v)
    _, pull_exact = torch.func.vjp(exact, q, k, v)
    for got, expected in zip(torch.func.vmap(pull)(cotangents), torch.func.vmap(pull_exact)(cotangents), strict=True):
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_the_layout_of_what_was_saved():
    q, k, v = qkv(seqlen=90)
    output, lse = torch.ops.aiter.attention(q, k, v, None, None, None, True, 0.25, 0)
    grad = torch.randn_like(output)
    grad_lse = torch.randn_like(lse)
    expected = torch.ops.aiter.attention_backward(grad, grad_lse, q, k, v, output, lse, None, None, True, 0.25, 0)
    heads_first = output.transpose(1, 2).contiguous().transpose(1, 2)
    strided_lse = lse.transpose(1, 2).contiguous().transpose(1, 2)
    expanded = torch.ones(()).expand_as(output)
    got = torch.ops.aiter.attention_backward(
        grad.transpose(0, 1).contiguous().transpose(0, 1),
        *(grad_lse, q, k, v, heads_first, strided_lse, None, None, True, 0.25, 0),
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    ones = torch.ops.aiter.attention_backward(
        torch.ones_like(output), None, q, k, v, output, lse, None, None, True, 0.25, 0
    )
    got = torch.ops.aiter.attention_backward(expanded, None, q, k, v, output, lse, None, None, True, 0.25, 0)
    for a, b in zip(got, ones, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_operator_converts_lengths_and_refuses_heads():
    x, lengths = torch.randn(7, 2, 16), torch.tensor([3, 4], dtype=torch.int32)

    def call(query, key, lengths):
        return torch.ops.aiter.attention(query, key, key, lengths, lengths, None, True, 0.25, 4)[0]

    expected = call(x, x, lengths)
    assert torch.equal(call(x, x, lengths.long()), expected)
    assert torch.equal(call(x, x, torch.stack([lengths, lengths + 9], 1)[:, 0]), expected)
    for query, given, words in (
        (torch.randn(7, 3, 16), lengths, "3 heads"),
        (x.half(), lengths, "dtype"),
        (x[..., :12], lengths, "head_dim"),
        (x, lengths.float(), "dtype torch.float32"),
        (x, lengths[:1].long() + 2**33, r"seqlens_q\[0\]"),
        (x, None, "lengths"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            call(query, x, given)


def test_a_profile_names_the_call():
    tensors = qkv()
    attend(*tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        attend(*tensors)
    assert "aiter::attention" in [event.key for event in profile.key_averages()]


def test_a_mode_sees_the_operator():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Mode():
        attend(*qkv())
    assert any("aiter.attention" in name for name in seen)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


COMPILED = {
    "packed, another longest length": (
        lambda q, n, longest: aiter.variable_length_attention(q, q, q, n, longest),
        [
            (torch.randn(a + b, 2, 16), torch.tensor([a, b], dtype=torch.int32), max(a, b))
            for a, b in ((3, 4), (2, 7), (9, 5), (6, 6))
        ],
    ),
    "padded, max_seq_len from the shape": (
        lambda q, n: aiter.variable_length_attention(q, q, q, n, q.shape[1]),
        [(torch.randn(2, s, 2, 16), ints(2, s)) for s in (5, 6, 9, 12)],
    ),
    "another block_size": (
        lambda q, cache, table: aiter.flash_attn_with_kvcache(q, cache, table, cache.shape[3]),
        [
            (torch.randn(2, 1, 2, 16), torch.randn(2, 4, 2, s, 16), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32))
            for s in (16, 32, 48, 64)
        ],
    ),
    "another scale": (
        lambda q, scale: aiter.flash_attn_func(q, q, q, softmax_scale=scale),
        [(torch.randn(1, 5, 2, 16), scale) for scale in (0.1, 0.2, 0.3, 0.4)],
    ),
}


@pytest.mark.parametrize("title", COMPILED)
def test_sizes_and_scales_cost_no_graph_of_their_own(title):
    """The first two calls may cost one each (PyTorch makes sizes symbolic at the second); no further one does."""
    function, calls = COMPILED[title]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for arguments in calls:
        torch.testing.assert_close(compiled(*arguments), function(*arguments), rtol=0, atol=0)
    assert 1 <= len(graphs) <= 2


def test_the_operator_is_never_traced():
    """After a graph break Dynamo sees every frame, the operator's own too, which holds addresses."""
    code = """
import torch, aiter
def attend(query, valid):
    (rows,) = (mask.nonzero().squeeze(1) for mask in (valid,))
    length = valid.view(1, -1).sum(1, dtype=torch.int32)
    packed = query[rows]
    direct = aiter.variable_length_attention(packed, packed, packed, length, int(length), causal=True)
    return direct + torch.ops.aiter.attention(packed, packed, packed, length, length, None, True, .25, int(length))[0]
compiled = torch.compile(attend, backend="eager")
for tokens in (12, 11, 9, 8, 7):
    query, valid = torch.randn(tokens, 4, 16), torch.arange(tokens) > 1
    assert torch.equal(compiled(query, valid), attend(query, valid))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
