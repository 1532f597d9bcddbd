"""Lists of pages (page_indptr, page_indices, last_page_len) say what a page table says, to every operation that takes
one: the same bits."""

import pytest
import torch
from problems import DEVICE, page_lists, randn

import aiter
from aiter import flash_attn

LENGTHS = (33, 0, 65, 16)
HEADS, HEADS_KV, HEAD_DIM = 4, 2, 64
DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16


class Case:
    def __init__(self, page_size, seq_q=5):
        self.page_size, self.batch, self.seq_q = page_size, len(LENGTHS), seq_q
        per_sequence = -(-max(LENGTHS) // page_size)
        pages = self.batch * per_sequence + 2
        self.table = torch.randperm(pages, device=DEVICE)[:-2].view(self.batch, -1).int()
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=DEVICE)
        self.caches = [randn(pages, HEADS_KV, page_size, HEAD_DIM, dtype=DTYPE) for _ in "kv"]
        self.query = randn(self.batch, seq_q, HEADS, HEAD_DIM, dtype=DTYPE)
        indptr, indices, last = page_lists(self.table, LENGTHS, page_size, spare=3)
        self.lists = {"page_indptr": indptr, "page_indices": indices, "last_page_len": last}

    def expected(self, **options):
        return aiter.flash_attn_with_kvcache(
            self.query, self.caches, self.table, self.page_size, cache_seqlens=self.lengths, **options
        )

    def listed(self, **options):
        return aiter.flash_attn_with_kvcache(
            self.query, self.caches, None, self.page_size, **{**self.lists, "max_seqlen_k": max(LENGTHS), **options}
        )


@pytest.mark.parametrize("seq_q", (1, 5, 40))
@pytest.mark.parametrize("page_size", (1, 7, 16))
def test_what_a_table_says(page_size, seq_q):
    case = Case(page_size, seq_q)
    for options in ({}, {"causal": False}, {"window_size": (9, 0)}, {"sinks": torch.randn(HEADS, device=DEVICE)}):
        expected = case.expected(batch_invariant=True, return_lse=True, **options)
        for bound in (None, max(LENGTHS), 1000):
            output = case.listed(batch_invariant=True, return_lse=True, max_seqlen_k=bound, **options)
            for ours, theirs in zip(output, expected, strict=True):
                assert torch.equal(ours, theirs)
    # Lengths that are shorter than the lists.
    shorter = (case.lengths - 1).clamp(min=0)
    case.lengths = shorter
    assert torch.equal(case.listed(cache_seqlens=shorter, batch_invariant=True), case.expected(batch_invariant=True))


def test_pages_that_are_full():
    case = Case(16)
    whole = case.lengths.new_tensor([-(-n // 16) * 16 for n in LENGTHS])
    case.lengths, case.lists["last_page_len"] = whole, None
    assert torch.equal(case.listed(max_seqlen_k=80, batch_invariant=True), case.expected(batch_invariant=True))


@pytest.mark.parametrize("index", (torch.int64, torch.int32))
def test_other_operations(index):
    case = Case(7)
    keys, values = (cache.transpose(1, 2) for cache in case.caches)
    expected = case.expected(causal=True)
    lists = {name: tensor.repeat_interleave(2).to(index)[::2] for name, tensor in case.lists.items()}
    output = flash_attn.flash_attn_with_kvcache(case.query, keys, values, causal=True, **lists)
    torch.testing.assert_close(output, expected)
    lengths = torch.full_like(case.lengths, case.seq_q)
    packed, starts = case.query.flatten(0, 1), torch.arange(case.batch + 1, device=DEVICE).int() * case.seq_q
    output = flash_attn.flash_attn_varlen_func(packed, keys, values, starts, None, 5, 70, causal=True, **lists)
    torch.testing.assert_close(output.view_as(expected), expected)
    more = {"block_size": 7, "causal": True, **lists}
    output = aiter.variable_length_attention(packed, *case.caches, lengths, 5, **more)
    torch.testing.assert_close(output.view_as(expected), expected)
    more["seqlens_k"] = case.lengths
    output = aiter.variable_length_attention(case.query, *case.caches, lengths, 5, max_seqlen_k=65, **more)
    torch.testing.assert_close(output, expected)


def test_compiled():
    case = Case(7)
    torch._dynamo.reset()
    compiled = torch.compile(case.listed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), case.listed())


def test_takes_no_gradient():
    case = Case(7)
    case.query.requires_grad_()
    with pytest.raises(NotImplementedError, match="paged cache takes no gradient"):
        case.listed().sum().backward()


def test_nothing_to_read():
    case = Case(7)
    for name in ("page_indices", "page_indptr"):
        case.lists[name] = case.lists[name].clone()
    case.lists["page_indptr"].zero_()
    assert not case.listed().any()
    case.lists["page_indices"] = case.lists["page_indices"][:0]
    assert not case.listed().any()


@pytest.mark.skipif(DEVICE == "cpu", reason="values are not looked at on a GPU; here no CUDA or ROCm device")
def test_in_a_graph_with_other_lists():
    """Shorter and longer lists in the same memory, without waiting for the GPU."""
    case = Case(16)
    case.listed()
    torch.cuda.set_sync_debug_mode("error")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = case.listed()
    torch.cuda.set_sync_debug_mode("default")
    for indptr in ([0, 1, 2, 3, 4], [0, 5, 5, 9, 9]):
        case.lists["page_indptr"].copy_(torch.tensor(indptr))
        graph.replay()
        assert torch.equal(output, case.listed())


INDICES = torch.arange(14, dtype=torch.int32)
BAD = (
    ({"page_indices": None}, TypeError, "pages are named by page_table, .*, or by page_indptr"),
    ({"page_indptr": None}, TypeError, "pages are named by page_table, .*, or by page_indptr"),
    ({"page_indptr": INDICES[:4]}, ValueError, r"page_indptr .*of 3 sequences, but query has .*of 4 seq"),
    ({"page_indptr": INDICES[:5].float()}, TypeError, "page_indptr has dtype torch.float32"),
    ({"last_page_len": INDICES[:3]}, ValueError, r"last_page_len has shape \(3,\)"),
    ({"page_indices": INDICES.view(2, 7)}, ValueError, "page_indices must be"),
    ({"max_seqlen_k": 0}, ValueError, "max_seqlen_k is 0"),
)
BAD_VALUES = (
    ({"max_seqlen_k": 64}, "the pages of sequence 2 hold 65 tokens, more than max_seqlen_k, 64"),
    ({"page_indptr": INDICES.new_tensor([0, 5, 4, 6, 7])}, r"page_indptr\[1\] is 5 and the next 4; they must rise"),
    ({"page_indptr": INDICES.new_tensor([0, 5, 5, 15, 70])}, r"page_indptr\[3\] is 15 and the next 70.*21 entries"),
    ({"page_indptr": INDICES.new_tensor([-1, 5, 5, 15, 18])}, r"page_indptr\[0\] is -1"),
    ({"page_indptr": INDICES.new_tensor([0, 5, 5, 15, 19])}, r"page_indices\[18\] is -2147483648; the cache has pages"),
    ({"last_page_len": INDICES.new_tensor([1, 99, 2, 8])}, r"last_page_len\[3\] is 8; it must be from 0 to a page's 7"),
    ({"cache_seqlens": INDICES.new_tensor([1, 1, 1, 1])}, r"cache_seqlens\[1\] is 1, but its list of pages holds 0"),
)


@pytest.mark.parametrize(("changes", "error", "words"), BAD)
def test_bad_arguments(changes, error, words):
    case = Case(7)
    changes = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in changes.items()}
    with pytest.raises(error, match=words):
        case.listed(**changes)


@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's values are not looked at")
@pytest.mark.parametrize(("changes", "words"), BAD_VALUES)
def test_bad_values(changes, words):
    case = Case(7)
    with pytest.raises(ValueError, match=words):
        case.listed(**changes)
    case.listed()


def test_not_with_a_table_or_new_tokens():
    case = Case(7)
    with pytest.raises(ValueError, match="page_table and page_indptr are two ways"):
        aiter.flash_attn_with_kvcache(case.query, case.caches, case.table, 7, **case.lists)
    keys, values = (cache.transpose(1, 2) for cache in case.caches)
    with pytest.raises(NotImplementedError, match=r"reshape_and_cache first"):
        flash_attn.flash_attn_with_kvcache(case.query, keys, values, keys, values, cache_seqlens=3, **case.lists)
