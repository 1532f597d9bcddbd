"""Windows, soft caps, ALiBi, sinks, starts, offsets and value head_dims of the GPU kernels, alone and together, on
emulated AMD GPUs and on a CUDA device, against float64 by the rule of tests/accuracy.py.

What nobody may look at is NaN: padding, rows between packed sequences, values and keys outside of every window, pages
that hold no others (whose entries in the page table are -1). Compiling takes longer than running: each kernel of
KERNELS gets many problems.
"""

import itertools
import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accuracy import assert_as_accurate, pytorch_attend_one
from driver import DTYPES, GPUS, attend, gradients, ints, require
from problems import Sequence, assert_sequences

from aiter import dropout, reference

SOURCES = Path(__file__).parents[2] / "kernels_src"
OPTIONS = ("softcap", "alibi", "paged", "chunk", "dropout")


@dataclass(frozen=True)
class Kernel:
    """What a kernel is built for."""

    name: str
    dtype: str
    head_dim: int
    value_dim: int
    mask: str = ""  # "causal" or "window"
    softcap: bool = False
    alibi: bool = False
    paged: bool = False
    chunk: bool = False
    dropout: bool = False

    def __str__(self):
        words = [self.name, self.dtype, str(self.head_dim), str(self.value_dim), self.mask]
        return "-".join([w for w in words if w] + [w for w in OPTIONS if getattr(self, w)])


FORWARD, DECODE, BACKWARD = "attention_forward", "attention_decode", "attention_backward"
KERNELS = {
    "gfx90a": (
        Kernel(FORWARD, "fp16", 64, 64, "window", softcap=True, alibi=True, chunk=True, dropout=True),
        Kernel(FORWARD, "bf16", 512, 512, "causal"),
        Kernel(DECODE, "bf16", 128, 128, "window", paged=True),
        Kernel(BACKWARD, "bf16", 72, 72, "window", softcap=True, alibi=True, dropout=True),
    ),
    "gfx942": (
        Kernel(FORWARD, "bf16", 128, 128, "window", paged=True),
        Kernel(FORWARD, "fp16", 192, 128, "causal", dropout=True),
        Kernel(DECODE, "fp16", 64, 64, "window", softcap=True, alibi=True, chunk=True),
        Kernel(DECODE, "bf16", 576, 512, "causal", paged=True),
        Kernel(BACKWARD, "fp16", 128, 128, "window", chunk=True, dropout=True),
        Kernel(BACKWARD, "bf16", 512, 512, "causal"),
    ),
    "gfx950": (
        Kernel(FORWARD, "bf16", 64, 128, "window", softcap=True, dropout=True),
        Kernel(FORWARD, "fp16", 320, 264, "window"),
        Kernel(DECODE, "bf16", 192, 128, "causal", alibi=True),
        Kernel(BACKWARD, "bf16", 96, 64, "window", softcap=True),
        Kernel(BACKWARD, "fp16", 40, 264, "window", dropout=True),
    ),
}
KERNELS["cuda"] = (
    *itertools.chain(*KERNELS.values()),
    *(Kernel(FORWARD, "bf16", d, v, m, s, a, p) for (d, v), m, s, a, p in (
        ((128, 128), "window", True, True, True),
        ((256, 256), "window", True, False, False),
        ((128, 128), "causal", True, False, False),
        ((64, 64), "", False, True, False),
        ((40, 88), "causal", False, False, True),
        ((512, 512), "causal", False, False, False),
        ((320, 264), "window", True, False, False),
    )),
    *(Kernel(DECODE, "fp16", d, v, m, s, a, p) for (d, v), m, s, a, p in (
        ((128, 128), "causal", True, True, True),
        ((256, 256), "window", False, False, True),
        ((40, 88), "", True, False, False),
        ((512, 512), "causal", False, False, True),
        ((576, 512), "causal", False, False, True),
    )),
    *(Kernel(BACKWARD, "bf16", d, v, m, s, a) for (d, v), m, s, a in (
        ((128, 128), "window", True, True),
        ((256, 256), "causal", True, False),
        ((192, 128), "causal", False, False),
        ((64, 64), "", False, True),
    )),
)  # fmt: skip


def on_kernels(*names, only=lambda kernel: True):
    kernels = ((target, kernel) for target in GPUS for kernel in KERNELS[target])
    cases = [(target, kernel) for target, kernel in kernels if kernel.name in names and only(kernel)]
    return pytest.mark.parametrize("target, kernel", cases, ids=[f"{t}-{k}" for t, k in cases])


def options_of(kernel, window, heads_q, sinks):
    """What `reference.attend_one` takes for every sequence alike, without slopes."""
    options = {"window": window} if kernel.mask == "window" else {"causal": kernel.mask == "causal"}
    if kernel.softcap:
        options["softcap"] = 3.0  # random scores reach it
    if sinks:
        options["sinks"] = torch.randn(heads_q) * 3
    if kernel.chunk:
        options["chunk"] = 37
    return options


def dropout_of(kernel, lengths, heads_q):
    """What the call takes, and what `reference.attend_one` takes for each sequence."""
    if not kernel.dropout:
        return {}, [{}] * len(lengths)
    options = {"dropout_p": 0.3, "rng_state": torch.randint(-(2**63), 2**63 - 1, (2,))}
    masks = (
        dropout.keep_mask(options["rng_state"], 0.3, 1, heads_q, *n, first_sequence=b) for b, n in enumerate(lengths)
    )
    return options, [{"kept": mask[0], "dropout_p": 0.3} for mask in masks]


def rows_in_memory(tensors, layout, most):
    """One tensor for all sequences, NaN where there is none, and where each of them is. Packed: with gaps between them,
    or one behind the other and a rest at the end."""
    shape, dtype = tensors[0].shape[1:], tensors[0].dtype
    if layout == "padded":
        memory = torch.full((len(tensors), most, *shape), math.nan, dtype=dtype)
        places = [(b, slice(len(t))) for b, t in enumerate(tensors)]
    else:
        gaps = [3 * (b % 2) + b for b in range(len(tensors))] if layout == "starts" else [0] * len(tensors)
        begins, end = [], 0
        for tensor, gap in zip(tensors, gaps, strict=True):
            begins.append(end + gap)
            end += gap + len(tensor)
        memory = torch.full((end + 5, *shape), math.nan, dtype=dtype)
        places = [(slice(begin, begin + len(t)),) for begin, t in zip(begins, tensors, strict=True)]
    for tensor, place in zip(tensors, places, strict=True):
        memory[place] = tensor
    return memory, places


def layout_arguments(layout, places_q, places_k, rows, keys, most):
    if layout == "padded":
        return {"seqlens_q": ints(rows), "seqlens_k": ints(keys)}
    if layout == "packed":
        return {"seqlens_q": ints(rows), "seqlens_k": ints(keys), "max_seqlen": most}
    starts = [[place[0].start for place in places] + [places[-1][0].stop] for places in (places_q, places_k)]
    return {
        "starts_q": ints(starts[0]), "starts_k": ints(starts[1]), "seqlens_q": ints(rows), "seqlens_k": ints(keys),
        "max_seqlen": most,
    }  # fmt: skip


def in_pages(tensors, seen, page_size):
    """Keys and values of all sequences in shuffled pages; entries of pages that nobody looks at are -1."""
    longest = max(max(len(key) for key, _ in tensors), 1)
    per_sequence = -(-longest // page_size)
    table = torch.randperm(len(tensors) * per_sequence + 1)[:-1].view(len(tensors), per_sequence).int()
    caches = [
        torch.full((table.numel() + 1, page_size, *t.shape[1:]), math.nan, dtype=t.dtype) for t in tensors[0]
    ]  # (pages, position, heads, dim)
    for b, pair in enumerate(tensors):
        for page in range(per_sequence):
            tokens = slice(page * page_size, (page + 1) * page_size)
            for cache, tensor in zip(caches, pair, strict=True):
                cache[table[b, page].long(), : len(tensor[tokens])] = tensor[tokens]
            if not seen[b][tokens].any():
                table[b, page] = -1
    return caches, table


def check(target, kernel, lengths, heads, layout="padded", window=(-1, -1), sinks=False, offsets=None, **how):
    """lengths: (rows, keys) of each sequence."""
    dtype, (heads_q, heads_kv) = DTYPES[kernel.dtype], heads
    options = options_of(kernel, window, heads_q, sinks)
    slopes = torch.rand(len(lengths), heads_q) if kernel.alibi else None
    drawn, masks = dropout_of(kernel, lengths, heads_q)
    queries, pairs, references, seen = [], [], [], []
    for b, (rows, keys) in enumerate(lengths):
        queries.append(torch.randn(rows, heads_q, kernel.head_dim).to(dtype))
        key, value = (torch.randn(keys, heads_kv, d).to(dtype) for d in (kernel.head_dim, kernel.value_dim))
        own = options | masks[b]
        if slopes is not None:
            own["alibi_slopes"] = slopes[b]
        if offsets is not None:
            own["offset"] = offsets[b]
        visible = reference.visible_keys(
            rows, keys, own.get("causal", False), own.get("window"), own.get("offset"), chunk=own.get("chunk", 0)
        ).any(0)  # fmt: skip
        key[~visible], value[~visible] = math.nan, math.nan
        pairs.append((key, value))
        references.append(own)
        seen.append(visible)
    most = [max(n[side] for n in lengths) for side in (0, 1)]
    rows, keys = zip(*lengths, strict=True)
    query_layout = "padded" if layout == "paged" else layout
    query, places = rows_in_memory(queries, query_layout, most[0])
    if kernel.paged:
        (key, value), table = in_pages(pairs, seen, page_size=how.pop("page_size", 16))
        arguments = {"seqlens_q": ints(rows), "seqlens_k": ints(keys), "page_table": table}
        if layout != "padded":
            arguments["max_seqlen"] = most
        if layout == "starts":
            arguments["starts_q"] = ints([place[0].start for place in places] + [places[-1][0].stop])
    else:
        (key, places_k), (value, _) = (rows_in_memory(t, layout, most[1]) for t in zip(*pairs, strict=True))
        arguments = layout_arguments(layout, places, places_k, rows, keys, most)
    if offsets is not None:
        arguments["query_offsets"] = ints(offsets)
    passed = {name: value for name, value in options.items() if name != "causal"}
    output, lse = attend(
        target, query, key, value, options.get("causal", False), alibi_slopes=slopes, name=kernel.name,
        **arguments, **passed, **drawn, **how,
    )  # fmt: skip
    if layout == "padded":
        lse_places = [(b, slice(None), slice(n)) for b, n in enumerate(rows)]
    else:
        lse_places = [(slice(None), *place) for place in places]
    sequences = []
    for b, own in enumerate(references):
        own = dict(own)
        own.pop("causal", None)
        sequences.append(Sequence(queries[b], *pairs[b], places[b], lse_places[b], own))
    assert_sequences(output, lse, sequences, options.get("causal", False))
    rest, lse_rest = torch.ones(output.shape[:-2], dtype=torch.bool), torch.ones(lse.shape, dtype=torch.bool)
    for place, lse_place in zip(places, lse_places, strict=True):
        rest[place], lse_rest[lse_place] = False, False
    assert not output[rest].any() and (lse[lse_rest] == -math.inf).all()


def chosen(target, kernel, problems):
    """All problems on a GPU; on an emulated one the first two, and one of those that only a window tells apart."""
    if kernel.mask != "window" or target == "cuda":
        return problems if kernel.mask == "window" else problems[:2]
    return *problems[:2], problems[2 + GPUS.index(target) % (len(problems) - 2)]


@on_kernels(FORWARD)
def test_forward(target, kernel):
    lengths, offsets = [(150, 150), (3, 200), (0, 7), (131, 40), (5, 0)], [30, -60, 0, 5, 9]
    if kernel.head_dim > 256:
        lengths = [(40, 70), (3, 100), (0, 7), (65, 40), (5, 0)]
    problems = (
        ("padded", (17, 0), True, None),
        ("starts", (40, 9), True, offsets),
        ("packed", (-1, 3), False, None),
        ("padded", (5, -1), False, offsets),
        ("starts", (0, 0), False, None),
    )
    for layout, window, sinks, offset in chosen(target, kernel, problems):
        check(target, kernel, lengths, (2, 1), layout, window, sinks, offset)


@on_kernels(DECODE)
def test_decode(target, kernel):
    lengths = [(1, 700), (2, 33), (1, 0), (0, 9), (1, 129), (2, 1)]
    problems = (
        ("padded", (100, 0), True, None),
        ("starts", (300, 9), True, [500, 20, 0, 0, 300, -9]),
        ("padded", (-1, 0), False, None),
        ("packed", (5, -1), False, None),
        ("padded", (0, 0), False, None),
    )
    for layout, window, sinks, offsets in chosen(target, kernel, problems):
        check(target, kernel, lengths, (8, 2), layout, window, sinks, offsets)
    check(target, kernel, [(13, 333), (4, 12), (17, 90)], (3, 1), window=(60, 2))  # several row tiles


@on_kernels(FORWARD, DECODE)
def test_batch_invariant(target, kernel):
    """The bits of a sequence do not depend on the rest of the batch, nor on how many of its rows are asked for."""
    if kernel.dropout:
        pytest.skip("which weights are left out depends on the place in the batch")
    forward = kernel.name == FORWARD
    rows, keys = (140, 150) if forward else (3, 2300)
    how = {"window": (61, 0), "sinks": False, "batch_invariant": True}
    results = []
    for batch in ([(rows, keys)], [(rows, keys), (1, 5)], [(2, 900), (1, 1), (rows, keys)]):
        results.append(same(target, kernel, batch, batch.index((rows, keys)), rows, how))
    if kernel.mask:
        last = 1 if not forward else 30
        results.append(same(target, kernel, [(last, keys)], 0, rows, how))
    for output, lse in results[1:]:
        n = len(output)
        assert torch.equal(output, results[0][0][-n:]) and torch.equal(lse, results[0][1][:, -n:])


@on_kernels(DECODE)
def test_batch_invariant_by_blocks_with_several_pieces(target, kernel):
    """More pieces, each with sums of its own, than blocks are at work at one time."""
    how = {"window": (20, 0), "sinks": False, "batch_invariant": True}
    many = [(1, 1 + i * 7 % 40) for i in range(620)]  # gfx942: 2 * 304 blocks
    for index in (0, 300, 615):  # the last in a second round
        many[index] = (3, 30)
    alone = same(target, kernel, [(3, 30)], 0, 3, how)
    for index in (300, 615):
        for own, expected in zip(same(target, kernel, many, index, 3, how), alone, strict=True):
            assert torch.equal(own, expected)


def same(target, kernel, lengths, index, rows, how):
    """The result of sequence `index`, whose values are the same whatever the others are: of its last rows."""
    dtype, heads_q, heads_kv = DTYPES[kernel.dtype], 4, 1
    generator = torch.Generator("cpu").manual_seed(4)

    def values(*shape):
        made = torch.randn(*shape, generator=generator, device="cpu")
        return made.to(torch.get_default_device(), dtype)

    asked, keys = lengths[index]
    query = values(rows, heads_q, kernel.head_dim)[rows - asked :]
    key, value = (values(keys, heads_kv, dim) for dim in (kernel.head_dim, kernel.value_dim))
    options = options_of(kernel, how["window"], heads_q, False)
    slopes = torch.tensor([0.3, 0.01, 0.1, 0.03]) if kernel.alibi else None
    most = [max(n[side] for n in lengths) for side in (0, 1)]
    tensors = [torch.zeros(len(lengths), n, *t.shape[1:], dtype=dtype) for n, t in zip(
        (most[0], most[1], most[1]), (query, key, value), strict=True)]  # fmt: skip
    for tensor, own in zip(tensors, (query, key, value), strict=True):
        tensor[index, : len(own)] = own
    arguments = {"seqlens_q": ints([n[0] for n in lengths]), "seqlens_k": ints([n[1] for n in lengths])}
    if kernel.paged:
        page_size = 32
        tensors[1:] = [
            torch.nn.functional.pad(t, (0, 0, 0, 0, 0, -most[1] % page_size)).flatten(0, 1).unflatten(0, (-1, 32))
            for t in tensors[1:]
        ]
        arguments["page_table"] = torch.arange(len(tensors[1])).view(len(lengths), -1).int()
    output, lse = attend(
        target, *tensors, options.pop("causal", False), alibi_slopes=slopes, name=kernel.name, batch_invariant=True,
        **arguments, **options,
    )  # fmt: skip
    return output[index, :asked], lse[index, :, :asked]


@on_kernels(FORWARD, DECODE, BACKWARD)
def test_values_out_of_range(target, kernel):
    """Starts, offsets and window edges that are anything: no access leaves the tensors (or the emulator says so)."""
    if kernel.mask != "window" or kernel.softcap:
        return pytest.skip("the plain kernels with a window stand for all")
    dtype, far = DTYPES[kernel.dtype], 2**31 - 1
    query, grad = (torch.randn(20, 2, dim).to(dtype) for dim in (kernel.head_dim, kernel.value_dim))
    key, value = (torch.randn(2, 16, 1, dim).to(dtype) for dim in (kernel.head_dim, kernel.value_dim))
    options = {"page_table": ints([[-far, far]] * 3)}
    if not kernel.paged:
        key, value, options = key.flatten(0, 1), value.flatten(0, 1), {"starts_k": ints([far, -far, 9, 4])}
    for starts, offsets, window in (
        ([-far, 7, far, 3], [far, -far - 1, 0], (far, far)),
        ([0, 15, 4, 20], [-far, 5, far], (far, 0)),  # the last overlaps the first
        ([-far, 7, far, 3], [0, 9, 3], (0, far)),
        ([far, -far, 7, far], [far, 40, far], (3, 0)),  # all rows past the last key
    ):
        options |= {"starts_q": ints(starts), "max_seqlen": (20, 32), "query_offsets": ints(offsets), "window": window}
        options |= {"batch_invariant": kernel.name == DECODE, **dropout_of(kernel, [], 2)[0]}
        options |= {"chunk": 37} if kernel.chunk else {}
        if kernel.name == BACKWARD:
            gradients(target, query, key, value, grad, torch.zeros(2, 20), grad, **options)
        else:
            attend(target, query, key, value, name=kernel.name, **options)


@pytest.mark.parametrize("target, name", [("gfx942", FORWARD), ("gfx942", BACKWARD), ("gfx90a", DECODE)])
def test_cost_follows_the_window(target, name):
    """Twice the tokens, twice the products of matrices; a decoding call reads as much as before."""
    require(target)
    kernel = next(k for k in KERNELS[target] if k.name == name and k.mask == "window" and k.head_dim == 128)
    costs = []
    for tokens in (512, 1024):
        query = torch.randn(1, 1 if name == DECODE else tokens, 1, 128).to(DTYPES[kernel.dtype])
        key, value = (torch.randn(1, tokens, 1, 128).to(query.dtype) for _ in "kv")
        stats = {}
        options = {"window": (100, 0), "stats": stats, **dropout_of(kernel, [], 1)[0]}
        options |= {"chunk": 37} if kernel.chunk else {}
        if kernel.paged:
            options["page_table"] = ints([list(range(tokens // 32))])
            key, value = (t.view(-1, 32, 1, 128) for t in (key, value))
        if name == BACKWARD:
            gradients(target, query, key, value, query, torch.zeros(1, 1, tokens), query, **options)
        else:
            attend(target, query, key, value, name=name, **options)
        total = [s["total"] for kernel_name, s in stats.items() if name in kernel_name]
        costs.append(sum(t["bytes"] if name == DECODE else t["cycles"]["matrix"] for t in total))
    assert costs[1] <= costs[0] * (1.0 if name == DECODE else 2.2)


@on_kernels(BACKWARD)
def test_backward(target, kernel):
    lengths, offsets = [(150, 150), (3, 70), (0, 7), (61, 40), (5, 0)], [30, 60, 0, -5, 9]
    if max(kernel.head_dim, kernel.value_dim) > 256:
        lengths = [(70, 40), (3, 40), (0, 7), (33, 20), (5, 0)]
    problems = (
        ("padded", (17, 0), False, None),
        ("starts", (40, 9), True, offsets),
        ("packed", (-1, 3), False, None),
        ("padded", (5, -1), False, offsets),
    )
    for layout, window, sinks, offset in chosen(target, kernel, problems):
        check_gradients(target, kernel, lengths, (2, 1), layout, window, sinks, offset)
        if target == "cuda":  # sm_90a's single pass, which the longest lengths decide on
            longer = [(300, 420), *lengths[1:]]
            check_gradients(target, kernel, longer, (4, 1), layout, window, sinks, offset, longest=(1024, 1024))


def check_gradients(target, kernel, lengths, heads, layout, window, sinks, offsets, longest=None):
    dtype, (heads_q, heads_kv) = DTYPES[kernel.dtype], heads
    options = options_of(kernel, window, heads_q, sinks)
    slopes = torch.rand(len(lengths), heads_q) if kernel.alibi else None
    drawn, masks = dropout_of(kernel, lengths, heads_q)
    inputs, expected, pytorch = [], [], []
    for b, (rows, keys) in enumerate(lengths):
        own = options | masks[b]
        own |= {"alibi_slopes": slopes[b]} if slopes is not None else {}
        own |= {"offset": offsets[b]} if offsets is not None else {}
        shapes = [(rows, heads_q, kernel.head_dim)]
        shapes += [(keys, heads_kv, dim) for dim in (kernel.head_dim, kernel.value_dim)]
        tensors = [torch.randn(shape).to(dtype) for shape in shapes]
        grad = torch.randn(rows, heads_q, kernel.value_dim).to(dtype)
        leaves = [t.double().requires_grad_() for t in tensors]
        output, lse = reference.attend_one(*leaves, **own)
        places = own.get("causal", False), own.get("window"), own.get("offset")
        seen = reference.visible_keys(rows, keys, *places, chunk=own.get("chunk", 0))
        rows_that_see = seen.any(1).nonzero().flatten()
        if sinks:
            lse = torch.logaddexp(lse, own["sinks"].double().unsqueeze(1))
        inputs.append((*tensors, output.detach().to(dtype), grad, lse.detach().float()))
        if len(rows_that_see) == 0:
            expected.append([torch.zeros_like(t) for t in tensors])
            pytorch.append(expected[-1])
            continue
        expected.append(torch.autograd.grad((output * grad).sum(), leaves))
        # PyTorch has no answer for rows that see nothing: those that see are neighbours.
        first, last = int(rows_that_see[0]), int(rows_that_see[-1]) + 1
        own["offset"] = first + own.get("offset", keys - rows)
        if "kept" in own:
            own["kept"] = own["kept"][:, first:last]
        leaves = [t.clone().requires_grad_() for t in tensors]
        partial = pytorch_attend_one(leaves[0][first:last], *leaves[1:], **own)
        pytorch.append(torch.autograd.grad((partial * grad[first:last]).sum(), leaves))
    most = longest or [max(n[side] for n in lengths) for side in (0, 1)]
    query, key, value, output, grad = zip(*(i[:5] for i in inputs), strict=True)
    (query, places), (output, _), (grad, _) = (rows_in_memory(t, layout, most[0]) for t in (query, output, grad))
    (key, places_k), (value, _) = (rows_in_memory(t, layout, most[1]) for t in (key, value))
    lse, _ = rows_in_memory([i[5].T for i in inputs], layout, most[0])
    lse = (lse.transpose(1, 2) if layout == "padded" else lse.T).contiguous()
    arguments = layout_arguments(layout, places, places_k, *zip(*lengths, strict=True), most)
    if offsets is not None:
        arguments["query_offsets"] = ints(offsets)
    passed = {name: value for name, value in options.items() if name not in ("causal", "sinks")}
    results = gradients(
        target, query, key, value, output, lse, grad, None, options.get("causal", False), alibi_slopes=slopes,
        lse_is_given=sinks, **arguments, **passed, **drawn,
    )  # fmt: skip
    for i, (result, own_places) in enumerate(zip(results, (places, places_k, places_k), strict=True)):
        got = torch.cat([result[place].flatten() for place in own_places])
        exact, theirs = (torch.cat([grads[i].flatten() for grads in all_]) for all_ in (expected, pytorch))
        assert_as_accurate(got, exact, theirs)
        rest = torch.ones(result.shape[:-2], dtype=torch.bool)
        for place in own_places:
            rest[place] = False
        assert not result[rest].any()


@on_kernels(FORWARD, DECODE, only=lambda kernel: kernel.softcap and not kernel.dropout and not kernel.paged)
def test_soft_caps(target, kernel):
    """Scores from none to far beyond the cap, products that overflow, and a NaN."""
    require(target)
    dtype = DTYPES[kernel.dtype]
    of_cap = torch.tensor([0.0, 1e-30, 1e-6, 1e-3, 0.03, 0.1, 0.2, 0.35, 0.5, 0.8, 1.0, 1.5, 2.0, 3.0, 5.0, 9.0, 1e3])
    rows = torch.tensor([1.0, -1.0, 0.1, 1e-5, torch.finfo(dtype).max])
    options = {"window": (-1, -1)} if kernel.mask == "window" else {"causal": kernel.mask == "causal"}
    options |= {"alibi_slopes": torch.zeros(1)} if kernel.alibi else {}
    for cap in (3.0, 30.0, 50.0, 51.0, 1000.0):  # up to 50 sm_90a has another way, in bf16
        scores = torch.cat((of_cap, -of_cap))[torch.randperm(2 * len(of_cap))] * cap
        query, key = torch.zeros(len(rows), 1, kernel.head_dim), torch.zeros(len(scores), 1, kernel.head_dim)
        query[:, 0, 0], key[:, 0, 0] = rows, scores.clamp(-6e4, 6e4)
        value = torch.randn(len(scores), 1, kernel.value_dim).to(dtype)
        query, key, options["softcap"] = query.to(dtype), key.to(dtype), cap
        call = options | {"scale": 1.0, "name": kernel.name} | ({"chunk": 1000} if kernel.chunk else {})
        output, lse = attend(target, query[None], key[None], value[None], **call)
        exact, exact_lse = reference.attend_one(query, key, value, softmax_scale=1.0, **options)
        pytorch = pytorch_attend_one(query, key, value, softmax_scale=1.0, **options)
        for row in range(len(rows)):  # what one errs by must not hide behind another
            assert_as_accurate(output[0, row], exact[row], pytorch[row])
        torch.testing.assert_close(lse[0].double(), exact_lse, atol=2e-4, rtol=1e-5)
        key[3, 0, 0] = math.nan
        assert attend(target, query[None], key[None], value[None], **call)[0].isnan().all()


def numbers_of(text, name):
    found = re.search(name + r"\[[^]]*\] = \{([^}]*)\}", text)[1]
    return [float(number.strip().rstrip("f")) for number in found.split(",")]


def test_polynomials_of_caps():
    """Those in kernels_src/gpu/score.h as float32 computes them, and what they bound."""
    text = (SOURCES / "gpu/score.h").read_text()
    most = float(re.search(r"MOST = ([0-9.]+)f", text)[1])
    assert most / math.log(2) < 73
    u = torch.linspace(0, 1, 100_001)  # e^-2x
    total = torch.zeros_like(u)
    for c in reversed(numbers_of(text, r"float C(?=\[DEGREE)")):
        total = (total.double() * u + c).float()
    assert float((total - (1 - u.double()) / (1 + u.double())).abs().max()) * most < 1.5e-4  # of a score
    assert float(total[0]) == 1 and abs(float(total[-1])) < 3e-7 and float(total.max()) == 1

    near = float(re.search(r"NEAR = ([0-9.]+)f", text)[1])
    x = torch.linspace(-near, near, 100_001)
    total = torch.zeros_like(x)
    for c in reversed(numbers_of(text, "NEAR_TANH")):
        total = (total.double() * x.square() + c).float()
    assert float((total * x - x.double().tanh()).abs().max()) * most < 1.5e-4


@pytest.mark.parametrize("target", GPUS)
def test_a_scale_of_zero(target):
    """Uniform weights, however large the products: they overflow here. Its gradients: none of queries and keys."""
    require(target)
    query, key = (torch.full((1, n, 1, 64), 6e18, dtype=torch.bfloat16) for n in (5, 40))
    value, grad = torch.randn(1, 40, 1, 64).bfloat16(), torch.randn(1, 5, 1, 64).bfloat16()
    uniform = value.float().mean(1, keepdim=True).expand(1, 5, 1, 64)
    for name in (FORWARD, DECODE):
        for scale in (0.0, 1e-45, -0.0):
            output, lse = attend(target, query, key, value, scale=scale, name=name)
            torch.testing.assert_close(output.float(), uniform, atol=4e-3, rtol=0)
            torch.testing.assert_close(lse, torch.full_like(lse, math.log(40)))
    grads = gradients(target, query, key, value, output, lse, grad, scale=0.0)
    assert not grads[0].any() and not grads[1].any()
    torch.testing.assert_close(grads[2].float(), (grad.float().sum(1, keepdim=True) / 40).expand(1, 40, 1, 64),
                               atol=4e-3, rtol=0)  # fmt: skip


@pytest.mark.parametrize("target", GPUS)
def test_many_small_weights_beside_a_large_one(target):
    """fp16 holds nothing below 2^-25, and gfx90a's matrix unit takes subnormal numbers for 0. One key of 1024 has 17000
    times the weight of each other, as the first of a prompt often has: together these still count."""
    require(target)
    query, key, value = torch.zeros(1, 4, 1, 64), torch.zeros(1, 1024, 1, 64), torch.ones(1, 1024, 1, 64)
    query[..., 0], key[:, 0, 0, 0], value[:, 0] = 8, 9.75, 0
    others = (1020 + torch.arange(4)).view(1, 4, 1, 1) * math.exp(-9.75)  # causal: the last row sees all
    for name in (FORWARD, DECODE):
        output, lse = attend(target, *(t.half() for t in (query, key, value)), True, 0.125, name=name)
        expected = (others / (1 + others)).expand(output.shape)
        torch.testing.assert_close(output.float(), expected, rtol=2e-3, atol=0)
        torch.testing.assert_close(lse, 9.75 + others.log1p().view(1, 1, 4), rtol=1e-5, atol=0)
    grad = torch.full((1, 4, 1, 64), 4.0).half()
    *_, of_values = gradients(target, *(t.half() for t in (query, key, value)), output, lse, grad, None, True, 0.125)
    expected = float((4 * math.exp(-9.75) / (1 + others)).sum())
    torch.testing.assert_close(of_values[:, 1:1021].float(), torch.full((1, 1020, 1, 64), expected), rtol=4e-3, atol=0)


@pytest.mark.parametrize("target", GPUS)
def test_numbers_that_are_none(target):
    """A NaN of the caller's, whatever its bits, is one in the output; and where all scores are -inf, a sink has all of
    the weight."""
    require(target)
    query, key, value = (torch.randn(1, 3, 2, 64).bfloat16() for _ in "qkv")
    all_bits = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for name in (FORWARD, DECODE):
        output, _ = attend(target, query, key, value, name=name, sinks=all_bits)
        assert output.isnan().all(), name
        nothing = torch.full_like(key, -math.inf)
        output, lse = attend(target, query.abs(), nothing, value, name=name, sinks=torch.tensor([0.5, math.inf]))
        assert not output.any() and (lse == -math.inf).all(), name
