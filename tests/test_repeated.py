"""Calls like one before are sent off without being looked at again: aiter/repeated.py. Here on the CPU, where the
first kernels that are loaded bring the reader; the same Python stands before a GPU's kernels."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import aiter
from aiter import flash_attn, kv_cache, operations, plan, reader, repeated

BF16 = torch.bfloat16
pytestmark = pytest.mark.skipif(reader.exchange_of_torch() is None, reason="PyTorch cannot tell C what a tensor is")


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def ints(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


def dense(dim=16, heads=(2, 2), **keywords):
    shapes = [(2, 5, heads[0], dim), (2, 7, heads[1], dim), (2, 7, heads[1], dim)]
    return tuple(randn(*shape) for shape in shapes), keywords


def packed(used=None):
    lengths = [(3, 4), (2, 5), (1, 6)][int(torch.randint(3, ()))]
    starts = ints(0, lengths[0], 7)
    return (randn(7, 2, 16), randn(7, 1, 16), randn(7, 1, 16), starts, starts, 7, 7), {"causal": True}


def pages(dtype=torch.float32):
    return [randn(6, 4, 1, 16, dtype=dtype) for _ in "kv"], torch.randperm(6).int().view(2, 3)


def from_pages(seq=1):
    caches, table = pages()
    return (randn(2, seq, 2, 16), *caches), {
        "cache_seqlens": torch.randint(4, 12, (2,), dtype=torch.int32), "block_table": table, "causal": True,
    }  # fmt: skip


def own_pages(shared=False):
    caches, table = pages()
    key, value = (cache.transpose(1, 2) for cache in caches)
    cache = torch.stack((key, value)) if shared else (key, value)
    lengths = torch.randint(1, 12, (2,), dtype=torch.int32)
    return (randn(2, 1, 2, 16), cache, table, 4), {"cache_seqlens": lengths}


def in_pages():
    caches, table = pages()
    starts = ints(0, *[(1, 3), (2, 3)][int(torch.randint(2, ()))])
    return (randn(3, 2, 16), *caches, starts, None, 3, 12), {
        "block_table": table, "seqused_k": torch.randint(4, 12, (2,), dtype=torch.int32), "causal": True,
    }  # fmt: skip


def written(dtype=torch.int64):
    caches, _ = pages()
    return (randn(3, 1, 16), randn(3, 1, 16), *caches, torch.randperm(24)[:3].to(dtype)), {}


def with_out():
    arguments, keywords = packed()
    return arguments, keywords | {"out": torch.full((7, 2, 16), -1.0)}


KEPT = {
    "dense": (operations.flash_attn_func, dense),
    "a window, a cap, slopes, sinks": (
        operations.flash_attn_func,
        lambda: dense(72, window_size=(3, 0), softcap=2.0, alibi_slopes=torch.rand(2), sinks=randn(2), return_lse=True),
    ),
    "grouped": (operations.grouped_query_attention, lambda: ((*dense(heads=(4, 2))[0], 2), {"causal": True})),
    "one head": (operations.multi_query_attention, lambda: dense(heads=(4, 1))),
    "pages of two tensors": (operations.flash_attn_with_kvcache, own_pages),
    "pages of one tensor": (operations.flash_attn_with_kvcache, lambda: own_pages(shared=True)),
    "lengths": (
        operations.variable_length_attention,
        lambda: (
            (*(randn(2, 6, 2, 16) for _ in "qkv"), torch.randint(1, 7, (2,), dtype=torch.int32), 6),
            {"return_lse": True},
        ),
    ),
    "FlashAttention's": (flash_attn.flash_attn_func, lambda: dense(causal=True, return_attn_probs=True)),
    "packed": (flash_attn.flash_attn_varlen_func, packed),
    "packed over pages": (flash_attn.flash_attn_varlen_func, in_pages),
    "into a tensor of the caller's": (flash_attn.flash_attn_varlen_func, with_out),
    "decoding": (flash_attn.flash_attn_with_kvcache, from_pages),
    "several tokens": (flash_attn.flash_attn_with_kvcache, lambda: from_pages(3)),
    "written": (kv_cache.reshape_and_cache, written),
}


class Runs:
    """How many calls go the long way."""

    def __init__(self, monkeypatch):
        self.count, run = 0, plan.Plan.run

        def counted(*arguments):
            self.count += 1
            return run(*arguments)

        monkeypatch.setattr(plan.Plan, "run", counted)


@pytest.fixture
def runs(monkeypatch):
    operations.flash_attn_func(*dense()[0])  # from here on there is a reader
    return Runs(monkeypatch)


def clone(value):
    if isinstance(value, tuple):
        return tuple(clone(part) for part in value)
    return value.clone(memory_format=torch.preserve_format) if isinstance(value, torch.Tensor) else value


def agree(function, arguments, keywords):
    """The same bits as the long way, in what is returned and in what is written to."""
    others, by_name = [clone(value) for value in arguments], {name: clone(value) for name, value in keywords.items()}
    expected = function.__wrapped__(*others, **by_name)
    result = function(*arguments, **keywords)
    assert type(result) is type(expected)
    for got in result if isinstance(result, tuple) else (result,):
        assert got is None or got.is_contiguous()
    pairs = zip(
        (*(result if isinstance(result, tuple) else (result,)), *arguments, *keywords.values()),
        (*(expected if isinstance(expected, tuple) else (expected,)), *others, *by_name.values()),
        strict=True,
    )
    for got, wanted in pairs:
        if isinstance(wanted, torch.Tensor):
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    return result


def kept_by(function):
    return dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))["kept"].cell_contents


@pytest.mark.parametrize("name", KEPT)
def test_kept(name, runs):
    function, make = KEPT[name]
    torch.manual_seed(11)
    fresh = repeated.repeats(function.__wrapped__)
    for i in range(6):
        before = runs.count
        arguments, keywords = make()
        result = agree(fresh, arguments, keywords)
        assert runs.count - before == (2 if i < 2 else 1)  # one of them for what is expected
        if "out" in keywords:
            assert result is keywords["out"] and result._version == 1


def windows_in_a_tensor():
    arguments, keywords = dense(causal=True)
    return arguments, keywords | {"window_size": torch.randint(0, 3, (2,))}


def appended(rotary=False):
    """Several launches in one call."""
    arguments, keywords = from_pages()
    new = tuple(randn(2, 1, 1, 16) for _ in "kv")
    angles = dict(zip(("rotary_cos", "rotary_sin"), torch.rand(2, 12, 8), strict=True)) if rotary else {}
    keywords["cache_seqlens"] -= 1
    return (*arguments, *new), keywords | angles


def window_is_state():
    """One tensor for what Python reads and for what the kernel does."""
    both = torch.randint(0, 3, (2,))
    return dense()[0], {"dropout_p": 0.5, "window_size": both, "rng_state": both}


def window_is_lengths():
    arguments, _ = packed()
    both = torch.randint(1, 3, (2,), dtype=torch.int32)
    return arguments, {"window_size": both, "seqused_q": both}


LONG = {
    "a window in a tensor": (flash_attn.flash_attn_func, windows_in_a_tensor),
    "a window that is the state of a mask": (flash_attn.flash_attn_func, window_is_state),
    "a window that is lengths": (flash_attn.flash_attn_varlen_func, window_is_lengths),
    "lengths of int64": (
        flash_attn.flash_attn_with_kvcache,
        lambda: (from_pages()[0], from_pages()[1] | {"cache_seqlens": torch.randint(4, 12, (2,))}),
    ),
    "a length for all": (
        flash_attn.flash_attn_with_kvcache, lambda: (from_pages()[0], from_pages()[1] | {"cache_seqlens": 5}),
    ),
    "a head_dim that is padded": (flash_attn.flash_attn_func, lambda: dense(12)),
    "padding on the left": (
        flash_attn.flash_attn_with_kvcache,
        lambda: (
            (randn(2, 1, 2, 16), randn(2, 9, 1, 16), randn(2, 9, 1, 16)),
            {"cache_seqlens": ints(8, 9), "cache_leftpad": torch.randint(0, 4, (2,), dtype=torch.int32)},
        ),
    ),
    "the log-sum-exp beside a given output": (
        flash_attn.flash_attn_varlen_func, lambda: (with_out()[0], with_out()[1] | {"return_lse": True}),
    ),
    "lazily negated": (
        operations.flash_attn_func,
        lambda: ((torch.randn(2, 5, 2, 16, dtype=torch.cfloat).conj().imag, *dense()[0][1:]), {}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("rotary", [False, True])
def test_tokens_that_are_appended(rotary, runs):
    fresh = repeated.repeats(flash_attn.flash_attn_with_kvcache.__wrapped__)
    torch.manual_seed(14)
    for _ in range(3 * repeated.PATIENCE):  # what appends within remembers the tests before, too
        agree(fresh, *appended(rotary))
    whole = [call for call in kept_by(fresh).values() if call is not None]
    assert [len(call.before) for call in whole] == [2]  # a look at values, and the tokens
    arguments, keywords = appended(rotary)
    before = runs.count
    agree(fresh, arguments, keywords)
    assert runs.count - before == 2  # of what is expected: a look at values, and attention
    caches = [cache.clone() for cache in arguments[1:3]]
    with pytest.raises(ValueError, match=r"^cache_seqlens\[0\] is 12; "):
        fresh(*arguments, **keywords | {"cache_seqlens": ints(12, 3)})
    assert all(torch.equal(cache, old) for cache, old in zip(arguments[1:3], caches, strict=True))
    agree(fresh, *appended(rotary))


def test_forms_that_come_round():
    """More of them than are remembered of those met once; they are kept in time all the same."""
    fresh = repeated.repeats(operations.flash_attn_func.__wrapped__)
    forms = [tuple(randn(1, rows, 1, 8) for _ in "qkv") for rows in range(1, repeated.MOST_KEPT + 1)]
    for _ in range(120):
        for tensors in forms:
            fresh(*tensors)
    assert len(kept_by(fresh)) == repeated.MOST_KEPT


def test_tokens_that_are_appended_to_what_else_is_given(runs):
    """Two tensors where one was before, and the same lengths for another argument too."""
    fresh = repeated.repeats(flash_attn.flash_attn_with_kvcache.__wrapped__)
    torch.manual_seed(15)
    for shared in (True, True, True, False, False, False):
        arguments, keywords = appended()
        if shared:  # new keys and values are one tensor
            arguments = (*arguments[:4], arguments[3])
        agree(fresh, arguments, keywords | {"return_softmax_lse": True})


@pytest.mark.parametrize("name", LONG)
def test_always_the_long_way(name, runs):
    function, make = LONG[name]
    torch.manual_seed(12)
    fresh = repeated.repeats(function.__wrapped__)
    for _ in range(5):
        before = runs.count
        agree(fresh, *make())
        assert (runs.count - before) % 2 == 0


def test_gradients(runs):
    fresh = repeated.repeats(operations.flash_attn_func.__wrapped__)
    for _ in range(4):
        agree(fresh, *dense())
    tensors = [tensor.requires_grad_() for tensor in dense()[0]]
    assert fresh(*tensors).requires_grad
    with torch.no_grad():
        before = runs.count
        assert not fresh(*tensors).requires_grad and runs.count == before


def test_which_tensors_are_one(runs):
    """Three tensors, after calls in which keys and values were one."""
    fresh = repeated.repeats(operations.flash_attn_func.__wrapped__)
    for _ in range(4):
        one = randn(2, 5, 2, 16)
        agree(fresh, (one, one, one), {})
    for _ in range(4):
        agree(fresh, tuple(randn(2, 5, 2, 16) for _ in "qkv"), {})
    assert runs.count == 4 + 2 + 4 + 2


def test_a_query_that_is_a_part_of_the_cache(runs):
    """Values that lie where the query does belong to the cache all the same."""
    fresh = repeated.repeats(operations.flash_attn_with_kvcache.__wrapped__)
    for inside in (True, True, True, False, False, False):
        (query, cache, *rest), keywords = own_pages(shared=True)
        cache = cache.contiguous()  # so that a clone of the query lies elsewhere, and one of the cache is alike
        query = cache[1].view(-1)[:64].view(2, 1, 2, 16) if inside else query
        agree(fresh, (query, cache, *rest), keywords)


@pytest.mark.parametrize("shape, strides", [((1, 5, 2, 16), (7, 32, 16, 1)), ((2, 5, 1, 16), (80, 16, 3, 1))])
def test_strides_of_dimensions_of_one(shape, strides, runs):
    """The output has them as the query does, whichever way it goes."""
    fresh = repeated.repeats(operations.flash_attn_func.__wrapped__)
    for _ in range(4):
        query, key, value = torch.randn(160).as_strided(shape, strides), randn(*shape), randn(*shape)
        expected = fresh.__wrapped__(query, key, value)
        result = fresh(query, key, value)
        assert result.stride() == expected.stride() and torch.equal(result, expected)
    assert runs.count == 4 + 2


def test_values_out_of_range(runs):
    fresh = repeated.repeats(flash_attn.flash_attn_with_kvcache.__wrapped__)
    arguments, keywords = from_pages()
    for _ in range(4):
        agree(fresh, arguments, keywords)
    for lengths in (ints(4, 13), ints(-1, 4)):
        with pytest.raises(ValueError, match=r"cache_seqlens|seqused_k|seqlens_k"):
            fresh(*arguments, **keywords | {"cache_seqlens": lengths})
    agree(fresh, arguments, keywords)


def test_what_needs_pytorch(runs):
    fresh = repeated.repeats(operations.flash_attn_func.__wrapped__)
    arguments, _ = dense()
    for _ in range(4):
        expected = agree(fresh, arguments, {})
    before = runs.count
    with torch.autocast("cpu", dtype=BF16):
        assert fresh(*arguments).dtype == BF16
    torch.testing.assert_close(torch.vmap(fresh)(*(tensor[None] for tensor in arguments))[0], expected)
    with torch.profiler.profile() as profile:
        fresh(*arguments)
    assert any("aiter" in event.key for event in profile.key_averages())
    assert runs.count == before + 3


def test_a_plan_that_is_gone(runs, monkeypatch):
    fresh = repeated.repeats(operations.flash_attn_func.__wrapped__)
    arguments, _ = dense()
    for _ in range(4):
        agree(fresh, arguments, {})
    monkeypatch.setattr(plan, "plans", {})
    before = runs.count
    fresh(*arguments)
    assert runs.count == before + 1


def test_calls_that_are_never_alike(runs, monkeypatch):
    asked, form_of = [], reader.form_of
    monkeypatch.setattr(reader, "form_of", lambda *arguments: asked.append(1) or form_of(*arguments))
    fresh = repeated.repeats(operations.flash_attn_func.__wrapped__)
    for seq in range(1, 101):
        agree(fresh, tuple(randn(1, seq, 1, 16) for _ in "qkv"), {})
    assert len(asked) <= 22
    for _ in range(3 * repeated.PATIENCE):  # and then are
        agree(fresh, *dense())
    before = runs.count
    agree(fresh, *dense())
    assert runs.count == before + 1


def test_no_more_than_so_many(runs):
    fresh = repeated.repeats(operations.flash_attn_func.__wrapped__)
    for seq in range(1, repeated.MOST_KEPT + 20):
        for _ in range(3):
            agree(fresh, tuple(randn(1, seq, 1, 16) for _ in "qkv"), {})
    assert len(kept_by(fresh)) == repeated.MOST_KEPT


def test_threads(runs):
    """Each call's own addresses and outputs, and nobody's launches among another's."""
    fresh = repeated.repeats(flash_attn.flash_attn_varlen_func.__wrapped__)
    barrier = threading.Barrier(4)

    def work(seed):
        barrier.wait()
        return [agree(fresh, *made) is not None for made in calls[seed::4]]

    torch.manual_seed(13)
    calls = [(packed if i % 3 else in_pages)() for i in range(80)]
    with ThreadPoolExecutor(4) as pool:
        assert all(all(results) for results in pool.map(work, range(4)))


def test_compiled():
    fresh = repeated.repeats(aiter.operations.flash_attn_func.__wrapped__)
    arguments, _ = dense()
    for _ in range(3):
        expected = fresh(*arguments)
    compiled = torch.compile(lambda *tensors: fresh(*tensors) * 2, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), expected * 2)
