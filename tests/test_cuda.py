"""What only a real GPU can show: streams, devices, threads, graphs, sizes beyond 2^31 elements, no synchronisation."""

import itertools
import subprocess
import sys
import threading

import pytest
import torch
from accuracy import assert_as_accurate, assert_gradient_as_accurate, pytorch_attend_one
from problems import Sequence, assert_sequences, dense_sequences

import aiter
from aiter import flash_attn, plan, reference, repeated
from aiter.jit.arch import arch_of
from aiter.kernels import FORMS_ARCH

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")


def qkv(batch=2, seq_q=128, seq_k=128, heads_q=8, heads_kv=2, head_dim=64, dtype=torch.bfloat16, device="cuda"):
    query = torch.randn(batch, seq_q, heads_q, head_dim, device=device, dtype=dtype)
    key, value = (torch.randn(batch, seq_k, heads_kv, head_dim, device=device, dtype=dtype) for _ in range(2))
    return query, key, value


def decode(batch=4, seq_k=4096):
    """A decoding call with pages: arguments and options."""
    query, page_size = torch.randn(batch, 1, 32, 128, device="cuda", dtype=torch.bfloat16), 16
    pages = batch * seq_k // page_size
    cache = torch.randn(2, pages, 8, page_size, 128, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(pages, device="cuda").view(batch, -1).int()
    lengths = torch.randint(1, seq_k, (batch,), device="cuda", dtype=torch.int32)
    return (query, cache, table, page_size), {"cache_seqlens": lengths}


def mixed():
    """Packed queries over pages: a prompt, a chunk, a token."""
    rows, length, page_size = [300, 17, 1], 900, 16
    cache = [torch.randn(3 * 57, page_size, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv"]
    starts = torch.tensor([0, *rows], device="cuda").cumsum(0).int()
    query = torch.randn(sum(rows), 32, 128, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(3 * 57, device="cuda").view(3, 57).int()
    used = torch.randint(300, length, (3,), device="cuda", dtype=torch.int32)
    options = {"block_table": table, "seqused_k": used, "causal": True}
    return (query, *cache, starts, None, max(rows), length), options


CALLS = {
    "mixed batch": lambda: (flash_attn.flash_attn_varlen_func, *mixed()),
    "forward": lambda: (aiter.flash_attn_func, qkv(seq_q=500, seq_k=700), {"causal": True}),
    "keys cut and dealt": lambda: (aiter.flash_attn_func, qkv(seq_q=100, seq_k=9000), {"causal": True}),
    "keys cut, in turn": lambda: (
        *(aiter.flash_attn_func, qkv(seq_q=2000, seq_k=5000)),
        {"causal": True, "batch_invariant": True},
    ),
    "decode": lambda: (aiter.flash_attn_func, qkv(seq_q=1, seq_k=9000), {}),
    "paged decode": lambda: (aiter.flash_attn_with_kvcache, *decode()),
    "packed": lambda: (
        aiter.variable_length_attention,
        (*(t.flatten(0, 1) for t in qkv()), torch.tensor([100, 156], device="cuda", dtype=torch.int32), 200),
        {"causal": True},
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_does_not_synchronise(call):
    operation, arguments, options = call()
    operation(*arguments, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        operation(*arguments, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_graph_capture_and_replay(call):
    operation, arguments, options = call()
    expected = operation(*arguments, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = operation(*arguments, **options)
    for _ in range(3):
        output.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(output, expected, rtol=0, atol=0)
    arguments[0].copy_(torch.randn_like(arguments[0]))
    graph.replay()
    torch.testing.assert_close(output, operation(*arguments, **options), rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_call_like_one_before(call):
    """aiter/repeated.py: the bits of the long way with other tensors, on another stream and in a graph, and nothing
    looked at again."""
    operation, *made = call()
    fresh, stream = repeated.repeats(operation.__wrapped__), torch.cuda.Stream()
    for _ in range(3):  # the first may load the kernel that has the reader in it
        fresh(*made[0], **made[1])
    runs, run = [], plan.Plan.run
    for _ in range(3):
        _, arguments, options = call()
        expected = operation.__wrapped__(*arguments, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan.Plan, "run", lambda *arguments: runs.append(1) or run(*arguments))
            result = fresh(*arguments, **options)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
                late = [t.clone() if isinstance(t, torch.Tensor) else t for t in arguments]  # after the sleep
                on_stream = fresh(*late, **options)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                in_graph = fresh(*arguments, **options)
            graph.replay()
        assert not runs
        for got in (result, on_stream, in_graph):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_runs_on_the_current_stream(call):
    """The query is filled by a slow kernel on a side stream: a launch on any other stream would read it too early."""
    operation, arguments, options = call()
    query, stream = arguments[0], torch.cuda.Stream()
    fresh = torch.randn_like(query)
    expected = operation(fresh, *arguments[1:], **options)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        query.zero_()
        torch.cuda._sleep(50_000_000)
        query.copy_(fresh)
        output = operation(*arguments, **options)
    stream.synchronize()
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


def test_threads_share_kernels():
    calls = [make() for make in CALLS.values()] * 4
    expected = [operation(*arguments, **options) for operation, arguments, options in calls]
    results = [None] * len(calls)

    def run(index):
        operation, arguments, options = calls[index]
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                results[index] = operation(*arguments, **options)
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, reference_ in zip(results, expected, strict=True):
        torch.testing.assert_close(result, reference_, rtol=0, atol=0)


FIRST_CALLS = """
import threading, torch, aiter
query = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
graph, found = torch.cuda.CUDAGraph(), []
with torch.cuda.graph(graph):  # the kernel's code comes to the GPU while the graph is captured
    captured = aiter.flash_attn_func(query, query, query)
graph.replay()
thread = threading.Thread(target=lambda: found.append(aiter.flash_attn_func(query, query, query, causal=True)))
thread.start(); thread.join()  # a thread that has never used the GPU
heads_first = [query.transpose(1, 2)] * 3
right = [torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=causal) for causal in (False, True)]
expected = [output.transpose(1, 2) for output in right]
for got, right in zip([captured, *found], expected, strict=True):
    torch.testing.assert_close(got, right, atol=0.02, rtol=0.02)
"""


def test_first_launches_in_a_graph_and_in_a_new_thread():
    query = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.bfloat16)
    for causal in (False, True):
        aiter.flash_attn_func(query, query, query, causal=causal)  # compiles
    subprocess.run([sys.executable, "-c", FIRST_CALLS], check=True, timeout=120)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="one GPU only")
def test_runs_on_the_device_of_the_tensors():
    tensors = qkv(device="cuda:1")
    with torch.cuda.device(0):
        output = aiter.flash_attn_func(*tensors)
    assert output.device == tensors[0].device
    expected, _ = reference.attend_one(*(t[0] for t in tensors), False)
    assert_as_accurate(output[0], expected, pytorch_attend_one(*(t[0] for t in tensors), False))


def test_bad_values_on_the_gpu_stay_inside_the_tensors(monkeypatch):
    """Page numbers and lengths that nobody checked must not fault; AITER_CHECK_VALUES=1 names them."""
    (query, cache, table, page_size), options = decode()
    table[0, 0], table[1, 1], options["cache_seqlens"][2] = -5, 10**8, 10**8
    aiter.flash_attn_with_kvcache(query, cache, table, page_size, **options)
    packed = [t.flatten(0, 1) for t in qkv()]
    for lengths in ([10**6, 10**6], [-3, 256], [2**31 - 1, 2**31 - 1]):
        aiter.variable_length_attention(*packed, torch.tensor(lengths, device="cuda", dtype=torch.int32), 200)
    torch.cuda.synchronize()
    monkeypatch.setenv("AITER_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match="cache_seqlens"):
        aiter.flash_attn_with_kvcache(query, cache, table, page_size, **options)


FALLING_STARTS = """
import os, sys, torch
from aiter.flash_attn import flash_attn_varlen_func
far, longest, head_dim = 2**31 - 1, 2048, int(sys.argv[1])
shapes = [(3 * longest, heads, head_dim) for heads in (16, 4, 4)]
tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for shape in shapes]
gradient = torch.randn_like(tensors[0])

def gradients(starts_q, starts_k, causal):
    starts = [torch.tensor(starts, device="cuda", dtype=torch.int32) for starts in (starts_q, starts_k)]
    output = flash_attn_varlen_func(*tensors, *starts, longest, longest, causal=causal)
    return torch.autograd.grad(output, tensors, gradient)

for causal in (False, True):
    good = [0, 2000, 3000, 5000], [0, 1900, 3500, 5500]
    before = gradients(*good, causal)
    for starts in (
        [0, 2000, 1000, 3000],  # the last sequence overlaps the first
        [0, 2048, 0, 2048, 0, 2048],  # three times the same
        [5000, 4000, 2500, 500, 2500],
        [-far, 1500, far, -5, far, 100, 6000],
    ):
        even = [i * len(tensors[0]) // len(starts) for i in range(len(starts))]
        for starts_q, starts_k in ((starts, even), (even, starts), (starts, starts)):
            gradients(starts_q, starts_k, causal)
            torch.cuda.synchronize()
            print(causal, starts_q, starts_k, flush=True)
    for one, other in zip(before, gradients(*good, causal), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()
# At once: PyTorch's thread of the backward pass may still hold what only Python can let go of, and then aborts.
os._exit(0)
"""


@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
def test_gradients_of_packed_sequences_that_overlap(head_dim):
    """Starts that fall are seen by nobody but the GPU, where blocks wait for each other: the call ends, with gradients
    that mean nothing, and the next one is right. In a process of its own, so that one that hangs can be ended."""
    tensors = [t[0].requires_grad_() for t in qkv(1, 2048, 2048, 16, 4, head_dim)]
    starts = torch.tensor([0, 2048], device="cuda", dtype=torch.int32)
    for causal in (False, True):  # compiles
        output = flash_attn.flash_attn_varlen_func(*tensors, starts, starts, 2048, 2048, causal=causal)
        torch.autograd.grad(output, tensors, output)
    subprocess.run([sys.executable, "-c", FALLING_STARTS, str(head_dim)], check=True, timeout=120)


def test_float32_is_an_error_that_says_what_is_supported():
    with pytest.raises(aiter.errors.UnsupportedDtypeError, match="fp16, bf16"):
        aiter.flash_attn_func(*qkv(dtype=torch.float32))


def test_more_than_2_31_elements():
    """Batch entries beyond the reach of 32-bit offsets give what they give alone."""
    batch, seqlen, heads, head_dim = 9, 16384, 128, 128  # 2.4e9 elements a tensor
    query, key, value = (
        torch.randn(batch, seqlen, heads, head_dim, device="cuda", dtype=torch.float16) for _ in range(3)
    )
    rows = slice(seqlen - 128, None)
    output = aiter.flash_attn_func(query[:, rows], key, value)
    assert query.numel() > 2**31
    alone = aiter.flash_attn_func(*(t.clone() for t in (query[-1:, rows], key[-1:], value[-1:])))
    torch.testing.assert_close(output[-1:], alone, rtol=0, atol=0)
    one = aiter.flash_attn_func(query[:, -1:], key, value)
    torch.testing.assert_close(one[-1:], alone[:, -1:], rtol=2e-3, atol=2e-3)


CUT = {  # rows, keys, head_dim, options: few row tiles, or batch_invariant, so that keys are cut (on sm_90a)
    "a chunk": (100, 5000, 128, {"causal": True}),
    "of 64": (70, 4500, 64, {"causal": True}),
    "of 96": (70, 4500, 96, {}),
    "of 256": (90, 3000, 256, {"causal": True}),
    "of 112": (33, 2300, 112, {"window_size": (2200, 20)}),
    "a window": (300, 5000, 128, {"window_size": (2100, 0)}),
    "all options": (150, 3000, 128, {"causal": True, "softcap": 20.0, "slopes": True, "sinks": True}),
    "a cap": (150, 3000, 64, {"causal": True, "softcap": 20.0}),
    "more rows than keys": (4400, 4200, 128, {"causal": True, "batch_invariant": True}),
}


@pytest.fixture
def only_cut_keys(monkeypatch):
    """Whatever is called has the kernel that cuts keys, where there is one."""
    monkeypatch.setattr(plan, "plans", {})
    yield
    if arch_of(torch.device("cuda", 0)) == FORMS_ARCH:
        assert {key[0] for key in plan.plans} == {"attention_forward"}
        assert all(("cut", 1) in own.kernel.spec.options for own in plan.plans.values())


@pytest.mark.parametrize("rows, keys, head_dim, options", CUT.values(), ids=CUT)
def test_keys_that_are_cut(rows, keys, head_dim, options, only_cut_keys):
    """Dense, and packed over pages with lengths that only the GPU knows, some of them zero; twice the same bits."""
    options = dict(options)
    if options.pop("slopes", False):
        options["alibi_slopes"] = torch.rand(4, device="cuda")
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(4, device="cuda")
    known = {"window" if name == "window_size" else name: value for name, value in options.items()}
    causal, _ = known.pop("causal", False), known.pop("batch_invariant", None)
    query, key, value = qkv(2, rows, keys, 4, 2, head_dim)
    results = [aiter.flash_attn_func(query, key, value, return_lse=True, **options) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    sequences = [Sequence(query[b], key[b], value[b], (b,), (b,), known) for b in range(2)]
    assert_sequences(*results[0], sequences, causal)

    lengths, page_size = [keys, 0, keys // 3, 1], 16
    width = -(-keys // page_size)
    cache = torch.randn(2, 4 * width, page_size, 2, head_dim, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(4 * width, device="cuda").view(4, width).int()
    own_rows = rows, 5, 4, 1
    query = torch.randn(rows + 10, 4, head_dim, device="cuda", dtype=torch.bfloat16)
    used = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    pages = cache.transpose(2, 3)
    output, lse = aiter.variable_length_attention(
        *(query, *pages, torch.tensor(own_rows, device="cuda", dtype=torch.int32), rows),
        **{"seqlens_k": used, "page_table": table, "block_size": page_size, "return_lse": True, **options},
    )
    sequences, end = [], 0
    for b, length in enumerate(lengths):
        own = [reference.gather_pages(t, table[b], length) for t in pages]
        place, end = slice(end, end + own_rows[b]), end + own_rows[b]
        sequences.append(Sequence(query[place], *own, (place,), (slice(None), place), known))
    assert_sequences(output, lse, sequences, causal)


BITS = {
    "causal": {"causal": True},
    "window": {"window_size": (2500, 0)},
    "cap": {"causal": True, "softcap": 20.0},
    "great cap": {"causal": True, "softcap": 60.0},
    "slopes": {"causal": True, "alibi_slopes": (0.5, 0.0, 0.02, 0.001) * 4},
}


BITS_DIMS = *((dim, dim) for dim in (40, 64, 96, 128, 192, 256)), (192, 128), (256, 128), (72, 200)


@pytest.mark.parametrize(("head_dim", "value_dim"), BITS_DIMS)
@pytest.mark.parametrize("options", BITS.values(), ids=BITS)
def test_bits_of_cut_keys_depend_on_nothing_else(head_dim, value_dim, options):
    """A prompt of one call, whose blocks take their pieces in turn, and the same in chunks and single tokens, whose
    pieces are dealt, those of few rows by mma.sync, and of few pieces added up by a cluster of blocks; beside other
    sequences and in pages, too."""
    if "alibi_slopes" in options:
        options = {**options, "alibi_slopes": torch.tensor(options["alibi_slopes"], device="cuda")}
    heads, total = 16, 10000
    query, key, value = qkv(1, total, total, heads, 4, head_dim)
    if value_dim != head_dim:
        value = torch.randn(1, total, 4, value_dim, device="cuda", dtype=torch.bfloat16)
    whole = aiter.flash_attn_func(query, key, value, batch_invariant=True, return_lse=True, **options)
    expected = aiter.flash_attn_func(query, key, value, return_lse=True, **options)
    atol = 0.005
    if value_dim != head_dim and "alibi_slopes" in options:
        # They leave rows few keys, in any piece: weights in bfloat16 are off by 2^-8 of themselves, in each of the two.
        atol = 2**-7 * value.abs().max().item()
    torch.testing.assert_close(whole[0], expected[0], rtol=0.02, atol=atol)
    few = (0, 1), (1500, 1501), (2046, 2048), (3000, 3003), (4092, 4096), (5000, 5001), (8190, 8192), (9999, 10000)
    for begin, end in (*few, (0, 100), (4030, 4060), (4090, 4100), (8100, 8500)):
        part = (query[:, begin:end], key[:, :end], value[:, :end])
        output, lse = aiter.flash_attn_func(*part, batch_invariant=True, return_lse=True, **options)
        assert torch.equal(output, whole[0][:, begin:end]), (begin, end)
        assert torch.equal(lse, whole[1][:, :, begin:end]), (begin, end)
    many = [torch.cat((torch.randn_like(t).repeat(9, 1, 1, 1), t)) for t in (query[:, -1:], key, value)]
    output, lse = aiter.flash_attn_func(*many, batch_invariant=True, return_lse=True, **options)
    assert torch.equal(output[-1], whole[0][0, -1:]) and torch.equal(lse[-1], whole[1][0, :, -1:])
    for page_size in (16, 80, 7):
        pages = -(-total // page_size)
        table = torch.randperm(2 * pages, device="cuda")[:pages]
        cache = [t.new_full((2 * pages, page_size, *t.shape[2:]), float("nan")) for t in (key, value)]
        for paged, t in zip(cache, (key[0], value[0]), strict=True):
            paged[table] = torch.nn.functional.pad(t, (0, 0, 0, 0, 0, pages * page_size - total)).view(
                pages, page_size, *t.shape[1:]
            )
        for ends in ((800,), (2500,), (700, 4000, 1025), (6000,), (5000, total, 9000), (total,)):
            last = [end - 1 for end in ends]
            used = torch.tensor(ends, dtype=torch.int32, device="cuda")
            own_table = table[: -(-max(ends) // page_size)].int().repeat(len(ends), 1)
            output, lse = aiter.variable_length_attention(
                *(query[0, last], *(t.transpose(1, 2) for t in cache), torch.ones_like(used), 1),
                **{"seqlens_k": used, "page_table": own_table},
                **{"block_size": page_size, "batch_invariant": True, "return_lse": True, **options},
            )
            assert torch.equal(output, whole[0][0, last]), (page_size, ends)
            assert torch.equal(lse, whole[1][0][:, last]), (page_size, ends)


MANY_PIECES = {
    "4 rows": (4, {"causal": True}),
    "16 rows": (16, {"causal": True}),
    "short first pieces": (4, {"window_size": (12300, 0)}),
    "short first pieces and a cap": (4, {"window_size": (12300, 0), "softcap": 20.0}),
}


@pytest.mark.parametrize(("heads", "mask"), MANY_PIECES.values(), ids=MANY_PIECES)
def test_bits_of_many_pieces(heads, mask):
    """More pieces than are added up at one time, of a token's 8 rows or fewer and of more."""
    rows, total = 5000, 40000
    query, key, value = qkv(1, rows, total, heads, 1, 128)
    options = {"batch_invariant": True, "return_lse": True, **mask}
    whole = aiter.flash_attn_func(query, key, value, **options)
    expected = aiter.flash_attn_func(query, key, value, **mask)
    torch.testing.assert_close(whole[0], expected, rtol=0.02, atol=0.005)
    seen_of_one = {name: option for name, option in mask.items() if name != "causal"}
    for begin, end in ((0, 1), (2000, 2003), (rows - 1, rows)):
        seen = total - rows + end
        output, lse = aiter.flash_attn_func(query[:, begin:end], key[:, :seen], value[:, :seen], **options)
        assert torch.equal(output, whole[0][:, begin:end]), (begin, end)
        assert torch.equal(lse, whole[1][:, :, begin:end]), (begin, end)
    # So many row tiles that each block of a cluster has several of one's pieces; beside shorter ones, and in pages.
    for batch, shortest in ((8, 38000), (8, 100), (20, total), (40, 9000)):
        ends = torch.linspace(shortest, total, batch).int().tolist()
        last = [max(end - 1 - (total - rows), 0) for end in ends]
        used = torch.tensor(ends, dtype=torch.int32, device="cuda")
        ones = torch.ones_like(used)
        padded = [t.expand(batch, -1, -1, -1) for t in (key, value)]
        table = torch.arange(total // 16, device="cuda", dtype=torch.int32).expand(batch, -1).contiguous()
        paged = [t.view(-1, 16, *t.shape[2:]).transpose(1, 2) for t in (key, value)]
        for tensors, known in (
            ((query[0, last, None], *padded), {}),
            ((query[0, last], *paged), {"page_table": table, "block_size": 16}),
        ):
            output, lse = aiter.variable_length_attention(
                *(*tensors, ones, 1),
                **{"seqlens_k": used, "batch_invariant": True, "return_lse": True, **known, **seen_of_one},
            )
            output, lse = output.view(batch, heads, 128), lse.view(batch, heads) if lse.dim() == 3 else lse.T
            for i, end in enumerate(ends):
                if end > total - rows:
                    assert torch.equal(output[i], whole[0][0, last[i]]), (batch, end, known.keys())
                    assert torch.equal(lse[i], whole[1][0, :, last[i]]), (batch, end, known.keys())


PACKED = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 0)},
    "pieces": {"causal": True, "batch_invariant": True},
    "slopes": {"causal": True, "slopes": True},
}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_many_packed_sequences(options):
    """More of them than a wave looks at together, and among these such that are all empty."""
    options = dict(options)
    if options.pop("slopes", False):
        options["alibi_slopes"] = torch.rand(6, device="cuda")
    known = {"window" if name == "window_size" else name: value for name, value in options.items()}
    causal, _ = known.pop("causal", False), known.pop("batch_invariant", None)
    lengths = [0] * 33 + torch.randint(0, 700, (40,)).tolist() + [0] * 60 + [1, 129, 0, 1300, 64]
    query, key, value = (t[0] for t in qkv(1, sum(lengths), sum(lengths), 6, 2))
    output, lse = aiter.variable_length_attention(
        *(query, key, value, torch.tensor(lengths, device="cuda", dtype=torch.int32), 2000), return_lse=True, **options
    )
    sequences, end = [], 0
    for length in lengths:
        place, end = slice(end, end + length), end + length
        sequences.append(Sequence(query[place], key[place], value[place], (place,), (slice(None), place), known))
    assert_sequences(output, lse, [s for s in sequences if len(s.query)], causal)


@pytest.mark.parametrize("rows", (1, 20, 70))
@pytest.mark.parametrize("head_dim", (128, 256))
def test_pieces_in_turn_with_few_rows(rows, head_dim):
    """So many sequences that each block goes through all pieces of a row tile, most waves of which have no rows."""
    query, key, value = qkv(150, rows, 4200, 1, 1, head_dim)
    together = aiter.flash_attn_func(query, key, value, batch_invariant=True)
    for b in (0, 1, 2, 3, 131, 132, 149):
        own = (t[b : b + 1] for t in (query, key, value))
        assert torch.equal(together[b : b + 1], aiter.flash_attn_func(*own, batch_invariant=True)), b


def test_gradients_of_rows_that_see_nothing_with_dropout():
    """Past the last key, in tiles of their own, in one pass: what the workspace held before is not theirs."""
    query, key, value = (t.requires_grad_() for t in qkv(32, 1024, 1029, 4, 4, 64))
    offsets = torch.full((32,), 600, dtype=torch.int32, device="cuda")
    output = aiter.flash_attn_func(query, key, value, window_size=(100, 0), query_offsets=offsets, dropout_p=0.1)
    del_me = torch.full((1 << 29,), float("nan"), device="cuda")
    del del_me
    grads = torch.autograd.grad(output, (query, key, value), torch.randn_like(output))
    assert not grads[0][:, 529:].any() and all(grad.isfinite().all() for grad in grads)


def test_latent_values_that_some_sequences_share():
    """Values of the first sequence for all: a view of its keys there, and of nobody's in the others."""
    query = torch.randn(200, 1, 64, 576, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(200, 128, 1, 576, device="cuda", dtype=torch.bfloat16)
    value = key[:1, :, :, :512].expand(200, -1, -1, -1)
    output = aiter.flash_attn_func(query, key, value)
    torch.testing.assert_close(output, aiter.flash_attn_func(query, key, value.contiguous()))


def test_latent_keys_beside_those_of_others():
    """Packed: a sequence's last tile has rows of the next one, here NaN."""
    lengths = [100, 30, 65]
    query = torch.randn(3, 64, 576, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(sum(lengths), 1, 576, device="cuda", dtype=torch.bfloat16)
    key[100:130] = float("nan")
    starts = [torch.tensor(t, device="cuda", dtype=torch.int32) for t in ([0, 1, 2, 3], [0, 100, 130, 195])]
    output = flash_attn.flash_attn_varlen_func(query, key, key[..., :512], *starts, 1, 100)
    for b, own in ((0, key[:100]), (2, key[130:])):
        problem = query[b : b + 1], own, own[..., :512]
        expected, _ = reference.attend_one(*problem, False)
        assert_as_accurate(output[b : b + 1], expected, pytorch_attend_one(*problem, False))


LATENT = {  # heads, tokens, keys, by what tiles of 64 keys are scaled, options. More than 64 rows: two tiles at a time
    "a tile that is not full": (65, 1, 40, (), {}),
    "two tiles": (128, 1, 128, (), {}),
    "three, the last with one key": (128, 1, 129, (), {}),
    "units of 64 and 8 rows": (24, 3, 263, (), {"causal": True}),
    "a tile that is hidden from some rows": (33, 2, 129, (), {"causal": True}),
    "keys that are hidden from some rows": (40, 2, 420, (), {"window_size": (191, 0)}),
    "maxima that grow in first tiles": (128, 1, 400, (1, 1, 32, 1, 128, 1, 512), {}),
    "in second ones": (96, 1, 330, (1, 32, 1, 128, 1, 512), {}),
    "in both": (65, 1, 450, (1, 32, 96, 256, 600, 1500, 4000, 1), {}),
    "up to 64 rows, in turn": (16, 2, 450, (1, 32, 96, 256, 600, 1500, 4000, 1), {}),
    "64 rows": (64, 1, 129, (), {}),
}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=("bf16", "fp16"))
@pytest.mark.parametrize(("heads", "tokens", "keys", "scales", "options"), LATENT.values(), ids=LATENT)
def test_latent_rounds(heads, tokens, keys, scales, options, dtype):
    known = {"window" if name == "window_size" else name: value for name, value in options.items()}
    causal = known.pop("causal", False)
    query, key, _ = qkv(3, tokens, keys, heads, 1, 576, dtype)
    for tile, scale in enumerate(scales):
        key[:, tile * 64 : tile * 64 + 64, :, 512:] *= scale  # not the values
    value = key[..., :512]
    results = [aiter.flash_attn_func(query, key, value, return_lse=True, **options) for _ in range(2)]
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    sequences = [Sequence(query[b], key[b], value[b], (b,), (b,), known) for b in range(3)]
    assert_sequences(*results[0], sequences, causal)


@pytest.mark.parametrize("page_size", (64, 5), ids=("by a tensor map", "by lanes"))
@pytest.mark.parametrize(("heads", "tokens"), ((24, 3), (10, 3)), ids=("rounds", "in turn"))
def test_latent_pieces_of_few_and_many_rows(heads, tokens, page_size):
    """One after the other in a block: 1 to 3 tokens of so many heads, in units of up to 64 rows."""
    rows, lengths = (torch.randint(1, most, (200,)).tolist() for most in (tokens + 1, 500))
    width = -(-500 // page_size)
    key = torch.randn(200 * width, 1, page_size, 576, device="cuda", dtype=torch.bfloat16)
    table = torch.randperm(200 * width, device="cuda").view(200, width).int()
    query = torch.randn(sum(rows), heads, 576, device="cuda", dtype=torch.bfloat16)
    own_rows, used = (torch.tensor(t, device="cuda", dtype=torch.int32) for t in (rows, lengths))
    output, lse = aiter.variable_length_attention(
        *(query, key, key[..., :512], own_rows, tokens),
        **{"seqlens_k": used, "page_table": table, "block_size": page_size, "return_lse": True},
    )
    sequences, end = [], 0
    for b, length in enumerate(lengths):
        own, place, end = reference.gather_pages(key, table[b], length), slice(end, end + rows[b]), end + rows[b]
        sequences.append(Sequence(query[place], own, own[..., :512], (place,), (slice(None), place)))
    assert_sequences(output, lse, sequences, False)


@pytest.mark.parametrize(
    ("window", "length"), (((-1, -1), 1473), ((191, 0), 1473), ((-1, -1), 4098), ((2500, 0), 7622))
)
@pytest.mark.parametrize(("heads", "head_dim"), ((16, 576), (40, 576), (80, 576), (128, 576), (4, 320), (4, 512)))
def test_bits_of_a_token_depend_on_nothing_else(heads, head_dim, window, length):
    """Alone and with two others, whose window begins in another tile or part, or which see one part more: without
    `batch_invariant`, so many rows may take other steps."""
    query, key, _ = qkv(2, 3, length, heads, 1, head_dim)
    options = {"causal": True, "window_size": window, "batch_invariant": True}
    together = aiter.flash_attn_func(query, key, key[..., :512], **options)
    for token in range(3):
        own = query[:1, token : token + 1], key[:1, : length - 2 + token]
        alone = aiter.flash_attn_func(*own, own[1][..., :512], **options)
        assert torch.equal(alone, together[:1, token : token + 1]), token


@pytest.mark.parametrize("head_dim", (64, 96, 128, 256))
def test_gradients_with_slopes_in_many_tiles(head_dim):
    """Long enough for one pass on sm_90a, with tiles that all keys see, at any distance."""
    length, heads = 2048, 16
    tensors = [t.requires_grad_() for t in qkv(1, length, length, heads, heads, head_dim)]
    slopes = torch.linspace(0.0005, 0.05, heads, device="cuda")
    output = flash_attn.flash_attn_func(*tensors, causal=True, alibi_slopes=slopes)
    outside = torch.randn_like(output)
    grads = torch.autograd.grad(output, tensors, outside)
    place = torch.arange(length, device="cuda")
    distance = place[:, None] - place
    for head in (0, 9, heads - 1):
        results = []
        for dtype in (torch.float64, torch.bfloat16):
            own = [t[0, :, head].detach().to(dtype).requires_grad_() for t in tensors]
            scores = own[0] @ own[1].T / head_dim**0.5 - slopes[head].to(dtype) * distance
            weights = scores.masked_fill(distance < 0, -torch.inf).softmax(-1)
            results.append(torch.autograd.grad(weights @ own[2], own, outside[0, :, head].to(dtype)))
        for grad, exact, pytorch in zip(grads, *results, strict=True):
            assert_gradient_as_accurate(grad[0, :, head], exact, pytorch)


@pytest.mark.parametrize(
    ("seq_q", "heads_kv", "dims"), ((300, 2, (64, 64)), (4, 2, (128, 128)), (8, 1, (576, 512)), (8, 2, (512, 512)))
)
def test_an_output_in_the_place_of_the_query(seq_q, heads_kv, dims):
    """With an infinity that one row sees and others have in their tile: these are computed once more."""
    query, key, value = qkv(seq_q=seq_q, seq_k=300, heads_kv=heads_kv, head_dim=dims[0])
    key[:, -1, 0, 3] = float("inf")
    if dims == (64, 64):
        value[:, -1, 0, 3] = float("inf")
    else:
        value = key[..., : dims[1]]
    expected = aiter.flash_attn_func(query, key, value, causal=True)
    place = query[..., : dims[1]]
    assert flash_attn.flash_attn_func(query, key, value, causal=True, out=place) is place
    torch.testing.assert_close(place, expected, rtol=0, atol=0, equal_nan=True)


def test_a_huge_cap_is_refused():
    with pytest.raises(aiter.errors.UnsupportedError, match=r"softcap is 2e\+04; GPU kernels take up to 1e\+04"):
        aiter.flash_attn_func(*qkv(), softcap=2e4)


@pytest.mark.parametrize("causal", (False, True))
def test_131072_tokens(causal):
    seqlen = 131072
    query, key, value = qkv(batch=1, seq_q=seqlen, seq_k=seqlen, heads_q=2, heads_kv=1, head_dim=128)
    output = aiter.flash_attn_func(query, key, value, causal)
    tail = [query[0, -64:], key[0], value[0]]  # bottom-right alignment: the last rows are a problem of their own
    expected, _ = reference.attend_one(*tail, causal)
    assert_as_accurate(output[0, -64:], expected, pytorch_attend_one(*tail, causal))


def guarded(shape):
    """A place for an output within a larger tensor of sevens, rows further apart than they need be, and that tensor."""
    around = torch.full((*shape[:-1], shape[-1] + 16), 7.0, device="cuda", dtype=torch.bfloat16)
    return around[..., 8:-8], around


HEADS = {"heads apart": (3, 3), "four in a row tile": (8, 2), "more than a wave has rows": (32, 1)}


@pytest.mark.parametrize("hidden", (False, True), ids=("finite", "with a hidden infinity"))
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("head_dim", (40, 64, 96, 128, 192, 256))
def test_where_rows_end(head_dim, causal, heads, hidden):
    """Packed side by side, and row tiles that are filled in part: each row is where it belongs, those that are computed
    once more as well, nothing beside them is touched, and all that twice."""
    lengths, rest = [16, 1, 130, 0, 48, 200, 17, 64, 15, 384], 40
    total = sum(lengths)
    query, key, value = (t[0] for t in qkv(1, total + rest, total + rest, *heads, head_dim))
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    ends = starts[1:][torch.tensor(lengths) > 60] - 1
    if hidden:
        value[ends.long(), 0, 5] = float("inf")
    place, around = guarded(query.shape)
    arguments = (query, key, value, starts, starts, max(lengths), max(lengths))
    results = []
    for _ in range(2):
        output, lse = flash_attn.flash_attn_varlen_func(*arguments, causal=causal, out=place, return_lse=True)
        results.append((output.clone(), lse.clone()))
    assert (around[..., :8] == 7).all() and (around[..., -8:] == 7).all() and (place[total:] == 7).all()
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    rows = [slice(int(a), int(b)) for a, b in itertools.pairwise(starts) if a < b]
    sequences = [Sequence(query[own], key[own], value[own], (own,), (slice(None), own)) for own in rows]
    assert_sequences(output, lse, sequences, causal)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("head_dim", (64, 96, 128, 192, 256))
def test_where_rows_of_padded_sequences_end(head_dim, heads):
    """Lengths that are given, one of them 0: of a given output the rows past them are left alone, of a new one they are
    zeros. And equal ones, for which a block takes several row tiles."""
    for seq_q in (16, 100, 192, 500):
        query, key, value = qkv(5, seq_q, seq_q, *heads, head_dim)
        place, around = guarded(query.shape)
        for causal in (False, True):
            output, lse = flash_attn.flash_attn_func(query, key, value, causal=causal, out=place, return_lse=True)
            assert_sequences(output, lse, dense_sequences(query, key, value), causal)
            assert torch.equal(output, aiter.flash_attn_func(query, key, value, causal=causal))
        assert (around[..., :8] == 7).all() and (around[..., -8:] == 7).all()
    lengths = torch.tensor([500, 0, 16, 129, 499], device="cuda", dtype=torch.int32)
    flat = [t.flatten(0, 1) for t in (query, key, value)]
    starts = torch.arange(6, device="cuda", dtype=torch.int32) * 500
    place, around = guarded(flat[0].shape)
    used = {"seqused_q": lengths, "seqused_k": lengths}
    flash_attn.flash_attn_varlen_func(*flat, starts, starts, 500, 500, causal=True, out=place, **used)
    for b, length in enumerate(lengths.tolist()):
        own = aiter.flash_attn_func(*(t[b : b + 1, :length] for t in (query, key, value)), causal=True)
        torch.testing.assert_close(place[b * 500 : b * 500 + length], own[0], rtol=0.02, atol=0.005)
        assert (place[b * 500 + length : (b + 1) * 500] == 7).all()


def test_row_tiles_that_many_blocks_take_in_turn():
    """Several for each block, so that one's output is on its way while the next is begun, twice the same bits; and rows
    that see no keys among them."""
    for head_dim in (64, 96, 128):
        query, key, value = qkv(6, 1500, 1300, 16, 4, head_dim)
        results = [aiter.flash_attn_func(query, key, value, causal=True, return_lse=True) for _ in range(3)]
        for output, lse in results[1:]:
            assert torch.equal(output, results[0][0]) and torch.equal(lse, results[0][1])
        assert not results[0][0][:, :200].any() and (results[0][1][:, :, :200] == -torch.inf).all()
        for b in (0, 5):
            own = [t[b : b + 1] for t in (query, key, value)]
            expected, pytorch = (f(*(t[0] for t in own), True) for f in (reference.attend_one, pytorch_attend_one))
            assert_as_accurate(results[0][0][b], expected[0], pytorch)
