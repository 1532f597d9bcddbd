"""Gradients of the operations against float64 autograd of the unfused form, over the space of their arguments.

The rule for accuracy is that of the forward pass (accuracy.py), with PyTorch's own backward in the same dtype as the
measure. Errors are taken over a whole call: a sequence of one key has gradients of queries and keys that are zero but
for rounding, and says nothing by itself.
"""

import math
import subprocess
import sys

import pytest
import torch
from accuracy import assert_gradient_as_accurate, pytorch_attend_one
from hypothesis import given
from hypothesis import strategies as st
from problems import DEVICE, DRAWN_KINDS, DTYPES, KINDS_OF_HEAD_DIM, STRIDES, strided

import aiter
from aiter import reference

dtypes = st.sampled_from(DTYPES)
strides = st.sampled_from(STRIDES)
seqlens = st.one_of(st.sampled_from((15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 128, 129)), st.integers(2, 300))
groups = st.sampled_from(((1, 1), (2, 1), (4, 2), (6, 2), (3, 3), (8, 1)))


@pytest.fixture(autouse=True)
def on_device():
    with torch.device(DEVICE):
        yield


def leaves(*tensors):
    return [tensor.detach().requires_grad_() for tensor in tensors]


def expected(tensors, grad_output, grad_lse, causal, scale):
    """Gradients of one sequence in float64, and PyTorch's own. As PyTorch's operator returns no log-sum-exp, what flows
    through that is added to the latter in float64."""
    exact, own = leaves(*(tensor.double() for tensor in tensors)), leaves(*tensors)
    output, lse = reference.attend_one(*exact, causal, scale)
    seen = lse.isfinite()
    grads = torch.autograd.grad(output, exact, grad_output.double(), retain_graph=True, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, exact, strict=True)]
    pytorch = torch.autograd.grad(pytorch_attend_one(*own, causal, scale), own, grad_output)
    pytorch = [grad.nan_to_num() for grad in pytorch]  # rows that see nothing are NaN in some of its paths
    if grad_lse is not None and seen.any():
        through_lse = torch.autograd.grad(lse[seen], exact, grad_lse[seen].double(), allow_unused=True)
        for i, grad in enumerate(through_lse):
            if grad is not None:
                grads[i] = grads[i] + grad
                pytorch[i] = (pytorch[i].double() + grad).to(pytorch[i].dtype)
    return grads, pytorch


def assert_gradients(got, sequences, causal, scale=None):
    """`sequences` yields, for each one, its query, key, value, grad_output and grad_lse (or None) and its gradients'
    rows of query and of key."""
    results, references, pytorch = ([], [], []), ([], [], []), ([], [], [])
    for tensors, grad_output, grad_lse, rows_q, rows_k in sequences:
        if tensors[0].numel() and tensors[1].numel():
            exact, own = expected(tensors, grad_output, grad_lse, causal, scale)
        else:
            exact = own = [torch.zeros_like(tensor) for tensor in tensors]
        for i, rows in enumerate((rows_q, rows_k, rows_k)):
            results[i].append(got[i][rows].flatten())
            references[i].append(exact[i].double().flatten())
            pytorch[i].append(own[i].flatten())
    for triple in zip(results, references, pytorch, strict=True):
        if sum(part.numel() for part in triple[0]):
            result, *others = (torch.cat(part) for part in triple)
            assert_gradient_as_accurate(result, *others)


def dense(query, key, value, grad_output, grad_lse):
    for b in range(query.shape[0]):
        tensors = [t.detach()[b] for t in (query, key, value)]
        yield tensors, grad_output[b], None if grad_lse is None else grad_lse[b], (b,), (b,)


def gradients(call, tensors, grad_output, grad_lse):
    output, lse = call(*tensors)
    outputs = (output,) if grad_lse is None else (output, lse)
    return torch.autograd.grad(outputs, tensors, (grad_output, grad_lse)[: len(outputs)])


@given(
    kind=st.sampled_from(DRAWN_KINDS),
    batch=st.integers(2, 3),
    seq_q=seqlens,
    seq_k=seqlens,
    heads=groups,
    causal=st.booleans(),
    scale=st.one_of(st.none(), st.floats(0.05, 0.5), st.just(-0.1)),
    layout=st.tuples(strides, strides, strides, strides),
    through_lse=st.booleans(),
)
def test_dense(kind, batch, seq_q, seq_k, heads, causal, scale, layout, through_lse):
    torch.manual_seed(seq_q * 1000 + seq_k)
    dtype, head_dim = kind
    shapes = [
        (batch, s, h, head_dim) for s, h in zip((seq_q, seq_k, seq_k, seq_q), (*heads, heads[1], heads[0]), strict=True)
    ]
    *tensors, grad_output = (strided(shape, dtype, how) for shape, how in zip(shapes, layout, strict=True))
    grad_lse = torch.randn(batch, heads[0], seq_q) if through_lse else None
    tensors = leaves(*tensors)
    before = [t.detach().clone() for t in (*tensors, grad_output)]
    got = gradients(
        lambda q, k, v: aiter.flash_attn_func(q, k, v, causal, scale, return_lse=True), tensors, grad_output, grad_lse
    )
    assert all(grad.shape == t.shape and grad.dtype == dtype for grad, t in zip(got, tensors, strict=True))
    assert_gradients(got, dense(*tensors, grad_output, grad_lse), causal, scale)
    for tensor, original in zip((*tensors, grad_output), before, strict=True):
        assert torch.equal(tensor, original), "an input was written"


@pytest.mark.parametrize("head_dim", KINDS_OF_HEAD_DIM)
def test_head_dims(head_dim):
    dtype, causal = DTYPES[head_dim // 8 % len(DTYPES)], head_dim // 8 % 2 == 0
    *tensors, grad_output = (torch.randn(1, 70, 2, head_dim).to(dtype) for _ in range(4))
    tensors = leaves(*tensors)
    got = gradients(lambda *t: aiter.flash_attn_func(*t, causal, return_lse=True), tensors, grad_output, None)
    assert_gradients(got, dense(*tensors, grad_output, None), causal)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", (False, True))
def test_many_tiles_of_keys(dtype, causal):
    for seq_q, seq_k in ((3, 3000), (700, 1100), (1500, 600)):
        shapes = [(1, s, h, 64) for s, h in ((seq_q, 4), (seq_k, 2), (seq_k, 2), (seq_q, 4))]
        *tensors, grad_output = (torch.randn(shape).to(dtype) for shape in shapes)
        tensors = leaves(*tensors)
        got = gradients(lambda *t: aiter.flash_attn_func(*t, causal, return_lse=True), tensors, grad_output, None)
        assert_gradients(got, dense(*tensors, grad_output, None), causal)


@given(
    dtype=dtypes,
    packed=st.booleans(),
    lengths=st.lists(st.one_of(st.sampled_from((0, 1)), st.integers(2, 150)), min_size=1, max_size=4),
    spare=st.sampled_from((0, 1, 40)),
    heads=groups,
    causal=st.booleans(),
    through_lse=st.booleans(),
)
def test_variable_length(dtype, packed, lengths, spare, heads, causal, through_lse):
    lengths = [*lengths, 60]  # one that says something about accuracy
    longest = max(lengths) + spare
    outer = (sum(lengths),) if packed else (len(lengths), longest)
    *tensors, grad_output = (torch.randn(*outer, h, 64).to(dtype) for h in (*heads, heads[1], heads[0]))
    grad_lse = torch.randn(heads[0], outer[0]) if packed else torch.randn(outer[0], heads[0], outer[1])
    rows = [(r,) for r in reference.split_packed(lengths)] if packed else [(b, slice(n)) for b, n in enumerate(lengths)]
    if not packed:  # what stands in the padding has no effect
        for b, n in enumerate(lengths):
            for tensor in (*tensors, grad_output):
                tensor[b, n:] = math.nan
            grad_lse[b, :, n:] = math.nan
    tensors = leaves(*tensors)
    got = gradients(
        lambda *t: aiter.variable_length_attention(*t, torch.tensor(lengths), longest, causal, return_lse=True),
        tensors,
        grad_output,
        grad_lse if through_lse else None,
    )
    lse_rows = [(slice(None), *r) if packed else (r[0], slice(None), r[1]) for r in rows]
    assert_gradients(
        got,
        (
            ([t.detach()[r] for t in tensors], grad_output[r], grad_lse[lr] if through_lse else None, r, r)
            for r, lr in zip(rows, lse_rows, strict=True)
        ),
        causal,
    )
    if not packed:
        for b, n in enumerate(lengths):
            assert not any(grad[b, n:].any() for grad in got), "padding has a gradient"


def test_grouped_and_multi_query():
    query, key, value, grad_output = (torch.randn(2, 90, heads, 64).to(DTYPES[0]) for heads in (6, 2, 2, 6))
    tensors = leaves(query, key, value)
    grouped = torch.autograd.grad(aiter.grouped_query_attention(*tensors, 3, True), tensors, grad_output)
    flash = torch.autograd.grad(aiter.flash_attn_func(*tensors, causal=True), tensors, grad_output)
    assert all(torch.equal(a, b) for a, b in zip(grouped, flash, strict=True))
    tensors = leaves(query, key[:, :, :1], value[:, :, :1])
    got = torch.autograd.grad(aiter.multi_query_attention(*tensors), tensors, grad_output)
    assert_gradients(got, dense(*tensors, grad_output, None), False)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_tensor_as_query_key_and_value(dtype):
    (tensor,) = leaves(torch.randn(2, 65, 2, 64).to(dtype))
    apart = leaves(tensor, tensor, tensor)
    grad_output = torch.randn(2, 65, 2, 64).to(dtype)
    (got,) = torch.autograd.grad(aiter.flash_attn_func(tensor, tensor, tensor, causal=True), tensor, grad_output)
    parts = torch.autograd.grad(aiter.flash_attn_func(*apart, causal=True), apart, grad_output)
    torch.testing.assert_close(got.float(), sum(p.float() for p in parts), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_incoming_gradients_need_not_be_contiguous(dtype):
    tensors = leaves(*(torch.randn(2, 40, 3, 64).to(dtype) for _ in range(3)))
    transposed = torch.randn(2, 64, 3, 40).to(dtype).transpose(1, 3)
    expanded = torch.randn(1, 1, 1, 64).to(dtype).expand(2, 40, 3, 64)
    one = torch.ones((), dtype=dtype).expand(2, 40, 3, 64)  # what output.sum().backward() sends
    for grad_output in (transposed, expanded, one):
        strange, plain = (
            torch.autograd.grad(aiter.flash_attn_func(*tensors), tensors, grad)
            for grad in (grad_output, grad_output.contiguous())
        )
        assert all(torch.equal(a, b) for a, b in zip(strange, plain, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_the_log_sum_exp_is_used(dtype):
    tensors = leaves(*(torch.randn(1, 50, 2, 64).to(dtype) for _ in range(3)))
    _, lse = aiter.flash_attn_func(*tensors, causal=True, return_lse=True)
    grads = torch.autograd.grad(lse.square().sum(), tensors, allow_unused=True)
    exact = leaves(*(t[0].double() for t in tensors))
    wanted = torch.autograd.grad(reference.attend_one(*exact, True)[1].square().sum(), exact, allow_unused=True)
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    for got, want in zip(grads[:2], wanted[:2], strict=True):
        torch.testing.assert_close(got[0].double(), want, rtol=0, atol=tolerance * float(want.abs().max()))
    assert grads[2] is None or not grads[2].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_have_no_gradient(dtype):
    query, grad_output = (torch.randn(2, 40, 2, 64).to(dtype) for _ in range(2))
    tensors = leaves(query, *(torch.randn(2, 9, 2, 64).to(dtype) for _ in range(2)))
    got = gradients(
        lambda *t: aiter.flash_attn_func(*t, True, return_lse=True), tensors, grad_output, torch.randn(2, 2, 40)
    )
    assert not got[0][:, :31].any() and got[0][:, 32:].any() and all(grad.isfinite().all() for grad in got)


@pytest.mark.parametrize("how", ("padding", "blind"))
def test_rows_without_keys_have_no_part_in_the_gradient_of_sinks(how):
    """Whatever their gradients hold."""
    keys = 6 if how == "padding" else 3
    query, key, value = (torch.randn(2, n, 2, 16).to(DTYPES[0]) for n in (6, keys, keys))
    lengths = torch.tensor([6, 3], dtype=torch.int32)
    options = {"seqlens_q": lengths, "seqlens_k": lengths} if how == "padding" else {"causal": True}
    grad_output, sinks = torch.randn_like(query), torch.randn(2)
    gone = (slice(1, 2), slice(3, None)) if how == "padding" else (slice(None), slice(3))
    results = []
    for filling in (0.0, math.nan, math.inf):
        grad_output[gone] = filling
        tensors = leaves(query, key, value, sinks)
        output = aiter.flash_attn_func(*tensors[:3], sinks=tensors[3], **options)
        results.append(torch.autograd.grad(output, tensors, grad_output))
    for name, *same in zip(("query", "key", "value", "sinks"), *results, strict=True):
        assert same[0].isfinite().all() and all(torch.equal(same[0], other) for other in same[1:]), name
    assert results[0][3].all()


@pytest.mark.parametrize("changed", ("query_offsets", "alibi_slopes", "seqlens_k"))
def test_what_the_backward_pass_reads_may_not_change_before_it(changed):
    numbers = {
        "query_offsets": torch.tensor([3], dtype=torch.int32),
        "alibi_slopes": torch.rand(2),
        "seqlens_k": torch.tensor([7], dtype=torch.int32),
    }
    tensors = leaves(*(torch.randn(1, 8, 2, 16).to(DTYPES[0]) for _ in "qkv"))
    output = aiter.flash_attn_func(*tensors, causal=True, **numbers)
    numbers[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_nothing_to_see_at_all():
    for seq_q, seq_k in ((0, 5), (5, 0)):
        tensors = leaves(*(torch.randn(2, seqlen, 2, 64).to(DTYPES[0]) for seqlen in (seq_q, seq_k, seq_k)))
        got = torch.autograd.grad(aiter.flash_attn_func(*tensors).sum(), tensors)
        assert all(grad.shape == t.shape and not grad.any() for grad, t in zip(got, tensors, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(dtype):
    """Scores of ±1e4 saturate softmax: gradients stay finite."""
    tensors = leaves(*(torch.randn(1, 130, 2, 64).to(dtype) for _ in range(3)))
    for scale in (200.0, -200.0):
        grads = torch.autograd.grad(aiter.flash_attn_func(*tensors, True, scale).sum(), tensors)
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.skipif(DEVICE != "cpu", reason="threads of CPU kernels")
def test_results_do_not_depend_on_the_thread_count():
    threads = torch.get_num_threads()
    many = leaves(*(torch.randn(2, 300, 3, 64).bfloat16() for _ in range(3)))
    one_head = leaves(*(torch.randn(1, 2000, 1, 64) for _ in range(3)))
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for tensors in (many, one_head):
                output = aiter.flash_attn_func(*tensors, causal=True)
                results.append(torch.autograd.grad(output, tensors, output.detach()))
    finally:
        torch.set_num_threads(threads)
    for i, result in enumerate(results[2:]):
        assert all(torch.equal(a, b) for a, b in zip(result, results[i % 2], strict=True))


def test_no_second_derivative():
    tensors = leaves(*(torch.randn(1, 8, 1, 64).to(DTYPES[0]) for _ in range(3)))
    (grad,) = torch.autograd.grad(aiter.flash_attn_func(*tensors).square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_no_gradient_through_pages():
    (query,) = leaves(torch.randn(1, 2, 2, 64).to(DTYPES[0]))
    cache, page_table = torch.randn(3, 2, 16, 64).to(DTYPES[0]), torch.tensor([[0, 2]], dtype=torch.int32)
    output = aiter.flash_attn_with_kvcache(query, cache, page_table, 16)
    with pytest.raises(NotImplementedError, match="paged cache"):
        output.sum().backward()


def test_functional_gradients_over_a_mapped_dimension():
    query, key, value = (torch.randn(3, 40, 2, 64).to(DTYPES[0]) for _ in range(3))

    def loss(q, k, v):
        return aiter.flash_attn_func(q[None], k[None], v[None], causal=True).square().sum()

    mapped = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    for b in range(3):
        alone = torch.func.grad(loss, argnums=(0, 1, 2))(query[b], key[b], value[b])
        for got, want in zip(mapped, alone, strict=True):
            torch.testing.assert_close(got[b], want, rtol=0, atol=0)


MEASURE_MEMORY = """
import sys, torch, aiter
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
def run(seqlen):
    tensors = [torch.randn(1, seqlen, 1, 64).requires_grad_() for _ in range(3)]
    output = aiter.flash_attn_func(*tensors)
    grad = torch.ones_like(output)
    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
    before = peak()
    torch.autograd.grad(output, tensors, grad)
    return peak() - before
run(256)
for seqlen in sys.argv[1:]:
    print(run(int(seqlen)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_grows_linearly_with_the_length():
    lengths = (4096, 8192, 16384)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY, *map(str, lengths)], capture_output=True, text=True, check=False
    )
    if "Permission" in run.stderr:
        pytest.skip("the peak of this process cannot be reset")
    assert run.returncode == 0, run.stderr
    short, middle, long = map(int, run.stdout.split())
    row = 64 * 4  # bytes
    # Three gradients and the accumulators of dQ: four rows a token; some buffers do not depend on the length. A score
    # matrix would be 1 GiB.
    assert long <= 16384 * row * 6 + 8 * 2**20, (short, middle, long)
    assert long - middle <= 8192 * row * 6, (short, middle, long)
