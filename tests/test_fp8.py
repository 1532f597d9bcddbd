"""Keys and values of 8 bits through the public operations: what reads them, what writes them, what is refused."""

import math
import re

import pytest
import torch
from problems import DEVICE, Sequence, assert_sequences, randn

import aiter
from aiter import flash_attn, jit, kv_cache, reference
from aiter.jit.record import read_record

FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
E4M3 = torch.float8_e4m3fn
DTYPE, HEADS, HEADS_KV, DIM = torch.bfloat16, 4, 2, 64
# Of so few bits that what is multiplied out is a number of DTYPE too.
K_DESCALE, V_DESCALE = torch.tensor([[0.5, 1.5], [3.0, 0.375]], device=DEVICE), torch.tensor(0.75, device=DEVICE)
DESCALES = {"k_descale": K_DESCALE, "v_descale": V_DESCALE}


def cached(*shape, dtype=E4M3):
    return (3 * randn(*shape, dtype=DTYPE)).to(dtype)


def multiplied_out(key, value, b, descales=DESCALES):
    """Rows (seq, heads_kv, dim) of sequence b as numbers of DTYPE, which they are exactly."""
    k_descale, v_descale = descales["k_descale"], descales["v_descale"]
    k = key.float() * (k_descale if k_descale.dim() == 0 else k_descale[b].unsqueeze(1))
    return k.to(DTYPE), (value.float() * v_descale).to(DTYPE)


def sequences_of(query, keys, values):
    return [
        Sequence(query[b], *multiplied_out(k, v, b), (b,), (b,))
        for b, (k, v) in enumerate(zip(keys, values, strict=True))
    ]


@pytest.mark.parametrize("rows", (1, 70))
def test_dense(rows):
    query = randn(2, rows, HEADS, DIM, dtype=DTYPE)
    key, value = (cached(2, 90, HEADS_KV, DIM) for _ in "kv")
    output, lse = aiter.flash_attn_func(query, key, value, True, return_lse=True, **DESCALES)
    assert_sequences(output, lse, sequences_of(query, key, value), True)
    again = aiter.grouped_query_attention(query, key, value, 2, True, **DESCALES)
    assert torch.equal(again, output)
    assert torch.equal(flash_attn.flash_attn_func(query, key, value, causal=True, **DESCALES), output)
    # Without descales, and where a cache is a slice of another tensor's every second row.
    wide = cached(2, 180, HEADS_KV, 2 * DIM)
    key, value = wide[:, ::2, :, :DIM], wide[:, ::2, :, DIM:]
    output = aiter.flash_attn_func(query, key, value, True)
    exact = [t.contiguous().to(DTYPE) for t in (key, value)]
    assert_sequences(output, None, [Sequence(query[b], *(t[b] for t in exact), (b,), (b,)) for b in range(2)], True)


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_paged(dtype):
    """The seed's operation and FlashAttention's, of which each has an order of dimensions of its own."""
    lengths, page_size = [33, 70], 16
    table = torch.randperm(12)[:10].view(2, 5).to(DEVICE, torch.int32)
    caches = [cached(12, HEADS_KV, page_size, DIM, dtype=dtype) for _ in "kv"]
    query, seqlens = randn(2, 3, HEADS, DIM, dtype=DTYPE), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    rows = [[reference.gather_pages(c.float(), table[b], n) for b, n in enumerate(lengths)] for c in caches]
    for cache in caches:  # what no sequence has is not looked at
        for b, n in enumerate(lengths):
            for token in range(n, 5 * page_size):
                cache[table[b, token // page_size], :, token % page_size] = math.nan
    output, lse = aiter.flash_attn_with_kvcache(
        query, tuple(caches), table, page_size, True, cache_seqlens=seqlens, return_lse=True, **DESCALES
    )
    assert_sequences(output, lse, sequences_of(query, *rows), True)
    theirs = [cache.transpose(1, 2) for cache in caches]
    again = flash_attn.flash_attn_with_kvcache(
        query, *theirs, cache_seqlens=seqlens, block_table=table, causal=True, **DESCALES
    )
    assert torch.equal(again, output)
    starts = torch.tensor([0, 3, 6], dtype=torch.int32, device=DEVICE)
    packed = flash_attn.flash_attn_varlen_func(
        query.flatten(0, 1), *theirs, starts, None, 3, 70, causal=True, block_table=table, seqused_k=seqlens, **DESCALES
    )
    assert torch.equal(packed.unflatten(0, (2, 3)), output)


def test_variable_lengths():
    lengths = [40, 25]
    query = randn(65, HEADS, DIM, dtype=DTYPE)
    key, value = (cached(65, HEADS_KV, DIM) for _ in "kv")
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    output = aiter.variable_length_attention(query, key, value, seqlens, 40, True, **DESCALES)
    sequences = [
        Sequence(query[r], *multiplied_out(key[r], value[r], b), (r,), ())
        for b, r in enumerate(reference.split_packed(lengths))
    ]
    assert_sequences(output, None, sequences, True)


def test_head_dims_that_are_padded():
    query = randn(1, 5, 2, 60, dtype=DTYPE)
    key, value = (cached(1, 20, 1, 60) for _ in "kv")
    output = flash_attn.flash_attn_func(query, key, value, causal=True, v_descale=V_DESCALE)
    exact = key[0].to(DTYPE), (value[0].float() * V_DESCALE).to(DTYPE)
    assert_sequences(output, None, [Sequence(query[0], *exact, (0,), (0,))], True)


def test_compiled_and_through_the_dispatcher():
    query = randn(2, 5, HEADS, DIM, dtype=DTYPE)
    key, value = (cached(2, 30, HEADS_KV, DIM) for _ in "kv")
    expected = aiter.flash_attn_func(query, key, value, True, **DESCALES)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(query, key, value, k_descale, v_descale):
        return aiter.flash_attn_func(query, key, value, True, k_descale=k_descale, v_descale=v_descale)

    assert torch.equal(step(query, key, value, K_DESCALE, V_DESCALE), expected)
    with torch.autocast(DEVICE, DTYPE):  # leaves 8 bits alone
        assert torch.equal(aiter.flash_attn_func(query.float(), key, value, True, **DESCALES), expected)
    inputs = (query, key, value, None, None, None, True, DIM**-0.5, 0)
    named = {"k_descale": K_DESCALE, "v_descale": V_DESCALE}
    assert torch.equal(torch.ops.aiter.attention(*inputs, **named)[0], expected)
    torch.library.opcheck(torch.ops.aiter.attention, inputs, named, test_utils="test_faketensor")
    out = torch.empty_like(query)
    flash_attn.flash_attn_func(query, key, value, causal=True, out=out, **DESCALES)
    assert torch.equal(out, expected)


def test_gradients_are_refused(monkeypatch):
    """Before anything is compiled."""
    query = randn(1, 5, HEADS, DIM, dtype=DTYPE)
    key, value = (cached(1, 30, HEADS_KV, DIM) for _ in "kv")
    monkeypatch.setattr(jit, "get_kernel", lambda spec: pytest.fail("compiled"))
    wants = query.clone().requires_grad_()
    for call in (
        lambda: aiter.flash_attn_func(wants, key, value, True),
        lambda: aiter.flash_attn_func(query, key.clone().requires_grad_(), value, True),
        lambda: aiter.flash_attn_func(query, key, value, sinks=torch.zeros(HEADS, requires_grad=True, device=DEVICE)),
        lambda: torch.compile(aiter.flash_attn_func, backend="eager")(wants, key, value, True),
        lambda: aiter.attention_backward(query, query, key, value, query, torch.zeros(1, HEADS, 5, device=DEVICE)),
        lambda: torch.func.grad(lambda q: aiter.flash_attn_func(q, key, value).sum().float())(query),
    ):
        with pytest.raises(Exception, match="float8 keys and values take no gradient"):
            call()


@pytest.mark.parametrize(
    ("error", "words", "change"),
    (
        (ValueError, "k_descale is given, but the cache has dtype torch.bfloat16", {"cache": DTYPE}),
        (TypeError, "k_descale has dtype torch.float64", {"k_descale": torch.ones(1, dtype=torch.float64)}),
        (ValueError, "k_descale has shape (3,); it must be float32 (1,), (heads_kv,)", {"k_descale": torch.ones(3)}),
        (ValueError, "k_descale has shape (1, 2)", {"k_descale": torch.ones(1, 2)}),
        (TypeError, "k_descale must be a torch.Tensor", {"k_descale": 1.0}),
        (ValueError, "k_descale takes no gradient", {"k_descale": torch.ones(1, requires_grad=True)}),
        (TypeError, "value has dtype torch.float8_e5m2; it must be that of key", {"value": torch.float8_e5m2}),
        (TypeError, "query has dtype torch.float8_e4m3fn", {"query": E4M3}),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(error, words, change):
    query = torch.zeros(2, 5, HEADS, DIM, dtype=DTYPE).to(change.get("query", DTYPE))
    key = torch.zeros(2, 30, HEADS_KV, DIM).to(change.get("cache", E4M3))
    value = torch.zeros(2, 30, HEADS_KV, DIM).to(change.get("value", key.dtype))
    k_descale = change.get("k_descale", torch.ones(1))
    with pytest.raises(error, match=re.escape(words)):
        aiter.flash_attn_func(query, key, value, k_descale=k_descale)
    query = query.to(DTYPE)
    with pytest.raises(NotImplementedError, match="q_descale is not offered"):
        flash_attn.flash_attn_func(query, key, value, q_descale=torch.ones(1))
    with pytest.raises(NotImplementedError, match="v_descale is not offered with qv"):
        flash_attn.flash_attn_func(query, key, value, qv=query, v_descale=torch.ones(1))


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_reshape_and_cache_then_read(dtype):
    """Written as PyTorch converts, to the bit, and read back as that."""
    key, value = (randn(20, HEADS_KV, DIM, dtype=DTYPE) for _ in "kv")
    caches = [torch.zeros(3, 16, HEADS_KV, DIM, device=DEVICE).to(dtype) for _ in "kv"]
    slots = torch.randperm(48)[:20].to(DEVICE)
    scales = torch.tensor([0.02, 0.5], device=DEVICE), torch.tensor([0.1], device=DEVICE)
    kv_cache.reshape_and_cache(key, value, *caches, slots, *scales)
    for new, cache, scale in zip((key, value), caches, scales, strict=True):
        largest = torch.finfo(dtype).max
        expected = (new.float() / scale.unsqueeze(1)).clamp(-largest, largest).to(dtype)
        assert torch.equal(cache.flatten(0, 1)[slots].view(torch.uint8), expected.view(torch.uint8))


def test_append_and_attend():
    """New tokens are divided by the descales that they are read with."""
    page_size, lengths = 16, [5, 20]
    caches = [cached(4, page_size, HEADS_KV, DIM) for _ in "kv"]
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32, device=DEVICE)
    query, key, value = (randn(2, 3, heads, DIM, dtype=DTYPE) for heads in (HEADS, HEADS_KV, HEADS_KV))
    before = [[c[table[b]].flatten(0, 1)[:n].clone() for b, n in enumerate(lengths)] for c in caches]
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    output = flash_attn.flash_attn_with_kvcache(
        query, *caches, key, value, cache_seqlens=seqlens, block_table=table, causal=True, **DESCALES
    )
    rows = []
    for new, cache, old, descale in zip((key, value), caches, before, (K_DESCALE, V_DESCALE.expand(2, 2)), strict=True):
        quantised = (new.float() / descale.view(2, 1, 2, 1)).to(E4M3)
        rows.append([torch.cat((old[b].float(), quantised[b].float())) for b in range(2)])
        for b, n in enumerate(lengths):
            assert torch.equal(cache[table[b]].flatten(0, 1)[: n + 3].float(), rows[-1][b])
    assert_sequences(output, None, sequences_of(query, *rows), True)
    with pytest.raises(ValueError, match="k_descale has shape"):
        kv_cache.append(key, value, *caches, seqlens, table, k_scale=torch.ones(3, device=DEVICE))


def test_recorded_calls_name_the_cache_dtype(tmp_path, monkeypatch):
    monkeypatch.setenv("AITER_RECORD", str(tmp_path / "kernels.jsonl"))
    monkeypatch.setattr(jit, "_kernels", {})
    monkeypatch.setattr("aiter.plan.plans", {})
    aiter.flash_attn_func(randn(1, 1, HEADS, DIM, dtype=DTYPE), cached(1, 9, 2, DIM), cached(1, 9, 2, DIM), True)
    (spec,) = read_record(tmp_path / "kernels.jsonl")
    assert dict(spec.options)["e4m3fn"] == 1 and "-e4m3fn" in spec.name
