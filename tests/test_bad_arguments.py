"""Every bad argument raises an error that names it, before anything is compiled or launched."""

import math

import pytest
import torch

import aiter


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch):
    """A kernel asked for is a failure of the test."""

    def fail(spec):
        raise AssertionError(f"a kernel was asked for: {spec}")

    monkeypatch.setattr("aiter.jit.get_kernel", fail)


def qkv(batch=2, seq_q=4, seq_k=4, heads_q=4, heads_kv=2, head_dim=32, dtype=torch.float32):
    query = torch.zeros(batch, seq_q, heads_q, head_dim, dtype=dtype)
    key, value = (torch.zeros(batch, seq_k, heads_kv, head_dim, dtype=dtype) for _ in range(2))
    return query, key, value


def replaced(position, tensor):
    tensors = list(qkv())
    tensors[position] = tensor(tensors[position]) if callable(tensor) else tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    (
        (replaced(0, None), TypeError, "query must be a torch.Tensor.*NoneType"),
        (replaced(1, [[1.0]]), TypeError, "key must be a torch.Tensor.*list"),
        (replaced(2, 3.0), TypeError, "value must be a torch.Tensor.*float"),
        (replaced(0, lambda t: t[0]), ValueError, "query must be .*3 dimensions"),
        (replaced(1, lambda t: t[None]), ValueError, "key must be .*5 dimensions"),
        (replaced(0, torch.zeros(())), ValueError, "query must be .*0 dimensions"),
        (replaced(1, torch.zeros(())), ValueError, "key must be .*0 dimensions"),
        (replaced(0, lambda t: t.double()), TypeError, "query has dtype torch.float64"),
        (replaced(0, lambda t: t.int()), TypeError, "query has dtype torch.int32"),
        (replaced(1, lambda t: t.half()), TypeError, "key has dtype torch.float16.*that of query"),
        (replaced(2, lambda t: t.bfloat16()), TypeError, "value has dtype torch.bfloat16"),
        (replaced(1, lambda t: t.to("meta")), ValueError, "key is on device meta"),
        (replaced(0, lambda t: t.to_sparse()), TypeError, "query must be a dense"),
        (replaced(1, lambda t: t[..., :24]), ValueError, "key has head_dim 24.*32"),
        (replaced(1, lambda t: t[:1]), ValueError, "key has batch size 1.*2"),
        (replaced(2, lambda t: t[:, :3]), ValueError, "value has shape"),
        (qkv(heads_q=3), ValueError, "query has 3 heads and key 2"),
        (qkv(heads_kv=0), ValueError, "query has 4 heads and key 0"),
        (qkv(head_dim=12), ValueError, "head_dim 12.*multiple of 8"),
        (qkv(head_dim=520), ValueError, "head_dim 520.*512"),
        ((*qkv(head_dim=576)[:2], qkv(head_dim=576)[2]), ValueError, "value has head_dim 576.*512"),
        (qkv(head_dim=0), ValueError, "head_dim 0"),
    ),
)
def test_dense(tensors, error, words):
    with pytest.raises(error, match=words):
        aiter.flash_attn_func(*tensors)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    (
        ({"causal": 1}, TypeError, "causal must be True or False"),
        ({"causal": [True]}, TypeError, "causal|unhashable"),
        ({"return_lse": torch.ones(3)}, TypeError, "return_lse must be True or False"),
        ({"return_lse": 1}, TypeError, "return_lse must be True or False"),
        ({"rng_state": "junk"}, TypeError, "rng_state must be a torch.Tensor"),
        ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a float"),
        ({"softmax_scale": math.nan}, ValueError, "softmax_scale is nan"),
        ({"softmax_scale": torch.tensor(1.0)}, TypeError, "softmax_scale"),
    ),
)
def test_options(options, error, words):
    with pytest.raises(error, match=words):
        aiter.flash_attn_func(*qkv(), **options)


def test_head_groups():
    with pytest.raises(ValueError, match=r"num_groups is 4, but query has 4 heads and key 2"):
        aiter.grouped_query_attention(*qkv(), num_groups=4)
    with pytest.raises(ValueError, match="num_groups is 0"):
        aiter.grouped_query_attention(*qkv(), num_groups=0)
    with pytest.raises(TypeError, match="num_groups must be an int"):
        aiter.grouped_query_attention(*qkv(), num_groups=2.0)
    with pytest.raises(ValueError, match="key has 2 heads"):
        aiter.multi_query_attention(*qkv())


def cached(**changes):
    arguments = {
        "query": torch.zeros(2, 3, 4, 32),
        "kv_cache": torch.zeros(10, 2, 16, 32),
        "page_table": torch.zeros(2, 3, dtype=torch.int32),
        "block_size": 16,
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    (
        ({"block_size": 32}, ValueError, "block_size.*32.*16"),
        ({"block_size": 0}, ValueError, "block_size is 0"),
        ({"block_size": 16.0}, TypeError, "block_size must be an int"),
        ({"kv_cache": torch.zeros(3, 10, 2, 16, 32)}, ValueError, r"kv_cache has shape \(3, 10"),
        ({"kv_cache": (torch.zeros(10, 2, 16, 32),)}, ValueError, "kv_cache is a sequence of 1"),
        ({"kv_cache": (torch.zeros(10, 2, 16, 32), torch.zeros(9, 2, 16, 32))}, ValueError, "kv_cache value"),
        ({"kv_cache": torch.zeros(10, 2, 16, 32).half()}, TypeError, "kv_cache key has dtype"),
        ({"kv_cache": torch.zeros(10, 3, 16, 32)}, ValueError, "query has 4 heads and kv_cache key 3"),
        ({"kv_cache": torch.zeros(10, 2, 16, 40)}, ValueError, "kv_cache key has head_dim 40"),
        ({"kv_cache": "cache"}, TypeError, "kv_cache must be"),
        ({"page_table": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, "page_table has shape"),
        ({"page_table": torch.zeros(2, 3)}, TypeError, "page_table has dtype torch.float32"),
        ({"page_table": torch.zeros(6, dtype=torch.int32)}, ValueError, "page_table must be"),
        ({"page_table": [[0]]}, TypeError, "page_table must be a torch.Tensor"),
        ({"page_table": torch.tensor([[0, 1, 2], [3, 10, 5]])}, ValueError, r"page_table\[1, 1\] is 10.*0 to 9"),
        ({"page_table": torch.tensor([[0, 1, -1], [3, 4, 5]])}, ValueError, r"page_table\[0, 2\] is -1"),
        ({"cache_seqlens": torch.tensor([1, 49])}, ValueError, r"cache_seqlens\[1\] is 49.*48"),
        ({"cache_seqlens": torch.tensor([-1, 4])}, ValueError, r"cache_seqlens\[0\] is -1"),
        ({"cache_seqlens": torch.tensor([1])}, ValueError, "cache_seqlens has shape"),
        ({"cache_seqlens": torch.tensor([1.0, 2.0])}, TypeError, "cache_seqlens has dtype"),
        ({"query": torch.zeros(3, 4, 32)}, ValueError, "query must be"),
    ),
)
def test_kvcache(changes, error, words):
    with pytest.raises(error, match=words):
        aiter.flash_attn_with_kvcache(**cached(**changes))


def variable(**changes):
    query, key, value = qkv(seq_q=8, seq_k=8)
    arguments = {"query": query, "key": key, "value": value, "seq_lengths": torch.tensor([3, 8]), "max_seq_len": 8}
    return {**arguments, **changes}


def packed(**changes):
    tensors = {name: torch.zeros(11, heads, 32) for name, heads in (("query", 4), ("key", 2), ("value", 2))}
    return variable(**{**tensors, **changes})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    (
        (packed(seqlens_k=torch.tensor([3, 8]), key=None), TypeError, "key must be a torch.Tensor"),
        (packed(seqlens_k=torch.tensor([3, 8]), max_seqlen_k=1.5), TypeError, "max_seqlen_k must be an int"),
        (packed(seqlens_k=torch.tensor([3, 8]), max_seqlen_k=-1), ValueError, "max_seqlen_k is -1"),
        (packed(max_seq_len=2**31), ValueError, f"max_seq_len is {2**31}"),
        (variable(max_seq_len=9), ValueError, "padded to 8 tokens.*max_seq_len is 9"),
        (variable(max_seq_len=0), ValueError, "max_seq_len is 0"),
        (variable(max_seq_len=8.0), TypeError, "max_seq_len must be an int"),
        (variable(seq_lengths=torch.tensor([3, 9])), ValueError, r"seq_lengths\[1\] is 9.*max_seq_len, 8"),
        (variable(seq_lengths=torch.tensor([-1, 3])), ValueError, r"seq_lengths\[0\] is -1"),
        (variable(seq_lengths=torch.tensor([3])), ValueError, "seq_lengths has shape"),
        (variable(seq_lengths=[3, 8]), TypeError, "seq_lengths must be a torch.Tensor"),
        (variable(seq_lengths=torch.tensor([3.0, 8.0])), TypeError, "seq_lengths has dtype"),
        (variable(key=torch.zeros(2, 7, 2, 32)), ValueError, "key has|value has"),
        (variable(key=torch.zeros(16, 2, 32)), ValueError, "key has number of dimensions 3"),
        (variable(block_size=16), ValueError, "block_size is 16, but there is no page_table"),
        (variable(page_table=torch.zeros(2, 1).int()), ValueError, "page_table is given without block_size"),
        (packed(seq_lengths=torch.tensor([3, 7])), ValueError, "adds up to 10.*11"),
        (packed(seq_lengths=torch.tensor([2, 9])), ValueError, r"seq_lengths\[1\] is 9"),
        (packed(query=torch.zeros(10, 4, 32)), ValueError, "key has shape"),
        (
            variable(
                key=torch.zeros(5, 2, 4, 32),
                value=torch.zeros(5, 2, 4, 32),
                page_table=torch.tensor([[0, 1], [2, 5]]),
                block_size=4,
            ),
            ValueError,
            r"page_table\[1, 1\] is 5.*0 to 4",
        ),
        (
            variable(
                key=torch.zeros(5, 2, 4, 32),
                value=torch.zeros(5, 2, 4, 32),
                page_table=torch.tensor([[0], [2]]),
                block_size=4,
            ),
            ValueError,
            r"seq_lengths\[1\] is 8.*page_table holds",
        ),
    ),
)
def test_variable_length(arguments, error, words):
    with pytest.raises(error, match=words):
        aiter.variable_length_attention(**arguments)
