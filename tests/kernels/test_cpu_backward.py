"""The CPU backward kernel against float64 autograd, by the rule for accuracy: PyTorch's own backward is the measure."""

import torch
from accuracy import assert_gradient_as_accurate, pytorch_attend_one
from driver import CPUS, CPUS_AND_MASKS, DTYPES, NATIVE, attend, gradients, on_cpus, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Sequence
from test_cpu_kernels import HEAD_DIM, LENGTHS, SEEDS, archs_and_masks, dense_sequences, enough_sequences

from aiter import reference

ABLEST = {NATIVE[-1], CPUS[-1]}  # enough for what hardly depends on the instructions
ablest_and_masks = on_cpus([case for case in CPUS_AND_MASKS if case[:2] in ABLEST])


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def expected(tensors, grad_output, grad_lse, causal, scale, options):
    """Gradients in float64, and in PyTorch's own operator; what flows through the log-sum-exp is added to the latter
    in float64, as PyTorch's operator has no such gradient."""
    exact = leaves(*(tensor.double() for tensor in tensors))
    output, lse = reference.attend_one(*exact, causal, scale, **options)
    own = leaves(*tensors)
    pytorch = torch.autograd.grad(pytorch_attend_one(*own, causal, scale, **options), own, grad_output)
    if grad_lse is None:
        return torch.autograd.grad(output, exact, grad_output.double()), pytorch
    seen = lse.isfinite()
    through_lse = torch.autograd.grad(lse[seen], exact, grad_lse[seen].double(), retain_graph=True, allow_unused=True)
    both = torch.autograd.grad((output, lse[seen]), exact, (grad_output.double(), grad_lse[seen].double()))
    return both, [p if t is None else (p.double() + t).to(p.dtype) for p, t in zip(pytorch, through_lse, strict=True)]


def check(sequences, results, grad_output, grad_lse, causal, scale=None):
    references, pytorch, got = ([], [], []), ([], [], []), ([], [], [])
    for sequence, keys in sequences:
        tensors = sequence.query, sequence.key, sequence.value
        lse_grad = None if grad_lse is None else grad_lse[sequence.lse_rows]
        exact, own = expected(tensors, grad_output[sequence.rows], lse_grad, causal, scale, sequence.options)
        for i, rows in enumerate((sequence.rows, keys, keys)):
            references[i].append(exact[i].flatten())
            pytorch[i].append(own[i].flatten())
            got[i].append(results[i][rows].flatten())
    for i in range(3):
        result = torch.cat(got[i])
        assert_gradient_as_accurate(result, torch.cat(references[i]), torch.cat(pytorch[i]))


@archs_and_masks
@settings(max_examples=6)
@given(data=st.data())
def test_dense(dtype, arch, causal, data):
    torch.manual_seed(data.draw(SEEDS))
    heads_kv, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    # With very few keys the gradients of queries and keys are little but rounding: nothing to be accurate about.
    seq_q, seq_k = data.draw(LENGTHS), data.draw(LENGTHS.filter(lambda n: n >= 15))
    batch = enough_sequences(seq_q)
    query, grad_output = (randn(batch, seq_q, heads_kv * group, HEAD_DIM, dtype=dtype) for _ in "qo")
    key, value = (randn(batch, seq_k, heads_kv, HEAD_DIM, dtype=dtype) for _ in "kv")
    grad_lse = torch.randn(batch, heads_kv * group, seq_q) if data.draw(st.booleans()) else None
    output, lse = attend(arch, query, key, value, causal)
    results = gradients(arch, query, key, value, output, lse, grad_output, grad_lse, causal)
    sequences = [(s, (b, slice(None))) for b, s in enumerate(dense_sequences(query, key, value))]
    check(sequences, results, grad_output, grad_lse, causal)
    for again in (1, 3):
        same = gradients(arch, query, key, value, output, lse, grad_output, grad_lse, causal, threads=again)
        assert all(torch.equal(a, b) for a, b in zip(results, same, strict=True))


@ablest_and_masks
def test_padded(dtype, arch, causal):
    lengths_q, lengths_k = (torch.tensor(lengths, dtype=torch.int32) for lengths in ((70, 0, 3, 100), (90, 20, 0, 1)))
    query, grad_output = (randn(4, 100, 4, HEAD_DIM, dtype=dtype) for _ in "qo")
    key, value = (randn(4, 90, 2, HEAD_DIM, dtype=dtype) for _ in "kv")
    for b in range(4):
        query[b, lengths_q[b] :] = grad_output[b, lengths_q[b] :] = float("nan")
        key[b, lengths_k[b] :] = value[b, lengths_k[b] :] = float("nan")
    lengths = {"seqlens_q": lengths_q, "seqlens_k": lengths_k}
    output, lse = attend(arch, query, key, value, causal, **lengths)
    results = gradients(arch, query, key, value, output, lse, grad_output, None, causal, **lengths)
    sequences = [
        (sequence, (b, slice(0, int(lengths_k[b]))))
        for b, sequence in enumerate(dense_sequences(query, key, value, lengths_q, lengths_k))
        if lengths_q[b] and lengths_k[b]
    ]
    check(sequences, results, grad_output, None, causal)
    for b in range(4):
        assert not results[0][b, lengths_q[b] :].any()
        assert not results[1][b, lengths_k[b] :].any() and not results[2][b, lengths_k[b] :].any()


@ablest_and_masks
def test_packed(dtype, arch, causal):
    lengths = torch.tensor((70, 0, 1, 129), dtype=torch.int32)
    total = int(lengths.sum())
    query, grad_output = (randn(total, 4, HEAD_DIM, dtype=dtype) for _ in "qo")
    key, value = (randn(total, 2, HEAD_DIM, dtype=dtype) for _ in "kv")
    options = {"seqlens_q": lengths, "seqlens_k": lengths, "max_seqlen": (150, 150)}
    output, lse = attend(arch, query, key, value, causal, **options)
    results = gradients(arch, query, key, value, output, lse, grad_output, None, causal, **options)
    sequences = [
        (Sequence(query[rows], key[rows], value[rows], (rows,), (slice(None), rows)), (rows,))
        for rows in reference.split_packed(lengths.tolist())
        if rows.stop > rows.start
    ]
    check(sequences, results, grad_output, None, causal)


@on_cpus(sorted(ABLEST))
def test_long_sequence_in_chunks(dtype, arch):
    """Few heads and many keys: dQ is a sum of parts, and scale may be negative."""
    query, grad_output = (randn(1, 150, 1, HEAD_DIM, dtype=dtype) for _ in "qo")
    key, value = (randn(1, 2100, 1, HEAD_DIM, dtype=dtype) for _ in "kv")
    output, lse = attend(arch, query, key, value, True, -0.2)
    results = gradients(arch, query, key, value, output, lse, grad_output, None, True, -0.2)
    sequences = [(s, (b, slice(None))) for b, s in enumerate(dense_sequences(query, key, value))]
    check(sequences, results, grad_output, None, True, -0.2)


@on_cpus(sorted(ABLEST | {NATIVE[0]}))
def test_what_is_not_finite_is_not_hidden(dtype, arch):
    """inf or NaN in an argument: what is NaN in float64 is not finite here, and no gradient is finite
    that is not in float64; few keys or many."""
    for keys in (4, 20, 60, 200):
        for victim in range(4):
            for bad in (float("inf"), float("-inf"), float("nan")):
                tensors = [randn(1, n, 1, HEAD_DIM, dtype=dtype) for n in (4, keys, keys, 4)]
                tensors[victim][0, 1, 0, 3] = bad
                *inputs, grad_output = tensors
                output, lse = attend(arch, *inputs, False)
                results = gradients(arch, *inputs, output, lse, grad_output, None, False)
                exact = leaves(*(tensor[0].double() for tensor in inputs))
                wanted = torch.autograd.grad(reference.attend_one(*exact)[0], exact, grad_output[0].double())
                for got, want in zip(results, wanted, strict=True):
                    assert not got[0][want.isnan()].isfinite().any()
                    assert want.isfinite().all() <= got.isfinite().all()
    # A log-sum-exp that is handed in, and its gradient.
    tensors = [randn(1, n, 1, HEAD_DIM, dtype=dtype) for n in (4, 20, 20, 4)]
    output, lse = attend(arch, *tensors[:3], False)
    for bad in (float("inf"), float("-inf"), float("nan")):
        wrong = lse.clone()
        wrong[0, 0, 1] = bad
        for own_lse, grad_lse in ((wrong, None), (lse, wrong)):
            results = gradients(
                arch, *tensors[:3], output, own_lse, tensors[3], grad_lse, False, lse_is_given=grad_lse is None
            )
            assert not results[0][0, 1].isfinite().any()
            assert results[0][0, [0, 2, 3]].isfinite().all() and not results[1].isfinite().all()


@on_cpus(sorted(ABLEST | {NATIVE[0]}))
def test_scale_of_zero(dtype, arch):
    large = 1e4 if dtype == "fp16" else 1e25
    for keys in (20, 200):
        query, key = (randn(1, n, 1, HEAD_DIM, dtype=dtype).sign() * large for n in (70, keys))
        value, grad_output = (randn(1, n, 1, HEAD_DIM, dtype=dtype) for n in (keys, 70))
        output, lse = attend(arch, query, key, value, False, 0.0)
        results = gradients(arch, query, key, value, output, lse, grad_output, None, False, 0.0)
        assert not results[0].any() and not results[1].any()
        expected = grad_output[0].double().mean(0) * (70 / keys)
        torch.testing.assert_close(results[2][0].double(), expected.expand(keys, 1, -1), rtol=2e-2, atol=1e-3)


def test_dtypes_are_covered():
    assert {dtype for dtype, _ in CPUS} == set(DTYPES)
