"""Random calls of a kernel through the launch ABI: lengths around tiles, every layout and option, strides. Whatever no
query sees is NaN or inf, and pages that hold nothing else have no valid number."""

import math
from dataclasses import dataclass, field

import torch
from driver import DTYPES, ints, randn
from hypothesis import strategies as st
from problems import STRIDES, Sequence, page_lists, strided

from aiter import dropout, reference

SEEDS = st.integers(0, 2**32)
# Around the sizes at which vectors, tiles, strips and blocks of keys are full.
LENGTHS = (1, 2, 5, 15, 16, 17, 31, 33, 48, 49, 63, 64, 65, 100, 127, 129, 200, 391, 420)
LAYOUTS = ("dense", "packed", "paged", "packed over pages")


@dataclass
class Call:
    """Arguments of `driver.attend` and `driver.gradients`, and the sequences that they stand for; `keys` is where each
    sequence's rows of key and value are."""

    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    options: dict
    layout: str
    sequences: list[Sequence] = field(default_factory=list)
    keys: list[tuple] = field(default_factory=list)


def draw_call(
    data,
    dtype,
    dims,
    switched_on,
    layouts=LAYOUTS,
    fewest_keys=1,
    sinks=True,
    lengths_q=LENGTHS,
    lengths_k=LENGTHS,
    fp8=None,
    strides=STRIDES[:3],
) -> Call:
    """`dims` are the head_dims of keys and values; `switched_on` are the options that the kernel is compiled for. A
    sequence has no keys, or at least `fewest_keys`: one that sees a single key has gradients that are all rounding.
    fp8: the dtype that keys and values are kept in, with descales."""
    draw, pick = data.draw, lambda *values: data.draw(st.sampled_from(values))
    torch.manual_seed(draw(SEEDS))
    heads_kv, group = pick(1, 2), pick(1, 2, 3, 5)
    heads = heads_kv * group
    seq_q, seq_k = pick(*lengths_q), pick(*(n for n in lengths_k if n >= fewest_keys))
    batch = max(2, 64 // seq_q)  # the largest error of a handful of values says little about either operator
    lengths = [
        [n if full else draw(st.one_of(st.just(0), st.integers(least, n))) for _ in range(batch)]
        for n, least, full in ((seq_q, 1, draw(st.booleans())), (seq_k, fewest_keys, draw(st.booleans())))
    ]

    options, each = {"batch_invariant": "batch_invariant" in switched_on}, [{} for _ in range(batch)]
    if "window" in switched_on:
        options["window"] = pick(-1, 3, 7, 40, 130), pick(-1, 0, 3, 33, 100)
    if "softcap" in switched_on:
        options["softcap"] = pick(1.0, 5.0, 30.0, 50.0)
    if "chunk" in switched_on:
        options["chunk"] = pick(*(n for n in (1, 7, 16, 40, 128, 300) if n >= fewest_keys))
    if "dropout" in switched_on:
        options["dropout_p"] = pick(0.17, 0.5, 0.9)
        options["rng_state"] = torch.randint(-(2**63), 2**63 - 1, (2,))
        drawn = options["rng_state"], options["dropout_p"]
        kept = dropout.keep_mask(*drawn, batch, heads, seq_q, seq_k)
        for own, rows, keys, mask in zip(each, *lengths, kept, strict=True):
            own |= {"kept": mask[:, :rows, :keys], "dropout_p": options["dropout_p"]}
    if "alibi" in switched_on:
        options["alibi_slopes"] = torch.rand(pick((heads,), (batch, heads))) / 2
    if sinks and draw(st.booleans()):
        options["sinks"] = 2 * torch.randn(heads)
    if draw(st.booleans()):
        options["query_offsets"] = ints([draw(st.integers(-seq_q // 2, seq_k)) for _ in range(batch)])
    for b, own in enumerate(each):
        own |= {name: options[name] for name in ("window", "chunk", "softcap", "sinks") if name in options}
        if "alibi_slopes" in options:
            own["alibi_slopes"] = options["alibi_slopes"].expand(batch, heads)[b]
        if "query_offsets" in options:
            own["offset"] = int(options["query_offsets"][b])

    query, key, value = (
        [randn(n, h, dim, dtype=dtype) for n in lengths[side]]
        for side, h, dim in ((0, heads, dims[0]), (1, heads_kv, dims[0]), (1, heads_kv, dims[1]))
    )
    unseen = [
        ~reference.visible_keys(
            *n, "causal" in switched_on, options.get("window"), own.get("offset"), chunk=options.get("chunk", 0)
        ).any(0)
        for n, own in zip(zip(*lengths, strict=True), each, strict=True)
    ]
    for k, v, rows in zip(key, value, unseen, strict=True):
        k[rows], v[rows] = math.nan, math.inf
    exact = key, value  # what the references see
    if fp8 is not None:
        key, value = ([part.to(fp8) for part in parts] for parts in (key, value))
        exact = [list(parts) for parts in (key, value)]
        for name, parts in (("key_descale", exact[0]), ("value_descale", exact[1])):
            shape = pick(None, (1,), (heads_kv,), (batch, heads_kv))
            if shape is not None:  # of so few bits that products are numbers of `dtype` too
                options[name] = torch.tensor((0.375, 0.5, 1.5, 3.0))[torch.randint(4, shape)]
            for b, part in enumerate(parts):
                descale = options[name].expand(batch, heads_kv)[b].view(-1, 1) if shape else 1.0
                parts[b] = (part.float() * descale).to(DTYPES[dtype])

    layout = pick(*layouts)
    packed_q, paged = layout.startswith("packed"), "page" in layout
    tensors, places = [], []
    for side, most, parts in ((0, seq_q, query), (1, seq_k, key), (1, seq_k, value)):
        how, shape = pick(*strides), parts[0].shape[1:]
        if side == 1 and paged:
            tensors.append(parts)
            continue
        if layout == "dense" or (side == 0 and not packed_q):
            tensor = strided((batch, most, *shape), parts[0].dtype, how, torch.get_default_device())
            rows = [(b, slice(0, n)) for b, n in enumerate(lengths[side])]
        else:
            gaps = [3 * (b % 2) for b in range(batch + 1)] if options["batch_invariant"] else [0] * batch + [2]
            ends = [sum(lengths[side][:b]) + sum(gaps[: b + 1]) for b in range(batch + 1)]
            tensor = strided((ends[-1], *shape), parts[0].dtype, how, torch.get_default_device())
            rows = [(slice(start, start + n),) for start, n in zip(ends, lengths[side], strict=False)]
            options["max_seqlen"] = (seq_q, seq_k)
            if any(gaps[:-1]):
                options[("starts_q", "starts_k")[side]] = ints(ends)
        tensor.fill_(math.nan)
        for place, part in zip(rows, parts, strict=True):
            tensor[place] = part
        tensors.append(tensor)
        places.append(rows)
    options |= {"seqlens_q": ints(lengths[0]), "seqlens_k": ints(lengths[1])}
    if paged:
        page_size = pick(1, 7, 16, 64)
        tensors[1:] = paginate(options, seq_k, page_size, tensors[1], tensors[2], unseen)
        if draw(st.booleans()):
            names = "page_indptr", "page_table", "last_page_len"
            options |= zip(names, page_lists(options["page_table"], lengths[1], page_size, spare=3), strict=True)
            if draw(st.booleans()):
                del options["seqlens_k"]
    call = Call(tuple(tensors), options, layout, keys=[] if paged else places[1])
    for b, own in enumerate(each):
        rows = places[0][b]
        lse_rows = (slice(None), *rows) if packed_q else (b, slice(None), rows[1])
        call.sequences.append(Sequence(query[b], exact[0][b], exact[1][b], rows, lse_rows, own))
    return call


def paginate(options, seq_k, page_size, key, value, unseen):
    """Key and value in shuffled pages."""
    batch, pages = len(key), -(-seq_k // page_size)
    table = torch.randperm(batch * pages + 2)[: batch * pages].view(batch, pages).to(torch.int32)
    caches = [
        torch.full((batch * pages + 2, page_size, *parts[0].shape[1:]), math.nan).to(parts[0].dtype)
        for parts in (key, value)
    ]
    for b in range(batch):
        for cache, tokens in zip(caches, (key[b], value[b]), strict=True):
            for i in range(0, len(tokens), page_size):
                part = tokens[i : i + page_size]
                cache[table[b, i // page_size], : len(part)] = part
        for i in range(pages):
            if unseen[b][i * page_size : (i + 1) * page_size].all():
                table[b, i] = (-1, 2**31 - 1)[i % 2]
    options["page_table"] = table
    return caches


def assert_rest_is_clear(call, output, lse):
    """Rows of the output that belong to no sequence are zeros, their log-sum-exp -inf."""
    rest = torch.ones(output.shape[:-2], dtype=torch.bool)
    for sequence in call.sequences:
        rest[sequence.rows] = False
    assert not output[rest].any() and lse.transpose(-2, -1)[rest].eq(-math.inf).all()
