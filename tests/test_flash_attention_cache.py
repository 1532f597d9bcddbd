"""aiter.flash_attn.flash_attn_with_kvcache and flash_attn_combine, against what they mean, written down in PyTorch."""

import inspect
import itertools

import pytest
import torch
from accuracy import assert_as_accurate, pytorch_attend_one
from problems import DEVICE, DTYPES, randn

import aiter
from aiter import flash_attn, reference
from aiter.flash_attn import flash_attn_combine, flash_attn_with_kvcache

HEADS_Q, HEADS_KV, DIM = 4, 2, 64


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def rotated(x, cos, sin, interleaved):
    """x (seq, heads, dim) by the angles of its rows, (seq, pairs), in float32."""
    pairs, result = cos.shape[1], x.float().clone()
    low, high = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (
        slice(0, pairs), slice(pairs, 2 * pairs))  # fmt: skip
    a, b, c, s = result[..., low].clone(), result[..., high].clone(), cos.float()[:, None], sin.float()[:, None]
    result[..., low], result[..., high] = a * c - b * s, b * c + a * s
    return result.to(x.dtype)


class Case:
    """A cache of either kind, and what is appended to it; `rows(cache, b)` is where sequence b lies, in order."""

    def __init__(self, dtype, kind, seq_q=3, seq_new=2, dim=DIM, lengths=(5, 0, 9)):
        batch = len(lengths)
        self.lengths, self.dtype = lengths, dtype
        self.query = randn(batch, seq_q, HEADS_Q, dim, dtype=dtype)
        self.new = [randn(batch, seq_new, HEADS_KV, dim, dtype=dtype) for _ in "kv"] if seq_new else [None, None]
        self.keywords = {"cache_seqlens": ints(*lengths)}
        if "pages" in kind:
            table = torch.randperm(13)[:12].view(3, 4)
            self.caches = [randn(13, 4, HEADS_KV, dim, dtype=dtype) for _ in "kv"]
            rows = torch.full((6, 4), -1, dtype=torch.int32)
            rows[[5, 0, 3]] = table.int()
            if kind == "pages":
                self.keywords["block_table"] = table.int().to(DEVICE)
            else:
                self.keywords |= {"block_table": rows.to(DEVICE), "cache_batch_idx": ints(5, 0, 3)}
            self.rows = lambda cache, b: cache[table[b]].flatten(0, 1)
        else:
            layout = (5, HEADS_KV, 16, dim)  # as (batch, seq, heads, dim) by a view
            self.caches = [randn(*layout, dtype=dtype).transpose(1, 2) for _ in "kv"]
            index = [0, 1, 2]
            if kind == "indexed rows":
                index = [3, 0, 4]
                self.keywords["cache_batch_idx"] = ints(*index)
            self.rows = lambda cache, b: cache[index[b]]

    def expected(self, padding=(0, 0, 0), rotary=None, moves=True):
        """For each sequence its query, and the keys and values that it must see."""
        sequences = []
        for b, length in enumerate(self.lengths):
            query, new = self.query[b], [tensor if tensor is None else tensor[b] for tensor in self.new]
            if rotary:
                cos, sin, interleaved = rotary
                places = length + torch.arange(len(new[0]))
                new[0] = rotated(new[0], cos[places], sin[places], interleaved)
                places = length + torch.arange(len(query)) * moves
                query = rotated(query, cos[places], sin[places], interleaved)
            end = length + (0 if new[0] is None else len(new[0]))
            tensors = []
            for own, tokens in zip(self.caches, new, strict=True):
                rows = self.rows(own, b).clone()
                if tokens is not None:
                    rows[length:end] = tokens
                tensors.append(rows[padding[b] : end])
            sequences.append((query, *tensors))
        return sequences

    def call(self, causal=False, **more):
        caches = [cache.clone(memory_format=torch.preserve_format) for cache in self.caches]
        keywords = {"causal": causal, "return_softmax_lse": True, **self.keywords, **more}
        output, lse = flash_attn_with_kvcache(self.query, *caches, *self.new, **keywords)
        return output, lse, caches

    def check(self, causal=False, padding=None, rotary=None, window=None, **more):
        if padding is not None:
            more["cache_leftpad"] = ints(*padding)
        if window is not None:
            more["window_size"] = window
        if rotary is not None:
            more |= {"rotary_cos": rotary[0], "rotary_sin": rotary[1], "rotary_interleaved": rotary[2]}
        output, lse, caches = self.call(causal, **more)
        exact, pytorch = [], []
        for b, (query, key, value) in enumerate(
            self.expected(padding or (0, 0, 0), rotary, causal or window is not None)
        ):
            mask = {} if window is None else {"window": tuple(int(side) for side in window)}
            reference_output, reference_lse = reference.attend_one(query, key, value, causal, **mask)
            exact.append(reference_output)
            pytorch.append(pytorch_attend_one(query, key, value, causal, **mask).nan_to_num())
            torch.testing.assert_close(lse[b].double(), reference_lse, rtol=1e-3, atol=1e-3)
            end = self.lengths[b] + (0 if self.new[0] is None else self.new[0].shape[1])
            for cache, before, rows in zip(caches, self.caches, (key, value), strict=True):
                now = self.rows(cache, b)
                first = 0 if padding is None else padding[b]
                tolerance = 0 if rotary is None else torch.finfo(self.dtype).eps
                torch.testing.assert_close(now[first:end], rows, rtol=tolerance, atol=4e-7 if rotary else 0)
                assert torch.equal(now[end:], self.rows(before, b)[end:])
        assert_as_accurate(output, torch.stack(exact), torch.stack(pytorch))


KINDS = ("rows", "indexed rows", "pages", "indexed pages")


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_appends_and_attends(kind, causal):
    for dtype, (seq_q, seq_new) in itertools.product(DTYPES[:2], ((3, 2), (1, 1), (4, 4), (2, 0))):
        lengths = (5, 0, 9) if seq_new else (5, 1, 9)
        Case(dtype, kind, seq_q, seq_new, lengths=lengths).check(causal)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("kind", KINDS)
def test_rotates(kind, causal):
    """Keys by their places; queries too where there is a mask, else all by the first place."""
    for (rotary_dim, interleaved), dtype in itertools.product(((64, True), (32, False), (16, True)), DTYPES[:2]):
        angles = torch.rand(16, rotary_dim // 2) * 6.3
        cos, sin = (t.to(dtype).to(DEVICE) for t in (angles.cos(), angles.sin()))
        Case(dtype, kind).check(causal, rotary=(cos, sin, interleaved))


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_left(kind):
    for causal in (False, True):
        Case(DTYPES[0], kind).check(causal, padding=(2, 0, 9))
    Case(DTYPES[0], kind, seq_new=0, lengths=(5, 3, 9)).check(True, padding=(4, 3, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_windows(kind):
    """Which rotate queries by their own places, causal or not; a tensor will do, as FlashAttention's tests give it."""
    angles = torch.rand(16, 16) * 6.3
    cos, sin = (t.to(DTYPES[0]).to(DEVICE) for t in (angles.cos(), angles.sin()))
    Case(DTYPES[0], kind).check(rotary=(cos, sin, False), window=(3, 1))
    Case(DTYPES[0], kind).check(True, window=(2, 0))
    Case(DTYPES[0], kind).check(window=torch.tensor([4, 0]))
    Case(DTYPES[0], kind).check(padding=(2, 0, 9), window=(3, 0))


def test_head_dims_that_are_padded():
    Case(DTYPES[0], "pages", dim=59).check(True)


def test_packed_queries_and_new_tokens():
    """FlashAttention 3's cu_seqlens_q, cu_seqlens_k_new and max_seqlen_q: the same bits as one sequence at a time."""
    case = Case(DTYPES[0], "pages", lengths=(3, 7, 1))
    counts_q, counts_new = (2, 0, 3), (4, 1, 0)
    query = randn(5, HEADS_Q, DIM, dtype=case.dtype)
    key, value = (randn(5, HEADS_KV, DIM, dtype=case.dtype) for _ in "kv")
    angles = torch.rand(16, 16) * 6.3
    cos, sin = (t.to(case.dtype).to(DEVICE) for t in (angles.cos(), angles.sin()))
    rotary = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": False}
    caches = [cache.clone() for cache in case.caches]
    packed, lse = flash_attn_with_kvcache(
        *(query, *caches, key, value),
        **{"cu_seqlens_q": ints(0, 2, 2, 5), "cu_seqlens_k_new": ints(0, 4, 5, 5), "max_seqlen_q": 3, "causal": True},
        **{"cache_seqlens": ints(3, 7, 1), "page_table": case.keywords["block_table"], "return_softmax_lse": True},
        **rotary,
    )
    for b, rows_q, rows_new in ((0, slice(0, 2), slice(0, 4)), (2, slice(2, 5), slice(5, 5))):
        assert (counts_q[b], counts_new[b]) == (rows_q.stop - rows_q.start, rows_new.stop - rows_new.start)
        alone = [cache.clone() for cache in case.caches]
        output, own = flash_attn_with_kvcache(
            *(query[None, rows_q], *alone, key[None, rows_new], value[None, rows_new]),
            **{"cache_seqlens": case.lengths[b], "block_table": case.keywords["block_table"][b : b + 1]},
            **{"causal": True, "return_softmax_lse": True, **rotary},
        )
        torch.testing.assert_close(packed[rows_q], output[0], rtol=2e-2, atol=1e-5)
        torch.testing.assert_close(lse[:, rows_q], own[0], rtol=1e-4, atol=1e-4)
        for both, one in zip(caches, alone, strict=True):
            assert torch.equal(case.rows(both, b), case.rows(one, b))


def test_lengths_as_an_int_and_full_caches():
    case = Case(DTYPES[0], "rows", seq_new=0, lengths=(6, 6, 6))
    expected, *_ = case.call()
    assert torch.equal(case.call(cache_seqlens=6)[0], expected)
    whole = flash_attn_with_kvcache(case.query, *case.caches)
    assert torch.equal(whole, flash_attn_with_kvcache(case.query, *case.caches, cache_seqlens=16))


def test_output_where_it_is_told():
    case = Case(DTYPES[0], "pages")
    expected, _, _ = case.call()
    out = torch.empty_like(expected)
    assert case.call(out=out)[0] is out and torch.equal(out, expected)


def test_compiled():
    """In one graph; the caches are changed in place."""
    case = Case(DTYPES[0], "pages")
    caches, again = ([cache.clone() for cache in case.caches] for _ in "12")

    def step(query, key_cache, value_cache, key, value, lengths, table):
        return flash_attn_with_kvcache(
            query, key_cache, value_cache, key, value, cache_seqlens=lengths, block_table=table, causal=True
        )

    torch._dynamo.reset()
    rest = *case.new, case.keywords["cache_seqlens"], case.keywords["block_table"]
    with torch.no_grad():
        expected = step(case.query, *caches, *rest)
        output = torch.compile(step, fullgraph=True, backend="aot_eager")(case.query, *again, *rest)
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(caches, again, strict=True))
    assert not torch.equal(again[0], case.caches[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
def test_in_a_graph_with_other_lengths():
    case = Case(torch.bfloat16, "pages")
    caches = [cache.clone() for cache in case.caches]
    lengths, table = case.keywords["cache_seqlens"], case.keywords["block_table"]
    keywords = {"cache_seqlens": lengths, "block_table": table, "causal": True}

    def steps(caches):
        """Each kernel comes up while the one before it runs, and reads what that one writes."""
        output = case.query
        for _ in range(3):
            output = flash_attn_with_kvcache(output, *caches, *case.new, **keywords)
        return output

    steps(caches)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = steps(caches)
    for numbers in ((1, 2, 3), (0, 13, 7)):
        lengths.copy_(ints(*numbers))
        again = [cache.clone() for cache in caches]
        expected = case.query
        for _ in range(3):
            expected = flash_attn_with_kvcache(expected, *again, *case.new, **keywords)
            torch.cuda.synchronize()
        graph.replay()
        assert torch.equal(output, expected)
        assert all(torch.equal(a, b) for a, b in zip(caches, again, strict=True))


BAD = (
    ({"v": None}, ValueError, "k and v are given together"),
    ({"cache_seqlens": None}, ValueError, "k and v are given together, with cache_seqlens"),
    ({"cache_batch_idx": torch.full((3,), 9, dtype=torch.int32)}, ValueError, r"cache_batch_idx\[0\] is 9; block_t"),
    ({"page_table": torch.zeros(3, 4, dtype=torch.int32)}, ValueError, "block_table and page_table are one"),
    ({"rotary_cos": torch.zeros(16, 8)}, ValueError, "rotary_cos and rotary_sin are given together"),
    ({"rotary_cos": torch.zeros(16, 40), "rotary_sin": torch.zeros(16, 40)}, ValueError, "rotary_cos has shape"),
    ({"cu_seqlens_q": torch.zeros(4, dtype=torch.int32)}, ValueError, "q must be"),
    ({"cache_seqlens": torch.zeros(3)}, TypeError, "cache_seqlens has dtype"),
    ({"k_cache": torch.zeros(13, 4, 3, DIM)}, ValueError, "multiple of those of k_cache"),
    ({"qv": torch.zeros(1)}, ValueError, "qv must be"),
    ({"attention_chunk": -5}, ValueError, "attention_chunk is -5"),
    ({"splits": 5}, TypeError, "there is no argument 'splits'"),
)


@pytest.mark.parametrize(("changes", "error", "words"), BAD)
def test_bad_arguments(changes, error, words):
    """Refused before anything is written."""
    if "cache_batch_idx" in changes and DEVICE != "cpu":
        pytest.skip("a GPU's values are not looked at")
    case = Case(DTYPES[0], "pages")
    caches = [cache.clone() for cache in case.caches]
    arguments = {"q": case.query, "k_cache": caches[0], "v_cache": caches[1], "k": case.new[0], "v": case.new[1]}
    changes = {
        name: value.to(DEVICE, DTYPES[0] if value.dim() > 1 and value.is_floating_point() else value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in changes.items()
    }
    with pytest.raises(error, match=words):
        flash_attn_with_kvcache(**arguments | case.keywords | changes)
    assert all(torch.equal(a, b) for a, b in zip(caches, case.caches, strict=True))


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not look at lengths; it leaves out what does not fit")
@pytest.mark.parametrize("rotary", (False, True))
@pytest.mark.parametrize("wanted", range(3))
def test_no_gradient_of_a_call_that_appends(wanted, rotary):
    """Of none of q, k and v: the next call would write over what a backward pass reads."""
    tensors = [randn(2, 1, 2, 16, dtype=torch.bfloat16) for _ in "qkv"]
    caches = [randn(2, 9, 2, 16, dtype=torch.bfloat16) for _ in "kv"]
    before = [cache.clone() for cache in caches]
    angles = [randn(16, 8, dtype=torch.bfloat16) for _ in "cs"] if rotary else [None, None]
    tensors[wanted].requires_grad_()
    lengths = torch.tensor([3, 5], device=DEVICE, dtype=torch.int32)
    call = (tensors[0], *caches, *tensors[1:], *angles)
    with pytest.raises(ValueError, match="takes no gradient"):
        flash_attn_with_kvcache(*call, cache_seqlens=lengths)
    assert all(torch.equal(cache, old) for cache, old in zip(caches, before, strict=True))
    with torch.no_grad():
        assert flash_attn_with_kvcache(*call, cache_seqlens=lengths).isfinite().all()


def test_no_room_for_new_tokens():
    case = Case(DTYPES[0], "pages", lengths=(5, 0, 15))
    with pytest.raises(
        ValueError, match=r"^cache_seqlens\[2\] is 15; .* to 14, which with 2 new tokens is .* has room for, 16"
    ):
        case.call()


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU does not look at lengths; it takes the rows that there are")
def test_lengths_beyond_their_sequences():
    """FlashAttention reads the next sequence's rows there, or behind the tensor: a length is wrong, and is named."""
    q, k, v = (randn(20, 2, 64, dtype=DTYPES[0]) for _ in range(3))
    starts = ints(0, 12, 20)
    for used, name in (("seqused_q", "cu_seqlens_q"), ("seqused_k", "cu_seqlens_k")):
        with pytest.raises(ValueError, match=rf"{used}\[1\] is 9, but {name} gives that sequence 8 rows"):
            flash_attn.flash_attn_varlen_func(q, k, v, starts, starts, 12, 12, **{used: ints(5, 9)})
    query, key, value = randn(2, 1, 2, 64, dtype=DTYPES[0]), *(t.unflatten(0, (2, 10)) for t in (k, v))
    for lengths, padding, words in (
        (ints(5, 3), ints(5, 4), r"cache_leftpad\[1\] is 4; .* 0 to its sequence's 3"),
        (None, ints(0, 11), r"cache_leftpad\[1\] is 11; .* 0 to its sequence's 10"),
        (ints(5, 3), ints(-1, 3), r"cache_leftpad\[0\] is -1"),
        (ints(11, 3), ints(2, 3), r"^cache_seqlens\[0\] is 11; .* what the cache has room for, 10"),
    ):
        with pytest.raises(ValueError, match=words):
            flash_attn.flash_attn_with_kvcache(query, key, value, cache_seqlens=lengths, cache_leftpad=padding)


@pytest.mark.parametrize("dtype", (None, torch.bfloat16))
def test_combine(dtype):
    query, key, value = (randn(2, 20, 2, 64, dtype=DTYPES[0]) for _ in range(3))
    whole, lse = aiter.flash_attn_func(query, key, value, return_lse=True)
    parts = [
        aiter.flash_attn_func(query, key[:, a:b], value[:, a:b], return_lse=True) for a, b in ((0, 7), (7, 8), (8, 20))
    ]
    outputs, lses = (
        torch.stack([part[0].float() for part in parts]),
        torch.stack([part[1] for part in parts]).transpose(2, 3),
    )
    output, total = flash_attn_combine(outputs, lses, out_dtype=dtype)
    assert output.dtype == (dtype or torch.float32) and total.shape == (2, 20, 2)
    exact = dtype is None and DTYPES[0] is torch.float32
    torch.testing.assert_close(output.float(), whole.float(), rtol=0, atol=1e-5 if exact else 1e-2)
    torch.testing.assert_close(total, lse.transpose(1, 2), rtol=0, atol=1e-5)
    out = torch.empty_like(output)
    assert flash_attn_combine(outputs, lses, out, dtype)[0] is out and torch.equal(out, output)


# FlashAttention 2's positional parameters, which users give by position.
COMMON = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
POSITIONS = {
    "flash_attn_func": f"q k v {COMMON}",
    "flash_attn_varlen_func": f"q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k {COMMON} block_table",
    "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx "
    "cache_leftpad block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits "
    "return_softmax_lse",
    "flash_attn_combine": "out_partial lse_partial out out_dtype",
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_of_arguments(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == POSITIONS[name].split()


def test_packed_forms_take_the_same_positions():
    """What follows qkv and kv stands as in flash_attn_func and flash_attn_varlen_func."""
    q, k, v = randn(3, 2, 10, 2, 64, dtype=DTYPES[0])
    tail = 0.0, 0.3, True, (-1, -1), 0.0, None, False, True  # up to return_attn_probs
    expected = flash_attn.flash_attn_func(q, k, v, *tail)
    qkv, kv = torch.stack((q, k, v), 2), torch.stack((k, v), 2)
    starts = ints(0, 10, 20)
    flat = [tensor.flatten(0, 1) for tensor in (q, qkv, kv)]
    results = (
        flash_attn.flash_attn_qkvpacked_func(qkv, *tail),
        flash_attn.flash_attn_qkvpacked_func(torch.cat((q, k, v), 2), *tail, num_heads_q=2),
        flash_attn.flash_attn_kvpacked_func(q, kv, *tail),
        flash_attn.flash_attn_varlen_qkvpacked_func(flat[1], starts, 10, *tail),
        flash_attn.flash_attn_varlen_kvpacked_func(flat[0], flat[2], starts, starts, 10, 10, *tail),
    )
    for output, lse, probabilities in results:
        torch.testing.assert_close(output.view_as(expected[0]), expected[0], rtol=0, atol=1e-6)
        assert probabilities is None and lse.dtype == torch.float32
