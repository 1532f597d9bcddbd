"""The five operations against float64 and PyTorch's own operator, over the space of their arguments."""

import math

import pytest
import torch
from accuracy import assert_as_accurate, pytorch_attend_one
from hypothesis import given
from hypothesis import strategies as st
from problems import (
    DEVICE,
    DRAWN_KINDS,
    DTYPES,
    KINDS_OF_HEAD_DIM,
    STRIDES,
    assert_sequences,
    check_dense,
    check_grouped,
    check_kvcache,
    check_variable_length,
    dense_sequences,
    randn,
)

import aiter
from aiter import reference

dtypes = st.sampled_from(DTYPES)
strides = st.sampled_from(STRIDES)
# Around the sizes of tiles and vectors, where the edge cases are, and anything else.
seqlens = st.one_of(st.sampled_from((1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)), st.integers(0, 200))
scales = st.one_of(st.none(), st.floats(0.01, 1.0))
groups = st.sampled_from(((1, 1), (2, 1), (4, 2), (6, 2), (3, 3), (8, 1)))


@given(
    kind=st.sampled_from(DRAWN_KINDS),
    batch=st.integers(0, 3),
    seq_q=seqlens,
    seq_k=seqlens,
    heads=groups,
    causal=st.booleans(),
    scale=scales,
    layout=st.tuples(strides, strides, strides),
    return_lse=st.booleans(),
)
def test_flash_attn_func(kind, **arguments):
    check_dense(*kind, **arguments)


@pytest.mark.parametrize("head_dim", KINDS_OF_HEAD_DIM)
def test_head_dims(head_dim):
    dtype = DTYPES[head_dim // 8 % len(DTYPES)]
    causal = head_dim // 8 % 2 == 0
    query, key, value = (randn(1, 70, 2, head_dim, dtype=dtype) for _ in range(3))
    output, lse = aiter.flash_attn_func(query, key, value, causal, return_lse=True)
    assert_sequences(output, lse, dense_sequences(query, key, value), causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", (False, True))
def test_long_sequences_and_one_query(dtype, causal):
    for seq_q, seq_k in ((1, 3000), (700, 1100), (4, 2049)):
        query, key, value = (randn(1, s, h, 64, dtype=dtype) for s, h in ((seq_q, 4), (seq_k, 2), (seq_k, 2)))
        output, lse = aiter.flash_attn_func(query, key, value, causal, return_lse=True)
        assert_sequences(output, lse, dense_sequences(query, key, value), causal)


@given(dtype=dtypes, heads_kv=st.integers(1, 3), num_groups=st.integers(1, 5), causal=st.booleans(), seqlen=seqlens)
def test_grouped_and_multi_query(**arguments):
    check_grouped(head_dim=64, **arguments)


@given(
    kind=st.sampled_from(DRAWN_KINDS),
    form=st.sampled_from(("shared", "pair", "stacked")),
    page_size=st.sampled_from((1, 3, 16, 128)),
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=3),
    seq_q=st.sampled_from((1, 2, 17, 65)),
    heads=groups,
    causal=st.booleans(),
    all_full=st.booleans(),
    index_dtype=st.sampled_from((torch.int32, torch.int64)),
)
def test_flash_attn_with_kvcache(kind, **arguments):
    check_kvcache(*kind, **arguments)


@given(
    kind=st.sampled_from(DRAWN_KINDS),
    form=st.sampled_from(("padded", "packed", "padded paged", "packed paged")),
    lengths=st.lists(st.integers(0, 150), min_size=0, max_size=4),
    spare=st.sampled_from((0, 1, 40)),
    heads=groups,
    causal=st.booleans(),
)
def test_variable_length_attention(kind, **arguments):
    check_variable_length(*kind, **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("size", (1e4, -1e4))
def test_large_scores(dtype, causal, size):
    """Scores of ±1e4 saturate softmax; nothing may overflow."""
    query, key, value = (randn(1, seqlen, 2, 64, dtype=dtype) for seqlen in (130, 150, 150))
    largest = torch.einsum("bqhd,bkhd->bhqk", query.double(), key.double()).abs().max()
    scale = size / float(largest)
    output, lse = aiter.flash_attn_func(query, key, value, causal, scale, return_lse=True)
    expected, expected_lse = reference.attend_one(query[0], key[0], value[0], causal, scale)
    assert_as_accurate(output[0], expected, pytorch_attend_one(query[0], key[0], value[0], causal, scale))
    torch.testing.assert_close(lse[0].double(), expected_lse, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_average_the_values(dtype):
    key, value = randn(1, 77, 1, 64, dtype=dtype), randn(1, 77, 1, 64, dtype=dtype)
    query = torch.zeros(1, 5, 1, 64, dtype=dtype, device=DEVICE)
    output, lse = aiter.flash_attn_func(query, key, value, return_lse=True)
    torch.testing.assert_close(
        output[0, :, 0].double(), value[0, :, 0].double().mean(0).expand(5, -1), rtol=1e-2, atol=4e-3
    )
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(77)), rtol=0, atol=2e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_are_zero(dtype):
    query, key = randn(2, 40, 2, 64, dtype=dtype), randn(2, 9, 2, 64, dtype=dtype)
    output, lse = aiter.flash_attn_func(query, key, key, causal=True, return_lse=True)
    assert not output[:, :31].any() and (lse[:, :, :31] == -math.inf).all()
    assert output[:, 31:].any(-1).all() and lse[:, :, 31:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("bad", (math.inf, -math.inf, math.nan))
@pytest.mark.parametrize("where", ("query", "key", "value"))
def test_non_finite_inputs_stay_where_the_mathematics_puts_them(dtype, head_dim, bad, where):
    tensors = {name: randn(1, 150, 2, head_dim, dtype=dtype) for name in ("query", "key", "value")}
    tensors[where][0, 90, 0, 3] = bad
    output, lse = aiter.flash_attn_func(**tensors, causal=True, return_lse=True)
    expected, expected_lse = reference.attend_one(*(t[0] for t in tensors.values()), causal=True)
    assert torch.equal(output[0].isnan(), expected.isnan())
    assert torch.equal(output[0].isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(output[0].double()[finite], expected[finite], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse[0].double(), expected_lse, rtol=1e-3, atol=1e-3, equal_nan=True)


def test_documented_examples_run_as_written():
    """The examples of the operations' public documentation (https://rocm.github.io/aiter/api/attention.html)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = {"device": device, "dtype": torch.float16}
    q, k, v = (torch.randn(2, 1024, 16, 64, **half) for _ in range(3))
    assert aiter.flash_attn_func(q, k, v, causal=True).shape == q.shape
    query = torch.randn(4, 128, 16, 64, **half)
    kv_cache = torch.randn(256, 16, 128, 64, **half)
    page_table = torch.randint(0, 256, (4, 32), device=device, dtype=torch.int32)
    assert aiter.flash_attn_with_kvcache(query, kv_cache, page_table, block_size=128).shape == query.shape
    q = torch.randn(2, 1024, 32, 64, **half)
    k, v = (torch.randn(2, 1024, 8, 64, **half) for _ in range(2))
    assert aiter.grouped_query_attention(q, k, v, num_groups=4).shape == q.shape
    assert aiter.multi_query_attention(q, k[:, :, :1], v[:, :, :1]).shape == q.shape
    seq_lengths = torch.tensor([100, 1024], device=device)
    assert aiter.variable_length_attention(q, k, v, seq_lengths, max_seq_len=1024).shape == q.shape


def test_results_do_not_depend_on_the_thread_count():
    threads = torch.get_num_threads()
    query, key, value = (torch.randn(2, 300, 3, 64, dtype=torch.bfloat16) for _ in range(3))
    one = torch.randn(1, 1, 2, 64), torch.randn(1, 5000, 2, 64), torch.randn(1, 5000, 2, 64)
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append((aiter.flash_attn_func(query, key, value, True), aiter.flash_attn_func(*one)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0]) and torch.equal(result[1], results[0][1])
