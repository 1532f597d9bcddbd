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


def times_for_gradients(dtype):
    """Of PyTorch's error, for gradients. In float32 the rule holds for most tensors, not for all: how the rounding of
    scores falls out decides, for PyTorch as for us (docs/training.md)."""
    return 4 if dtype == torch.float32 else 2
