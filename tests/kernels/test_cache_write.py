"""The kernel that writes into caches, on CPUs, emulated AMD GPUs and a CUDA device: through the launch ABI.

What is copied or becomes 8-bit floats is held against PyTorch bit by bit, the whole of the cache and all around it;
what is rotated, within a unit in the last place of float64 rounded.
"""

import math

import driver
import pytest
import torch
from driver import CPUS, DTYPES, GPUS, ints

from aiter import abi
from aiter.errors import LaunchError
from aiter.jit.arch import arch_of
from aiter.jit.spec import Spec

FP8 = {"e4m3fn": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz, "e5m2": torch.float8_e5m2}
# (target, dtype, 8-bit type): between them all types, and every way in which a CPU's vectors become elements.
CPU_CASES = (("x86-64-v2", "fp16", "e4m3fn"), ("x86-64-v3", "bf16", "e4m3fnuz"), ("x86-64-v4", "fp32", "e5m2"))
CASES = [case for case in CPU_CASES if case[1::-1] in CPUS]
CASES += [("gfx90a", "bf16", "e5m2"), ("gfx942", "bf16", "e4m3fnuz"), ("gfx950", "fp16", "e4m3fn")]
CASES += [("cuda", "bf16", fp8) for fp8 in FP8]
PLAIN = [(target, dtype) for target, dtype, _ in CASES[:-2]] + [("gfx90a", "fp16"), ("cuda", "fp16")]


def on(cases, *names):
    return pytest.mark.parametrize(names, cases, ids=["-".join(case) for case in cases])


HEADS = 2


def caches(how, dtype, pages, page_size, dims):
    """Views (pages, page_size, heads, dim) of memory that lies as `how` says, and that memory, filled with noise."""
    key_dim, value_dim = dims

    def noise(*shape):
        bits = torch.randint(0, 255, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8)
        return bits.view(dtype)

    if how == "halves":  # of one tensor, heads outside of positions
        memory = noise(pages, HEADS, page_size, key_dim + value_dim).transpose(1, 2)
        return memory[..., :key_dim], memory[..., key_dim:], memory
    if how == "pages":
        memory = noise(2, pages, page_size, HEADS, max(dims))
        return memory[0, ..., :key_dim], memory[1, ..., :value_dim], memory
    if how == "elements apart":
        memory = noise(2, pages, HEADS, max(dims), page_size).movedim(-1, 2)
        return memory[0, ..., :key_dim], memory[1, ..., :value_dim], memory
    if how == "odd":  # nothing at a multiple of 16 bytes
        memory = noise(2, pages, page_size, HEADS, max(dims) + 3)
        return memory[0, ..., 1 : key_dim + 1], memory[1, ..., 1 : value_dim + 1], memory
    raise ValueError(how)


def four(tensor):
    return tensor.stride() if tensor.dim() == 4 else (0, *tensor.stride())


def launch(target, dtype, fp8, numbers, reads, writes):
    arch = arch_of(torch.device("cuda")) if target == "cuda" else target
    built = driver._kernel(target, Spec("cache_write", dtype, 0, False, arch, ((fp8, 1),) if fp8 else ()))
    strides = {f"{n}_strides": four(t) for n, t in (reads | writes).items() if t is not None and t.dim() in (3, 4)}
    problem = abi.CacheWriteProblem(**numbers, **strides)
    driver._run(target, built, problem, reads, writes, 2, driver.GOMP_PARALLEL, None)


def quantised(row, fp8, scale):
    largest = torch.finfo(FP8[fp8]).max
    return (row.float() / scale).clamp(-largest, largest).to(FP8[fp8])


def same_bits(a, b):
    assert a.dtype == b.dtype
    as_int = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(as_int), b.contiguous().view(as_int))


SLOTS = [3, -1, 17, 0, 8, 5, -7, 23]
LAYOUTS = (("pages", 40, 24), ("halves", 64, 64), ("odd", 20, 11), ("elements apart", 16, 8))


@on([*CASES, *((*plain, "") for plain in PLAIN)], "target", "dtype", "fp8")
def test_by_slots(target, dtype, fp8):
    for index, (how, *dims) in enumerate(LAYOUTS):
        wide, per_head = index % 2, index // 2
        key, value = (driver.randn(len(SLOTS) + 3, HEADS, dim, dtype=dtype) * 30 for dim in dims)
        key[3], value[4, 1, :3] = math.nan, torch.tensor([math.inf, -math.inf, -0.0])
        key_cache, value_cache, memory = caches(how, FP8[fp8] if fp8 else DTYPES[dtype], 4, 6, dims)
        expected = memory.clone(memory_format=torch.preserve_format)
        views = [expected.as_strided(c.shape, c.stride(), c.storage_offset()) for c in (key_cache, value_cache)]
        scales = [torch.tensor([0.37, 1.9][: per_head + 1]), torch.tensor([7.3, 0.11][: per_head + 1])]
        for token, slot in enumerate(SLOTS):
            for view, new, scale in zip(views, (key, value), scales, strict=True):
                if slot >= 0:
                    view[slot // 6, slot % 6] = quantised(new[token], fp8, scale.unsqueeze(1)) if fp8 else new[token]
        numbers = {"batch": 1, "heads_kv": HEADS, "seqlen_new": len(SLOTS), "head_dim": dims[0], "value_dim": dims[1]}
        numbers |= {"page_size": 6, "wide_slots": wide, "num_pages": 4}
        numbers |= {"key_scale_strides": (0, per_head), "value_scale_strides": (0, per_head)}
        reads = {"key": key, "value": value, "slots": torch.tensor(SLOTS, dtype=torch.int64 if wide else torch.int32)}
        if fp8:
            reads |= {"key_scale": scales[0], "value_scale": scales[1]}
        launch(target, dtype, fp8, numbers, reads, {"key_cache": key_cache, "value_cache": value_cache})
        assert same_bits(memory, expected), how


@on(CASES, "target", "dtype", "fp8")
def test_every_element_to_8_bits(target, dtype, fp8):
    """All 65536 of a 16-bit type; of floats, many of every size."""
    if dtype == "fp32":
        values = torch.randn(1 << 16) * torch.exp2(torch.randint(-30, 20, (1 << 16,)).float())
        values[:5] = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    else:
        values = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(DTYPES[dtype])
    rows = values.view(-1, HEADS, 256)
    cache = torch.zeros(len(rows), 1, HEADS, 256, dtype=FP8[fp8])
    other = torch.zeros_like(cache)
    numbers = {"batch": 1, "heads_kv": HEADS, "seqlen_new": len(rows), "head_dim": 256, "value_dim": 256}
    numbers |= {"page_size": 1, "num_pages": len(rows)}
    reads = {"key": rows, "value": rows, "slots": ints(list(range(len(rows))))}
    launch(target, dtype, fp8, numbers, reads, {"key_cache": cache, "value_cache": other})
    assert same_bits(cache.flatten(), quantised(values, fp8, 1.0)) and same_bits(cache, other)


# rotary_dim, interleaved, head_dim: halves that are whole runs of 8, that are not, all of the row, one pair.
ROTATIONS = ((32, False, 40), (24, False, 40), (40, True, 40), (16, True, 24), (2, False, 16), (64, False, 64))


@on(PLAIN, "target", "dtype")
@pytest.mark.parametrize("form", ("pages", "rows", "packed"))
def test_appends_and_rotates(target, dtype, form):
    """Behind the lengths of the sequences; queries rotate by their own places, or all by the first one's."""
    lengths, page_size, places = [0, 7, 5], 4 if form == "pages" else 12, 14
    counts, counts_q = ([3, 0, 2], [1, 4, 0]) if form == "packed" else ([3] * 3, [2] * 3)
    positions = ints([1, 0, 9]) if form == "rows" else None
    table = ints([[6, 0, 2], [4, 1, 7], [8, 9, 3]]) if form == "pages" else None
    pages = 10 if form == "pages" else 3
    batch, heads_q = len(lengths), 3
    for index, (rotary_dim, interleaved, head_dim) in enumerate(ROTATIONS):
        step = index % 2
        packed = form == "packed"
        outer, outer_q = ((sum(counts),), (sum(counts_q),)) if packed else ((batch, 3), (batch, 2))
        key, value = (driver.randn(*outer, HEADS, dim, dtype=dtype) for dim in (head_dim, 24))
        query = driver.randn(*outer_q, heads_q, head_dim, dtype=dtype)
        angles = torch.rand(places, rotary_dim // 2) * 2 * math.pi
        cos, sin = angles.cos().to(DTYPES[dtype]), angles.sin().to(DTYPES[dtype])
        key_cache, value_cache, memory = caches(LAYOUTS[index % 4][0], DTYPES[dtype], pages, page_size, (head_dim, 24))
        expected = memory.double().clone(memory_format=torch.preserve_format)
        keys, values = (expected.as_strided(c.shape, c.stride(), c.storage_offset()) for c in (key_cache, value_cache))
        expected_query = query.double()
        row = row_q = 0
        for b, length in enumerate(lengths):
            first = length if positions is None else int(positions[b])
            for i in range(counts[b]):
                page, position = divmod(length + i, page_size)
                page = b if table is None else int(table[b, page])
                at = row if packed else (b, i)
                keys[page, position] = rotated(key[at], cos, sin, first + i, interleaved)
                values[page, position] = value[at].double()
                row += 1
            for i in range(counts_q[b]):
                at = row_q if packed else (b, i)
                expected_query[at] = rotated(query[at], cos, sin, first + i * step, interleaved)
                row_q += 1
        numbers = {"batch": batch, "heads_q": heads_q, "heads_kv": HEADS, "seqlen_q": 2, "seqlen_new": 3}
        numbers |= {"head_dim": head_dim, "value_dim": 24, "page_size": page_size, "num_pages": pages}
        numbers |= {"table_width": 3 if table is not None else 0, "page_table_stride": 3 if table is not None else 0}
        numbers |= {"rotary_dim": rotary_dim, "rotary_length": places, "interleaved": interleaved, "query_step": step}
        numbers |= {"total_q": sum(counts_q), "total_new": sum(counts)} if packed else {}
        numbers |= {"cos_stride": cos.stride(0), "sin_stride": sin.stride(0)}
        reads = {"query": query, "key": key, "value": value, "seqlens": ints(lengths), "page_table": table}
        reads |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_positions": positions}
        if packed:
            reads |= {"starts_q": starts(counts_q), "starts_new": starts(counts)}
        out = torch.full_like(query, math.nan)
        writes = {"rotated": out, "key_cache": key_cache, "value_cache": value_cache}
        launch(target, dtype, "", numbers, reads, writes)
        eps = torch.finfo(DTYPES[dtype]).eps
        for got, wanted in ((out, expected_query), (memory, expected)):
            torch.testing.assert_close(got.double(), wanted, rtol=eps, atol=4e-7, equal_nan=True)


def rotated(rows, cos, sin, place, interleaved):
    """In float64, head by head: the definition."""
    result, pairs = rows.double(), cos.shape[1]
    low = slice(0, 2 * pairs, 2) if interleaved else slice(0, pairs)
    high = slice(1, 2 * pairs, 2) if interleaved else slice(pairs, 2 * pairs)
    x, y, c, s = result[:, low].clone(), result[:, high].clone(), cos[place].double(), sin[place].double()
    result[:, low], result[:, high] = x * c - y * s, y * c + x * s
    return result


def starts(counts):
    return ints([0, *torch.tensor(counts).cumsum(0).tolist()])


WRONG = (
    {"seqlens": [-1, 4]},
    {"seqlens": [7, 4]},  # its second token would be past the table
    {"seqlens": [2**31 - 1, 4]},
    {"page_table": [[0, 9], [2, 3]], "seqlens": [3, 4]},
    {"page_table": [[-1, 0], [2, 3]]},
)


WRONG_ON = dict(PLAIN)


@pytest.mark.parametrize("target", WRONG_ON)
@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_has_no_place_is_not_written(target, wrong):
    """A CPU refuses all of it; a GPU writes the rest."""
    good = {"seqlens": [1, 4], "page_table": [[0, 1], [2, 3]]}
    held = {name: ints(numbers) for name, numbers in (good | wrong).items()}
    dtype = WRONG_ON[target]
    key, value = (driver.randn(2, 2, HEADS, 16, dtype=dtype) for _ in "kv")
    key_cache, value_cache, memory = caches("pages", DTYPES[dtype], 5, 4, (16, 16))
    expected = memory.clone()
    numbers = {"batch": 2, "heads_kv": HEADS, "seqlen_new": 2, "head_dim": 16, "value_dim": 16, "page_size": 4}
    numbers |= {"num_pages": 5, "table_width": 2, "page_table_stride": 2}
    reads, writes = {"key": key, "value": value, **held}, {"key_cache": key_cache, "value_cache": value_cache}
    if target not in GPUS:
        with pytest.raises(LaunchError, match="out of range"):
            launch(target, dtype, "", numbers, reads, writes)
    else:
        launch(target, dtype, "", numbers, reads, writes)
        for b in range(2):
            for i in range(2):
                place = int(held["seqlens"][b]) + i
                page = int(held["page_table"][b, place // 4]) if int(held["seqlens"][b]) >= 0 and place < 8 else -1
                if 0 <= page < 5:
                    expected[0, page, place % 4], expected[1, page, place % 4] = key[b, i], value[b, i]
    assert same_bits(memory, expected)
