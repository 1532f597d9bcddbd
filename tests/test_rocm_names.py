"""The names of ROCm's library: what resolves here means the same, and all else says what this package is."""

import importlib
import importlib.util
import inspect
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from problems import DEVICE, page_lists, randn

import aiter
from aiter import reference
from aiter.integrations.rocm import names

DTYPE = torch.float32 if DEVICE == "cpu" else torch.bfloat16
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5} if DEVICE == "cpu" else {"rtol": 2e-2, "atol": 2e-2}
LENGTHS, QUERIES = (33, 5, 64), (1, 5, 8)  # cached tokens, queries of each sequence
HEADS, HEADS_KV, DIM = 6, 2, 64


def ints(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def starts(counts):
    return ints([0, *counts]).cumsum(0).int()


class Paged:
    """Packed queries, and caches (pages, page_size, heads_kv, dim) with what names their pages."""

    def __init__(self, page_size=16, queries=QUERIES, heads=HEADS, heads_kv=HEADS_KV, dim=DIM, latent=None):
        per_sequence = -(-max(LENGTHS) // page_size)
        pages = len(LENGTHS) * per_sequence + 1
        self.page_size, self.queries = page_size, queries
        self.table = torch.randperm(pages, device=DEVICE)[:-1].view(len(LENGTHS), -1).int()
        self.indptr, self.indices, self.last = page_lists(self.table, LENGTHS, page_size, spare=9)
        self.key = randn(pages, page_size, heads_kv, dim, dtype=DTYPE)
        self.value = self.key[..., :latent] if latent else randn(pages, page_size, heads_kv, dim, dtype=DTYPE)
        self.query = randn(sum(queries), heads, dim, dtype=DTYPE)
        self.starts, self.lengths = starts(queries), ints(LENGTHS)
        self.out = torch.full((*self.query.shape[:2], self.value.shape[-1]), math.nan, dtype=DTYPE, device=DEVICE)

    def check(self, output, lse=None, causal=True, scale=None, **options):
        """Against the sequences one by one; lse (heads, total)."""
        at = 0
        for row, length, count in zip(self.table, LENGTHS, self.queries, strict=True):
            key, value = (
                reference.gather_pages(cache.transpose(1, 2), row, length) for cache in (self.key, self.value)
            )
            rows = slice(at, at + count)
            expected = reference.attend_one(self.query[rows], key, value, causal, scale, **options)
            torch.testing.assert_close(output[rows].double(), expected[0], **TOLERANCE)
            if lse is not None:
                torch.testing.assert_close(lse[:, rows].double(), expected[1], **TOLERANCE)
            at += count


# ---- one function for both packages' keywords ----


def test_flash_attn_func_takes_both_packages_calls():
    q, k, v = (randn(2, 33, 4, 64, dtype=DTYPE) for _ in "qkv")
    expected, lse = aiter.flash_attn_func(q, k, v, True, return_lse=True)
    for call in (
        lambda f: f(q=q, k=k, v=v, causal=True, return_lse=True),
        lambda f: f(query=q, key=k, value=v, causal=True, dropout_p=0.0, return_lse=True),
        lambda f: f(q, k, v, causal=True, window_size=(-1, -1, 0), return_lse=True, how_v3_bf16_cvt=2),
        lambda f: f(q, k, v, 0.0, None, True, (-1, -1), None, None, True, True),
    ):
        output = call(aiter.flash_attn_func)
        assert torch.equal(output[0], expected) and torch.equal(output[1], lse)
    probabilities = aiter.flash_attn_func(q, k, v, dropout_p=0.0, causal=True, return_attn_probs=True)
    assert torch.equal(probabilities[0], expected) and probabilities[1] is None
    weights = aiter.flash_attn_func(q, k, v, dropout_p=0.5, return_lse=True, return_attn_probs=True)[2]
    assert weights.shape == (2, 4, 33, 33) and 0.4 < weights.lt(0).float().mean() < 0.6
    sinks = torch.randn(4, device=DEVICE)
    assert torch.equal(aiter.flash_attn_func(q, k, v, sink_ptr=sinks), aiter.flash_attn_func(q, k, v, sinks=sinks))
    signature = inspect.signature(aiter.flash_attn_func)
    assert list(signature.parameters)[:5] == ["query", "key", "value", "causal", "softmax_scale"]


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "words"),
    (
        ((0.0,), {}, TypeError, "it is causal here, and dropout_p in ROCm's library"),
        ((0.0, None), {}, TypeError, "it is causal here"),
        ((True,), {"deterministic": True}, TypeError, "it is causal here"),
        ((True, None, True), {}, TypeError, "it is causal here"),
        ((0.0,), {"return_attn_probs": True}, TypeError, "give everything after q, k and v by name"),
        ((), {"bias": torch.zeros(1)}, NotImplementedError, "bias is not offered"),
        ((), {"window_size": (4, 4, 2)}, NotImplementedError, "keeps sink tokens"),
        ((), {"dropout_p": 0.0, "nonsense": 1}, TypeError, "nonsense"),
    ),
)
def test_flash_attn_func_is_never_silently_wrong(arguments, keywords, error, words):
    q = randn(1, 3, 2, 64, dtype=DTYPE)
    with pytest.raises(error, match=words):
        aiter.flash_attn_func(q, q, q, *arguments, **keywords)


def test_compiled():
    q = randn(2, 9, 4, 64, dtype=DTYPE)

    def call(x):
        return aiter.flash_attn_func(q=x, k=x, v=x, causal=True, return_lse=True, dropout_p=0.0)

    torch._dynamo.reset()
    for ours, theirs in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(q), call(q), strict=True):
        assert torch.equal(ours, theirs)


def test_rows_of_padded_batches():
    counts, used = (20, 12), (7, 30)  # fewer than there is room for: the bounds are theirs
    q, k, v = (randn(2, 33, heads, 64, dtype=DTYPE) for heads in (4, 2, 2))
    output, lse = aiter.flash_attn_func(
        q=q, k=k, v=v, cu_seqlens_q=starts(counts), cu_seqlens_kv=starts(used), return_lse=True
    )
    packed = [tensor.flatten(0, 1) for tensor in (q, k, v)]
    places = ints([0, 33, 66])
    padded = aiter.flash_attn_varlen_func(
        *(*packed, starts(counts), starts(used), max(counts), max(used)),
        cu_seqlens_q_padded=places,
        cu_seqlens_k_padded=places,
        return_lse=True,
    )
    assert torch.equal(padded[0].view_as(output), output) and lse.shape == (2, 4, 33) and padded[1].shape == (4, 66)
    for b in range(2):
        expected = reference.attend_one(q[b, : counts[b]], k[b, : used[b]], v[b, : used[b]], False)
        torch.testing.assert_close(output[b, : counts[b]].double(), expected[0], **TOLERANCE)
        torch.testing.assert_close(lse[b, :, : counts[b]].double(), expected[1], **TOLERANCE)


def test_varlen_positions_are_rocms():
    q = randn(9, 2, 64, dtype=DTYPE)
    places = starts((4, 5))
    # ..., min_seqlen_q, dropout_p, softmax_scale, logits_soft_cap, causal, window_size
    output = aiter.flash_attn_varlen_func(q, q, q, places, places, 5, 5, 1, 0.0, 0.3, 4.0, True, (2, -1, 0))
    for rows in (slice(4), slice(4, 9)):
        expected = reference.attend_one(q[rows], q[rows], q[rows], True, 0.3, softcap=4.0, window=(2, 0))
        torch.testing.assert_close(output[rows].double(), expected[0], **TOLERANCE)
    with pytest.raises(TypeError, match=r"min_seqlen_q, is 0\.0; it must be an int.*aiter\.flash_attn\."):
        aiter.flash_attn_varlen_func(q, q, q, places, places, 5, 5, 0.0, None, True)


# ---- pages ----


@pytest.mark.parametrize("form", ("lists", "slots", "block_table"))
def test_batch_prefill(form):
    case = Paged(1 if form == "slots" else 16)
    caches = [cache.squeeze(1) if form == "slots" else cache for cache in (case.key, case.value)]
    where = {"kv_last_page_lens": case.last}
    if form == "block_table":
        where = {"block_table": case.table, "seqlen_k": case.lengths}
    output, lse = aiter.mha_batch_prefill_func(
        *(case.query, *caches, case.starts, case.indptr, case.indices, max(QUERIES), max(LENGTHS)),
        causal=True,
        window_size=(20, -1),
        logits_soft_cap=3.0,
        return_lse=True,
        out=case.out,
        **where,
    )
    assert output.data_ptr() == case.out.data_ptr()
    case.check(output, lse, softcap=3.0, window=(20, 0))


@pytest.mark.parametrize("layout", ("NHD", "HND"))
def test_paged_attention(layout):
    case = Paged(16, queries=(1, 1, 1))
    caches = [cache if layout == "NHD" else cache.transpose(1, 2).contiguous() for cache in (case.key, case.value)]
    one = torch.ones(1, device=DEVICE)
    ends = None, "auto", layout, 3.0, one, one
    for ragged, v1 in (
        (aiter.paged_attention_ragged, aiter.paged_attention_v1),
        (torch.ops.aiter.paged_attention_ragged, torch.ops.aiter.paged_attention_v1),
    ):
        # ROCm's callers give lists and lengths of pages of more sequences than there are.
        more = torch.cat([case.indptr, case.indptr[-1:]]), torch.cat([case.last, case.last])
        case.out.fill_(math.nan)
        ragged(case.out, one, case.query, *caches, 0.2, more[0], case.indices, more[1], 16, 1, *ends)
        case.check(case.out, scale=0.2, softcap=3.0)
        for rows in (None, starts((1, 1, 1)), starts((1, 1))):
            case.out.fill_(math.nan)
            v1(case.out, one, case.query, *caches, 0.2, case.table, rows, case.lengths, 64, *ends, None, 256, 1, 10)
            case.check(case.out, scale=0.2, softcap=3.0, window=(9, 0))
    with pytest.raises(NotImplementedError, match="alibi_slopes with logits_soft_cap"):
        v1 = aiter.paged_attention_v1
        slopes = torch.rand(HEADS, device=DEVICE)
        v1(case.out, one, case.query, *caches, 0.2, case.table, None, case.lengths, 64, slopes, *ends[1:])


def test_unified_attention():
    from aiter.ops.triton.attention.unified_attention import unified_attention
    from aiter.ops.triton.unified_attention import unified_attention as old_place

    assert unified_attention is old_place
    case, sinks = Paged(), torch.randn(HEADS, device=DEVICE)
    one = torch.ones(1, device=DEVICE)  # vLLM gives scales with every cache
    unified_attention(
        *(case.query, case.key, case.value, case.out, case.starts, max(QUERIES), case.lengths, max(LENGTHS)),
        *(0.2, True, (20, -1), case.table, 3.0, None, one, one),
        sinks=sinks,
    )
    case.check(case.out, scale=0.2, softcap=3.0, window=(20, 0), sinks=sinks)
    with pytest.raises(NotImplementedError, match="output_scale is not offered"):
        unified_attention(
            *(case.query, case.key, case.value, case.out, case.starts, max(QUERIES), case.lengths, max(LENGTHS)),
            *(0.2, True, (-1, -1), case.table, 0.0, None, one, one),
            output_scale=one,
        )


def test_queries_of_8_bits():
    case = Paged()
    case.query = case.query.to(torch.float8_e4m3fn)
    with pytest.raises(NotImplementedError, match="a query of 8 bits is not offered"):
        aiter.mha_batch_prefill_func(
            *(case.query, case.key, case.value, case.starts, case.indptr, case.indices, 8, 64),
            kv_last_page_lens=case.last,
        )


@pytest.mark.parametrize("heads", (1, 12, 16))
def test_latent_attention(heads):
    """Any number of heads, and of queries from 1 to 8."""
    from aiter.mla import mla_decode_fwd, mla_prefill_fwd
    from aiter.ops.triton.attention.mla import mla_decode_fwd as by_table

    case = Paged(1, heads=heads, heads_kv=1, dim=576, latent=512)
    where = case.starts, case.indptr, case.indices, case.last, max(QUERIES)
    _, lse = mla_decode_fwd(case.query, case.key, case.out, *where, sm_scale=0.05, num_kv_splits=4, return_lse=True)
    assert lse.shape == (sum(QUERIES), heads)
    case.check(case.out, lse.transpose(0, 1), scale=0.05)
    assert mla_decode_fwd(case.query, case.key, case.out, *where, sm_scale=0.05, causal=False)[1] is None
    case.check(case.out, scale=0.05, causal=False)
    _, lse = mla_prefill_fwd(case.query, case.key, case.out, *where, 0.05)
    assert lse.shape == (sum(QUERIES), 1, heads, 1)
    case.check(case.out, lse[:, 0, :, 0].transpose(0, 1), scale=0.05)
    case.out.fill_(math.nan)
    by_table(
        *(case.query, case.key, case.out, case.starts, case.lengths, max(LENGTHS), case.table, 0.05),
        *(512, 64, True, None, None),
    )
    case.check(case.out, scale=0.05)
    with pytest.raises(NotImplementedError, match="cp_world_size is not offered"):
        mla_decode_fwd(case.query, case.key, case.out, *where, cp_world_size=2)


def test_metadata_is_not_needed():
    needed = aiter.get_mla_metadata_info_v1(4, 1, 16, DTYPE, DTYPE, False)
    buffers = [torch.empty(shape, dtype=dtype) for shape, dtype in needed]
    assert len(buffers) == 6
    assert aiter.get_mla_metadata_v1(None, None, None, 16, 1, True, *buffers) is None


def test_other_triton_functions():
    from aiter.ops.triton.attention.mha import flash_attn_func, flash_attn_varlen_func
    from aiter.ops.triton.attention.mha_v3 import flash_attn_with_kvcache
    from aiter.ops.triton.mha import flash_attn_varlen_func as old_place
    from aiter.ops.triton.mha_v3 import flash_attn_func as v3

    q, k, v = (randn(2, 33, heads, 64, dtype=DTYPE) for heads in (4, 2, 2))
    expected = aiter.flash_attn_func(q, k, v, True, 0.2)
    assert torch.equal(flash_attn_func(q, k, v, 0.0, 0.2, True), expected)
    assert torch.equal(v3(q, k, v, 0.2, True), expected)
    packed, places = [tensor.flatten(0, 1) for tensor in (q, k, v)], ints([0, 33, 66])
    for function in (flash_attn_varlen_func, old_place):
        output = function(*packed, places, places, 33, 33, 0.0, 0.2, True)
        torch.testing.assert_close(output.view_as(expected), expected)
    torch.testing.assert_close(flash_attn_with_kvcache(q, k, v, cache_seqlens=33, softmax_scale=0.2), expected)


# ---- caches ----


@pytest.mark.parametrize("dtype", ("auto", "fp8", "fp8_e5m2"))
def test_writes(dtype):
    stored = {"auto": torch.bfloat16, "fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[dtype]
    memory = torch.bfloat16 if dtype == "auto" else torch.uint8
    caches = [torch.zeros(4, 8, 2, 64, dtype=memory, device=DEVICE) for _ in "kv"]
    tokens = [randn(5, 2, 64, dtype=torch.bfloat16) for _ in "kv"]  # more than slots
    slots, scale = torch.tensor([9, -1, 0, 31], device=DEVICE), torch.tensor(0.5, device=DEVICE)
    aiter.reshape_and_cache_flash(*tokens, *caches, slots, dtype, scale, scale)
    for cache, token in zip(caches, tokens, strict=True):
        rows = cache.view(stored).flatten(0, 1)
        expected = token if dtype == "auto" else (token.float() / 0.5).to(stored)
        for index, slot in ((0, 9), (2, 0), (3, 31)):
            assert torch.equal(rows[slot].float(), expected[index].float())
        assert cache.float().count_nonzero(-1).gt(0).sum() == 3 * 2
    latent = torch.zeros(4, 8, 576, dtype=memory, device=DEVICE)
    compressed, rotary = (randn(5, dim, dtype=torch.bfloat16) for dim in (512, 64))
    aiter.concat_and_cache_mla(compressed, rotary, latent, slots, dtype, scale)
    expected = torch.cat([compressed, rotary], -1)
    expected = expected if dtype == "auto" else (expected.float() / 0.5).to(stored)
    assert torch.equal(latent.view(stored).flatten(0, 1)[[9, 0, 31]].float(), expected[[0, 2, 3]].float())


def test_8_bit_operands():
    q, k, v = ((randn(2, 9, 2, 64, dtype=torch.bfloat16) / 0.25).to(torch.float8_e4m3fn) for _ in "qkv")
    scale = torch.full((1,), 0.25, device=DEVICE)
    expected = aiter.flash_attn_func(*((tensor.float() * 0.25).bfloat16() for tensor in (q, k, v)), causal=True)
    output = aiter.flash_attn_fp8_pertensor_func(q, k, v, scale, scale, scale, causal=True)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)
    packed, places = [tensor.flatten(0, 1) for tensor in (q, k, v)], ints([0, 9, 18])
    output = aiter.flash_attn_varlen_fp8_pertensor_func(
        *(*packed, scale, scale, scale, places, places, 9, 9), causal=True
    )
    torch.testing.assert_close(output.view_as(expected), expected)


@pytest.mark.parametrize("name", ("pa_fwd_asm", "paged_attention_rocm", "reshape_and_cache", "mla_reduce_v1"))
def test_what_is_known_and_not_offered(name):
    with pytest.raises(NotImplementedError, match=f"{name} of ROCm's library is not offered"):
        getattr(aiter, name)(1, 2, three=3)


# ---- what resolves, and what does not ----


@pytest.mark.parametrize("module", sorted(names.MODULES))
def test_modules(module):
    found = importlib.import_module(module)
    assert importlib.util.find_spec(module) is not None and found.__doc__
    for name in found.__all__:
        assert name == "ENABLE_CK" or getattr(found, name).__doc__
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nonsense'. This is aiter-jit"):
        found.nonsense  # noqa: B018


def test_top_level():
    for name in names.TOP_LEVEL:
        assert callable(getattr(aiter, name))
    assert aiter.flash_attn_varlen_func is importlib.import_module("aiter.ops.mha").flash_attn_varlen_func


UNKNOWN = (
    "import aiter.fused_moe",
    "from aiter import gemm_a8w8_blockscale",
    "from aiter.fused_moe import fused_moe",
    "from aiter.ops import mhc",
    "from aiter.ops.shuffle import shuffle_weight",
    "from aiter.ops.triton.gemm_a16w16 import gemm_a16w16",
    "from aiter.mla import get_meta_param",
    "from aiter.jit.core import AITER_CSRC_DIR",
)


@pytest.mark.parametrize("code", UNKNOWN)
def test_all_else_says_what_this_package_is(code):
    with pytest.raises(ImportError, match=r"This is aiter-jit.*distribution amd-aiter.*docs/rocm\.md"):
        exec(code)


def test_a_question_is_answered():
    """vLLM asks before it imports."""
    for name in ("aiter.ops.triton.pa_mqa_logits", "aiter.ops.triton.attention.pa_mqa_logits", "aiter.fused_moe"):
        assert importlib.util.find_spec(name) is None
    assert not hasattr(aiter, "gemm_a4w4") and getattr(aiter, "dtypes", None) is None


def imported(path, *folders):
    """What `import aiter` prints to stderr, from the package in `path`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (path, *folders)))}
    command = [sys.executable, "-c", "import aiter"]
    ran = subprocess.run(command, env=environment, cwd=folders[0] if folders else "/", capture_output=True, text=True)
    assert ran.returncode == 0
    return ran.stderr


def test_the_other_distribution_is_noticed(tmp_path):
    package = Path(aiter.__file__).parent
    assert "import name" not in imported(package.parent)
    (tmp_path / "amd_aiter-0.1.9.dist-info").mkdir()
    warned = imported(package.parent, tmp_path)
    assert "another distribution has the import name aiter too" in warned and "amd_aiter-0.1.9.dist-info" in warned
    # Its files among ours: one was installed over the other.
    mixed = tmp_path / "site" / "aiter"
    mixed.mkdir(parents=True)
    for file in package.iterdir():
        if file.name != "__pycache__":
            (mixed / file.name).symlink_to(file)
    (mixed / "ops").mkdir()
    assert f"({mixed / 'ops'};" in imported(mixed.parent, mixed)


# What programs import for attention, in the releases that were read: each line is one `from ... import ...` of theirs.
IMPORTS = (
    # SGLang 0.5.23, sglang/srt/layers/attention/aiter_backend.py: one try block, so that it is all or nothing
    "from aiter import (flash_attn_varlen_fp8_pertensor_func, flash_attn_varlen_func, get_mla_metadata_info_v1, "
    "get_mla_metadata_v1, get_ps_metadata_info_v1, get_ps_metadata_v1, mha_batch_prefill_func, mla_prefill_ps_asm_fwd, "
    "mla_reduce_v1, paged_attention_ragged)",
    "from aiter.mla import mla_decode_fwd, mla_prefill_fwd",
    "from aiter.ops.triton.attention.unified_attention import unified_attention",
    # vLLM 0.33: rocm_aiter_unified_attn, rocm_aiter_fa, mla/rocm_aiter_mla, mla/aiter_triton_mla, _aiter_ops
    "from aiter.ops.triton.unified_attention import unified_attention",
    "from aiter import flash_attn_varlen_func, pa_fwd_asm, paged_attention_common",
    "from aiter.ops.triton.attention.mha_v3 import flash_attn_with_kvcache",
    "from aiter.ops.triton.attention.mla import mla_decode_fwd",
    "from aiter.ops.triton.mha import flash_attn_varlen_func",
    # SGLang's diffusion models, xDiT 0.7, yunchang 0.6.4
    "from aiter.jit.core import ENABLE_CK",
    "from aiter import flash_attn_func, flash_attn_varlen_func, flash_attn_fp8_pertensor_func",
    "import aiter.ops.triton.attention",
)


@pytest.mark.parametrize("code", IMPORTS)
def test_what_programs_import(code):
    exec(code)


@pytest.mark.parametrize("stored", ("fp8", "fp8_e5m2"))
def test_8_bit_caches(stored):
    """Bytes, as vLLM keeps them, with scales on the device."""
    dtype = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}[stored]
    case = Paged(16, queries=(1, 1, 1))
    case.query = case.query.bfloat16()
    scale = torch.full((1,), 0.25, device=DEVICE)
    caches = [(cache.float() / 0.25).to(dtype) for cache in (case.key, case.value)]
    case.key, case.value = (cache.float() * 0.25 for cache in caches)
    out = torch.empty_like(case.query)
    starts_, ends = case.starts, ("NHD", 0.0, scale, scale)
    aiter.paged_attention_v1(
        *(
            out,
            None,
            case.query,
            *(cache.view(torch.uint8) for cache in caches),
            0.2,
            case.table,
            None,
            case.lengths,
            64,
        ),
        *(None, stored, *ends),
    )
    again = aiter.mha_batch_prefill_func(
        *(case.query, *caches, starts_, case.indptr, case.indices, 1, 64),
        softmax_scale=0.2,
        causal=True,
        kv_last_page_lens=case.last,
        k_descale=scale,
        v_descale=scale,
    )
    assert torch.equal(out, again)
    for b, (row, length) in enumerate(zip(case.table, LENGTHS, strict=True)):
        key, value = (reference.gather_pages(cache.transpose(1, 2), row, length) for cache in (case.key, case.value))
        expected = reference.attend_one(case.query[b : b + 1], key, value, True, 0.2)[0]
        torch.testing.assert_close(out[b : b + 1].double(), expected, rtol=2e-2, atol=2e-2)
