"""Random calls of the public operations, held against float64 and PyTorch's own operator: over the whole space of
arguments on the device at hand, and on chosen points of it where a GPU is emulated."""

import math
import os
from dataclasses import dataclass, field

import torch
from accuracy import assert_as_accurate, assert_gradient_as_accurate, pytorch_attend_one

import aiter
from aiter import reference

# Where the operations are tested: on the GPU of a machine that has one, unless AITER_TEST_DEVICE=cpu.
DEVICE = os.environ.get("AITER_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16) if DEVICE == "cpu" else (torch.bfloat16, torch.float16)

# Every one up to 128; beyond, each remainder once of 64, which kernels for GPUs go through at one time. Those for CPUs
# go by vectors of at most 16.
BEYOND_128 = (136, 168, 248, 256) if DEVICE == "cpu" else (136, 144, 168, 176, 216, 224, 248, 256)
KINDS_OF_HEAD_DIM = (*range(8, 129, 8), *BEYOND_128)
# Pairs of dtype and head_dim to draw from: few, as each is two or four kernels to compile.
DRAWN_KINDS = [
    (dtype, head_dim)
    for place, dtype in enumerate(DTYPES)
    for head_dim in ((40, 64, 128), (8, 64, 128), (40, 64))[place - len(DTYPES)]
]


def randn(*shape, dtype, device=None):
    """Random values of `dtype` on the device under test, or `device`; the same on every device."""
    return torch.randn(shape, device="cpu").to(dtype).to(device or DEVICE)


def strided(shape, dtype, how, device=None):
    """A tensor of `shape` whose memory is laid out as `how` says: every one has a unit stride in the last dimension
    but 'last', which must be copied."""
    if how == "contiguous":
        return randn(*shape, dtype=dtype, device=device)
    if how == "heads_first":
        order = list(range(len(shape)))
        order[-3], order[-2] = order[-2], order[-3]
        return randn(*(shape[i] for i in order), dtype=dtype, device=device).transpose(-3, -2)
    if how == "sliced in 8s":  # as GPU kernels read: other addresses are copied before they are called
        return randn(*shape[:-1], shape[-1] + 16, dtype=dtype, device=device)[..., 8 : shape[-1] + 8]
    if how == "sliced":
        return randn(*shape[:-1], shape[-1] + 3, dtype=dtype, device=device)[..., 1 : shape[-1] + 1]
    if how == "last":
        return randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype, device=device).transpose(-1, -2)
    raise ValueError(how)


STRIDES = ("contiguous", "heads_first", "sliced", "last")
GPU_STRIDES = ("contiguous", "heads_first", "sliced in 8s")


@dataclass
class Sequence:
    """One sequence of a batch: its rows of the arguments, where its rows of the results are, and what else
    `reference.attend_one` takes for it (window, softcap, ...)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rows: tuple
    lse_rows: tuple
    options: dict = field(default_factory=dict)


def assert_sequences(output, lse, sequences, causal, softmax_scale=None):
    """Holds each sequence's rows of output and log-sum-exp against float64, by the rule for accuracy. Errors are taken
    over the whole batch, as the rule compares two operators and not two rows."""
    references, pytorch = [], []
    for sequence in sequences:
        tensors, options = (sequence.query, sequence.key, sequence.value), sequence.options
        expected, expected_lse = reference.attend_one(*tensors, causal, softmax_scale, **options)
        references.append(expected.flatten())
        pytorch.append(pytorch_attend_one(*tensors, causal, softmax_scale, **options).to(output.dtype).flatten())
        if lse is not None:
            torch.testing.assert_close(lse[sequence.lse_rows].double(), expected_lse, rtol=1e-4, atol=2e-4)
    if references:
        got = torch.cat([output[sequence.rows].flatten() for sequence in sequences])
        results = got, torch.cat(references), torch.cat(pytorch)
        seeing = results[1].reshape(-1, output.shape[-1]).any(-1).sum()
        if seeing < 64 or any(sequence.options for sequence in sequences):
            # In float32 the largest of a few rows' errors depends on how single scores are rounded: some 1 in 30 to 100
            # random calls has twice the other operator's (docs/cpu.md), so that the root mean square counts. And with
            # options both operators are written out.
            assert_gradient_as_accurate(*results)
        else:
            assert_as_accurate(*results)


def dense_sequences(query, key, value):
    return [Sequence(query[b], key[b], value[b], rows=(b,), lse_rows=(b,)) for b in range(query.shape[0])]


def check_dense(
    dtype, head_dim, seq_q, seq_k, heads, causal, batch=2, scale=None, layout=("contiguous",) * 3, return_lse=True
):
    """Calls flash_attn_func and holds its results against the references."""
    heads_q, heads_kv = heads
    query = strided((batch, seq_q, heads_q, head_dim), dtype, layout[0])
    key = strided((batch, seq_k, heads_kv, head_dim), dtype, layout[1])
    value = strided((batch, seq_k, heads_kv, head_dim), dtype, layout[2])
    before = [t.clone() for t in (query, key, value)]
    result = aiter.flash_attn_func(query, key, value, causal, scale, return_lse=return_lse)
    output, lse = result if return_lse else (result, None)
    assert output.shape == query.shape and output.is_contiguous() and output.dtype == dtype
    if return_lse:
        assert lse.shape == (batch, heads_q, seq_q) and lse.dtype == torch.float32
    assert_sequences(output, lse, dense_sequences(query, key, value), causal, scale)
    for tensor, original in zip((query, key, value), before, strict=True):
        assert torch.equal(tensor, original), "an input was written"


def check_grouped(dtype, head_dim, seqlen, heads_kv, num_groups, causal):
    """Calls grouped_query_attention and, with one KV head, multi_query_attention."""
    query = randn(2, seqlen, heads_kv * num_groups, head_dim, dtype=dtype)
    key, value = (randn(2, seqlen, heads_kv, head_dim, dtype=dtype) for _ in range(2))
    grouped = aiter.grouped_query_attention(query, key, value, num_groups, causal)
    assert torch.equal(grouped, aiter.flash_attn_func(query, key, value, causal))
    assert_sequences(grouped, None, dense_sequences(query, key, value), causal)
    if heads_kv == 1:
        assert torch.equal(grouped, aiter.multi_query_attention(query, key, value, causal))


def page_lists(page_table, lengths, page_size, spare=0):
    """What a page table says of sequences with these lengths, as (page_indptr, page_indices, last_page_len)."""
    counts = [-(-n // page_size) for n in lengths]
    rows = [row[:count] for row, count in zip(page_table, counts, strict=True)]
    indices = torch.cat([*rows, torch.full((spare,), -(2**31), device=page_table.device)]).int()
    indptr = torch.tensor([0, *counts]).cumsum(0).int().to(indices.device)
    last = [(n - 1) % page_size + 1 if n else 0 for n in lengths]
    return indptr, indices, torch.tensor(last, dtype=torch.int32, device=indices.device)


def check_kvcache(
    dtype, head_dim, form, page_size, lengths, seq_q, heads, causal, all_full=False, index_dtype=torch.int32
):
    """Calls flash_attn_with_kvcache with shuffled pages; entries past the valid tokens are -1."""
    heads_q, heads_kv = heads
    batch, max_blocks = len(lengths), -(-max([*lengths, 1]) // page_size)
    num_pages = batch * max_blocks + 2
    page_table = torch.randperm(num_pages)[: batch * max_blocks].view(batch, max_blocks).to(DEVICE, index_dtype)
    caches = [randn(num_pages, heads_kv, page_size, head_dim, dtype=dtype) for _ in range(1 + (form != "shared"))]
    kv_cache = {"shared": caches[0], "pair": tuple(caches), "stacked": torch.stack(caches)}[form]
    query = randn(batch, seq_q, heads_q, head_dim, dtype=dtype)
    valid = [max_blocks * page_size] * batch if all_full else lengths
    gathered = [[reference.gather_pages(c, page_table[b], n) for b, n in enumerate(valid)] for c in caches]
    sequences = [Sequence(query[b], gathered[0][b], gathered[-1][b], rows=(b,), lse_rows=(b,)) for b in range(batch)]
    if not all_full:
        for b, length in enumerate(lengths):
            page_table[b, -(-length // page_size) :] = -1
    cache_seqlens = None if all_full else torch.tensor(lengths, dtype=index_dtype, device=DEVICE)
    output, lse = aiter.flash_attn_with_kvcache(
        query, kv_cache, page_table, page_size, causal, cache_seqlens=cache_seqlens, return_lse=True
    )
    assert_sequences(output, lse, sequences, causal)
    indptr, indices, last = page_lists(page_table, valid, page_size, spare=2)
    lists = {"page_indptr": indptr, "page_indices": indices, "last_page_len": last, "max_seqlen_k": max([*valid, 1])}
    output, lse = aiter.flash_attn_with_kvcache(query, kv_cache, None, page_size, causal, return_lse=True, **lists)
    assert_sequences(output, lse, sequences, causal)


def check_variable_length(dtype, head_dim, form, lengths, spare, heads, causal):
    """Calls variable_length_attention; `form` is padded or packed, and paged or not. Padding is NaN."""
    heads_q, heads_kv = heads
    longest, page_size = max([*lengths, 1]) + spare, 16
    seq_lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    packed, every = form.startswith("packed"), slice(None)
    outer = (sum(lengths),) if packed else (len(lengths), longest)
    query = randn(*outer, heads_q, head_dim, dtype=dtype)
    rows = [(r,) for r in reference.split_packed(lengths)] if packed else [(b, slice(n)) for b, n in enumerate(lengths)]
    lse_rows = [(every, *r) for r in rows] if packed else [(b, every, slice(n)) for b, n in enumerate(lengths)]
    if "paged" in form:
        max_blocks = -(-longest // page_size)
        num_pages = len(lengths) * max_blocks + 1
        page_table = torch.randperm(num_pages)[: len(lengths) * max_blocks].view(len(lengths), max_blocks)
        page_table = page_table.int().to(DEVICE)
        key, value = (randn(num_pages, heads_kv, page_size, head_dim, dtype=dtype) for _ in range(2))
        gathered = [[reference.gather_pages(c, page_table[b], n) for b, n in enumerate(lengths)] for c in (key, value)]
        paging = {"page_table": page_table, "block_size": page_size}
    else:
        key, value = (randn(*outer, heads_kv, head_dim, dtype=dtype) for _ in range(2))
        gathered = [[cache[r].clone() for r in rows] for cache in (key, value)]
        paging = {}
    sequences = [
        Sequence(query[rows[b]].clone(), gathered[0][b], gathered[1][b], rows[b], lse_rows[b])
        for b in range(len(lengths))
    ]
    if not packed:
        for b, n in enumerate(lengths):
            for tensor in (query,) if paging else (query, key, value):
                tensor[b, n:] = math.nan
    output, lse = aiter.variable_length_attention(
        query, key, value, seq_lengths, longest, causal, return_lse=True, **paging
    )
    assert_sequences(output, lse, sequences, causal)
    if not packed:
        for b, n in enumerate(lengths):
            assert not output[b, n:].any() and (lse[b, :, n:] == -math.inf).all()
