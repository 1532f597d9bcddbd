"""The public operations on AMD GPUs: their kernels, built by hipcc and executed instruction by instruction.

CPU tensors stand for a GPU's: the operations are told that the device is of an AMD arch, and launches go to the
emulator, which lets a kernel touch nothing but the tensors of the call. The kernels' own tests, over more shapes, are
in kernels/.
"""

from unittest import mock

import addresses
import emulator
import pytest
import torch
from emulator import hipcc
from problems import (
    Sequence,
    assert_sequences,
    check_dense,
    check_grouped,
    check_kvcache,
    check_variable_length,
    randn,
)

import aiter
from aiter import abi, plan_cache, reference
from aiter.kernels import CACHE_DTYPES, Gpu


def extent(outer, strides, heads, head_dim, tokens):
    """Elements from the first to the last of a tensor with these sizes and strides."""
    if min(outer, tokens, heads) == 0:
        return 0
    return (outer - 1) * strides[0] + (tokens - 1) * strides[1] + (heads - 1) * strides[2] + head_dim


def ranges(problem, tensors, spec, workspace_bytes):
    """(address, bytes, writable) of everything that a call gives to its kernel."""
    p, head_dim = problem, spec.head_dim
    kept = 1 if dict(spec.options).keys() & CACHE_DTYPES else 2
    queries = (1, p.total_q) if p.packed_q else (p.batch, p.seqlen_q)
    keys = (p.num_pages, p.page_size) if p.page_size else (1, p.total_k) if p.packed_k else (p.batch, p.seqlen_k)
    row_lse = p.total_q if p.packed_q else p.batch * p.seqlen_q
    for name, (outer, tokens), strides, heads, element in (
        ("query", queries, p.query_strides, p.heads_q, 2),
        ("key", keys, p.key_strides, p.heads_kv, kept),
        ("value", keys, p.value_strides, p.heads_kv, kept),
        ("output", queries, p.output_strides, p.heads_q, 2),
    ):
        yield getattr(tensors, name), element * extent(outer, strides, heads, head_dim, tokens), name == "output"
    table = p.listed_pages or p.batch * p.page_table_stride
    lengths = (("seqlens_q", p.batch), ("seqlens_k", p.batch), ("last_page_len", p.batch), ("page_indptr", p.batch + 1))
    for name, count in (*lengths, ("page_table", table)):
        yield getattr(tensors, name), 4 * count, False
    for name, strides in (("key_descale", p.key_descale_strides), ("value_descale", p.value_descale_strides)):
        yield getattr(tensors, name), 4 * (1 + (p.batch - 1) * strides[0] + (p.heads_kv - 1) * strides[1]), False
    yield tensors.lse, 4 * p.heads_q * row_lse, True
    yield tensors.workspace, workspace_bytes, True


@pytest.fixture(params=emulator.ARCHS)
def gpu(request, monkeypatch):
    if reason := hipcc.missing(request.param):
        pytest.skip(reason)
    with emulator.session(request.param, threads=2) as emulated:

        def launcher(kernel, device):
            def launch(packed):
                call = abi.AttentionCall.from_buffer_copy(packed)
                emulated.forbid_all()
                for address, nbytes, writable in ranges(
                    call.problem, call.tensors, kernel.spec, kernel.workspace_raw(packed)
                ):
                    if address and nbytes:
                        emulated.allow(address, nbytes, writable)
                code = kernel.launch_raw(packed, None)
                emulated.check()
                kernel.check(code)
                launched.add(kernel.spec.kernel)
                emulated.options |= dict(kernel.spec.options)
                return 0

            return launch

        launched, emulated.options = set(), {}
        emulated.launched = launched
        monkeypatch.setattr("aiter.plan.on_gpu", lambda tensor: True)
        monkeypatch.setattr("aiter.plan.arch_of", lambda device: request.param)
        monkeypatch.setattr("aiter.plan._gpu", lambda device: Gpu.of(request.param, 104))
        monkeypatch.setattr("aiter.plan.launcher", launcher)
        monkeypatch.setattr("problems.DEVICE", "cpu")
        with mock.patch.dict(plan_cache.plans, clear=True):
            yield emulated


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_flash_attn_func(gpu, dtype):
    check_dense(dtype, 64, 100, 130, (4, 2), causal=True, layout=("heads_first", "sliced", "last"))
    check_dense(dtype, 64, 2, 300, (4, 2), causal=False, batch=1)
    assert gpu.launched == {"attention_forward", "attention_decode"}


def test_few_rows_on_many_keys(gpu):
    """Whose keys are dealt to several blocks."""
    check_dense(torch.bfloat16, 64, 40, 2100, (8, 2), causal=True, batch=1)
    assert gpu.launched == {"attention_forward"} and "cut" in gpu.options


def test_grouped_and_multi_query(gpu):
    check_grouped(torch.bfloat16, 64, 70, 1, 3, causal=True)


@pytest.mark.parametrize("seq_q", (1, 80))
def test_flash_attn_with_kvcache(gpu, seq_q):
    check_kvcache(torch.bfloat16, 64, "stacked", 16, [0, 100, 33], seq_q, (4, 2), causal=True)
    check_kvcache(torch.bfloat16, 64, "pair", 3, [50, 7, 64], seq_q, (4, 2), causal=True, all_full=True)


@pytest.mark.parametrize("seq_q", (2, 40))
def test_8_bit_cache(gpu, seq_q):
    """Rows of 72 bytes: read in place, at multiples of eight."""
    lengths, table = [70, 9], torch.randperm(12)[:10].view(2, 5).int()
    caches = [randn(12, 2, 16, 72, dtype=torch.float16).to(torch.float8_e4m3fnuz) for _ in "kv"]
    query, descale = randn(2, seq_q, 4, 72, dtype=torch.float16), torch.tensor([[0.5, 3.0], [1.5, 0.375]])
    output, lse = aiter.flash_attn_with_kvcache(
        *(query, tuple(caches), table, 16, True),
        cache_seqlens=torch.tensor(lengths, dtype=torch.int32),
        k_descale=descale,
        v_descale=torch.tensor([0.75]),
        return_lse=True,
    )
    sequences = []
    for b, n in enumerate(lengths):
        key, value = (reference.gather_pages(cache.float(), table[b], n) for cache in caches)
        exact = (key * descale[b].view(2, 1)).half(), (value * 0.75).half()  # exactly
        sequences.append(Sequence(query[b], *exact, (b,), (b,)))
    assert_sequences(output, lse, sequences, True)
    assert gpu.launched == {"attention_decode" if seq_q == 2 else "attention_forward"}


@pytest.mark.parametrize("form", ("padded", "packed", "padded paged", "packed paged"))
def test_variable_length_attention(gpu, form):
    check_variable_length(torch.bfloat16, 64, form, [65, 0, 130], 7, (4, 2), causal=True)


@pytest.mark.parametrize("seq_q", (1, 33))
def test_far_addresses(gpu, seq_q):
    """Decoding and prefill; the emulator adds up addresses as the machine code says."""
    addresses.check_far_pages(torch.bfloat16, seq_q)
    addresses.check_far_rows(torch.bfloat16, seq_q)
    addresses.check_across_4gib(torch.bfloat16, seq_q)
    assert ("attention_decode" if seq_q == 1 else "attention_forward") in gpu.launched
