"""Far memory and many tokens, on the device at hand. Where a GPU is emulated: test_operations_on_amd.py."""

import addresses
import problems
import pytest
import torch
from accuracy import assert_as_accurate, pytorch_attend_one

import aiter
from aiter import reference

QUERIES = pytest.mark.parametrize("seq_q", (1, 33))


@QUERIES
@pytest.mark.parametrize("dtype", problems.DTYPES)
def test_pages_beyond_4_gib(dtype, seq_q):
    addresses.check_far_pages(dtype, seq_q)
    addresses.check_far_pages(dtype, seq_q, window_size=(30, 0))


@QUERIES
@pytest.mark.parametrize("dtype", problems.DTYPES)
def test_rows_4_gib_apart(dtype, seq_q):
    addresses.check_far_rows(dtype, seq_q)


@pytest.mark.skipif(problems.DEVICE != "cpu", reason="PyTorch decides where a GPU's memory lies")
@QUERIES
@pytest.mark.parametrize("dtype", problems.DTYPES)
def test_tensors_across_a_multiple_of_4_gib(dtype, seq_q):
    addresses.check_across_4gib(dtype, seq_q)


def test_gradients_of_rows_4_gib_apart():
    dtype = problems.DTYPES[0]
    near = [problems.randn(2, 70, 2, 64, dtype=dtype) for _ in range(3)]
    far = []
    for tensor in near:
        rows = addresses.far_empty((2, 5 * addresses.GIB // 2 // dtype.itemsize), dtype)
        far.append(rows.as_strided(tensor.shape, (rows.stride(0), 128, 64, 1)).copy_(tensor))
    results = []
    for tensors in (near, far):
        leaves = [tensor.requires_grad_() for tensor in tensors]
        output = aiter.flash_attn_func(*leaves, causal=True)
        results.append(torch.autograd.grad(output, leaves, torch.ones_like(output)))
    addresses.same(*results)


@pytest.mark.parametrize("dtype", problems.DTYPES)
def test_100000_tokens(dtype):
    """The last rows of a long sequence, with a window and by decoding over all of it."""
    tokens, rows = 100_003, 40
    query, key, value = (problems.randn(1, tokens, heads, 64, dtype=dtype) for heads in (2, 1, 1))
    output = aiter.flash_attn_func(query, key, value, window_size=(50, 0))
    for start in (0, 65_536 - 20, tokens - rows):
        keys = slice(max(0, start - 50), start + rows)
        near = query[0, start : start + rows], key[0, keys], value[0, keys]
        options = {"window": (50, 0), "offset": start - keys.start}
        expected, _ = reference.attend_one(*near, False, **options)
        assert_as_accurate(output[0, start : start + rows], expected, pytorch_attend_one(*near, **options))
    for last in (1, 5):
        tail = query[0, -last:], key[0], value[0]
        output = aiter.flash_attn_func(query[:, -last:], key, value, causal=True)
        expected, _ = reference.attend_one(*tail, True)
        assert_as_accurate(output[0], expected, pytorch_attend_one(*tail, True))
