"""What testers found by trying to break it: each once wrong, silently or loudly."""

import math

import pytest
import torch

import aiter
from aiter import flash_attn

R = torch.randn


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_negative_int64_offsets():
    q = R(2, 9, 2, 64)
    narrow = aiter.flash_attn_func(q, q, q, True, query_offsets=ints(-3, -5))
    assert torch.equal(aiter.flash_attn_func(q, q, q, True, query_offsets=ints(-3, -5).long()), narrow)


def test_packed_backward_knows_its_bounds_and_looks_at_lengths():
    q, lengths, grad = R(9, 2, 64), ints(4, 5), R(9, 2, 64)
    output, lse = aiter.variable_length_attention(q, q, q, lengths, 5, return_lse=True)
    arguments = (grad, q, q, q, output, lse)
    bounds = {"max_seqlen_q": 5, "max_seqlen_k": 5}
    expected = aiter.attention_backward(*arguments, seqlens_q=lengths, seqlens_k=lengths, **bounds)
    unbounded = aiter.attention_backward(*arguments, seqlens_q=lengths, seqlens_k=lengths)
    for got, right in zip(unbounded[:3], expected[:3], strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=1e-5)
    for wrong in (ints(99, 1), ints(-1, 5)):
        with pytest.raises(ValueError, match=r"seqlens_k\[0\]"):
            aiter.attention_backward(*arguments, seqlens_q=lengths, seqlens_k=wrong)
    with pytest.raises(TypeError, match="query must be a"):
        aiter.attention_backward(grad, None, q, q, output, lse)


@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_merging_hides_nothing_but_rows_without_keys(bad):
    output, lse = R(1, 3, 2, 8), R(1, 2, 3)
    other = lse.clone()
    other[0, 0, 1] = bad
    merged, _ = aiter.merge_attention_states([output, output], [lse, other])
    assert merged[0, 1, 0].isnan().all() and merged.isnan().sum() == 8


def test_head_dims_that_pad_alike_are_not_alike():
    with pytest.raises(ValueError, match="k has head_dim 60"):
        flash_attn.flash_attn_func(R(1, 2, 1, 59), R(1, 2, 1, 60), R(1, 2, 1, 59))


def test_out():
    q, starts = R(6, 2, 64), ints(0, 3)
    out = torch.full_like(q, 7.0)
    _, lse = flash_attn.flash_attn_varlen_func(q, q, q, starts, starts, 3, 3, out=out, return_lse=True)
    assert (out[3:] == 7).all() and (lse[:, 3:] == -math.inf).all() and lse[:, :3].isfinite().all()
    q = R(1, 9, 2, 64)
    leaf = q.clone().requires_grad_()
    saved = leaf * 1
    loss = (saved * saved).sum()
    flash_attn.flash_attn_func(q, q, q, out=saved.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match="out requires a gradient"):
        flash_attn.flash_attn_func(q, q, q, out=leaf)
    with pytest.raises(ValueError, match="the same memory"):
        flash_attn.flash_attn_func(q, q, q, out=torch.zeros(1, 9, 1, 64).expand(1, 9, 2, 64))
    with torch.profiler.profile(), pytest.raises(ValueError, match="out= takes no gradient"):
        flash_attn.flash_attn_func(q, q, q, sinks=torch.zeros(2, requires_grad=True), out=torch.empty_like(q))


def test_pages_that_no_row_sees_may_be_anything():
    cache, token = R(4, 1, 16, 64), R(1, 1, 1, 64)

    def call(**options):
        return aiter.flash_attn_with_kvcache(token, cache, ints([-1]), 16, True, cache_seqlens=ints(10), **options)

    assert not call(window_size=(3, 0), query_offsets=ints(20)).any()
    assert not call(seqlens_q=ints(0)).any()
    with pytest.raises(ValueError, match=r"page_table\[0, 0\] is -1"):
        call()


def test_options_out_of_range():
    q = R(1, 9, 2, 64)
    with pytest.raises(ValueError, match="window_size is"):
        aiter.flash_attn_func(q, q, q, window_size=(2**31, 0))
    with pytest.raises(ValueError, match="alibi_slopes takes no gradient"):
        aiter.flash_attn_func(q, q, q, alibi_slopes=torch.ones(2, requires_grad=True))
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, cap: aiter.flash_attn_func(q, q, q, softcap=cap), backend="eager", dynamic=True)
    with pytest.raises(ValueError, match="softcap is -2"):
        compiled(q, -2.0)


def test_a_sink_that_is_none():
    sinks = torch.full((2,), -math.inf, requires_grad=True)
    output = aiter.flash_attn_func(R(1, 9, 2, 64), R(1, 4, 2, 64), R(1, 4, 2, 64), True, sinks=sinks)
    output.sum().backward()
    assert not sinks.grad.any()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    (
        ({"softcap": None}, TypeError, "softcap must be a number"),
        ({"softcap": math.nan}, TypeError, "softcap must be a number"),
        ({"window_size": 5}, TypeError, "window_size must be a pair"),
        ({"window_size": (-1, -1, 4)}, NotImplementedError, "sink tokens"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5"),
        ({"q_descale": torch.zeros(1)}, NotImplementedError, "q_descale is not offered .it was a tensor"),
        ({"qv": torch.zeros(1, 4, 2, 8)}, ValueError, "qv is torch.float32 .1, 4, 2, 8.; it must be"),
        ({"qv": torch.zeros(1, 4, 2, 59), "attention_chunk": -1}, ValueError, "attention_chunk is -1"),
        ({"windows": 1}, TypeError, "there is no argument 'windows'"),
        ({"out": 3}, TypeError, "out must be a torch.Tensor"),
    ),
)
def test_arguments_of_flash_attention(options, error, words):
    q = R(1, 4, 2, 59)
    with pytest.raises(error, match=words):
        flash_attn.flash_attn_func(q, q, q, **options)


def test_batched_gradients():
    """Of gradients that say of themselves that they are plain tensors, and have no memory."""
    leaves = [R(2, 6, 2, 16, requires_grad=True) for _ in "qkv"]
    output, lse = aiter.flash_attn_func(*leaves, return_lse=True)
    for result, inputs in ((output, leaves), (lse, leaves[:2])):
        grads = R(3, *result.shape)
        batched = torch.autograd.grad(result, inputs, grads, is_grads_batched=True, retain_graph=True)
        single = [torch.autograd.grad(result, inputs, grad, retain_graph=True) for grad in grads]
        for got, *expected in zip(batched, *single, strict=True):
            torch.testing.assert_close(got, torch.stack(expected))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_flash_attention_is_traced_without_a_scale():
    q, k, v = (R(1, 5, 2, 16) for _ in "qkv")
    traced = torch.jit.trace(lambda q, k, v: flash_attn.flash_attn_func(q, k, v, causal=True), (q, k, v))
    torch.testing.assert_close(traced(q, k, v), aiter.flash_attn_func(q, k, v, True))


def test_a_list_that_has_itself_in_it():
    q = R(1, 5, 2, 16)
    endless = []
    endless.append(endless)
    for _ in range(2):
        with pytest.raises(TypeError, match="window_size must be a pair"):
            flash_attn.flash_attn_func(q, q, q, window_size=endless)


def test_an_output_that_is_the_keys_or_the_values():
    q, k, v = (R(2, 300, 2, 16) for _ in "qkv")
    expected = aiter.flash_attn_func(q, k, v)
    for name, out in (("k", k), ("v", v)):
        with pytest.raises(ValueError, match=f"out begins where {name} does; it may be q"):
            flash_attn.flash_attn_func(q, k, v, out=out)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, out=q), expected) and torch.equal(q, expected)


@pytest.mark.parametrize("name", ("sinks", "alibi_slopes"))
def test_lazily_negated_numbers(name):
    q = R(1, 5, 1, 16)
    negated = torch.randn(1, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    expected = aiter.flash_attn_func(q, q, q, **{name: negated.resolve_neg().clone()})
    assert torch.equal(aiter.flash_attn_func(q, q, q, **{name: negated}), expected)


def test_an_inference_tensor_to_write_into():
    with torch.inference_mode():
        out, joined = torch.ones(1, 2, 1, 16), torch.empty(2, 3, 1, 8)
    nothing = torch.empty(1, 0, 1, 16)
    assert not flash_attn.flash_attn_func(R(1, 2, 1, 16), nothing, nothing, out=out).any()
    parts, lse = R(2, 2, 3, 1, 8), R(2, 2, 3, 1)
    expected, _ = flash_attn.flash_attn_combine(parts, lse)
    assert torch.equal(flash_attn.flash_attn_combine(parts, lse, joined)[0], expected)
