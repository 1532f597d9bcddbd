"""The rule for accuracy: the error against float64 is at most twice that of PyTorch's own operator in the same dtype,
plus the rounding of one output ulp (the rule of FlashAttention's own tests)."""

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from aiter import reference


def pytorch_attend_one(
    query,
    key,
    value,
    causal=False,
    softmax_scale=None,
    *,
    window=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    offset=None,
):
    """PyTorch's result for one sequence, in the dtype of its tensors; arguments as for `reference.attend_one`.

    Where PyTorch has an operator, by that. Soft caps, ALiBi and sinks are written out as its fused operators compute:
    scores and their softmax in float32, weights rounded to the dtype."""
    seq_q, heads_q, head_dim = query.shape
    seq_k, heads_kv, _ = key.shape
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    k, v = (t.repeat_interleave(heads_q // heads_kv, 1) for t in (k, v))
    seen = reference.visible_keys(seq_q, seq_k, causal, window, offset, query.device)
    if softcap == 0.0 and alibi_slopes is None and sinks is None:
        mask = seen if causal or window else None
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)[0].transpose(0, 1)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    scores = reference.capped(q[0].float() @ k[0].float().transpose(1, 2) * scale, softcap)
    if alibi_slopes is not None:
        scores = scores + reference.alibi_bias(seq_q, seq_k, alibi_slopes.float(), offset)
    blind = ~seen.any(1).view(1, -1, 1)
    scores = scores.masked_fill(~seen & ~blind[0], -math.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(-1, seq_q, 1)), 2)
    weights = scores.softmax(2)[..., :seq_k].to(v.dtype)
    return (weights @ v[0]).masked_fill(blind, 0.0).transpose(0, 1)


def ulp(exact, dtype):
    """The distance between neighbouring numbers of `dtype` at the largest value of `exact`."""
    largest = exact.abs().max().clamp(min=torch.finfo(dtype).tiny)
    return torch.finfo(dtype).eps * float(largest)


def assert_as_accurate(output, exact, pytorch, times=2):
    """Holds `output` and PyTorch's result, both in one dtype, against the float64 `exact`, where all are finite:
    `times` PyTorch's error is allowed."""
    assert output.shape == exact.shape and output.dtype == pytorch.dtype
    assert torch.equal(output.isfinite(), exact.isfinite())
    finite = exact.isfinite() & pytorch.isfinite()
    if not finite.any():
        return
    error = float((output.double() - exact)[finite].abs().max())
    allowed = times * float((pytorch.double() - exact)[finite].abs().max()) + ulp(exact[finite], output.dtype)
    assert error <= allowed, f"error {error:.3g} against float64; allowed are {allowed:.3g}"


def assert_gradient_as_accurate(gradient, exact, pytorch):
    """The same rule for a gradient, and for results with options. In float32 it holds for the root mean square of
    errors, and four times PyTorch's largest error is allowed: how the rounding of single scores falls out decides over
    that one (docs/training.md)."""
    if gradient.dtype != torch.float32:
        return assert_as_accurate(gradient, exact, pytorch)
    assert_as_accurate(gradient, exact, pytorch, times=4)
    finite = exact.isfinite() & pytorch.isfinite()
    if finite.any():
        error, allowed = (float((t.double() - exact)[finite].square().mean().sqrt()) for t in (gradient, pytorch))
        allowed = 2 * allowed + ulp(exact[finite], torch.float32)
        assert error <= allowed, f"root mean square error {error:.3g} against float64; allowed are {allowed:.3g}"
