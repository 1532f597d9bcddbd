"""The rule for accuracy: the error against float64 is at most twice that of PyTorch's own operator in the same dtype,
plus the rounding of one output ulp (the rule of FlashAttention's own tests)."""

import torch

from aiter.reference import pytorch_attend_one as pytorch_attend_one


def ulp(exact, dtype):
    """The distance between neighbouring numbers of `dtype` at the largest value of `exact`."""
    largest = exact.abs().max().clamp(min=torch.finfo(dtype).tiny)
    return torch.finfo(dtype).eps * float(largest)


def largest(errors):
    return float(errors.abs().max())


def root_mean_square(errors):
    return float(errors.square().mean().sqrt())


def assert_as_accurate(output, exact, pytorch, times=2):
    """Holds `output` and PyTorch's result, both in one dtype, against the float64 `exact`, where all are finite:
    `times` PyTorch's error is allowed."""
    assert output.shape == exact.shape and output.dtype == pytorch.dtype
    assert torch.equal(output.isfinite(), exact.isfinite())
    finite = exact.isfinite() & pytorch.isfinite()
    if not finite.any():
        return
    error = largest((output.double() - exact)[finite])
    allowed = times * largest((pytorch.double() - exact)[finite]) + ulp(exact[finite], output.dtype)
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
        error, allowed = (root_mean_square((t.double() - exact)[finite]) for t in (gradient, pytorch))
        allowed = 2 * allowed + ulp(exact[finite], torch.float32)
        assert error <= allowed, f"root mean square error {error:.3g} against float64; allowed are {allowed:.3g}"


def assert_greedy(tokens, exact, pytorch):
    """That each token is the one of the largest logit, as far as the dtype of `pytorch` can tell: logits that are as
    accurate as the rule asks may be wrong by twice PyTorch's largest error, and so may those beside them."""
    error = float((pytorch.double() - exact).abs().max())
    behind = exact.amax(-1) - exact.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    assert 4 * error < float(exact.std()), "in this dtype any token might be the largest"
    assert float(behind.max()) <= 4 * error, f"{float(behind.max()):.3g} behind; allowed are {4 * error:.3g}"
