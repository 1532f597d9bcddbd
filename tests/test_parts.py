"""Attention in parts: merged, and differentiated part by part, it is the attention of the whole."""

import math

import pytest
import torch
from problems import DTYPES, randn

import aiter

CUTS = ((0, 20), (20, 150), (150, 150), (150, 190))


def whole(dtype, seq_q=50, heads=(4, 2), head_dim=64):
    query = randn(2, seq_q, heads[0], head_dim, dtype=dtype)
    key, value = (randn(2, CUTS[-1][1], heads[1], head_dim, dtype=dtype) for _ in range(2))
    return query, key, value


def in_parts(query, key, value, **options):
    return [aiter.flash_attn_func(query, key[:, a:b], value[:, a:b], return_lse=True, **options) for a, b in CUTS]


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_parts_are_the_whole(dtype):
    tensors = whole(dtype)
    expected, expected_lse = aiter.flash_attn_func(*tensors, return_lse=True)
    outputs, lses = zip(*in_parts(*tensors), strict=True)
    output, lse = aiter.merge_attention_states(outputs, lses)
    assert output.dtype == dtype
    # Parts and results are rounded once each, by half a unit; in float32 a few sums count, too.
    largest = max(part.abs().max().item() for part in outputs)
    units = 8 if dtype == torch.float32 else 1.5
    torch.testing.assert_close(output, expected, rtol=0, atol=units * torch.finfo(dtype).eps * largest)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-4)


def test_rows_without_keys():
    output, lse = torch.full((1, 2, 1, 8), math.nan), torch.full((1, 1, 2), -math.inf)
    merged, merged_lse = aiter.merge_attention_states([output, output], [lse, lse])
    assert (merged == 0).all() and (merged_lse == -math.inf).all()
    other, other_lse = torch.ones(1, 2, 1, 8), torch.zeros(1, 1, 2)
    merged, merged_lse = aiter.merge_attention_states([output, other], [lse, other_lse])
    assert torch.equal(merged, other) and torch.equal(merged_lse, other_lse)


def test_a_sink_joins_once():
    output, lse = torch.ones(3, 2, 8), torch.tensor([[0.0, 1.0, -math.inf], [2.0, 3.0, 4.0]])
    sinks = torch.tensor([1.0, -1.0])
    merged, merged_lse = aiter.merge_attention_states([output], [lse], sinks=sinks)
    torch.testing.assert_close(merged[..., 0], torch.sigmoid(lse - sinks.unsqueeze(1)).T)
    assert torch.equal(merged_lse, lse)


def test_gradients_of_rows_without_keys():
    """Log-sum-exps that are leaves, -inf in every part: the row has no keys, and so no gradient."""
    outputs = [torch.randn(1, 3, 2, 8).requires_grad_() for _ in range(3)]
    lses = [torch.tensor([[[0.5, -math.inf, 1.0]] * 2]).requires_grad_() for _ in range(3)]
    for sinks in (None, torch.tensor([0.5, -math.inf])):
        merged, lse = aiter.merge_attention_states(outputs, lses, sinks=sinks)
        assert (lse[..., 1] == -math.inf).all() and (merged[:, 1] == 0).all()
        loss = merged.square().sum() + lse.masked_fill(lse == -math.inf, 0.0).sum()
        for gradient in torch.autograd.grad(loss, (*outputs, *lses)):
            assert gradient.isfinite().all()
            assert (gradient[..., 1] == 0).all() if gradient.dim() == 3 else (gradient[:, 1] == 0).all()


def test_merging_is_differentiable():
    outputs = [torch.randn(1, 3, 2, 8, dtype=torch.float64).float().requires_grad_() for _ in range(2)]
    lses = [torch.randn(1, 2, 3).requires_grad_(), torch.tensor([[[0.0, -math.inf, 1.0]] * 2]).requires_grad_()]
    merged, lse = aiter.merge_attention_states(outputs, lses)
    (merged.square().sum() + lse.sum()).backward()
    assert all(t.grad.isfinite().all() for t in (*outputs, *lses))


@pytest.mark.parametrize("with_lse", (False, True))
def test_gradients_by_parts(with_lse):
    query, key, value = whole(DTYPES[0])
    output, lse = aiter.flash_attn_func(query, key, value, return_lse=True)
    grad_output, grad_lse = randn(*output.shape, dtype=output.dtype), None
    if with_lse:
        grad_lse = randn(*lse.shape, dtype=torch.float32)
    expected = aiter.attention_backward(grad_output, query, key, value, output, lse, grad_lse=grad_lse)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    results = aiter.flash_attn_func(*leaves, return_lse=True)
    count = 1 + with_lse
    torch.autograd.backward(results[:count], [grad_output, grad_lse][:count])
    parts = [
        aiter.attention_backward(grad_output, query, key[:, a:b], value[:, a:b], output, lse, grad_lse=grad_lse)
        for a, b in CUTS
    ]
    summed = sum(part.query.float() for part in parts)
    tolerance = 1e-4 if output.dtype == torch.float32 else 3e-2
    for got, whole_, autograd in (
        (summed, expected.query, leaves[0].grad),
        (torch.cat([part.key for part in parts], 1), expected.key, leaves[1].grad),
        (torch.cat([part.value for part in parts], 1), expected.value, leaves[2].grad),
    ):
        torch.testing.assert_close(got.float(), whole_.float(), rtol=0, atol=tolerance)
        torch.testing.assert_close(whole_.float(), autograd.float(), rtol=0, atol=tolerance)


def test_bad_arguments():
    query, key, value = whole(DTYPES[0])
    output, lse = aiter.flash_attn_func(query, key, value, return_lse=True)
    with pytest.raises(ValueError, match="1 outputs and 2 lses"):
        aiter.merge_attention_states([output], [lse, lse])
    with pytest.raises(ValueError, match=r"lses\[1\] has shape"):
        aiter.merge_attention_states([output, output], [lse, lse[..., :1]])
    with pytest.raises(TypeError, match=r"lses\[0\] has dtype"):
        aiter.merge_attention_states([output], [lse.half()])
    with pytest.raises(ValueError, match="output has shape"):
        aiter.attention_backward(output, query, key, value, output[:, :1], lse)
    with pytest.raises(ValueError, match="lse is"):
        aiter.attention_backward(output, query, key, value, output, lse[:1])
    with pytest.raises(TypeError, match="there is no option window"):
        aiter.attention_backward(output, query, key, value, output, lse, window=(1, 1))
