"""The CPU kernels, driven through the launch ABI: every code path, every layout, against float64."""

import math

import pytest
import torch
from driver import CPUS, CPUS_AND_MASKS, DTYPES, GOMP_PARALLEL, attend, on_cpus, randn, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import STRIDES, Sequence, assert_sequences

from aiter.reference import attend_one, split_packed

archs, archs_and_masks = on_cpus(CPUS), on_cpus(CPUS_AND_MASKS)
HEAD_DIM = 72  # fills no vector and no tile; one value, as each is a compilation per dtype and arch
# Around the sizes at which vectors, tiles, strips and blocks of keys are full.
LENGTHS = st.sampled_from((1, 2, 5, 15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 100, 127, 129, 200, 391, 420))

SEEDS = st.integers(0, 2**32)


def enough_sequences(seq_q):
    """A batch with some rows in it: the largest error of a handful of values says little about either operator."""
    return max(1, 64 // seq_q)


def dense_sequences(query, key, value, seqlens_q=None, seqlens_k=None):
    for b in range(query.shape[0]):
        rows = slice(0, query.shape[1] if seqlens_q is None else int(seqlens_q[b]))
        keys = slice(0, key.shape[1] if seqlens_k is None else int(seqlens_k[b]))
        yield Sequence(query[b, rows], key[b, keys], value[b, keys], (b, rows), (b, slice(None), rows))


@archs_and_masks
@settings(max_examples=20)
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


@on_cpus(CPUS[1::8])  # some of them: each is a compilation
@pytest.mark.parametrize("head_dim", (8, 56, 256))
def test_other_head_dims(dtype, arch, head_dim):
    query = randn(1, 70, 2, head_dim, dtype=dtype)
    key, value = (randn(1, 90, 1, head_dim, dtype=dtype) for _ in "kv")
    for rows in (1, 2, 70):
        output, lse = attend(arch, query[:, :rows], key, value, True)
        assert_sequences(output, lse, list(dense_sequences(query[:, :rows], key, value)), True)


@archs
def test_few_rows(dtype, arch):
    """One to nine query rows that share keys, from one token or from several: four at a time are worked on together,
    and more than eight go through matrix products."""
    for seq_q, group in (*((1, group) for group in range(1, 10)), (2, 3), (2, 4), (4, 2), (8, 1), (9, 1)):
        batch = enough_sequences(seq_q * group)
        query = randn(batch, seq_q, group, HEAD_DIM, dtype=dtype)
        key, value = (randn(batch, 45, 1, HEAD_DIM, dtype=dtype) for _ in "kv")
        output, lse = attend(arch, query, key, value, True)
        assert_sequences(output, lse, list(dense_sequences(query, key, value)), True)


@archs_and_masks
def test_padded(dtype, arch, causal):
    lengths_q = torch.tensor((70, 0, 3, 100, 99), dtype=torch.int32)
    lengths_k = torch.tensor((90, 20, 0, 1, 9), dtype=torch.int32)
    query = randn(5, 100, 4, HEAD_DIM, dtype=dtype)
    key, value = (randn(5, 90, 2, HEAD_DIM, dtype=dtype) for _ in "kv")
    for b in range(5):
        query[b, lengths_q[b] :] = math.nan
        key[b, lengths_k[b] :] = value[b, lengths_k[b] :] = math.nan
    output, lse = attend(arch, query, key, value, causal, seqlens_q=lengths_q, seqlens_k=lengths_k)
    assert_sequences(output, lse, list(dense_sequences(query, key, value, lengths_q, lengths_k)), causal)
    for b in range(5):
        assert not output[b, lengths_q[b] :].any() and lse[b, :, lengths_q[b] :].eq(-math.inf).all()


@archs_and_masks
def test_packed(dtype, arch, causal):
    lengths = (70, 0, 1, 129, 16)
    query = randn(sum(lengths), 4, HEAD_DIM, dtype=dtype)
    key, value = (randn(sum(lengths), 2, HEAD_DIM, dtype=dtype) for _ in "kv")
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    output, lse = attend(arch, query, key, value, causal, seqlens_q=seqlens, seqlens_k=seqlens, max_seqlen=(150, 150))
    sequences = [
        Sequence(query[rows], key[rows], value[rows], (rows,), (slice(None), rows)) for rows in split_packed(lengths)
    ]
    assert_sequences(output, lse, sequences, causal)


@archs
@pytest.mark.parametrize("seq_q", (1, 2, 40))
@pytest.mark.parametrize("page_size", (1, 7, 16, 128))
def test_paged(dtype, arch, seq_q, page_size):
    batch, heads, group, most = 4, 2, 2, 200
    pages = -(-most // page_size)
    lengths = torch.tensor((most, seq_q, 131, 0), dtype=torch.int32)
    key, value = (randn(batch * pages + 3, page_size, heads, HEAD_DIM, dtype=dtype) for _ in "kv")
    order = torch.randperm(len(key), dtype=torch.int32)[: batch * pages].view(batch, pages)
    table = order.clone()
    for b, length in enumerate(lengths):
        table[b, -(-int(length) // page_size) :] = -1  # never read
    query = randn(batch, seq_q, heads * group, HEAD_DIM, dtype=dtype)
    output, lse = attend(arch, query, key, value, True, seqlens_k=lengths, page_table=table)
    full_key, full_value = (cache[order.long()].flatten(1, 2) for cache in (key, value))
    assert_sequences(output, lse, list(dense_sequences(query, full_key, full_value, None, lengths)), True)


@archs
@pytest.mark.parametrize(("seq_q", "seq_k"), ((1, 1100), (3, 1100), (40, 1100), (700, 700)))
def test_same_bits_for_any_threads(dtype, arch, seq_q, seq_k):
    """Later keys are larger, so that maxima move: at different keys for different rows, which share tiles in ways that
    differ with the number of threads."""
    query = randn(1, seq_q, 2, HEAD_DIM, dtype=dtype)
    key, value = (randn(1, seq_k, 1, HEAD_DIM, dtype=dtype) for _ in "kv")
    key *= torch.linspace(0.5, 4, seq_k).to(key.dtype).view(-1, 1, 1)
    expected = attend(arch, query, key, value, True, threads=1)
    assert_sequences(*expected, list(dense_sequences(query, key, value)), True)
    for threads, parallel in ((2, GOMP_PARALLEL), (3, None), (200, None)):
        got = attend(arch, query, key, value, True, threads=threads, parallel=parallel)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@archs
@pytest.mark.parametrize("scale", (-0.3, 0.0, -0.0, 1.0))
def test_scale(dtype, arch, scale):
    for seq_q in (1, 50):
        query = randn(2, seq_q, 2, HEAD_DIM, dtype=dtype)
        key, value = (randn(2, 60, 2, HEAD_DIM, dtype=dtype) for _ in "kv")
        output, lse = attend(arch, query, key, value, True, scale)
        assert_sequences(output, lse, list(dense_sequences(query, key, value)), True, scale)


@archs
@pytest.mark.parametrize("how", STRIDES[:3])
def test_strides(dtype, arch, how):
    for seq_q in (2, 37):
        query = strided((2, seq_q, 2, HEAD_DIM), dtype, how)
        key, value = (strided((2, 41, 1, HEAD_DIM), dtype, how) for _ in "kv")
        output, lse = attend(arch, query, key, value, True)
        assert_sequences(output, lse, list(dense_sequences(query, key, value)), True)


@archs
def test_large_and_equal_scores(dtype, arch):
    for seq_q in (1, 50):
        query = randn(1, seq_q, 2, HEAD_DIM, dtype=dtype)
        key, value = (randn(1, 150, 2, HEAD_DIM, dtype=dtype) for _ in "kv")
        for scale, factor in ((100.0, 1.0), (1.0, 0.0)):
            output, lse = attend(arch, query * factor, key, value, True, scale)
            expected, expected_lse = attend_one(query[0] * factor, key[0], value[0], True, scale)
            torch.testing.assert_close(lse[0].double(), expected_lse, rtol=1e-5, atol=1e-4)
            eps = torch.finfo(DTYPES[dtype]).eps
            atol = max(
                4 * eps, 2e-3 if scale > 1 else 0
            )  # large scores: the rounding of a score is a factor of a weight
            torch.testing.assert_close(output[0].double(), expected, rtol=2 * eps, atol=atol)


@archs
@pytest.mark.parametrize("scale", (0.0, -0.0))
def test_scale_of_zero(dtype, arch, scale):
    """Weights are equal however large the products are, as zero times any number is zero; what is not finite is NaN."""
    large = 1e4 if dtype == "fp16" else 1e25
    for seq_q in (1, 50):
        query, key = (randn(1, n, 1, HEAD_DIM, dtype=dtype).sign() * large for n in (seq_q, 60))
        value = randn(1, 60, 1, HEAD_DIM, dtype=dtype)
        output, lse = attend(arch, query, key, value, True, scale)
        assert_sequences(output, lse, list(dense_sequences(query, key, value)), True, scale)
        for victim in (query, key):
            before, victim[0, -1, 0, 3] = victim[0, -1, 0, 3].item(), math.inf
            output, lse = attend(arch, query, key, value, True, scale)
            assert output[0, -1].isnan().all() and lse[0, 0, -1].isnan()
            assert output[0, :-1].isfinite().all() and lse[0, 0, :-1].isfinite().all()
            victim[0, -1, 0, 3] = before


@archs_and_masks
@settings(max_examples=15)
@given(data=st.data())
def test_infinities_and_nans_stay_where_they_belong(dtype, arch, causal, data):
    torch.manual_seed(data.draw(SEEDS))
    seq_q, seq_k = data.draw(st.sampled_from((1, 2, 20, 70))), data.draw(st.sampled_from((1, 30, 140)))
    tensors = [randn(1, n, 1, HEAD_DIM, dtype=dtype) for n in (seq_q, seq_k, seq_k)]
    for _ in range(data.draw(st.integers(1, 3))):
        victim = tensors[data.draw(st.integers(0, 2))]
        row, d = data.draw(st.integers(0, victim.shape[1] - 1)), data.draw(st.integers(0, HEAD_DIM - 1))
        victim[0, row, 0, d] = data.draw(st.sampled_from((math.inf, -math.inf, math.nan)))
    output, lse = attend(arch, *tensors, causal)
    expected, expected_lse = attend_one(*(tensor[0] for tensor in tensors), causal)
    torch.testing.assert_close(lse[0].double(), expected_lse, rtol=1e-4, atol=2e-4, equal_nan=True)
    tolerance = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}[dtype]
    torch.testing.assert_close(output[0].double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
