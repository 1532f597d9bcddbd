"""The rule for accuracy: the error against float64 is at most twice that of PyTorch's own operator in the same dtype,
plus the rounding of one output ulp (the rule of FlashAttention's own tests)."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def pytorch_attend_one(query, key, value, causal, softmax_scale=None):
    """PyTorch's operator on one sequence: query (seq_q, heads_q, head_dim), key, value (seq_k, heads_kv, head_dim)."""
    seq_q, heads_q, _ = query.shape
    seq_k, heads_kv, _ = key.shape
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    k, v = (t.repeat_interleave(heads_q // heads_kv, 1) for t in (k, v))
    mask = None
    if causal:
        columns = torch.arange(seq_k, device=query.device)
        mask = columns <= torch.arange(seq_q, device=query.device).unsqueeze(1) + (seq_k - seq_q)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=softmax_scale)[0].transpose(0, 1)


def ulp(reference, dtype):
    """The distance between neighbouring numbers of `dtype` at the largest value of `reference`."""
    largest = reference.abs().max().clamp(min=torch.finfo(dtype).tiny)
    return torch.finfo(dtype).eps * float(largest)


def assert_as_accurate(output, reference, pytorch, times=2):
    """Holds `output` and PyTorch's result, both in one dtype, against the float64 `reference`, where all are finite:
    `times` PyTorch's error is allowed."""
    assert output.shape == reference.shape and output.dtype == pytorch.dtype
    assert torch.equal(output.isfinite(), reference.isfinite())
    finite = reference.isfinite() & pytorch.isfinite()
    if not finite.any():
        return
    error = float((output.double() - reference)[finite].abs().max())
    allowed = times * float((pytorch.double() - reference)[finite].abs().max()) + ulp(reference[finite], output.dtype)
    assert error <= allowed, f"error {error:.3g} against float64; allowed are {allowed:.3g}"


def assert_gradient_as_accurate(gradient, reference, pytorch):
    """The same rule for a gradient. In float32 it holds for the root mean square of errors, and four times PyTorch's
    largest error is allowed: how the rounding of single scores falls out decides over that one (docs/training.md)."""
    if gradient.dtype != torch.float32:
        return assert_as_accurate(gradient, reference, pytorch)
    assert_as_accurate(gradient, reference, pytorch, times=4)
    finite = reference.isfinite() & pytorch.isfinite()
    if finite.any():
        error, allowed = (float((t.double() - reference)[finite].square().mean().sqrt()) for t in (gradient, pytorch))
        allowed = 2 * allowed + ulp(reference[finite], torch.float32)
        assert error <= allowed, f"root mean square error {error:.3g} against float64; allowed are {allowed:.3g}"
