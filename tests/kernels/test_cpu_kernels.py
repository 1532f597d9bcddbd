"""The CPU kernels, driven through the launch ABI: every arch that this CPU can run, every layout, against float64."""

import math

import pytest
import torch
from cpu_driver import ARCHS, DTYPES, attend
from hypothesis import given
from hypothesis import strategies as st
from problems import Sequence, assert_sequences

archs = pytest.mark.parametrize(("dtype", "arch"), ARCHS)
HEAD_DIM = 72  # fills no vector and no tile; one value, as each is a compilation per dtype and arch
# Around the sizes at which vectors, tiles, strips and blocks of keys are full.
LENGTHS = st.sampled_from((1, 2, 5, 15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 100, 127, 129, 200, 391, 420))

SEEDS = st.integers(0, 2**32)


def randn(*shape, dtype):
    return torch.randn(shape).to(DTYPES[dtype])


def enough_sequences(seq_q):
    """A batch with some rows in it: the largest error of a handful of values says little about either operator."""
    return max(1, 64 // seq_q)


def dense_sequences(query, key, value, seqlens_q=None, seqlens_k=None):
    for b in range(query.shape[0]):
        rows = slice(0, query.shape[1] if seqlens_q is None else int(seqlens_q[b]))
        keys = slice(0, key.shape[1] if seqlens_k is None else int(seqlens_k[b]))
        yield Sequence(query[b, rows], key[b, keys], value[b, keys], (b, rows), (b, slice(None), rows))


@archs
@pytest.mark.parametrize("causal", (False, True))
@given(data=st.data())
def test_dense(dtype, arch, causal, data):
    torch.manual_seed(data.draw(SEEDS))
    heads_kv, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from((1, 2, 3, 5)))
    seq_q, seq_k = data.draw(LENGTHS), data.draw(LENGTHS)
    batch = enough_sequences(seq_q)
    query = randn(batch, seq_q, heads_kv * group, HEAD_DIM, dtype=dtype)
    key, value = (randn(batch, seq_k, heads_kv, HEAD_DIM, dtype=dtype) for _ in "kv")
    output, lse = attend(arch, query, key, value, causal)
    assert_sequences(output, lse, list(dense_sequences(query, key, value)), causal)


@archs
@pytest.mark.parametrize("head_dim", (8, 24, 256))
def test_other_head_dims(dtype, arch, head_dim):
    query = randn(1, 70, 2, head_dim, dtype=dtype)
    key, value = (randn(1, 90, 1, head_dim, dtype=dtype) for _ in "kv")
    for rows in (1, 2, 70):
        output, lse = attend(arch, query[:, :rows], key, value, True)
        assert_sequences(output, lse, list(dense_sequences(query[:, :rows], key, value)), True)
