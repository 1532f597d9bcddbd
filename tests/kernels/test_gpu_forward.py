"""The forward kernel for many query tokens, on emulated AMD GPUs and on a CUDA device, against float64.

Compiling takes longer than running: CASES gives every head_dim on every target, most with and without a mask, and
between them all combinations of dtype, causal and paged; each test then sends many problems through one kernel.
"""

import math

import torch
from driver import DTYPES, EMULATED, GPU_DTYPES, GPUS, attend, ints, on_targets, strided
from problems import STRIDES, Sequence, assert_sequences, page_lists

ROWS = 128  # query rows of a block, or half of them

# (dtype, head_dim, causal, paged)
KINDS = ("fp16", True), ("bf16", False)
CASES = {
    arch: [
        *(("bf16", 128, True, False), ("bf16", 64, True, True), ("fp16", 128, False, True)),
        *(
            (dtype, head_dim, causal, False)
            for j, head_dim in enumerate((40, 64, 80, 128, 192, 256))
            for dtype, causal in (KINDS if head_dim in (64, 128, 256) else (KINDS[(i + j // 2) % 2],))
        ),
    ]
    for i, arch in enumerate(EMULATED)
}
CASES["cuda"] = [
    (dtype, head_dim, causal, paged)
    for head_dim in (8, 40, 64, 80, 128, 192, 256)
    for dtype in GPU_DTYPES
    for causal in (False, True)
    for paged in (False, True)
]
PARAMETERS = [(target, *case) for target in GPUS for case in CASES[target]]
CONTIGUOUS = [p for p in PARAMETERS if not p[4]]
PAGED = [p for p in PARAMETERS if p[4]]
CAUSAL = [p for p in CONTIGUOUS if p[3] and p[2] in (64, 128)]


def key_tile(target, head_dim):
    """Keys that the kernel takes at a time; the lengths around it are those where a mistake would show."""
    return 64 if target == "cuda" else 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32


def dense(target, query, key, value, causal, scale=None):
    output, lse = attend(target, query, key, value, causal, scale)
    sequences = [Sequence(query[b], key[b], value[b], (b,), (b,)) for b in range(query.shape[0])]
    assert_sequences(output, lse, sequences, causal, scale)
    return output, lse


@on_targets(CONTIGUOUS)
def test_dense(target, dtype, head_dim, causal, paged):
    """Lengths around the tiles of rows and keys, grouped heads, more and fewer queries than keys."""
    tile = key_tile(target, head_dim)
    shapes = [  # batch, query tokens, keys, KV heads, query heads of each
        (1, ROWS - 1, tile, 1, 1),
        (1, ROWS + 1, tile + 1, 1, 2),
        (1, 2 * ROWS + 1, 3 * tile + 1, 1, 1),
        (2, 33, 2 * tile - 1, 2, 1),
        (1, 1, 1, 1, 3),
        (1, ROWS, 1, 1, 1),
        (1, 70, tile - 1, 1, 1),
        # Heads that share a row tile: all four, two of six, four of eight, two of four.
        (1, 5, tile + 1, 2, 4),
        (1, 3, tile, 1, 6),
        (1, 40, 2 * tile + 1, 1, 8),
        (2, 70, tile + 1, 1, 4),
    ]
    for batch, seq_q, seq_k, heads_kv, group in shapes:
        query = strided((batch, seq_q, heads_kv * group, head_dim), dtype, "contiguous")
        key, value = (strided((batch, seq_k, heads_kv, head_dim), dtype, "contiguous") for _ in "kv")
        dense(target, query, key, value, causal)


@on_targets(CAUSAL)
def test_many_short_sequences(target, dtype, head_dim, causal, paged):
    """More blocks than an AMD GPU has compute units, each of few rows: there are other loops for these."""
    for batch, heads in ((80, (4, 4)), (170, (8, 2))):
        shapes = ((batch, 9, heads[0]), *((batch, 12, heads[1]),) * 2)
        dense(target, *(strided((*shape, head_dim), dtype, "contiguous") for shape in shapes), causal)


@on_targets(CONTIGUOUS)
def test_padded_and_packed(target, dtype, head_dim, causal, paged):
    """The same ragged sequences both ways. Nothing in the padding has an effect, and all of the result is written."""
    tile = key_tile(target, head_dim)
    lengths = [tile + 1, 0, 1, ROWS + 5]
    longest = max(lengths)
    shape = (len(lengths), longest, 1, head_dim)
    query, key, value = (strided(shape, dtype, "contiguous") for _ in "qkv")
    valid = [[t[b, :length].clone() for t in (query, key, value)] for b, length in enumerate(lengths)]
    for b, length in enumerate(lengths):
        query[b, length:], key[b, length:], value[b, length:] = math.nan, math.inf, math.nan
    seqlens = ints(lengths)
    output, lse = attend(target, query, key, value, causal, seqlens_q=seqlens, seqlens_k=seqlens)
    places = [((b, slice(length)), (b, slice(None), slice(length))) for b, length in enumerate(lengths)]
    assert_sequences(output, lse, [Sequence(*t, *p) for t, p in zip(valid, places, strict=True)], causal)
    for b, length in enumerate(lengths):
        assert not output[b, length:].any() and (lse[b, :, length:] == -math.inf).all()

    packed = [torch.cat(tensors) for tensors in zip(*valid, strict=True)]
    output, lse = attend(target, *packed, causal, seqlens_q=seqlens, seqlens_k=seqlens, max_seqlen=(longest, longest))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    rows = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]
    sequences = [Sequence(*t, (r,), (slice(None), r)) for t, r in zip(valid, rows, strict=True)]
    assert_sequences(output, lse, sequences, causal)


@on_targets(PAGED)
def test_paged(target, dtype, head_dim, causal, paged):
    tile = key_tile(target, head_dim)
    lengths = [1, tile - 1, 0, 2 * tile + 1]
    for page_size, seq_q, group in ((16, 40, 2), (48, ROWS + 1, 1), (1, 3, 1), (2 * tile, 70, 1)):
        per_sequence = -(-max(lengths) // page_size)
        pages = len(lengths) * per_sequence + 1
        page_table = torch.randperm(pages)[: pages - 1].view(len(lengths), per_sequence).to(torch.int32)
        caches = [torch.full((pages, 1, page_size, head_dim), math.nan).to(DTYPES[dtype]) for _ in "kv"]
        query = strided((len(lengths), seq_q, group, head_dim), dtype, "contiguous")
        sequences = []
        for b, length in enumerate(lengths):
            used = -(-length // page_size)
            tensors = []
            for cache in caches:
                tokens = strided((used * page_size, 1, head_dim), dtype, "contiguous")
                tokens[length:] = math.nan  # what stands in the rest of a page has no effect
                cache[page_table[b, :used].long()] = tokens.view(used, page_size, 1, head_dim).transpose(1, 2)
                tensors.append(tokens[:length])
            page_table[b, used:] = (-1, 2**31 - 1)[b % 2]  # entries that no valid token needs may be anything
            sequences.append(Sequence(query[b], *tensors, (b,), (b,)))
        key, value = (cache.transpose(1, 2) for cache in caches)
        pages = {"seqlens_k": ints(lengths), "page_table": page_table}
        if listed := group == 1:
            indptr, indices, last = page_lists(page_table, lengths, page_size, spare=2)
            pages = {"page_indptr": indptr, "page_table": indices, "last_page_len": last}
        output, lse = attend(target, query, key, value, causal, **pages)
        assert_sequences(output, lse, sequences, causal)
        # A bad page number or length stays inside the tensors: the emulator watches, the result does not matter.
        if listed:
            indptr.copy_(ints([-9, 3, 2, 2**30, 4])), indices[0].fill_(2**30), last.copy_(ints([-1, 2**30, 3, 1]))
            attend(target, query, key, value, causal, **pages)
            continue
        page_table[0, 0], page_table[3, 0] = -5, 2**30
        attend(target, query, key, value, causal, seqlens_k=ints([-3, 9, 2**30, 1]), page_table=page_table)


@on_targets([p for p in PAGED if p[0] == "cuda"])
def test_mixed_batch(target, dtype, head_dim, causal, paged):
    """Chunks of prompts among tokens that decode: so different in rows that Hopper takes row tiles in an order of its
    own, and more of them than a GPU has blocks. Boxes of 8, 16 and 64 tokens, and pages that hold several tiles."""
    rows = [1, 1, 1, 1, 1, 150, 1, 1, 1, 1, 1, 70, 0, 2]
    keys = [r + k for r, k in zip(rows, [300, 0, 15, 16, 17, 127, 129, 255, 64, 8, 7, 290, 30, 40], strict=True)]
    heads, group = 5, 2
    query = strided((sum(rows), heads * group, head_dim), dtype, "contiguous")
    starts = ints([0, *torch.tensor(rows).cumsum(0).tolist()])
    for page_size in (8, 16, 64, 256):
        per_sequence = -(-max(keys) // page_size)
        page_table = torch.randperm(len(keys) * per_sequence).view(len(keys), -1).to(torch.int32)
        caches = [torch.full((page_table.numel(), page_size, heads, head_dim), math.nan).to(query.dtype) for _ in "kv"]
        sequences = []
        for b, length in enumerate(keys):
            tensors = []
            for cache in caches:
                tokens = strided((per_sequence * page_size, heads, head_dim), dtype, "contiguous")
                tokens[length:] = math.nan
                cache[page_table[b].long()] = tokens.view(per_sequence, page_size, heads, head_dim)
                tensors.append(tokens[:length])
            page_table[b, -(-length // page_size) :] = -1
            own = slice(int(starts[b]), int(starts[b + 1]))
            sequences.append(Sequence(query[own], *tensors, (own,), (slice(None), own)))
        pages = {"seqlens_k": ints(keys), "page_table": page_table}
        packed = {"starts_q": starts, "max_seqlen": (max(rows), max(keys))}
        output, lse = attend(target, query, *caches, causal, **pages, **packed)
        assert_sequences(output, lse, sequences, causal)


@on_targets(CAUSAL)
def test_strides_scales_and_many_heads(target, dtype, head_dim, causal, paged):
    for how in STRIDES[:3]:
        tensors = [strided((1, 65, 2, head_dim), dtype, how) for _ in "qkv"]
        if how == "sliced":  # rows of 16-byte pieces: what the operations see to
            tensors = [strided((1, 65, 4, head_dim), dtype, "contiguous")[:, :, 1:3] for _ in "qkv"]
        dense(target, *tensors, causal)
    query, key, value = (strided((3, 9, 3, head_dim), dtype, "contiguous") for _ in "qkv")
    for scale in (-0.3, 0.0, 2.0):  # nine units of work: one for each of 8 chiplets, and one that is left over
        dense(target, query, key, value, causal, scale)


@on_targets(CAUSAL)
def test_not_finite(target, dtype, head_dim, causal, paged):
    """inf and NaN come out where the mathematics puts them, and nowhere else."""
    tensors = [strided((1, 150, 2, head_dim), dtype, "contiguous") for _ in "qkv"]
    query, key, value = tensors
    value[0, 100], value[0, 140, 0, 3] = math.inf, math.nan
    output, lse = dense(target, *tensors, causal)
    assert output[0, :100].isfinite().all() and lse.isfinite().all()
    assert (output[0, 100:140] == math.inf).all() and output[0, 140:, 0, 3].isnan().all()
    value[0, 100], value[0, 140, 0, 3] = 0, 0
    key[0, 120, 1] = math.nan
    output, lse = attend(target, *tensors, causal)
    assert output[0, :120].isfinite().all() and output[0, :, 0].isfinite().all()
    assert output[0, 120:, 1].isnan().all() and lse[0, 1, 120:].isnan().all()
    key[0, 120, 1] = 0
    query[0, 7] = math.nan
    output, lse = attend(target, *tensors, causal)
    assert output[0, 7].isnan().all() and lse[0, :, 7].isnan().all()
    others = [i for i in range(150) if i != 7]
    assert output[0, others].isfinite().all() and lse[0, :, others].isfinite().all()
    # Of heads that share a row tile: keys that not all of its tokens see.
    query, key, value = (
        strided((1, n, heads, head_dim), dtype, "contiguous") for n, heads in ((20, 4), (90, 1), (90, 1))
    )
    value[0, 80] = math.inf
    output, lse = dense(target, query, key, value, causal)
    assert output[0, :10].isfinite().all() and (output[0, 10:] == math.inf).all() and lse.isfinite().all()


@on_targets([(target, "bf16", head_dim) for target in GPUS if target != "gfx90a" for head_dim in (8, 128)])
def test_few_products(target, dtype, head_dim):
    """Where one of the two products has few steps, what is done beside them must still be done."""
    query, key = (strided((1, n, 1, head_dim), dtype, "contiguous") for n in (ROWS + 2, 200))
    value = strided((1, 200, 1, 136 - head_dim), dtype, "contiguous")
    dense(target, query, key, value, False)


@on_targets([p for p in CONTIGUOUS if p[0] != "cuda"])
def test_cost(target, dtype, head_dim, causal, paged):
    """What the design promises of the machine code, counted by the emulator."""
    stats = {}
    query, key, value = (strided((1, 256, 1, head_dim), dtype, "contiguous") for _ in "qkv")
    attend(target, query, key, value, causal, stats=stats)
    (kernel,) = stats.values()
    loop = kernel["main_loop"]
    assert kernel["scratch_bytes"] == 0
    if target != "gfx90a" and head_dim <= 128:  # two groups of waves that alternate, unless there are rows for one only
        assert kernel["block"] == 512
        for batch, waves in ((1, 8), (320, 4)):  # fewer blocks than compute units, and more
            query, key, value = (strided((batch, n, 1, head_dim), dtype, "contiguous") for n in (9, 12, 12))
            stats.clear()
            attend(target, query, key, value, causal, stats=stats)
            (few,) = stats.values()
            assert few["block"] == waves * 64 and few["waves_per_simd"] == kernel["waves_per_simd"] == 2
    assert kernel["waves_per_simd"] >= (2 if head_dim <= 128 else 1)
    assert loop["lds_conflicts"] < 0.05
    assert loop["narrowest_load"] >= 8
