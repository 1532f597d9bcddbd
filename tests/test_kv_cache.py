"""aiter.kv_cache: how it refuses, and what PyTorch sees of it. What its kernel writes: kernels/test_cache_write.py."""

import pytest
import torch
from problems import DEVICE, DTYPES, randn

from aiter.kv_cache import reshape_and_cache

DTYPE = DTYPES[0]


def problem(dtype=DTYPE, **changes):
    """A token too many; slots 2, none, 7, 0 of 4 pages of 3; keys and values are halves of one tensor."""
    cache = randn(4, 3, 2, 40, dtype=dtype)
    arguments = {
        "key": randn(5, 2, 16, dtype=dtype),
        "value": randn(5, 2, 24, dtype=dtype),
        "key_cache": cache[..., :16],
        "value_cache": cache[..., 16:],
        "slot_mapping": torch.tensor([2, -1, 7, 0], device=DEVICE),
    }
    return cache, arguments | changes


def written(cache, arguments):
    """What the cache must hold afterwards."""
    expected = cache.clone()
    for token, slot in enumerate(arguments["slot_mapping"].tolist()):
        if slot >= 0:
            both = torch.cat((arguments["key"][token], arguments["value"][token]), -1)
            expected[slot // 3, slot % 3] = both
    return expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot_dtype", (torch.int32, torch.int64))
def test_writes_in_place_and_nothing_else(dtype, slot_dtype):
    cache, arguments = problem(dtype)
    expected = written(cache, arguments)
    arguments["slot_mapping"] = arguments["slot_mapping"].to(slot_dtype)
    assert reshape_and_cache(**arguments) is None
    assert torch.equal(cache, expected)


def test_one_token_a_page_and_strided_slots():
    """A pool with a row for each token; every second of the slots."""
    pool = randn(2, 20, 2, 16, dtype=DTYPE)
    expected, (key, value) = pool.clone(), randn(2, 3, 2, 16, dtype=DTYPE)
    slots = torch.tensor([19, 5, 0, 5, 4, 5], device=DEVICE)[::2]
    reshape_and_cache(key, value, pool[0].unsqueeze(1), pool[1].unsqueeze(1), slots)
    expected[0, slots], expected[1, slots] = key, value
    assert torch.equal(pool, expected)


def test_nothing_to_write():
    cache, arguments = problem()
    before = cache.clone()
    reshape_and_cache(**arguments | {"slot_mapping": arguments["slot_mapping"][:0]})
    empty = {name: arguments[name][:0] for name in ("key", "value", "slot_mapping")}
    reshape_and_cache(**arguments | empty)
    reshape_and_cache(**arguments | {"slot_mapping": torch.full((4,), -1, device=DEVICE)})
    assert torch.equal(cache, before)


def test_scales_of_one_element_or_one_a_head():
    key = randn(2, 2, 16, dtype=DTYPE)
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([0.5, 0.5])):
        cache = torch.zeros(1, 2, 2, 16, dtype=torch.float8_e4m3fn, device=DEVICE)
        reshape_and_cache(key, key, cache, cache.clone(), torch.arange(2, device=DEVICE), scale.to(DEVICE))
        assert torch.equal(cache[0].float(), (key.float() / 0.5).to(torch.float8_e4m3fn).float())


def test_operator():
    """A schema that says what is written, and a fake that agrees."""
    _, arguments = problem()
    tests = ("test_schema", "test_faketensor")  # the rest: test_compiled
    with torch.no_grad():
        torch.library.opcheck(torch.ops.aiter.reshape_and_cache.default, tuple(arguments.values()), test_utils=tests)


def test_compiled():
    """In one graph, with other numbers of tokens; the cache is changed in place, and read afterwards. It is cut into
    keys and values inside: PyTorch 2.13 misreads two halves that are inputs of a dynamic graph, whoever writes."""

    def step(key, value, cache, slots):
        reshape_and_cache(key * 2, value, cache[..., :16], cache[..., 16:], slots)
        return cache[..., :16].float().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for count in (4, 3):
        cache, arguments = problem()
        arguments["slot_mapping"] = arguments["slot_mapping"][:count]
        expected = written(cache, arguments | {"key": arguments["key"] * 2})
        total = compiled(arguments["key"], arguments["value"], cache, arguments["slot_mapping"])
        assert torch.equal(cache, expected)
        torch.testing.assert_close(total, expected[..., :16].float().sum())


SLOTS = torch.tensor([0, 1])
BAD = (
    ({"key": [1.0]}, TypeError, "key must be a torch.Tensor"),
    ({"value_cache": None}, TypeError, "value_cache must be a torch.Tensor"),
    ({"key": torch.zeros(5, 32)}, ValueError, r"key must be \(tokens, heads_kv, head_dim\)"),
    ({"value": torch.zeros(4, 2, 24)}, ValueError, "value has shape"),
    ({"value": torch.zeros(5, 2, 16)}, ValueError, "value_cache has shape"),
    ({"key_cache": torch.zeros(4, 3, 1, 16)}, ValueError, "key_cache has shape"),
    ({"key_cache": torch.zeros(4, 2, 2, 16)}, ValueError, "value_cache has shape"),
    ({"key_cache": torch.zeros(4, 3, 2, 16, dtype=torch.float64)}, TypeError, "key_cache has dtype"),
    ({"key_cache": torch.zeros(4, 3, 2, 16, dtype=torch.float8_e5m2)}, TypeError, "value_cache has dtype"),
    ({"slot_mapping": SLOTS.float()}, TypeError, "slot_mapping has dtype"),
    ({"slot_mapping": torch.zeros(6, dtype=torch.int32)}, ValueError, "slot_mapping has 6 slots; key has 5 tokens"),
    ({"k_scale": torch.ones(1)}, ValueError, "k_scale is given, but the cache has dtype"),
)


@pytest.mark.parametrize(("changes", "error", "words"), BAD)
def test_bad_arguments(changes, error, words):
    def place(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.to(DEVICE, DTYPE if value.dtype == torch.float32 and value.dim() > 1 else value.dtype)

    cache, arguments = problem(**{name: place(value) for name, value in changes.items()})
    before = cache.clone()
    with pytest.raises(error, match=words):
        reshape_and_cache(**arguments)
    assert torch.equal(cache, before)


@pytest.mark.parametrize(
    ("scale", "error", "words"),
    (
        (torch.ones(3), ValueError, "k_scale has shape"),
        (torch.ones(1, dtype=torch.float64), TypeError, "k_scale has dtype"),
        (0.5, TypeError, "k_scale must be a torch.Tensor"),
    ),
)
def test_bad_scales(scale, error, words):
    _, arguments = problem()
    for name in ("key_cache", "value_cache"):
        arguments[name] = arguments[name].to(torch.float8_e4m3fn)
    with pytest.raises(error, match=words):
        reshape_and_cache(**arguments, k_scale=scale.to(DEVICE) if isinstance(scale, torch.Tensor) else scale)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not look at slots; it leaves out those that do not exist")
def test_a_slot_that_does_not_exist():
    cache, arguments = problem(slot_mapping=torch.tensor([0, 12]))
    before = cache.clone()
    with pytest.raises(ValueError, match="slot_mapping has a slot 12; the cache has slots 0 to 11"):
        reshape_and_cache(**arguments)
    assert torch.equal(cache, before)


def test_takes_no_gradient():
    _, arguments = problem()
    arguments["key"].requires_grad_()
    with pytest.raises(ValueError, match=r"use torch.no_grad\(\)"):
        reshape_and_cache(**arguments)
    with torch.no_grad():
        reshape_and_cache(**arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_in_a_graph_without_synchronising():
    """Replayed with other tokens and other slots."""
    cache, arguments = problem(torch.bfloat16)
    reshape_and_cache(**arguments)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        reshape_and_cache(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        reshape_and_cache(**arguments)
    for slots in ([5, 6, -1, 11], [1, 2, 3, 4]):
        arguments["slot_mapping"].copy_(torch.tensor(slots))
        arguments["key"].normal_()
        expected = written(cache, arguments)
        graph.replay()
        assert torch.equal(cache, expected)
