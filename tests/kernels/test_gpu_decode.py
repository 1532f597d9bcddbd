"""The decoding kernel (few query tokens, split over the keys) on emulated AMD GPUs and on a CUDA device.

Every result is held against float64. Compiling takes longer than running: CASES gives every head_dim on every
target, and between them all combinations of dtype, causal and paged; each test sends many problems through one kernel.
"""

import functools
import math

import driver
import torch
from driver import DTYPES, GPUS, ints, on_targets, randn
from problems import Sequence, assert_sequences, page_lists

from aiter import reference

NAME = "attention_decode"
attend = functools.partial(driver.attend, name=NAME)
TILE = {"cuda": 16}  # keys that one wave takes at a time; 32 on AMD
WAVES = 4

# (dtype, head_dim, causal, paged)
SHARED = (("bf16", 64, False, True), ("fp16", 80, True, False), ("bf16", 128, True, False), ("fp16", 128, False, True))
CASES = {
    "gfx90a": (*SHARED, ("bf16", 40, True, True), ("fp16", 192, False, False), ("bf16", 256, False, False)),
    "gfx942": (*SHARED, ("fp16", 40, False, False), ("bf16", 192, True, True), ("fp16", 256, True, True)),
    "gfx950": (*SHARED, ("bf16", 40, False, True), ("fp16", 192, True, False), ("bf16", 256, True, True)),
}
CASES["cuda"] = (*dict.fromkeys(case for cases in CASES.values() for case in cases), ("bf16", 128, False, False))
PARAMETERS = [(target, *case) for target in GPUS for case in CASES[target]]
LATENT = [("cuda", "bf16", 576, False, False), ("cuda", "fp16", 576, True, False)]
LATENT += [("cuda", "fp16", 576, False, True), ("cuda", "bf16", 576, True, True), ("gfx942", "bf16", 576, True, True)]
PAGED = [p for p in PARAMETERS if p[4]]
CONTIGUOUS = [p for p in PARAMETERS if not p[4]]


def ragged(target):
    """Lengths around a tile, around a step of all waves, and long enough to be cut into several parts."""
    tile = TILE.get(target, 32)
    step = tile * WAVES
    return [0, 1, tile - 1, tile, tile + 1, step - 1, step, step + 1, 9 * step + 5]


# (KV heads, query heads of each, query tokens): from one row to more than a block has, and every number of row tiles.
SHAPES = ((2, 1, 1), (1, 8, 2), (1, 5, 4), (1, 33, 1), (1, 4, 1), (1, 16, 1), (1, 1, 70))


def shapes(head_dim):
    return SHAPES if head_dim == 128 else SHAPES[:3] if head_dim > 128 else SHAPES[1:]


@on_targets(CONTIGUOUS)
def test_padded(target, dtype, head_dim, causal, paged):
    lengths = ragged(target)
    for heads_kv, group, seq_q in shapes(head_dim):
        query = randn(len(lengths), seq_q, heads_kv * group, head_dim, dtype=dtype)
        key, value = (randn(len(lengths), max(lengths), heads_kv, head_dim, dtype=dtype) for _ in "kv")
        queries = [(seq_q, seq_q // 2, 0)[b % 3] if seq_q > 1 else 1 for b in range(len(lengths))]
        for b, length in enumerate(lengths):  # what stands in the padding has no effect
            key[b, length:], value[b, length:], query[b, queries[b] :] = math.nan, math.inf, math.nan
        output, lse = attend(target, query, key, value, causal, seqlens_q=ints(queries), seqlens_k=ints(lengths))
        sequences = []
        for b, (rows, length) in enumerate(zip(queries, lengths, strict=True)):
            place = (b, slice(rows)), (b, slice(None), slice(rows))
            sequences.append(Sequence(query[b, :rows], key[b, :length], value[b, :length], *place))
            assert not output[b, rows:].any() and (lse[b, :, rows:] == -math.inf).all()
        assert_sequences(output, lse, sequences, causal)


@on_targets(PAGED)
def test_paged(target, dtype, head_dim, causal, paged):
    lengths = ragged(target)
    for index, (heads_kv, group, seq_q) in enumerate(shapes(head_dim)):
        page_size = (16, 1, 128, 7, 64, 16, 48)[index]
        per_sequence = -(-max(lengths) // page_size)
        pages = len(lengths) * per_sequence + 1
        page_table = (torch.randperm if index % 2 else torch.arange)(pages)[: pages - 1]
        page_table = page_table.view(len(lengths), per_sequence).to(torch.int32)
        # (pages, heads, position, dim), handed over as (pages, position, heads, dim); unused places are NaN
        caches = [torch.full((pages, heads_kv, page_size, head_dim), math.nan).to(DTYPES[dtype]) for _ in "kv"]
        query = randn(len(lengths), seq_q, heads_kv * group, head_dim, dtype=dtype)
        sequences = []
        for b, length in enumerate(lengths):
            used = -(-length // page_size)
            tensors = []
            for cache in caches:
                tokens = randn(used * page_size, heads_kv, head_dim, dtype=dtype)
                tokens[length:] = math.nan
                cache[page_table[b, :used].long()] = tokens.view(used, page_size, heads_kv, head_dim).transpose(1, 2)
                tensors.append(tokens[:length])
            page_table[b, used:] = (-1, 2**31 - 1)[b % 2]  # entries that no valid token needs may be anything
            sequences.append(Sequence(query[b], *tensors, (b,), (b,)))
        key, value = (cache.transpose(1, 2) for cache in caches)
        pages = {"seqlens_k": ints(lengths), "page_table": page_table}
        if index % 3 != 2:
            indptr, indices, last = page_lists(page_table, lengths, page_size, spare=2)
            pages = {"page_indptr": indptr, "page_table": indices, "last_page_len": last}
        output, lse = attend(target, query, key, value, causal, **pages)
        assert_sequences(output, lse, sequences, causal)


@on_targets(CONTIGUOUS)
def test_packed(target, dtype, head_dim, causal, paged):
    lengths = ragged(target)
    for heads_kv, group, seq_q in SHAPES[1:3]:
        queries = [(0, 1, seq_q)[b % 3] for b in range(len(lengths))]
        query = randn(sum(queries), heads_kv * group, head_dim, dtype=dtype)
        key, value = (randn(sum(lengths), heads_kv, head_dim, dtype=dtype) for _ in "kv")
        output, lse = attend(
            target, query, key, value, causal, None, ints(queries), ints(lengths), None, (seq_q, max(lengths))
        )
        sequences, row, token = [], 0, 0
        for rows, tokens in zip(queries, lengths, strict=True):
            place, keys = slice(row, row + rows), slice(token, token + tokens)
            sequences.append(Sequence(query[place], key[keys], value[keys], (place,), (slice(None), place)))
            row, token = row + rows, token + tokens
        assert_sequences(output, lse, sequences, causal)


@on_targets([p for p in CONTIGUOUS if p[2] == 128])
def test_strides_scales_and_repetition(target, dtype, head_dim, causal, paged):
    """No lengths, tensors that are slices of others, any scale; the same result each time."""
    both = randn(2, 700, 2, 2 * head_dim + 8, dtype=dtype)
    key, value = both[..., :head_dim], both[..., head_dim : 2 * head_dim]
    query = randn(2, 3, 3, 4, head_dim, dtype=dtype)[:, :, 1]
    for scale in (None, -0.1, 0.0, 2.0):
        output, lse = attend(target, query, key, value, causal, scale)
        sequences = [Sequence(query[b], key[b], value[b], (b,), (b,)) for b in range(2)]
        assert_sequences(output, lse, sequences, causal, scale)
        again, again_lse = attend(target, query, key, value, causal, scale)
        assert torch.equal(output, again) and torch.equal(lse, again_lse)


@on_targets([p for p in CONTIGUOUS if p[2] == 128 and p[0] == "cuda"])
def test_equal_lengths(target, dtype, head_dim, causal, paged):
    """Units that several blocks share, that blocks have one of each, or several; and a single sequence in padding."""
    for batch, heads_kv, group, seq_q, seq_k in (
        (1, 8, 4, 1, 1000),
        (1, 2, 16, 1, 70),
        (1, 3, 2, 5, 5000),
        (4, 8, 2, 2, 700),
        (90, 1, 4, 1, 300),
        (150, 2, 1, 1, 130),
        (3, 60, 1, 1, 200),
    ):
        query = randn(batch, seq_q, heads_kv * group, head_dim, dtype=dtype)
        key, value = (randn(batch, seq_k, heads_kv, head_dim, dtype=dtype) for _ in "kv")
        output, lse = attend(target, query, key, value, causal)
        sequences = [Sequence(query[b], key[b], value[b], (b,), (b,)) for b in range(batch)]
        assert_sequences(output, lse, sequences, causal)
        if batch > 1:
            continue
        for rows, keys in ((seq_q, seq_k // 3), (seq_q - 1, seq_k - 1), (seq_q, 1), (seq_q, 0)):
            output, lse = attend(target, query, key, value, causal, seqlens_q=ints([rows]), seqlens_k=ints([keys]))
            place = (0, slice(rows)), (0, slice(None), slice(rows))
            assert_sequences(output, lse, [Sequence(query[0, :rows], key[0, :keys], value[0, :keys], *place)], causal)
            assert not output[0, rows:].any() and (lse[0, :, rows:] == -math.inf).all()


@on_targets([p for p in CONTIGUOUS if p[3]])
def test_masked_values_stay_out(target, dtype, head_dim, causal, paged):
    """What a query does not see cannot reach it, though it stands in the same matrix tile; what it sees does."""
    tokens = 4
    for seq_k in (tokens - 1, tokens + 1, 9 * WAVES * TILE.get(target, 32) + 3):  # whole, and cut into parts
        query = randn(1, tokens, 2, head_dim, dtype=dtype)
        key, value = (randn(1, seq_k, 2, head_dim, dtype=dtype) for _ in "kv")
        value[0, -1, 0, 3], value[0, -2, 1, 4], key[0, -1, 1, 0] = math.inf, math.nan, math.nan
        output, lse = attend(target, query, key, value, causal)
        expected = reference.attend_one(query[0], key[0], value[0], causal)[1]
        torch.testing.assert_close(lse[0].double(), expected, rtol=1e-4, atol=2e-4, equal_nan=True)
        assert_sequences(output, None, [Sequence(query[0], key[0], value[0], (0,), (0,))], causal)


def latent_memory(dtype, lengths, page_size):
    """Keys (batch, seq, 1, 576), or (pages, page_size, 1, 576) with a page table, NaN past each sequence's end; and the
    keys of each sequence."""
    tokens = [randn(n, 1, 576, dtype=dtype) for n in lengths]
    if not page_size:
        key = torch.full((len(lengths), max(lengths) + 3, 1, 576), math.nan).to(DTYPES[dtype])
        for row, own in zip(key, tokens, strict=True):
            row[: len(own)] = own
        return key, None, tokens
    width = -(-max(lengths) // page_size)
    key = torch.full((len(lengths) * width + 1, page_size, 1, 576), math.nan).to(DTYPES[dtype])
    table = torch.randperm(len(key))[1:].view(len(lengths), width).to(torch.int32)
    for row, own in zip(table, tokens, strict=True):
        used = -(-len(own) // page_size)
        pages = key[row[:used].long()].flatten(0, 1)
        pages[: len(own)] = own
        key[row[:used].long()] = pages.view(used, page_size, 1, 576)
        row[used:] = 2**31 - 1
    return key, table, tokens


@on_targets(LATENT)
def test_latent(target, dtype, head_dim, causal, paged):
    """Values that are the first columns of the keys, in the same memory and in one of their own: every number of rows,
    lengths around a tile, pages smaller and larger than one."""
    lengths = [0, 1, 63, 64, 65, 130, 4096]
    shapes = ((1, 1), (16, 1), (64, 1), (128, 1), (40, 2), (128, 2), (16, 8), (70, 1), (9, 3))
    sizes = (1, 16, 64, 128, 7, 48, 64, 8, 40) if paged else (0,) * len(shapes)
    if target != "cuda":
        lengths, shapes, sizes = [0, 1, 33, 70], ((16, 1), (5, 4)), (16, 1)
    for (heads, tokens), page_size in zip(shapes, sizes, strict=True):
        key, table, own = latent_memory(dtype, lengths, page_size)
        query = randn(len(lengths), tokens, heads, 576, dtype=dtype)
        sequences = [Sequence(query[b], k, k[..., :512], (b,), (b,)) for b, k in enumerate(own)]
        options = {"seqlens_k": ints(lengths), "page_table": table}
        for value in (key[..., :512], key[..., :512].clone()):
            output, lse = attend(target, query, key, value, causal, **options)
            assert_sequences(output, lse, sequences, causal)
        if target == "cuda":
            again = attend(target, query, key, key[..., :512], causal, **options)
            same = attend(target, query, key, key[..., :512].clone(), causal, **options)
            assert torch.equal(again[0], same[0]) and torch.equal(again[1], same[1])


@on_targets([p for p in LATENT if p[0] == "cuda"])
def test_latent_batch(target, dtype, head_dim, causal, paged):
    """More pieces than the GPU holds blocks, of any length; alone each sequence has the same bits where asked for."""
    lengths = [b * 37 % 700 for b in range(150)] + [3000]
    key, table, own = latent_memory(dtype, lengths, 16 if paged else 0)
    query = randn(len(lengths), 2, 80, 576, dtype=dtype)
    for batch_invariant in (False, True):
        options = {"page_table": table, "batch_invariant": batch_invariant}
        output, lse = attend(target, query, key, key[..., :512], causal, seqlens_k=ints(lengths), **options)
        sequences = [Sequence(query[b], k, k[..., :512], (b,), (b,)) for b, k in enumerate(own)]
        assert_sequences(output, lse, sequences, causal)
    for b in (0, 77, 150):
        one, memory = slice(b, b + 1), key if paged else key[b : b + 1]
        options["page_table"] = table[one] if paged else None
        alone, _ = attend(
            target, query[one], memory, memory[..., :512], causal, seqlens_k=ints(lengths[one]), **options
        )
        assert torch.equal(alone, output[one])


@on_targets([p for p in LATENT if p[0] == "cuda" and p[3]])
def test_latent_masked_values_stay_out(target, dtype, head_dim, causal, paged):
    lengths, tokens = [5, 64, 300], 4
    key, table, own = latent_memory(dtype, lengths, 16 if paged else 0)
    query = randn(len(lengths), tokens, 20, 576, dtype=dtype)
    for b, n in enumerate(lengths):
        place = (table[b, (n - 1) // 16].long(), (n - 1) % 16) if paged else (b, n - 1)
        key[place][0, 7] = own[b][n - 1, 0, 7] = (math.inf, math.nan, -math.inf)[b]
    output, _ = attend(target, query, key, key[..., :512], causal, seqlens_k=ints(lengths), page_table=table)
    assert output[:, :-1].isfinite().all()
    sequences = [Sequence(query[b], k, k[..., :512], (b,), (b,)) for b, k in enumerate(own)]
    assert_sequences(output, None, sequences, causal)


@on_targets([p for p in CONTIGUOUS if p[2] == 128 and p[0] in ("gfx90a", "cuda")])
def test_more_units_than_blocks(target, dtype, head_dim, causal, paged):
    """More sequences than the GPU holds blocks: ranges span many of them, and cuts are fewer than sequences. With many
    rows, blocks that add parts up have more than one row for each of their waves."""
    sizes = ((2, 230, 150), (20, 75, 40)) if target == "gfx90a" else ((2, 300, 150), (20, 300, 150))
    for heads, batch, longest in sizes:
        lengths = [b % longest for b in range(batch)] + [700]
        query = randn(len(lengths), 1, heads, head_dim, dtype=dtype)
        key, value = (randn(len(lengths), max(lengths), 1, head_dim, dtype=dtype) for _ in "kv")
        output, lse = attend(target, query, key, value, causal, seqlens_k=ints(lengths))
        sequences = [Sequence(query[b], key[b, :n], value[b, :n], (b,), (b,)) for b, n in enumerate(lengths)]
        assert_sequences(output, lse, sequences, causal)


@on_targets([p for p in CONTIGUOUS if p[2] == 128])
def test_lengths_out_of_range(target, dtype, head_dim, causal, paged):
    """Lengths that the host cannot check are bounded: nothing beyond the tensors is read (or the emulator says so)."""
    query = randn(3, 1, 4, head_dim, dtype=dtype)
    key, value = (randn(3, 40, 1, head_dim, dtype=dtype) for _ in "kv")
    output, lse = attend(target, query, key, value, causal, seqlens_k=ints([-7, 2**31 - 1, 40]))
    sequences = [Sequence(query[b], key[b, :n], value[b, :n], (b,), (b,)) for b, n in enumerate((0, 40, 40))]
    assert_sequences(output, lse, sequences, causal)


@on_targets([p for p in PARAMETERS if p[2] == 128 and p[0] != "cuda"])
def test_cost_of_the_main_loop(target, dtype, head_dim, causal, paged):
    """What the emulator counts: no scratch, two waves on a SIMD, wide loads, no bank conflicts."""
    query = randn(1, 1, 4, head_dim, dtype=dtype)
    key, value = (randn(4, 128, 1, head_dim, dtype=dtype) for _ in "kv")
    table = ints([[3, 1, 0, 2]]) if paged else None
    if not paged:
        key, value = (t.view(1, 512, 1, head_dim) for t in (key, value))
    stats = {}
    attend(target, query, key, value, causal, page_table=table, stats=stats)
    (kernel,) = (cost for name, cost in stats.items() if NAME in name)
    assert kernel["scratch_bytes"] == 0 and kernel["waves_per_simd"] >= 2
    loop = kernel["main_loop"]
    assert loop["narrowest_load"] >= (4 if paged else 8)  # the page table's entries
    assert loop["lds_conflicts"] < 0.05


@on_targets([p for p in CONTIGUOUS if p[2] == 128 and p[0] in ("gfx90a", "gfx950")])
def test_keys_and_values_are_read_once_for_each_row_tile(target, dtype, head_dim, causal, paged):
    """By the waves that have rows: not by the others, nor for padding."""
    tokens, keys, heads = 16, 512, 4
    query = randn(1, tokens, heads, head_dim, dtype=dtype)
    key, value = (randn(1, keys, 1, head_dim, dtype=dtype) for _ in "kv")
    once = 2 * key.numel() * key.element_size()
    for valid in (1, 5, 9, 16):
        stats = {}
        attend(target, query, key, value, causal, None, ints([valid]), ints([keys]), stats=stats)
        (kernel,) = (cost for name, cost in stats.items() if NAME in name)
        row_tiles = -(-valid * heads // 16)
        assert kernel["total"]["bytes"] <= (row_tiles + 0.5) * once
