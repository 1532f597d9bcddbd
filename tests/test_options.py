"""Windows, soft caps, ALiBi, sinks, offsets, unequal head dims: each alone and together, in every operation and layout,
forward and backward, against float64 and PyTorch, by the rule of accuracy.py."""

import math

import drawn
import pytest
import torch
from accuracy import assert_gradient_as_accurate, largest, pytorch_attend_one, root_mean_square
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DEVICE, DTYPES, STRIDES, Sequence, assert_sequences, randn, strided

import aiter
from aiter import reference

# (dtype, head_dim, value_dim, mask, softcap, alibi): few, as each is a kernel to compile, and a backward one.
CODES = (
    (DTYPES[0], 64, 64, "window", False, False),
    (DTYPES[0], 40, 24, "causal", True, True),
    (DTYPES[-1], 64, 64, "window", True, False),
    (DTYPES[-1], 24, 40, "window", False, True),
    (DTYPES[1], 64, 64, "window", True, True),
    (DTYPES[1], 72, 72, "none", True, False),
)
# Around tiles and vectors.
lengths = st.one_of(st.sampled_from((0, 1, 2, 15, 16, 17, 63, 64, 65, 128, 129)), st.integers(0, 200))
sides = st.one_of(st.just(-1), st.integers(0, 3), st.integers(0, 150))
# A row that sees one key has gradients that are zero but for rounding, and says nothing of a backward pass.
lengths_of_gradients = st.one_of(st.sampled_from((0, 15, 16, 17, 63, 64, 65, 128, 129)), st.integers(15, 200))
sides_of_gradients = st.one_of(st.just(-1), st.integers(4, 150))
groups = st.sampled_from(((1, 1), (4, 2), (6, 2), (3, 3), (8, 1)))
FORMS = ("dense", "padded", "packed", "paged")


@st.composite
def problems(draw, backward=False):
    dtype, head_dim, value_dim, mask, softcap, alibi = draw(st.sampled_from(CODES))
    batch = draw(st.integers(1, 3))
    sizes, side = (lengths_of_gradients, sides_of_gradients) if backward else (lengths, sides)
    window = draw(st.tuples(side, side)) if mask == "window" else (-1, -1)
    return {
        "dtype": dtype,
        "dims": (head_dim, value_dim),
        "form": draw(st.sampled_from(FORMS[: 3 if backward else 4])),
        "heads": draw(groups),
        "lengths_q": draw(st.lists(sizes, min_size=batch, max_size=batch)),
        "lengths_k": draw(st.lists(sizes, min_size=batch, max_size=batch)),
        "causal": mask == "causal" or (mask == "window" and draw(st.booleans())),
        "window": window,
        "softcap": draw(st.floats(0.5, 30.0)) if softcap else 0.0,
        "alibi": draw(st.sampled_from(("heads", "batch"))) if alibi else "",
        "sinks": draw(st.booleans()),
        "offsets": draw(st.one_of(st.none(), st.lists(st.integers(-20, 220), min_size=batch, max_size=batch))),
        "layout": draw(st.tuples(*[st.sampled_from(STRIDES)] * 3)),
        "seed": draw(st.integers(0, 1000)),
    }


class Problem:
    """The tensors of one problem; its sequences; and how to call it."""

    def __init__(
        self,
        dtype,
        dims,
        form,
        heads,
        lengths_q,
        lengths_k,
        causal,
        window,
        softcap,
        alibi,
        sinks,
        offsets,
        layout,
        seed,
    ):
        torch.manual_seed(seed)
        head_dim, value_dim = dims
        heads_q, heads_kv = heads
        batch = len(lengths_q)
        if form == "dense":
            lengths_q, lengths_k = [max(lengths_q)] * batch, [max(lengths_k)] * batch
        self.form, self.causal, self.options = form, causal, {}
        self.lengths_q, self.lengths_k = lengths_q, lengths_k
        most_q, most_k = max(lengths_q), max(lengths_k)
        packed = form == "packed"
        outer_q = (sum(lengths_q),) if packed else (batch, most_q)
        self.query = strided((*outer_q, heads_q, head_dim), dtype, layout[0], DEVICE)
        self.extra = {}
        if form == "paged":
            page = 16
            blocks = max(1, -(-most_k // page))
            table = torch.randperm(batch * blocks + 1)[: batch * blocks].view(batch, blocks).int().to(DEVICE)
            self.key = randn(batch * blocks + 1, heads_kv, page, head_dim, dtype=dtype)
            self.value = randn(batch * blocks + 1, heads_kv, page, value_dim, dtype=dtype)
            gathered = [
                [reference.gather_pages(c, table[b], n) for b, n in enumerate(lengths_k)]
                for c in (self.key, self.value)
            ]
            for b, n in enumerate(lengths_k):
                table[b, -(-n // page) :] = -1
            self.extra = {"page_table": table, "block_size": page}
        else:
            outer_k = (sum(lengths_k),) if packed else (batch, most_k)
            self.key = strided((*outer_k, heads_kv, head_dim), dtype, layout[1], DEVICE)
            self.value = strided((*outer_k, heads_kv, value_dim), dtype, layout[2], DEVICE)
        rows_q = list(reference.split_packed(lengths_q)) if packed else lengths_q
        rows_k = list(reference.split_packed(lengths_k)) if packed else lengths_k
        self.rows_q = [(r,) if packed else (b, slice(r)) for b, r in enumerate(rows_q)]
        self.rows_k = [(r,) if packed else (b, slice(r)) for b, r in enumerate(rows_k)]
        every = slice(None)
        self.lse_rows = [(every, *r) if packed else (r[0], every, r[1]) for r in self.rows_q]
        slopes = (torch.rand(batch, heads_q) * 0.5).to(DEVICE)
        logits = torch.randn(heads_q).to(DEVICE)
        if window != (-1, -1):
            self.options["window_size"] = window
        if softcap:
            self.options["softcap"] = softcap
        if alibi:
            slopes = slopes if alibi == "batch" else slopes[:1].expand(batch, -1)
            self.options["alibi_slopes"] = slopes if alibi == "batch" else slopes[0]
        if sinks:
            self.options["sinks"] = logits
        if offsets is not None:
            self.options["query_offsets"] = torch.tensor(offsets, dtype=torch.int32, device=DEVICE)
        self.each = [
            {
                "window": window if window != (-1, -1) else None,
                "softcap": softcap,
                "alibi_slopes": slopes[b] if alibi else None,
                "sinks": logits if sinks else None,
                "offset": None if offsets is None else offsets[b],
            }
            for b in range(batch)
        ]
        self.sequences = []
        for b in range(batch):
            key, value = (
                (gathered[0][b], gathered[1][b])
                if form == "paged"
                else (self.key[self.rows_k[b]].clone(), self.value[self.rows_k[b]].clone())
            )
            self.sequences.append(
                Sequence(self.query[self.rows_q[b]].clone(), key, value, self.rows_q[b], self.lse_rows[b], self.each[b])
            )
        if form == "padded":  # what stands in the padding has no effect
            for tensor, valid in ((self.query, lengths_q), (self.key, lengths_k), (self.value, lengths_k)):
                for b, n in enumerate(valid):
                    tensor[b, n:] = math.nan

    def call(self, query, key, value, return_lse=True):
        if self.form == "dense":
            return aiter.flash_attn_func(query, key, value, self.causal, return_lse=return_lse, **self.options)
        held_q, held_k = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in (self.lengths_q, self.lengths_k))
        if self.form == "padded":
            lengths = {"seqlens_q": held_q, "seqlens_k": held_k}
            return aiter.flash_attn_func(
                query, key, value, self.causal, return_lse=return_lse, **lengths, **self.options
            )
        longest = max(self.lengths_q)
        return aiter.variable_length_attention(
            *(query, key, value, held_q, max(longest, 1) if self.form == "packed" else query.shape[1], self.causal),
            **{"seqlens_k": held_k, "max_seqlen_k": max(*self.lengths_k, 1), "return_lse": return_lse},
            **self.extra,
            **self.options,
        )


def _note(operation, problem):
    on = {name: bool(problem[name]) for name in ("softcap", "alibi", "sinks", "causal")}
    on |= {"window": problem["window"] != (-1, -1), "offsets": problem["offsets"] is not None}
    head_dim, value_dim = problem["dims"]
    where = f"operations on {'this CPU' if DEVICE == 'cpu' else 'CUDA'}"
    drawn.note(where, operation, problem["form"], unequal_dims=head_dim != value_dim, **on)


@settings(max_examples=120)
@given(problem=problems())
def test_forward(problem):
    _note("forward", problem)
    problem = Problem(**problem)
    if problem.form == "paged" and problem.query.shape[1] == 0:
        return  # max_seq_len is at least 1
    output, lse = problem.call(problem.query, problem.key, problem.value)
    assert output.is_contiguous() and output.shape[-1] == problem.value.shape[-1]
    assert_sequences(output, lse, problem.sequences, problem.causal)
    if problem.form == "padded":
        for b, n in enumerate(problem.lengths_q):
            assert not output[b, n:].any() and (lse[b, :, n:] == -math.inf).all()


@settings(max_examples=60)
@given(problem=problems(backward=True), with_lse=st.booleans())
def test_backward(problem, with_lse):
    _note("backward", problem)
    problem = Problem(**problem)
    tensors = [t.detach().clone().requires_grad_() for t in (problem.query, problem.key, problem.value)]
    sinks = problem.options.get("sinks")
    if sinks is not None:
        problem.options["sinks"] = sinks.requires_grad_()
        tensors.append(sinks)
    output, lse = problem.call(*tensors[:3])
    grad_output, grad_lse = torch.randn_like(output), torch.randn_like(lse)
    count = 1 + with_lse
    got = torch.autograd.grad((output, lse)[:count], tensors, (grad_output, grad_lse)[:count])
    names = ("query", "key", "value", "sinks")[: len(tensors)]
    parts = {name: ([], [], []) for name in names}
    sink_sums = [0.0, 0.0]
    for b, sequence in enumerate(problem.sequences):
        if not (sequence.query.numel() and sequence.key.numel()):
            continue
        exact, own = _gradients(
            sequence, problem.causal, grad_output[sequence.rows], grad_lse[sequence.lse_rows], with_lse
        )
        for i, rows in enumerate((problem.rows_q[b], problem.rows_k[b], problem.rows_k[b])):
            for part, tensor in zip(parts[names[i]], (got[i][rows], exact[i], own[i]), strict=True):
                part.append(tensor.flatten())
        if sinks is not None:
            sink_sums[0] += exact[3]
            sink_sums[1] += own[3]
    for name in ("query", "key", "value"):
        if parts[name][0]:
            result, exact, own = (torch.cat(part) for part in parts[name])
            if sinks is not None and output.dtype == torch.float32:
                # Weights are restored from a saved log-sum-exp. Half an ulp of it, where it is 16, changes them, and so
                # gradients, by 8 ulps of theirs; slopes make it larger (docs/training.md). Without a sink short rows
                # have their softmax again. Largest errors are those of single scores: see assert_sequences.
                exact, own = exact.double(), own.double()
                largest_lse = float(lse.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=16.0))
                restored = largest_lse / 2 * torch.finfo(torch.float32).eps
                for size, times in ((root_mean_square, 2), (largest, 8)):
                    allowed = times * size(own - exact) + restored * size(exact)
                    assert size(result.double() - exact) <= allowed
            else:
                assert_gradient_as_accurate(result, exact.double(), own)
    if sinks is not None and isinstance(sink_sums[0], torch.Tensor):
        scale = sink_sums[0].abs().max().clamp(min=1.0).item()
        allowed = 2 * (sink_sums[1].double() - sink_sums[0]).abs().max().item()
        allowed += max(torch.finfo(output.dtype).eps, 1e-5) * scale  # an ulp of the output that was saved
        torch.testing.assert_close(got[3].double(), sink_sums[0], rtol=0, atol=allowed)


def _gradients(sequence, causal, grad_output, grad_lse, with_lse):
    """Of one sequence, in float64 and PyTorch's own. What flows through the log-sum-exp is added to the latter."""
    options = dict(sequence.options)
    exact = [t.detach().double().requires_grad_() for t in (sequence.query, sequence.key, sequence.value)]
    own = [t.detach().clone().requires_grad_() for t in (sequence.query, sequence.key, sequence.value)]
    sinks = options.pop("sinks")
    sinks64 = sinks32 = None
    if sinks is not None:
        sinks64, sinks32 = sinks.detach().double().requires_grad_(), sinks.detach().clone().requires_grad_()
        exact.append(sinks64)
        own.append(sinks32)
    output, lse = reference.attend_one(*exact[:3], causal, sinks=sinks64, **options)
    grads = _grad(output, exact, grad_output.double(), retain_graph=True)
    mine = pytorch_attend_one(*own[:3], causal, sinks=sinks32, **options).nan_to_num()
    pytorch = [grad.nan_to_num() for grad in _grad(mine, own, grad_output.to(mine.dtype))]
    seen = lse.isfinite()
    if with_lse and seen.any():
        for i, grad in enumerate(_grad(lse[seen], exact, grad_lse[seen].double())):
            grads[i] = grads[i] + grad
            pytorch[i] = (pytorch[i].double() + grad).to(pytorch[i].dtype)
    return grads, pytorch


def _grad(output, inputs, grad_output, **keywords):
    if not output.requires_grad:
        return [torch.zeros_like(tensor) for tensor in inputs]
    grads = torch.autograd.grad(output, inputs, grad_output, allow_unused=True, **keywords)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs, strict=True)]


def test_a_window_to_the_right_alone_is_causal():
    """The same code, and so the same bits."""
    tensors = [randn(1, 70, 2, 64, dtype=DTYPES[0]) for _ in range(3)]
    expected = aiter.flash_attn_func(*tensors, causal=True)
    assert torch.equal(aiter.flash_attn_func(*tensors, window_size=(-1, 0)), expected)
    assert torch.equal(aiter.flash_attn_func(*tensors, causal=True, window_size=(-1, 5)), expected)


def test_compiled_with_any_numbers():
    """No new graph for another window, cap or slopes."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def call(q, left, cap, slopes):
        return aiter.flash_attn_func(q, q, q, causal=True, window_size=(left, 0), softcap=cap, alibi_slopes=slopes)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    q = randn(1, 40, 2, 64, dtype=DTYPES[1])
    for left, cap in ((3, 5.0), (7, 9.0), (12, 11.0), (30, 2.0)):
        arguments = q, left, cap, torch.rand(2).to(DEVICE)
        torch.testing.assert_close(compiled(*arguments), call(*arguments), rtol=0, atol=0)
    assert len(graphs) <= 2


def test_vmap_with_sinks():
    q, k, v = (randn(3, 2, 20, 2, 64, dtype=DTYPES[0]) for _ in range(3))
    sinks = torch.randn(2).to(DEVICE)
    mapped = torch.func.vmap(lambda q, k, v: aiter.flash_attn_func(q, k, v, sinks=sinks))(q, k, v)
    for i in range(3):
        assert torch.equal(mapped[i], aiter.flash_attn_func(q[i], k[i], v[i], sinks=sinks))
    for name, option in (("sinks", torch.randn(3, 2)), ("alibi_slopes", torch.rand(3, 2))):
        with pytest.raises(NotImplementedError, match=f"vmap over {name} is not offered.* give one {name}"):
            torch.func.vmap(lambda q, k, v, x, name=name: aiter.flash_attn_func(q, k, v, **{name: x}))(
                q, k, v, option.to(DEVICE)
            )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    (
        ({"window_size": 5}, TypeError, "window_size must be a pair"),
        ({"window_size": (1.0, 2)}, TypeError, "window_size must be a pair of ints"),
        ({"window_size": (-2, 0)}, ValueError, r"window_size is \(-2, 0\)"),
        ({"softcap": "1"}, TypeError, "softcap must be a float"),
        ({"softcap": -1.0}, ValueError, "softcap is -1.0"),
        ({"softcap": math.nan}, ValueError, "softcap is nan"),
        ({"softcap": 2e37}, ValueError, r"softcap is 2e\+37; .* to 1e\+37"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks has shape"),
        ({"sinks": [0.0, 0.0]}, TypeError, "sinks must be a torch.Tensor"),
        ({"sinks": torch.zeros(2, dtype=torch.int32)}, TypeError, "sinks has dtype"),
        ({"alibi_slopes": torch.zeros(1, 3)}, ValueError, "alibi_slopes has shape"),
        ({"alibi_slopes": torch.zeros(2, 2, 2)}, ValueError, "alibi_slopes must be"),
        ({"alibi_slopes": torch.zeros(5, 2)}, ValueError, "alibi_slopes has shape"),
        ({"query_offsets": torch.zeros(2, dtype=torch.int32)}, ValueError, "query_offsets has shape"),
        ({"query_offsets": torch.zeros(1)}, TypeError, "query_offsets has dtype"),
        ({"batch_invariant": 1}, TypeError, "batch_invariant must be True or False"),
        ({"window": (1, 1)}, TypeError, "there is no option window"),
    ),
)
def test_bad_options(options, error, words):
    tensors = [torch.zeros(1, 4, 2, 64, dtype=DTYPES[0], device=DEVICE) for _ in range(3)]
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(error, match=words):
        aiter.flash_attn_func(*tensors, **options)


@pytest.mark.skipif(DEVICE != "cpu", reason="float32 is for CPUs")
@pytest.mark.parametrize(("keys", "head_dim", "spread"), ((24, 64, 8.0), (48, 128, 4.0), (60, 64, 8.0)))
def test_gradients_of_large_scores_beside_sinks(keys, head_dim, spread):
    """Where weights are restored from a log-sum-exp, both passes must sum scores in the same order: then what a score
    is wrong by cancels. Scores as large as this show it, by the values' gradient above all."""
    query, key, value, grad = (randn(16, n, 2, head_dim, dtype=torch.float32) for n in (20, keys, keys, 20))
    tensors = [(query * spread).requires_grad_(), key.requires_grad_(), value.requires_grad_()]
    sinks = randn(2, dtype=torch.float32).requires_grad_()
    got = torch.autograd.grad(aiter.flash_attn_func(*tensors, sinks=sinks), tensors, grad)
    found = []
    for b in range(16):
        sequence = Sequence(*(t[b] for t in tensors), (b,), (b,), {"sinks": sinks})
        found.append(_gradients(sequence, False, grad[b], None, False))
    for i in range(3):
        exact, own = (torch.stack([both[which][i] for both in found]).double() for which in (0, 1))
        error, others = (root_mean_square(t.double() - exact) for t in (got[i], own))
        assert error <= 1.5 * others, (i, error / others)
