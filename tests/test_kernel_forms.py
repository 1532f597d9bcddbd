"""Which calls get the second form of a kernel: that cuts keys, on sm_90a and AMD GPUs, or that of latent attention
which goes through tiles in rounds, on sm_90a. What they compute: test_cuda.py, on a card, and
kernels/test_gpu_pieces.py."""

import pytest
import torch

import aiter
from aiter import plan
from aiter.kernels import CUTS_NO_KEYS, Gpu, cuts_keys, form_of, forward_kernel, kernel_spec, specs_for
from aiter.layout import Sizes
from aiter.options import Options

CUT, MULTIPROCESSORS = ("cut", 1), 132
HOPPER, OTHER = Gpu.of("sm_90a", MULTIPROCESSORS), Gpu.of("sm_80", 108)
AMD, MI200 = Gpu.of("gfx942", 304), Gpu.of("gfx90a", 104)
SLOPES = torch.ones(32)


def sizes(batch, rows, keys, heads_q=32, heads_kv=8):
    return Sizes(batch, heads_q, heads_kv, rows, keys, *[0] * 8)


@pytest.mark.parametrize(
    "call, options, cut",
    [
        (sizes(1, 128, 8192), {}, True),
        (sizes(1, 256, 8192), {}, True),  # 64 tiles of 128 rows: half of the multiprocessors or less
        (sizes(1, 257, 8192), {}, False),
        (sizes(8, 16, 4096), {}, True),
        (sizes(1, 128, 2048), {}, True),
        (sizes(1, 128, 2047), {}, False),
        (sizes(4, 4096, 4096), {}, False),
        (sizes(1, 17, 8192, 28, 4), {}, True),  # seven heads share no tile
        (sizes(4, 17, 8192, 28, 4), {}, False),
        (sizes(2, 17, 8192), {"alibi_slopes": SLOPES}, True),  # nor do heads with slopes: 64 tiles
        (sizes(3, 17, 8192), {"alibi_slopes": SLOPES}, False),
        (sizes(3, 17, 8192), {}, True),
        (sizes(1, 128, 8192), {"window_left": 1023, "window_right": 0}, False),  # few of the keys are seen
        (sizes(1, 128, 8192), {"window_left": 4095, "window_right": 0}, True),
        (sizes(1, 128, 8192), {"window_left": 100}, True),
    ],
)
def test_few_rows_on_many_keys(call, options, cut):
    assert cuts_keys(call, 128, Options(**options), HOPPER) == cut
    assert not cuts_keys(call, 128, Options(**options), OTHER), "of a GPU without such a kernel"


@pytest.mark.parametrize(
    "call, equal_lengths, decodes",
    [
        (sizes(1, 8, 8192, 28, 4), True, True),  # 56 rows, of seven heads that share no tile
        (sizes(1, 8, 8192), True, True),  # 32 rows
        (sizes(1, 9, 8192), True, False),  # more: keys are cut
        (sizes(1, 9, 1024), True, True),  # too few keys for that, and too few sequences to fill the GPU
        (sizes(16, 16, 1024), True, False),
        (sizes(16, 16, 1024), False, True),  # one may have most of the keys
        (sizes(8, 16, 8192), False, False),  # but pieces of it are dealt
        (sizes(1, 17, 1024), True, False),
    ],
)
def test_more_rows_than_decoding_is_good_for(call, equal_lengths, decodes):
    chosen = forward_kernel(call, 128, Options(), HOPPER, equal_lengths)
    assert chosen == ("attention_decode" if decodes else "attention_forward")
    slopes = forward_kernel(call, 128, Options(alibi_slopes=SLOPES), HOPPER, equal_lengths)
    others = (forward_kernel(call, 128, Options(), gpu, equal_lengths) for gpu in (OTHER, AMD))
    for other in (slopes, *others):
        assert (other == "attention_decode") == (call.seqlen_q <= 16)


def options_of(*options, kernel="attention_forward", head_dim=128, arch="sm_90a", **more):
    return kernel_spec(kernel, "bf16", head_dim, True, arch, options=options, **more).options


def test_where_there_is_such_a_form():
    assert options_of("cut") == options_of("batch_invariant") == options_of("batch_invariant", "cut") == (CUT,)
    assert options_of("cut", "softcap", paged=True) == (CUT, ("paged", 1), ("softcap", 1))
    assert options_of("cut", head_dim=192, value_dim=128) == (CUT, ("value_dim", 128))
    assert options_of() == ()
    for asked in ("cut", "batch_invariant"):
        for arch in ("sm_80", "sm_100", "sm_120"):
            assert options_of(asked, arch=arch) == ()
        for arch in ("gfx90a", "gfx942", "gfx950"):
            assert options_of(asked, arch=arch) == (CUT,)
            assert options_of(asked, "e4m3fn", arch=arch) == (CUT, ("e4m3fn", 1))
            assert options_of(asked, "dropout", arch=arch) == (("dropout", 1),)
            assert options_of(asked, arch=arch, head_dim=264) == ()
        for kernel in ("attention_decode", "attention_backward"):
            assert options_of(asked, kernel=kernel) == ()
        assert options_of(asked, head_dim=264) == ()
        assert CUT not in options_of(asked, head_dim=128, value_dim=264)
        assert options_of(asked, "dropout") == (("dropout", 1),)
        assert options_of(asked, "e4m3fn") == (("e4m3fn", 1),)
    assert options_of("batch_invariant", arch="x86-64-v3") == (("batch_invariant", 1),)


def forms(arch, *options):
    specs = specs_for("variable_length_attention", "bf16", 128, True, arch, options=options)
    return {spec.name[len("attention_") : -len(f"-{arch}")].replace("-bf16-d128-causal", "") for spec in specs}


def test_prewarm_builds_both_forms_and_one_where_bits_must_not_vary():
    decode = {"decode", "decode-paged"}
    assert forms("sm_90a") == {"forward", "forward-paged", "forward-cut", "forward-cut-paged"} | decode
    assert forms("sm_90a", "batch_invariant") == {"forward-cut", "forward-cut-paged"} | decode
    assert forms("sm_90a", "dropout") == {"forward-dropout", "forward-dropout-paged"}
    assert forms("sm_80") == forms("sm_80", "batch_invariant") == {"forward", "forward-paged"} | decode
    assert forms("gfx942") == forms("sm_90a")
    assert forms("gfx942", "batch_invariant") == {"forward-cut", "forward-cut-paged"} | decode


LATENT = {"kernel": "attention_decode", "head_dim": 576, "value_dim": 512}


def test_latent_attention_has_two_forms():
    value_dim, rounds = ("value_dim", 512), ("rounds", 1)
    assert options_of(**LATENT) == (value_dim,)
    assert options_of("rounds", **LATENT) == (rounds, value_dim)
    assert options_of("rounds", "e4m3fn", **LATENT) == (("e4m3fn", 1), value_dim)
    for arch in ("gfx942", "sm_80", "sm_100"):
        assert options_of("rounds", arch=arch, **LATENT) == (value_dim,)
    assert options_of("rounds", head_dim=512, kernel="attention_decode") == options_of("rounds") == ()
    specs = specs_for("flash_attn_func", "bf16", 576, True, "sm_90a", value_dim=512)
    assert {spec.options for spec in specs} == {(value_dim,), (rounds, value_dim)}
    assert len(specs_for("flash_attn_func", "bf16", 576, True, "gfx942", value_dim=512)) == 1


@pytest.mark.parametrize(
    ("heads", "tokens", "form", "invariant"),
    [
        (16, 1, None, None),
        (16, 2, None, None),
        (32, 3, "rounds", None),
        (65, 1, "rounds", "rounds"),
        (64, 1, None, None),
    ],
)
def test_which_one_by_rows_or_where_bits_must_not_vary_by_heads(heads, tokens, form, invariant):
    call = sizes(8, tokens, 4096, heads, 1)
    for options, expected in ((Options(), form), (Options(batch_invariant=True), invariant)):
        assert form_of("attention_decode", call, 576, options, HOPPER) == expected
        assert form_of("attention_decode", call, 512, options, HOPPER) is None
        assert form_of("attention_decode", call, 576, options, AMD) is None


class Asked(Exception):
    pass


@pytest.mark.parametrize(
    "gpu, shape, keys, options, kernel, code",
    [
        (HOPPER, (1, 128), 8192, {}, "attention_forward", ("cut",)),
        (
            HOPPER,
            (1, 128),
            8192,
            {"softcap": 5.0, "window_size": (4000, 0)},
            "attention_forward",
            ("cut", "softcap", "window"),
        ),
        (HOPPER, (1, 512), 8192, {}, "attention_forward", ()),
        (HOPPER, (1, 16), 8192, {}, "attention_forward", ("cut",)),
        (HOPPER, (1, 8), 8192, {}, "attention_decode", ()),
        (HOPPER, (32, 16), 1024, {}, "attention_forward", ()),
        (HOPPER, (1, 512), 8192, {"batch_invariant": True}, "attention_forward", ("batch_invariant",)),
        (AMD, (1, 128), 8192, {}, "attention_forward", ("cut",)),
        (AMD, (4, 32), 4096, {}, "attention_forward", ("cut",)),
        (AMD, (1, 16), 8192, {}, "attention_decode", ()),
        (AMD, (1, 1216), 8192, {}, "attention_forward", ("cut",)),  # 152 tiles of 256 rows, half of the compute units
        (AMD, (1, 1217), 8192, {}, "attention_forward", ()),
        (MI200, (1, 192), 8192, {}, "attention_forward", ("cut",)),  # of 128
        (MI200, (1, 193), 8192, {}, "attention_forward", ()),
        (OTHER, (1, 128), 8192, {}, "attention_forward", ()),
    ],
)
def test_operations_ask_for_it(monkeypatch, gpu, shape, keys, options, kernel, code):
    """CPU tensors stand for those of a GPU."""

    def ask(key, call, query):
        raise Asked(key)

    monkeypatch.setattr(plan, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(plan, "_gpu", lambda device: gpu)
    monkeypatch.setattr(plan, "_make_plan", ask)
    monkeypatch.setattr(plan, "plans", {})
    query = torch.empty(*shape, 32, 8, dtype=torch.bfloat16)
    cache = torch.empty(shape[0], keys, 8, 8, dtype=torch.bfloat16)
    with pytest.raises(Asked) as asked:
        aiter.flash_attn_func(query, cache, cache, **options)
    key = asked.value.args[0]
    assert (key[0], key[-1]) == (kernel, code)


def test_other_gpus_share_no_keys():
    assert CUTS_NO_KEYS == OTHER
    assert (AMD.multiprocessors, AMD.has_rounds) == (304, False)
    assert (AMD.tile_rows(128), AMD.tile_rows(136), MI200.tile_rows(128), HOPPER.tile_rows(64)) == (256, 128, 128, 128)
