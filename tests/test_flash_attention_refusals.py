"""What aiter.flash_attn and aiter.kv_cache refuse: by the names their callers know, before anything is written."""

import contextlib
import math

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from aiter import flash_attn, flash_attn_arguments, kv_cache
from aiter.errors import AiterError, LengthError, OverlapError
from aiter.flash_attn import flash_attn_combine, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

E4M3 = torch.float8_e4m3fn


class Watched(TorchDispatchMode):
    """Sends calls through PyTorch's dispatcher, and changes nothing."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*arguments, **(keywords or {}))


def ints(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def dense(**changes):
    tensors = {"q": torch.randn(2, 3, 4, 16), "k": torch.randn(2, 5, 2, 16), "v": torch.randn(2, 5, 2, 16)}
    return flash_attn_func, {**tensors, **changes}


def packed(**changes):
    tensors = {"q": torch.randn(7, 4, 16), "k": torch.randn(9, 2, 16), "v": torch.randn(9, 2, 16)}
    lengths = {"cu_seqlens_q": ints(0, 3, 7), "cu_seqlens_k": ints(0, 4, 9), "max_seqlen_q": 4, "max_seqlen_k": 5}
    return flash_attn_varlen_func, {**tensors, **lengths, **changes}


def cached(**changes):
    tensors = {"q": torch.randn(2, 1, 4, 16), "k_cache": torch.randn(2, 8, 2, 16), "v_cache": torch.randn(2, 8, 2, 16)}
    return flash_attn_with_kvcache, {**tensors, "cache_seqlens": ints(3, 4), **changes}


def paged(**changes):
    caches = {"k_cache": torch.randn(6, 4, 2, 16), "v_cache": torch.randn(6, 4, 2, 16)}
    return cached(**{**caches, "block_table": ints(0, 1, 2, 3).view(2, 2), **changes})


def appended(**changes):
    return cached(**{"k": torch.randn(2, 1, 2, 16), "v": torch.randn(2, 1, 2, 16), **changes})


def appended_packed(**changes):
    lengths = {"cu_seqlens_q": ints(0, 2, 5), "max_seqlen_q": 3, "q": torch.randn(5, 4, 16)}
    return appended(**{**lengths, **changes})


def rotated(**changes):
    angles = torch.randn(8, 8)
    return appended(**{"rotary_cos": angles, "rotary_sin": angles.clone(), **changes})


def listed(**changes):
    pages = {"k": torch.randn(6, 4, 2, 16), "v": torch.randn(6, 4, 2, 16), "cu_seqlens_k": None}
    return packed(**{**pages, "page_indptr": ints(0, 1, 3), "page_indices": ints(0, 1, 2), **changes})


def new_tokens(count, batch=2):
    return {name: torch.randn(batch, count, 2, 16) for name in "kv"}


def by_slots(**changes):
    tokens = {"key": torch.randn(3, 2, 16), "value": torch.randn(3, 2, 16)}
    caches = {"key_cache": torch.randn(4, 4, 2, 16), "value_cache": torch.randn(4, 4, 2, 16)}
    return kv_cache.reshape_and_cache, {**tokens, **caches, "slot_mapping": ints(1, 5, 7), **changes}


def combined(**changes):
    parts = {"out_partial": torch.randn(2, 1, 3, 4, 16), "lse_partial": torch.randn(2, 1, 3, 4)}
    return flash_attn_combine, {**parts, **changes}


def freed(*shape, dtype=torch.float32):
    tensor = torch.ones(shape, dtype=dtype)
    tensor.untyped_storage().resize_(0)
    return tensor


def freed_view(*shape):
    """With an address that is not null."""
    whole = torch.ones(2, *shape)
    view = whole[1]
    whole.untyped_storage().resize_(0)
    return view


def freed_far(*shape):
    """A view far into a pool."""
    pool = torch.empty(5 << 30, dtype=torch.uint8).view(torch.float32)  # memory that nobody touches
    view = pool[-math.prod(shape) :].view(shape)
    pool.untyped_storage().resize_(0)
    return view


FAR = freed_far(2, 5, 2, 16)
MANY = torch.ones(3)
FLAT = torch.randn(16)
REFUSED = {
    # Tensors without memory.
    "q freed": (dense(q=freed(2, 3, 4, 16)), ValueError, "q has .*no memory"),
    "k freed": (dense(k=freed(2, 5, 2, 16)), ValueError, "k has .*no memory"),
    "a view freed": (dense(v=freed_view(2, 5, 2, 16)), ValueError, "v has .*no memory"),
    "out freed": (dense(out=freed(2, 3, 4, 16)), ValueError, "out has .*no memory"),
    "sinks freed": (dense(sinks=freed(4)), ValueError, "sinks has .*no memory"),
    "lengths freed": (packed(cu_seqlens_q=freed(3, dtype=torch.int32)), ValueError, "cu_seqlens_q has .*no memory"),
    "a cache freed": (by_slots(key_cache=freed(4, 4, 2, 16)), ValueError, "key_cache has .*no memory"),
    "slots freed": (by_slots(slot_mapping=freed(3, dtype=torch.int32)), ValueError, "slot_mapping has .*no memory"),
    "new keys freed": (appended(k=freed(2, 1, 2, 16)), ValueError, "k has .*no memory"),
    "a narrow q freed": (dense(q=freed(2, 3, 4, 12)), ValueError, "q has .*no memory"),
    "far into a freed pool": (dense(v=FAR), ValueError, "v has .*no memory"),
    "a second query freed": (dense(qv=freed(2, 3, 4, 16)), ValueError, "qv has .*no memory"),
    "wide lengths freed": (packed(cu_seqlens_k=freed(3, dtype=torch.int64)), ValueError, "cu_seqlens_k has"),
    "used lengths freed": (packed(seqused_k=freed(2, dtype=torch.int32)), ValueError, "seqused_k has .*no memory"),
    "lengths before new tokens": (appended(cache_seqlens=freed(2, dtype=torch.int32)), ValueError, "cache_seqlens has"),
    "pages freed": (paged(k_cache=freed(6, 4, 2, 16)), ValueError, "k_cache has .*no memory"),
    "a table freed": (paged(block_table=freed(2, 2, dtype=torch.int32)), ValueError, "block_table has .*no memory"),
    "angles freed": (rotated(rotary_sin=freed(8, 8)), ValueError, "rotary_sin has .*no memory"),
    "parts freed": (combined(out_partial=freed(2, 1, 3, 4, 16)), ValueError, "out_partial has no memory"),
    "packed freed": ((flash_attn.flash_attn_qkvpacked_func, {"qkv": freed(2, 5, 3, 2, 16)}), ValueError, "qkv"),
    # On another device.
    "k on meta": (dense(k=torch.randn(2, 5, 2, 16, device="meta")), ValueError, "k is on device meta"),
    "q on meta": (dense(q=torch.randn(2, 3, 4, 16, device="meta")), ValueError, "on device meta"),
    "packed v on meta": (packed(v=torch.randn(9, 2, 16, device="meta")), ValueError, "v is on device meta"),
    "lengths on meta": (packed(cu_seqlens_k=ints(0, 4, 9).to("meta")), ValueError, "cu_seqlens_k is on device meta"),
    "out on meta": (dense(out=torch.randn(2, 3, 4, 16, device="meta")), ValueError, "out is on device meta"),
    "v_cache on meta": (cached(v_cache=torch.randn(2, 8, 2, 16, device="meta")), ValueError, "v_cache is on device"),
    "a cache on meta": (by_slots(value_cache=torch.randn(4, 4, 2, 16, device="meta")), ValueError, "value_cache is on"),
    "new values on meta": (appended(v=torch.randn(2, 1, 2, 16, device="meta")), ValueError, "v is on device meta"),
    "parts on meta": (combined(lse_partial=torch.randn(2, 1, 3, 4, device="meta")), ValueError, "lse_partial is on"),
    "combined on meta": (combined(out=torch.randn(1, 3, 4, 16, device="meta")), ValueError, "out is on device meta"),
    # No tensors, or of another kind.
    "slopes": (dense(alibi_slopes=[0.5] * 4), TypeError, "alibi_slopes must be a torch.Tensor"),
    "sinks": (dense(sinks=0.5), TypeError, "sinks must be a torch.Tensor"),
    "no q": (packed(q=None), TypeError, "q must be a torch.Tensor.*NoneType"),
    "a list": (packed(q=[1.0]), TypeError, "q must be a torch.Tensor.*list"),
    "no q, cached": (cached(q=None), TypeError, "q must be a torch.Tensor.*NoneType"),
    "8-bit, no k": (dense(q=torch.ones(2, 3, 4, 16).to(E4M3), k=None), TypeError, "k must be a torch.Tensor"),
    "8-bit, no v": (packed(q=torch.ones(7, 4, 16).to(E4M3), v=None), TypeError, "v must be a torch.Tensor"),
    "8-bit, flat k": (dense(q=torch.ones(2, 3, 4, 16).to(E4M3), k=FLAT), ValueError, "k must be .* 1 dimensions"),
    "8-bit, no cache": (cached(q=torch.ones(2, 1, 4, 16).to(E4M3), k_cache=3), TypeError, "k_cache must be a torch"),
    "new keys": (appended(k=3), TypeError, "k must be a torch.Tensor"),
    "new values": (appended(v=[1]), TypeError, "v must be a torch.Tensor"),
    "flat new keys": (appended(k=FLAT), ValueError, "k must be .* 1 dimensions"),
    "angles": (rotated(rotary_cos="x"), TypeError, "rotary_cos must be a torch.Tensor"),
    "places of angles": (cached(rotary_seqlens="x"), TypeError, "rotary_seqlens must be a torch.Tensor"),
    "sparse": (by_slots(key_cache=torch.randn(4, 4, 2, 16).to_sparse()), TypeError, "key_cache must be a dense"),
    "a sparse window": (dense(window_size=torch.tensor([1, 1]).to_sparse()), TypeError, "window_size must be a dense"),
    "a window of rank 0": (dense(window_size=torch.tensor(1)), ValueError, "window_size must be"),
    "nested": (dense(q=torch.nested.nested_tensor([FLAT, FLAT])), TypeError, "q must be a dense"),
    "lengths as an array": (cached(cache_seqlens=np.array([3, 4])), TypeError, "cache_seqlens must be a torch.Tensor"),
    "a bound as an array": (packed(max_seqlen_q=np.array([3, 4])), TypeError, "max_seqlen_q must be an int"),
    "a window of tensors": (dense(window_size=(MANY, 1)), TypeError, "window_size must be a pair"),
    "a bias": (dense(bias=np.ones(3)), NotImplementedError, "bias is not offered"),
    "a state": (dense(rng_state="junk"), TypeError, "rng_state must be a torch.Tensor"),
    # Numbers.
    "a huge bound": (packed(max_seqlen_k=2**31), ValueError, f"max_seqlen_k is {2**31}"),
    "a negative bound": (packed(max_seqlen_q=-1), ValueError, "max_seqlen_q is -1"),
    "a huge length": (cached(cache_seqlens=2**31), ValueError, f"cache_seqlens is {2**31}"),
    "a huger length": (cached(cache_seqlens=2**70), ValueError, f"cache_seqlens is {2**70}"),
    "a negative length": (cached(cache_seqlens=-1), ValueError, "cache_seqlens is -1"),
    "a huge scale": (dense(softmax_scale=10**40), ValueError, r"softmax_scale is 1e\+40"),
    "a huge float": (dense(softmax_scale=1e39), ValueError, r"softmax_scale is 1e\+39"),
    "a huger scale": (dense(softmax_scale=10**400), ValueError, "softmax_scale is inf"),
    "a huge cap": (dense(softcap=1e39), ValueError, r"softcap is 1e\+39"),
    "a huger cap": (packed(softcap=10**400), ValueError, "softcap is inf"),
    "a tiny cap": (dense(softcap=1e-45), ValueError, "softcap is 1"),
    "too few rows": (cached(q=torch.randn(2, 3, 4, 16), max_seqlen_q=2), ValueError, "max_seqlen_q is 2, but q has 3"),
    "no bound": (cached(max_seqlen_q="x"), TypeError, "max_seqlen_q must be an int"),
    # Flags and hints.
    "dropout_p": (dense(dropout_p=MANY), TypeError, "dropout_p must be a float"),
    "dropout_p, empty": (dense(dropout_p={}), TypeError, "dropout_p must be a float"),
    "causal": (dense(causal=MANY), TypeError, "causal must be True or False"),
    "return_lse": (dense(return_lse=MANY), TypeError, "return_lse must be True or False"),
    "return_attn_probs": (packed(return_attn_probs=object()), TypeError, "return_attn_probs must be True or False"),
    "return_softmax_lse": (cached(return_softmax_lse=1), TypeError, "return_softmax_lse must be True or False"),
    "deterministic": (dense(deterministic="x"), TypeError, "deterministic must be True or False"),
    "rotary_interleaved": (rotated(rotary_interleaved="x"), TypeError, "rotary_interleaved must be True or False"),
    "num_splits": (cached(num_splits="x"), TypeError, "num_splits must be int or None"),
    "pack_gqa": (dense(pack_gqa=object()), TypeError, "pack_gqa must be bool or int or None"),
    "rng_state over a cache": (cached(rng_state=torch.zeros(2, dtype=torch.int64)), TypeError, "rng_state"),
    # Scales.
    "q_descale's shape": (dense(q=torch.ones(2, 3, 4, 16).to(E4M3), q_descale=MANY), ValueError, "q_descale has shape"),
    "q_descale's dtype": (
        dense(q=torch.ones(2, 3, 4, 16).to(E4M3), q_descale=torch.ones(1).half()), TypeError, "q_descale has dtype",
    ),
    "q_descale's batch": (
        packed(q=torch.ones(7, 4, 16).to(E4M3), q_descale=torch.ones(3, 2)), ValueError, "q_descale .* batch size is 2",
    ),
    # Several elements in one place of memory.
    "an expanded cache": (
        by_slots(key_cache=torch.randn(1, 4, 2, 16).expand(4, 4, 2, 16)), ValueError, "key_cache has .* same memory",
    ),
    "an overlapping cache": (
        appended(v_cache=torch.randn(999).as_strided((2, 8, 2, 16), (64, 8, 128, 1))), ValueError, "v_cache .* memory",
    ),
    "an expanded out": (dense(out=torch.randn(1, 3, 4, 16).expand(2, 3, 4, 16)), ValueError, "out has .* same memory"),
    "combined, expanded": (combined(out=torch.randn(1, 1, 4, 16).expand(1, 3, 4, 16)), ValueError, "out has .* memory"),
    # flash_attn_combine.
    "combined in 3": (combined(out=3), TypeError, "out must be a torch.Tensor"),
    "combined as x": (combined(out_dtype="x"), TypeError, "out_dtype is 'x'"),
    "combined as 3": (combined(out_dtype=3), TypeError, "out_dtype is 3"),
    "combined as int32": (combined(out_dtype=torch.int32), TypeError, "out_dtype is torch.int32"),
    "combined as True": (combined(out_dtype=True), TypeError, "out_dtype is True"),
    "combined in integers": (combined(out=torch.zeros(1, 3, 4, 16, dtype=torch.int32)), TypeError, "out has dtype"),
    "integer parts": (combined(out_partial=torch.ones(2, 1, 3, 4, 16).int()), TypeError, "out_partial has dtype"),
    "combined in a leaf": (combined(out=torch.zeros(1, 3, 4, 16, requires_grad=True)), ValueError, "out= takes no"),
    "no parts": (combined(out_partial=torch.randn(0, 1, 3, 4, 16), lse_partial=torch.randn(0, 1, 3, 4)), ValueError,
                 "at least one part"),
    "parts of no columns": (combined(out_partial=torch.randn(2, 1, 3, 4, 0), out=3), TypeError, "out must be"),
    "combined as a list": (combined(out_dtype=[1]), TypeError, r"out_dtype is \[1\]"),
    # Values, where there is nothing to do as well.
    "no sequences' starts": (packed(cu_seqlens_q=ints()), ValueError, r"cu_seqlens_q has shape \(0,\)"),
    "no keys": (
        packed(k=torch.randn(0, 2, 16), v=torch.randn(0, 2, 16)), ValueError, r"cu_seqlens_k\[0\] is 0 and the next 4",
    ),
    "no queries": (packed(q=torch.randn(0, 4, 16)), ValueError, r"cu_seqlens_q\[0\] is 0 and the next 3"),
    "no columns in the table": (paged(block_table=ints().view(2, 0)), ValueError, r"cache_seqlens\[0\] is 3"),
    "no listed pages": (
        cached(k_cache=torch.randn(6, 4, 2, 16), v_cache=torch.randn(6, 4, 2, 16), cache_seqlens=None,
               page_indptr=ints(0, 1, 3), page_indices=ints()), ValueError, r"page_indptr\[0\] is 0 and the next 1",
    ),
    # Names.
    "lengths": (cached(cache_seqlens=ints(3, 9)), ValueError, r"cache_seqlens\[1\] is 9; .*room for, 8"),
    "lengths, for who waits for FlashAttention's": (
        paged(cache_seqlens=ints(3, 9)), RuntimeError, r"cache_seqlens\[1\] is 9; .*what block_table has room for, 8",
    ),
    "lengths and new tokens": (
        appended(cache_seqlens=ints(3, 8)), RuntimeError,
        r"cache_seqlens\[1\] is 8; .*to 7, which with 1 new token is what the cache has room for, 8\. Nothing was",
    ),
    "lengths' shape": (cached(cache_seqlens=ints(3, 4, 5)), ValueError, "cache_seqlens has shape"),
    "a page": (paged(block_table=ints(0, 1, 9, 3).view(2, 2)), ValueError, r"block_table\[1, 0\] is 9"),
    "a page, padded": (
        paged(block_table=ints(0, 1, 9, 3).view(2, 2), cache_leftpad=ints(0, 1)), ValueError, r"block_table\[1, 0\]",
    ),
    "a row": (cached(cache_batch_idx=ints(0, 2)), ValueError, r"^cache_batch_idx\[1\] is 2; the cache has rows 0 to 1"),
    "a negative row": (cached(cache_batch_idx=ints(-1, 1)), ValueError, r"^cache_batch_idx\[0\] is -1; .* rows 0 to 1"),
    "a row, padded": (
        cached(cache_batch_idx=ints(0, 2), cache_leftpad=ints(0, 1)), ValueError, r"^cache_batch_idx\[1\] is 2; the",
    ),
    "a row of the table": (
        paged(cache_batch_idx=ints(0, 2)), ValueError, r"^cache_batch_idx\[1\] is 2; block_table has rows 0 to 1$",
    ),
    "a page in a row of the table": (
        paged(cache_batch_idx=ints(1, 0), block_table=ints(0, 1, 9, 3).view(2, 2)), ValueError,
        r"^block_table\[cache_batch_idx\[0\], 0\] is 9; the cache has pages 0 to 5$",
    ),
    "the same, padded": (
        paged(cache_batch_idx=ints(1, 0), block_table=ints(0, 1, 9, 3).view(2, 2), cache_leftpad=ints(0, 1)),
        ValueError, r"^block_table\[cache_batch_idx\[0\], 0\] is 9; the cache has pages 0 to 5$",
    ),
    "no rows in the table": (
        paged(cache_batch_idx=ints(0, 1), block_table=ints().view(0, 2)), ValueError, "block_table has no rows",
    ),
    "a negative length, padded": (
        cached(cache_seqlens=ints(3, -1), cache_leftpad=ints(0, 0)), LengthError, r"^cache_seqlens\[1\] is -1; it must",
    ),
    "padding's shape": (cached(cache_leftpad=ints(1)), ValueError, "cache_leftpad has shape"),
    "new tokens' starts": (
        appended(k=torch.randn(3, 2, 16), v=torch.randn(3, 2, 16), cu_seqlens_k_new=ints(0, 3)), ValueError,
        "cu_seqlens_k_new has shape",
    ),
    "dtype of k": (dense(k=torch.randn(2, 5, 2, 16).half()), TypeError, "k has dtype torch.float16.*that of q"),
    "heads of q": (dense(q=torch.randn(2, 3, 3, 16)), ValueError, "q has 3 heads and k 2"),
    "batch of k": (dense(k=torch.randn(1, 5, 2, 16), v=torch.randn(1, 5, 2, 16)), ValueError, "k has batch size 1"),
    "shape of v": (packed(v=torch.randn(8, 2, 16)), ValueError, "v has shape"),
    "used": (packed(seqused_k=ints(4, 6)), ValueError, r"seqused_k\[1\] is 6"),
    "starts": (packed(cu_seqlens_q=ints(0, 8, 7)), ValueError, r"cu_seqlens_q\[0\] is 0 and the next 8"),
    "starts that fall": (
        packed(cu_seqlens_q=ints(0, 4, 3, 7), cu_seqlens_k=ints(0, 5, 5, 9)), ValueError,
        r"cu_seqlens_q\[1\] is 4 and the next 3; they must rise",
    ),
    "starts of keys that fall, in training": (
        packed(q=torch.randn(7, 4, 16, requires_grad=True), cu_seqlens_q=ints(0, 3, 3, 7),
               cu_seqlens_k=ints(0, 5, 4, 9)), ValueError, r"cu_seqlens_k\[1\] is 5 and the next 4; they must rise",
    ),
    "starts of pages": (
        packed(k=torch.randn(6, 4, 2, 16), v=torch.randn(6, 4, 2, 16), block_table=ints(0, 1, 2, 3).view(2, 2),
               cu_seqlens_k=ints(0, 4, 13)), ValueError, r"the length in cu_seqlens_k\[1\] is 9",
    ),
    "a paged v": (
        packed(k=torch.randn(6, 4, 2, 16), v=FLAT, block_table=ints(0, 1, 2, 3).view(2, 2)), ValueError, "v must be",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("dispatched", (False, True), ids=("plain", "under a mode"))
def test_refused(call, error, words, dispatched):
    function, keywords = call
    for _ in range(1 if dispatched else 3):  # a call like one before may not pass either
        # What the operator alone finds out, it says in its own names.
        mode = Watched() if dispatched else contextlib.nullcontext()
        with pytest.raises(error, match=None if dispatched else words), mode:
            function(**keywords)


BEFORE_A_WRITE = {
    "out": (appended(out=torch.zeros(2, 1, 4, 8)), ValueError, "out has shape"),
    "out of another dtype": (appended(out=torch.zeros(2, 1, 4, 16).half()), TypeError, "out has dtype"),
    "slopes": (appended(alibi_slopes=torch.ones(3)), ValueError, "alibi_slopes has shape"),
    "sinks": (appended(sinks=torch.ones(5)), ValueError, "sinks has shape"),
    "scale": (appended(softmax_scale=math.nan), ValueError, "softmax_scale is nan"),
    "window": (appended(window_size=(-2, 0)), ValueError, "window_size"),
    "cap": (appended(softcap=math.inf), ValueError, "softcap is inf"),
    "bound": (appended_packed(max_seqlen_q=-3), ValueError, "max_seqlen_q is -3"),
    "rows": (appended_packed(cu_seqlens_q=ints(0, 9, 5)), ValueError, r"cu_seqlens_q\[0\] is 0 and the next 9"),
    "more rows than the bound": (appended_packed(max_seqlen_q=2), ValueError, "cu_seqlens_q"),
    "a head_dim of 12": (
        appended(q=torch.randn(2, 1, 4, 12), k_cache=torch.randn(2, 8, 2, 12), v_cache=torch.randn(2, 8, 2, 12),
                 k=torch.randn(2, 1, 2, 12), v=torch.randn(2, 1, 2, 12), sinks=torch.ones(3)), ValueError, "sinks",
    ),
    "a strided out": (appended(out=torch.zeros(2, 1, 4, 32)[..., ::2]), ValueError, "out has strides"),
    "a freed out": (appended(out=freed(2, 1, 4, 16)), ValueError, "out has .*no memory"),
    "a gradient of the second query": (appended(qv=torch.randn(2, 1, 4, 16, requires_grad=True)), ValueError, "qv req"),
    "the same, narrow": (
        appended(q=torch.randn(2, 1, 4, 12), k_cache=torch.randn(2, 8, 2, 12), v_cache=torch.randn(2, 8, 2, 12),
                 k=torch.randn(2, 1, 2, 12), v=torch.randn(2, 1, 2, 12), out=torch.zeros(2, 1, 4, 12),
                 qv=torch.randn(2, 1, 4, 12, requires_grad=True)), ValueError, "qv requires one",
    ),
    "a negated cache": (
        appended(k_cache=torch.randn(2, 8, 2, 16, dtype=torch.cfloat).conj().imag), ValueError, "k_cache is lazily",
    ),
    "a gradient": (appended(sinks=torch.randn(4, requires_grad=True)), ValueError, "sinks requires one"),
    "new tokens that fall": (
        appended(k=torch.randn(3, 2, 16), v=torch.randn(3, 2, 16), cu_seqlens_k_new=ints(0, 4, 3)), ValueError,
        r"^cu_seqlens_k_new\[0\] is 0 and the next 4; they must rise from 0 to the 3 rows there are",
    ),
    "new tokens elsewhere": (
        appended(k=torch.randn(3, 2, 16), v=torch.randn(3, 2, 16), cu_seqlens_k_new=ints(9, 10, 12)), ValueError,
        r"^cu_seqlens_k_new\[0\] is 9 and the next 10; they must rise from 0 to the 3 rows there are",
    ),
    "places without angles": (
        rotated(rotary_seqlens=ints(3, 8)), ValueError,
        r"^rotary_seqlens\[1\] is 8, so that new tokens are rotated by .* place 8; rotary_cos .* have places 0 to 7",
    ),
    "negative places": (rotated(rotary_seqlens=ints(-2, 3)), ValueError, r"^rotary_seqlens\[0\] is -2, .* place -2; "),
    "lengths without angles": (
        rotated(k_cache=torch.randn(2, 12, 2, 16), v_cache=torch.randn(2, 12, 2, 16), cache_seqlens=ints(3, 7),
                **new_tokens(3)), ValueError, r"^cache_seqlens\[1\] is 7, so that new tokens .* places 7 to 9; ",
    ),
    "queries without angles": (
        rotated(q=torch.randn(2, 6, 4, 16), cache_seqlens=ints(2, 3), window_size=(9, 9)), ValueError,
        r"^cache_seqlens\[1\] is 3, so that queries .* places 3 to 8; rotary_cos",
    ),
    "no angles": (
        rotated(rotary_cos=torch.randn(0, 8), rotary_sin=torch.randn(0, 8)), ValueError, "rotary_sin have no places",
    ),
    "a negative length": (
        appended(cache_seqlens=ints(3, -1)), LengthError,
        r"^cache_seqlens\[1\] is -1; it must be from 0 to 7, which with 1 new token is what the cache has room for, 8",
    ),
    "a more negative length": (appended(cache_seqlens=ints(-5, 3)), LengthError, r"^cache_seqlens\[0\] is -5; .* to 7"),
    "a negative length, and angles": (rotated(cache_seqlens=ints(3, -1)), LengthError, r"^cache_seqlens\[1\] is -1; "),
    "a negative length, paged": (
        paged(cache_seqlens=ints(-1, 3), **new_tokens(2)), LengthError,
        r"^cache_seqlens\[0\] is -1; it must be .* to 6, which with 2 new tokens is what block_table has room for, 8",
    ),
    "new tokens of one sequence": (
        appended(k=torch.randn(6, 2, 16), v=torch.randn(6, 2, 16), cu_seqlens_k_new=ints(0, 1, 6)), LengthError,
        r"^cache_seqlens\[1\] is 4; it must be from 0 to 3, which with 5 new tokens",
    ),
    "more new tokens than room": (
        appended(cache_seqlens=ints(0, 0), **new_tokens(9)), LengthError, "^sequence 0 has 9 new tokens, more than",
    ),
    "beyond the cache, padded": (
        appended(cache_seqlens=ints(3, 8), cache_leftpad=ints(0, 0)), LengthError, r"^cache_seqlens\[1\] is 8; .* to 7",
    ),
    "a row that is written": (
        appended(cache_batch_idx=ints(0, 2)), ValueError, r"^cache_batch_idx\[1\] is 2; the cache has rows 0 to 1",
    ),
    "a row that is written and not read": (
        appended_packed(q=torch.randn(1, 4, 16), cu_seqlens_q=ints(0, 1, 1), cache_batch_idx=ints(0, 5)), ValueError,
        r"^cache_batch_idx\[1\] is 5; the cache has rows 0 to 1",
    ),
    "a page that is written and not read": (
        paged(q=torch.randn(1, 4, 16), cu_seqlens_q=ints(0, 1, 1), max_seqlen_q=1,
              block_table=ints(0, 1, 2, 9).view(2, 2), **new_tokens(1)), ValueError,
        r"^block_table\[1, 1\] is 9; the cache has pages 0 to 5",
    ),
    "one row twice": (
        appended(cache_batch_idx=ints(1, 1), cache_seqlens=ints(4, 4)), OverlapError,
        r"^cache_batch_idx\[0\] and cache_batch_idx\[1\] are both 1, and new tokens of both sequences .* place 4 there",
    ),
    "one row twice, some places": (
        appended(cache_batch_idx=torch.tensor([1, 1]), cache_seqlens=ints(5, 3), **new_tokens(3)), OverlapError,
        "place 5 there",
    ),
    "one row twice among others": (
        appended(q=torch.randn(4, 1, 4, 16), cache_batch_idx=ints(1, 0, 1, 1), cache_seqlens=ints(3, 4, 2, 4),
                 k=torch.randn(5, 2, 16), v=torch.randn(5, 2, 16), cu_seqlens_k_new=ints(0, 2, 3, 4, 5)), OverlapError,
        r"^cache_batch_idx\[0\] and cache_batch_idx\[3\] are both 1, .* place 4 there",
    ),
    "one row twice, rotated": (
        rotated(cache_batch_idx=ints(0, 0), cache_seqlens=ints(3, 3)), OverlapError, r"are both 0, .* place 3 there",
    ),
    "one row of the table twice": (
        paged(cache_batch_idx=ints(1, 1), cache_seqlens=ints(4, 4), **new_tokens(1)), OverlapError, "both 1, .* place 4"
    ),
    "one row twice, padded": (
        appended(cache_batch_idx=ints(1, 1), cache_seqlens=ints(4, 4), cache_leftpad=ints(1, 2)), OverlapError,
        "place 4 there",
    ),
    "one row twice, and a length that is worse": (
        appended(cache_batch_idx=ints(1, 1), cache_seqlens=ints(-1, -1)), LengthError, r"^cache_seqlens\[0\] is -1",
    ),
    "no rows": (
        appended(q=torch.randn(0, 4, 16), cu_seqlens_q=ints(0, 2, 5), max_seqlen_q=3), ValueError, r"cu_seqlens_q\[0\]",
    ),
    "a second query": (appended(qv=torch.randn(2, 1, 4, 16), sinks=torch.ones(3)), ValueError, "sinks has shape"),
    "a page that is read": (
        paged(k=torch.randn(2, 1, 2, 16), v=torch.randn(2, 1, 2, 16), cache_seqlens=ints(4, 4),
              block_table=ints(0, 1, 9, 3).view(2, 2)), ValueError, r"block_table\[1, 0\] is 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), BEFORE_A_WRITE.values(), ids=BEFORE_A_WRITE)
@pytest.mark.parametrize("dispatched", (False, True), ids=("plain", "under a mode"))
def test_nothing_is_written_before_all_is_checked(call, error, words, dispatched):
    function, keywords = call
    caches = keywords["k_cache"], keywords["v_cache"]
    before = [(cache.clone(), cache._version) for cache in caches]
    for _ in range(3):
        with pytest.raises(error, match=words), Watched() if dispatched else contextlib.nullcontext():
            function(**keywords)
    for cache, (old, version) in zip(caches, before, strict=True):
        assert torch.equal(cache, old) and cache._version == version


@pytest.mark.parametrize(
    "bad", ({"block_table": ints(0, 1, 9, 3).view(2, 2)}, {"cache_seqlens": ints(4, 8)}, {"cache_seqlens": ints(-1, 4)})
)
def test_nothing_is_written_by_a_call_like_one_before(bad):
    new = {name: torch.randn(2, 1, 2, 16) for name in "kv"}
    for _ in range(5):
        function, keywords = paged(**new, cache_seqlens=ints(4, 4))
        function(**keywords)
    function, keywords = paged(**new, **{"cache_seqlens": ints(4, 4), **bad})
    before = [keywords[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(ValueError, match=next(iter(bad))):
        function(**keywords)
    for name, old in zip(("k_cache", "v_cache"), before, strict=True):
        assert torch.equal(keywords[name], old) and keywords[name]._version == 0


@pytest.mark.parametrize(
    ("lengths", "table", "words"),
    (
        (ints(3, 8), None, "from 0 to 7, which with 1 new token is what .* has room for, 8"),
        (
            ints(3, -1),
            ints(0, 1, 2, 3).view(2, 2),
            r"cache_seqlens\[1\] is -1; .*what a row of block_table .* has room for, 8",
        ),
        (torch.tensor([3, 2**40]), None, rf"cache_seqlens\[1\] is {2**40}; .* 8"),
        (ints(3, 7), ints(0, 1, 2, 9).view(2, 2), r"block_table\[1, 1\] is 9; the cache has pages 0 to 5"),
    ),
)
def test_the_operator_that_appends_says_what_is_wrong(lengths, table, words):
    """As compiled functions call it."""
    _, keywords = appended() if table is None else paged(**new_tokens(1))
    caches = keywords["k_cache"], keywords["v_cache"]
    arguments = (keywords["k"], keywords["v"], *caches, lengths, table, *[None] * 6, False, False)
    with pytest.raises(ValueError, match=rf"{words}\. Nothing was written"):
        torch.ops.aiter.append_to_cache(*arguments)
    assert [cache._version for cache in caches] == [0, 0]


HUGE = 2**31 - 1


@pytest.mark.parametrize("make", (appended, paged), ids=("rows", "pages"))
@pytest.mark.parametrize("more", ({}, {"cache_leftpad": ints(0, 0)}, {"cu_seqlens_k_new": ints(0, 0, 3)}), ids=len)
@pytest.mark.parametrize(
    ("lengths", "shown"),
    (
        (ints(3, HUGE), HUGE),
        (ints(3, HUGE - 1), HUGE - 1),
        (torch.tensor([3, HUGE + 1]), HUGE + 1),
        (torch.tensor([3, 2**40]), 2**40),
        (torch.tensor([3, -(2**40)]), -(2**40)),
    ),
)
def test_lengths_beyond_int32_are_shown_as_given(make, more, lengths, shown):
    """Those and new tokens, and those that int32 cannot hold."""
    new = new_tokens(3)
    if "cu_seqlens_k_new" in more:
        new = {name: tokens[0] for name, tokens in new.items()}
    function, keywords = make(**new, cache_seqlens=lengths, **more)
    for _ in range(3):
        with pytest.raises(
            LengthError, match=rf"^cache_seqlens\[1\] is {shown}; it must be from 0 to 5, .* 8\. Nothing"
        ):
            function(**keywords)
    assert keywords["k_cache"]._version == keywords["v_cache"]._version == 0


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (cached(cache_seqlens=torch.tensor([3, 2**40])), rf"cache_seqlens\[1\] is {2**40}; "),
        (cached(cache_batch_idx=torch.tensor([0, -(2**40)])), rf"cache_batch_idx\[1\] is {-(2**40)}; "),
        (paged(block_table=torch.tensor([[0, 1], [2**40, 3]])), rf"block_table\[1, 0\] is {2**40}; "),
        (paged(cache_leftpad=torch.tensor([0, 2**40])), rf"cache_leftpad\[1\] is {2**40}; "),
        (packed(seqused_k=torch.tensor([4, -(2**40)])), rf"seqused_k\[1\] is {-(2**40)}; "),
        (packed(cu_seqlens_q=torch.tensor([0, 2**40, 7])), rf"cu_seqlens_q\[0\] is 0 and the next {2**40}; "),
        (listed(page_indptr=torch.tensor([0, 2**40, 3])), rf"page_indptr\[0\] is 0 and the next {2**40}; "),
        (listed(last_page_len=torch.tensor([4, 2**40])), rf"last_page_len\[1\] is {2**40}; "),
    ),
)
def test_numbers_that_int32_cannot_hold_are_shown_as_given(call, words):
    function, keywords = call
    with pytest.raises(ValueError, match=f"^{words}"):
        function(**keywords)


def _of_both(name, shape, own, other, other_shape, batch):
    """The message about two arguments that are not of one batch."""
    return (
        rf"^{name} has shape \({shape}\), of {own}, but {other} has shape \({other_shape}\), of {batch}: both must be"
    )


@pytest.mark.parametrize(
    ("call", "words"),
    (
        (
            packed(cu_seqlens_q=ints(0, 1, 3, 7)),
            _of_both("cu_seqlens_k", "3,", "2 sequences", "cu_seqlens_q", "4,", "3 sequences"),
        ),
        (
            packed(cu_seqlens_k=ints(0, 9)),
            _of_both("cu_seqlens_k", "2,", "1 sequence", "cu_seqlens_q", "3,", "2 sequences"),
        ),
        (
            packed(cu_seqlens_k=ints()),
            _of_both("cu_seqlens_k", "0,", "0 sequences", "cu_seqlens_q", "3,", "2 sequences"),
        ),
        (
            packed(seqused_k=ints(4, 5, 6)),
            _of_both("seqused_k", "3,", "3 sequences", "cu_seqlens_q", "3,", "2 sequences"),
        ),
        (packed(seqused_q=ints(4)), _of_both("seqused_q", "1,", "1 sequence", "cu_seqlens_q", "3,", "2 sequences")),
        (
            packed(k=torch.randn(6, 4, 2, 16), v=torch.randn(6, 4, 2, 16), block_table=ints(0, 1).view(1, 2)),
            _of_both("block_table", "1, 2", "1 sequence", "cu_seqlens_q", "3,", "2 sequences"),
        ),
        (
            listed(cu_seqlens_q=ints(0, 7)),
            _of_both("page_indptr", "3,", "2 sequences", "cu_seqlens_q", "2,", "1 sequence"),
        ),
        (
            listed(last_page_len=ints(1, 2, 3)),
            _of_both("last_page_len", "3,", "3 sequences", "cu_seqlens_q", "3,", "2 sequences"),
        ),
        (
            cached(cache_seqlens=ints(3, 4, 5)),
            _of_both("cache_seqlens", "3,", "3 sequences", "q", "2, 1, 4, 16", "2 sequences"),
        ),
        (
            cached(cache_batch_idx=ints(1)),
            _of_both("cache_batch_idx", "1,", "1 sequence", "q", "2, 1, 4, 16", "2 sequences"),
        ),
        (
            cached(cache_leftpad=ints(1)),
            _of_both("cache_leftpad", "1,", "1 sequence", "q", "2, 1, 4, 16", "2 sequences"),
        ),
        (
            paged(block_table=ints(0, 1, 2, 3).view(1, 4)),
            _of_both("block_table", "1, 4", "1 sequence", "q", "2, 1, 4, 16", "2 sequences"),
        ),
        (
            appended_packed(cu_seqlens_q=ints(0, 2, 4, 5)),
            _of_both("cache_seqlens", "2,", "2 sequences", "cu_seqlens_q", "4,", "3 sequences"),
        ),
        (
            appended(k=torch.randn(3, 2, 16), v=torch.randn(3, 2, 16), cu_seqlens_k_new=ints(0, 3)),
            _of_both("cu_seqlens_k_new", "2,", "1 sequence", "q", "2, 1, 4, 16", "2 sequences"),
        ),
    ),
)
def test_arguments_of_two_batches_are_both_named(call, words):
    """Who is wrong, nobody can tell."""
    function, keywords = call
    for _ in range(3):
        with pytest.raises(ValueError, match=words):
            function(**keywords)


@pytest.mark.parametrize("make", (appended, paged), ids=("rows", "pages"))
@pytest.mark.parametrize(
    ("lengths", "starts"), (((4, 3), (0, 1, 2)), ((3, 5), (0, 2, 4)), ((3, 3), (0, 2, 2)), ((3, 3), (0, 0, 0)))
)
def test_one_row_of_several_sequences(make, lengths, starts):
    """They may write to places of their own in it."""
    new = {name: torch.randn(starts[-1], 2, 16) for name in "kv"}
    for _ in range(4):
        function, keywords = make(cache_batch_idx=ints(1, 1), cache_seqlens=ints(*lengths), **new)
        keywords["cu_seqlens_k_new"] = ints(*starts)
        expected = {f"{name}_cache": keywords[f"{name}_cache"].clone() for name in "kv"}
        function(**keywords)
        for name, cache in expected.items():
            row = cache[2:4].view(8, 2, 16) if make is paged else cache[1]
            for length, start, end in zip(lengths, starts, starts[1:], strict=False):
                row[length : length + end - start] = new[name[0]][start:end]
            assert torch.equal(keywords[name], cache)


def test_one_row_that_several_sequences_read():
    for make in (cached, paged):
        function, keywords = make(cache_batch_idx=ints(1, 1))
        for _ in range(4):
            outputs = function(**keywords)
        keywords["cache_batch_idx"] = ints(0, 1)
        assert torch.equal(outputs[1], function(**keywords)[1])


def test_one_row_twice_in_a_call_like_one_before():
    for rows in (*[ints(1, 0)] * 5, ints(1, 1), ints(0, 1), ints(0, 0)):
        function, keywords = appended(cache_batch_idx=rows, cache_seqlens=ints(4, 4))
        before = [keywords[name].clone() for name in ("k_cache", "v_cache")]
        if rows[0] != rows[1]:
            function(**keywords)
            assert keywords["k_cache"]._version == 1
            continue
        with pytest.raises(OverlapError, match=rf"are both {int(rows[0])}, ") as raised:
            function(**keywords)
        assert isinstance(raised.value, ValueError) and isinstance(raised.value, AiterError)
        for name, old in zip(("k_cache", "v_cache"), before, strict=True):
            assert torch.equal(keywords[name], old) and keywords[name]._version == 0


@pytest.mark.parametrize("angles", (False, True))
def test_packed_queries_of_a_call_like_one_before(angles):
    """Taken as often as they are good, and refused before anything is written when they are not."""
    for starts in (*[ints(0, 2, 5)] * 5, ints(0, 5, 4), ints(0, 1, 5)):
        function, keywords = (rotated if angles else appended)(q=torch.randn(5, 4, 16), max_seqlen_q=4)
        keywords["cu_seqlens_q"] = starts
        if int(starts[1]) == 5:
            with pytest.raises(ValueError, match="cu_seqlens_q"):
                function(**keywords)
        else:
            function(**keywords)
        assert keywords["k_cache"]._version == (0 if int(starts[1]) == 5 else 1)


@pytest.mark.parametrize("head_dim", (12, 16))
def test_outputs_of_inference_mode(head_dim):
    """Outside of it, too, where PyTorch itself writes into no such tensor."""
    q, k_cache, v_cache = torch.randn(2, 1, 4, head_dim), torch.randn(2, 8, 2, head_dim), torch.randn(2, 8, 2, head_dim)
    new = {name: torch.randn(2, 1, 2, head_dim) for name in "kv"}
    with torch.inference_mode():
        out = torch.zeros(2, 1, 4, head_dim)
    call = {"q": q, "k_cache": k_cache, "v_cache": v_cache, **new, "cache_seqlens": ints(3, 4)}
    assert torch.equal(flash_attn_with_kvcache(**call, out=out), flash_attn_with_kvcache(**call))


def test_fake_tensors():
    with FakeTensorMode():
        function, keywords = appended(cache_leftpad=torch.ones(2, dtype=torch.int32))
        assert function(**keywords).shape == (2, 1, 4, 16)


def test_caches_apart_in_one_memory_have_versions_of_their_own():
    """Keys and values side by side, each with a counter of its own."""
    for _ in range(6):
        key_cache, value_cache = (part.data for part in torch.zeros(2, 8, 2, 32).split(16, -1))
        function, keywords = appended(k_cache=key_cache, v_cache=value_cache)
        function(**keywords)
        assert (key_cache._version, value_cache._version) == (1, 1)


def test_gradients_that_were_freed():
    q, k, v = (torch.randn(2, rows, heads, 16, requires_grad=True) for rows, heads in ((3, 4), (5, 2), (5, 2)))
    _, lse = flash_attn_func(q, k, v, return_lse=True)
    for gradient in (freed(2, 4, 3), freed_view(2, 4, 3)):
        with pytest.raises(ValueError, match=r"the gradient of the log-sum-exp has .*no memory"):
            torch.autograd.grad(lse, (q, k, v), gradient, retain_graph=True)


def _write_by_slots(cache):
    kv_cache.reshape_and_cache(torch.ones(1, 2, 16), torch.ones(1, 2, 16), cache, torch.zeros_like(cache), ints(1))


def _write_by_operator(cache):
    tokens = torch.ones(1, 2, 16)
    torch.ops.aiter.reshape_and_cache(tokens, tokens, cache, torch.zeros_like(cache), ints(1))


def _write_by_lengths(cache):
    new, query = torch.ones(3, 1, 2, 16), torch.ones(3, 1, 2, 16)
    flash_attn_with_kvcache(query, cache, torch.zeros_like(cache), new, new, cache_seqlens=ints(0, 1, 2))


@pytest.mark.parametrize("write", (_write_by_slots, _write_by_operator, _write_by_lengths))
@pytest.mark.parametrize("known", (False, True))
def test_autograd_sees_what_is_written(write, known):
    """A cache that a graph has saved cannot be written unnoticed, by a call like one before neither."""
    cache, weight = torch.randn(3, 4, 2, 16), torch.randn(3, 4, 2, 16, requires_grad=True)
    for _ in range(4 if known else 0):
        write(torch.randn(3, 4, 2, 16))
    loss = (weight * cache).sum()
    with torch.no_grad():
        write(cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_caches_of_inference_mode_are_written():
    with torch.inference_mode():
        cache = torch.zeros(3, 4, 2, 16)
        for _ in range(4):
            _write_by_slots(cache)
            _write_by_lengths(cache)
    _write_by_slots(cache)
    assert cache[0, 1].eq(1).all()


def test_an_interleaved_cache_is_no_overlap():
    """Keys and values side by side, heads before tokens: memory in another order than the dimensions."""
    both = torch.zeros(4, 2, 8, 32)
    key_cache, value_cache = (part.transpose(1, 2) for part in both.split(16, -1))
    kv_cache.reshape_and_cache(torch.ones(1, 2, 16), torch.ones(1, 2, 16), key_cache, value_cache, ints(9))
    assert both[1, :, 1].eq(1).all() and both.sum() == 64


@pytest.mark.parametrize("name", sorted(flash_attn_arguments.HINTS))
def test_hints_change_nothing(name):
    torch.manual_seed(0)
    function, keywords = dense()
    expected = function(**keywords)
    kind = flash_attn_arguments.HINTS[name][0]
    for value in (None, kind(2) if kind in (int, bool) else torch.zeros(2)):
        assert torch.equal(function(**keywords, **{name: value}), expected)
