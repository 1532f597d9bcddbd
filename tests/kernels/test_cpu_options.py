"""The CPU kernels with every option of the launch ABI, alone and together, against float64; and what may not change the
bits of a result."""

import math

import drawn
import pytest
import torch
from driver import CPUS, NATIVE, STOOD_IN, attend, gradients, ints, on_cpus, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Sequence, assert_sequences
from random_calls import assert_rest_is_clear, draw_call
from test_cpu_backward import check
from test_cpu_kernels import HEAD_DIM, archs

AMX = "x86-64-v4+avx512bf16+amxbf16"
ALL = ("alibi", "softcap", "window")
# dtype, arch, value head_dim, options: each engine, each option alone and with others. Each line is a compilation, and
# of the first list two, with that for gradients.
KERNELS = [
    ("fp16", "x86-64-v2", HEAD_DIM, ("chunk", "dropout")),
    ("fp32", "x86-64-v3", 40, ALL),
    ("fp32", "x86-64-v3", HEAD_DIM, ("causal", "chunk", "dropout")),
    ("fp32", "x86-64-v4", HEAD_DIM, ("batch_invariant", "dropout", "softcap")),
    ("bf16", "x86-64-v4+avx512bf16", 40, (*ALL, "batch_invariant")),
    ("bf16", AMX, 96, (*ALL, "dropout")),
    ("fp16", f"{AMX}+amxfp16", HEAD_DIM, ("batch_invariant", "causal", "softcap")),
]
FORWARD_ONLY = [
    ("fp16", "x86-64-v3", 40, (*ALL, "batch_invariant")),
    ("bf16", "x86-64-v4", HEAD_DIM, ("alibi",)),
    ("bf16", "x86-64-v4", HEAD_DIM, ("batch_invariant", "chunk", "dropout")),
    ("bf16", "x86-64-v4+avx512bf16", HEAD_DIM, ("dropout", "window")),
]
KERNELS, FORWARD_ONLY = ([kernel for kernel in some if kernel[:2] in CPUS] for some in (KERNELS, FORWARD_ONLY))


def on_kernels(kernels):
    ids = ["-".join((*kernel[:2], *kernel[3])) + "-stand-in" * (kernel[:2] in STOOD_IN) for kernel in kernels]
    return pytest.mark.parametrize(("dtype", "arch", "value_dim", "on"), kernels, ids=ids)


@on_kernels(KERNELS + FORWARD_ONLY)
@settings(max_examples=12)
@given(data=st.data())
def test_forward(dtype, arch, value_dim, on, data):
    call = draw_call(data, dtype, (HEAD_DIM, value_dim), on)
    drawn.note_call(arch, "forward", call, (HEAD_DIM, value_dim), "causal" in on)
    causal, scale = "causal" in on, data.draw(st.sampled_from((None, 0.3, -0.2)))
    output, lse = attend(arch, *call.tensors, causal, scale, **call.options)
    assert_sequences(output, lse, call.sequences, causal, scale)
    assert_rest_is_clear(call, output, lse)
    for threads in (1, 3):
        again = attend(arch, *call.tensors, causal, scale, threads=threads, **call.options)
        assert all(torch.equal(a, b) for a, b in zip(again, (output, lse), strict=True))


@on_cpus(CPUS[::2])
@settings(max_examples=10)
@given(data=st.data())
def test_sinks_starts_and_offsets(dtype, arch, data):
    """What needs no kernel of its own."""
    call = draw_call(data, dtype, (HEAD_DIM, HEAD_DIM), ("causal",))
    drawn.note_call(arch, "forward", call, (HEAD_DIM, HEAD_DIM), True)
    output, lse = attend(arch, *call.tensors, True, **call.options)
    assert_sequences(output, lse, call.sequences, True)
    assert_rest_is_clear(call, output, lse)


@on_kernels(KERNELS)
@settings(max_examples=8)
@given(data=st.data())
def test_backward(dtype, arch, value_dim, on, data):
    """With sinks, the log-sum-exp is that of keys and sink together."""
    call = draw_call(data, dtype, (HEAD_DIM, value_dim), on, ("dense", "packed"), fewest_keys=31)
    drawn.note_call(arch, "backward", call, (HEAD_DIM, value_dim), "causal" in on)
    causal, options = "causal" in on, call.options
    sinks = options.pop("sinks", None)
    output, lse = attend(arch, *call.tensors, causal, sinks=sinks, **options)
    grad_output = torch.full_like(output, math.nan)
    for sequence in call.sequences:
        grad_output[sequence.rows] = randn(*output[sequence.rows].shape, dtype=dtype)
    given_lse = sinks is not None
    if given_lse:
        lse = torch.logaddexp(lse, sinks.unsqueeze(1))
    arguments = (arch, *call.tensors, output, lse, grad_output, None, causal)
    results = gradients(*arguments, lse_is_given=given_lse, **options)
    with_keys = [(s, keys) for s, keys in zip(call.sequences, call.keys, strict=True) if len(s.query) and len(s.key)]
    if with_keys:
        check(with_keys, results, grad_output, None, causal)
    for result, places in zip(results, ([s.rows for s in call.sequences], call.keys, call.keys), strict=True):
        rest = torch.ones(result.shape[:-2], dtype=torch.bool)
        for place in places:
            rest[place] = False
        assert not result[rest].any()
    again = gradients(*arguments, lse_is_given=given_lse, threads=1, **options)
    assert all(torch.equal(a, b) for a, b in zip(again, results, strict=True))


@pytest.mark.parametrize(("head_dim", "value_dim"), ((576, 512), (8, 200)))
def test_large_and_unequal_head_dims(head_dim, value_dim):
    dtype, arch = next(path for path in reversed(NATIVE) if path[0] != "fp32")
    query, grad_output = randn(2, 70, 3, head_dim, dtype=dtype), randn(2, 70, 3, value_dim, dtype=dtype)
    key = randn(2, 90, 1, max(head_dim, value_dim), dtype=dtype)
    key, value = key[..., :head_dim], key[..., :value_dim]  # one memory
    for rows in (1, 70):
        output, lse = attend(arch, query[:, :rows], key, value, True)
        sequences = [Sequence(query[b, :rows], key[b], value[b], (b,), (b,)) for b in range(2)]
        assert_sequences(output, lse, sequences, True)
    results = gradients(arch, query, key, value, output, lse, grad_output, None, True)
    check([(sequence, (b,)) for b, sequence in enumerate(sequences)], results, grad_output, None, True)


# Every way in which rows of keys are turned round, and matrix tiles.
@on_cpus([path for path in NATIVE if path[0] != "fp32" or path == NATIVE[0]] + STOOD_IN[-1:])
def test_batch_invariant(dtype, arch):
    for tokens, heads_kv, group in ((1300, 1, 1), (200, 2, 5)):
        (query, key, value), whole = assert_invariant(dtype, arch, tokens, heads_kv, group, causal=True)
        assert_sequences(*whole, [Sequence(query[0], key[0], value[0], (0,), (0,))], True)


@on_cpus([path for path in NATIVE if path[0] == "fp32"][-1:])
def test_batch_invariant_with_options(dtype, arch):
    options = {"window": (150, 0), "softcap": 5.0, "alibi_slopes": torch.rand(6)}
    assert_invariant(dtype, arch, 1300, 2, 3, **options)


def assert_invariant(dtype, arch, tokens, heads_kv, group, **options):
    """No bit depends on how a prompt is cut or on other sequences: one row at a time is decoding. Later keys are
    larger, so that maxima move. Returns query, key and value, and what came out."""
    query = randn(1, tokens, heads_kv * group, HEAD_DIM, dtype=dtype)
    key, value = (randn(1, tokens, heads_kv, HEAD_DIM, dtype=dtype) for _ in "kv")
    key *= torch.linspace(0.5, 4, tokens).to(key.dtype).view(-1, 1, 1)
    whole = attend(arch, query, key, value, threads=1, batch_invariant=True, **options)
    for chunk in (1, 2, 4, 7, 9, 60, 512):
        begins = range(0, tokens, chunk)
        for begin in {*begins[:: max(1, len(begins) // 8)], begins[-1]}:
            rows = slice(begin, min(begin + chunk, tokens))
            tensors = query[:, rows], key[:, : rows.stop], value[:, : rows.stop]
            output, lse = attend(arch, *tensors, batch_invariant=True, **options)
            assert torch.equal(output, whole[0][:, rows]) and torch.equal(lse, whole[1][:, :, rows])
    others = [torch.cat((randn(2, *t.shape[1:], dtype=dtype), t)) for t in (query, key, value)]
    lengths = ints([tokens, 3, tokens])
    output, lse = attend(arch, *others, seqlens_q=lengths, seqlens_k=lengths, batch_invariant=True, **options)
    assert torch.equal(output[2], whole[0][0]) and torch.equal(lse[2], whole[1][0])
    return (query, key, value), whole


@on_cpus(sorted({NATIVE[0], NATIVE[-1]}))
def test_gradients_of_a_part_of_the_keys(dtype, arch):
    """With the log-sum-exp of all keys given, parts of them add up: also where one strip would hold all of a part."""
    query, grad_output = (randn(2, 70, 2, HEAD_DIM, dtype=dtype) for _ in "qo")
    key, value = (randn(2, 40, 2, HEAD_DIM, dtype=dtype) for _ in "kv")
    output, lse = attend(arch, query, key, value, False)
    parts = [
        gradients(arch, query, key[:, k], value[:, k], output, lse, grad_output, None, False, lse_is_given=True)
        for k in (slice(0, 17), slice(17, 40))
    ]
    grad_query = sum(part[0].float() for part in parts).to(query.dtype)
    results = (grad_query, *(torch.cat([part[i] for part in parts], 1) for i in (1, 2)))
    sequences = [(Sequence(query[b], key[b], value[b], (b,), (b,)), (b,)) for b in range(2)]
    check(sequences, results, grad_output, None, False)


@archs
def test_rest_is_left_alone(dtype, arch):
    query, key, value = (randn(2, 9, 2, HEAD_DIM, dtype=dtype) for _ in "qkv")
    lengths = ints([4, 0])
    for clear_rest in (False, True):
        output, _ = attend(arch, query, key, value, True, seqlens_q=lengths, seqlens_k=lengths, clear_rest=clear_rest)
        packed = [query.flatten(0, 1).roll(2, 0), *(t.flatten(0, 1) for t in (key, value))]
        layout = {"seqlens_q": lengths, "starts_q": ints([2, 8, 17]), "seqlens_k": lengths}
        packed, packed_lse = attend(
            arch, *packed, True, **layout, starts_k=ints([0, 9, 18]), max_seqlen=(9, 9), clear_rest=clear_rest
        )
        assert torch.equal(packed[2:6], output[0, :4])
        for rest in (output[0, 4:], output[1], packed[:2], packed[6:]):
            assert (rest == 0).all() if clear_rest else rest.isnan().all()
        assert packed_lse[:, :2].eq(-math.inf).all() if clear_rest else packed_lse[:, :2].isnan().all()


@on_kernels([kernel for kernel in KERNELS if kernel[3][: len(ALL)] == ALL][:2])
@settings(max_examples=40)
@given(data=st.data())
def test_whatever_device_memory_holds(dtype, arch, value_dim, on, data):
    """Lengths, starts, offsets and page numbers are clamped: what comes out may mean nothing, but all is written."""

    def anything(*shape):
        numbers = st.sampled_from((-(2**31), -5, 0, 1, 3, 7, 20, 41, 2**31 - 1))
        return ints(data.draw(st.lists(numbers, min_size=math.prod(shape), max_size=math.prod(shape)))).view(shape)

    batch, heads, seq_q, seq_k = 3, 4, data.draw(st.sampled_from((1, 20))), 33
    layout = data.draw(st.sampled_from(("dense", "packed", "paged", "lists")))
    query_shape, key_shape = {
        "dense": ((batch, seq_q), (batch, seq_k)),
        "packed": ((40,), (41,)),
        "paged": ((batch, seq_q), (9, 7)),
        "lists": ((batch, seq_q), (9, 7)),
    }[layout]
    query = randn(*query_shape, heads, HEAD_DIM, dtype=dtype)
    key, value = (randn(*key_shape, 2, dim, dtype=dtype) for dim in (HEAD_DIM, value_dim))
    options = {"alibi_slopes": torch.rand(heads), "softcap": 3.0, "batch_invariant": "batch_invariant" in on}
    options["window"] = data.draw(st.sampled_from(((-1, -1), (5, 0), (0, 9), (-1, 0))))
    options |= {name: anything(batch) for name in ("seqlens_q", "seqlens_k", "query_offsets")}
    if layout == "packed":
        options |= {"starts_q": anything(batch + 1), "starts_k": anything(batch + 1), "max_seqlen": (seq_q, seq_k)}
    if layout == "paged":
        options["page_table"] = anything(batch, 5)
    if layout == "lists":
        options |= {"page_table": anything(11), "page_indptr": anything(batch + 1), "last_page_len": anything(batch)}
    output, lse = attend(arch, query, key, value, **options)
    assert output.isfinite().all() and not lse.isnan().any()
    if layout not in ("paged", "lists"):
        grads = gradients(arch, query, key, value, output, lse, torch.randn_like(output), **options)
        assert all(grad.isfinite().all() for grad in grads)
