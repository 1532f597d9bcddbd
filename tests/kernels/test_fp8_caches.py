"""Keys and values of 8 bits, read by the kernels of CPUs, of emulated AMD GPUs and of a CUDA device: every number of
every format, and calls with everything else that there is, against float64 by the rule of tests/accuracy.py. What the
references see is the cache as it is multiplied out, exactly."""

import math

import pytest
import torch
from driver import CPUS, DTYPES, GPUS, STOOD_IN, attend, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import GPU_STRIDES, STRIDES, assert_sequences
from random_calls import LENGTHS, assert_rest_is_clear, draw_call

FP8 = {"e4m3fn": torch.float8_e4m3fn, "e4m3fnuz": torch.float8_e4m3fnuz, "e5m2": torch.float8_e5m2}
FORWARD, DECODE = "attention_forward", "attention_decode"
ALL = ("alibi", "softcap", "window")
# Target, kernel, dtype, head_dims, format, options. On CPUs each engine; on GPUs each way to convert: by the chip's own
# instructions (e4m3fnuz on gfx942, e4m3fn and e5m2 on gfx950, e4m3fn from sm_89 on) and by bits. Each line is a
# compilation.
KERNELS = [
    ("x86-64-v2", FORWARD, "fp16", (72, 72), "e5m2", ("batch_invariant", "causal")),
    ("x86-64-v3", FORWARD, "bf16", (72, 72), "e4m3fn", ("causal",)),
    ("x86-64-v3", FORWARD, "fp32", (72, 40), "e4m3fnuz", ("causal",)),
    ("x86-64-v3", FORWARD, "fp16", (72, 72), "e4m3fnuz", ("batch_invariant", "causal")),
    ("x86-64-v4+avx512bf16", FORWARD, "bf16", (72, 40), "e4m3fnuz", ALL),
    ("x86-64-v4+avx512bf16", FORWARD, "bf16", (72, 72), "e4m3fn", ("batch_invariant", "causal")),
    ("x86-64-v4+avx512bf16+amxbf16+amxfp16", FORWARD, "fp16", (72, 72), "e4m3fn", ("causal",)),
    ("gfx90a", DECODE, "bf16", (72, 72), "e4m3fn", ("causal",)),
    ("gfx90a", FORWARD, "fp16", (72, 72), "e5m2", ("causal",)),
    ("gfx942", DECODE, "bf16", (576, 512), "e4m3fnuz", ("causal",)),
    ("gfx942", FORWARD, "fp16", (72, 40), "e4m3fnuz", ALL),
    ("gfx950", DECODE, "bf16", (72, 40), "e5m2", ("window",)),
    ("gfx950", FORWARD, "bf16", (72, 72), "e4m3fn", ("window",)),
    ("cuda", DECODE, "bf16", (128, 128), "e4m3fn", ("causal",)),
    ("cuda", DECODE, "fp16", (72, 40), "e4m3fnuz", ("window",)),
    ("cuda", DECODE, "bf16", (576, 512), "e4m3fn", ("causal",)),
    ("cuda", FORWARD, "bf16", (128, 128), "e4m3fn", ("causal",)),
    ("cuda", FORWARD, "fp16", (72, 40), "e5m2", ALL),
]
KERNELS = [kernel for kernel in KERNELS if kernel[0] in GPUS or (kernel[2], kernel[0]) in CPUS]
on_kernels = pytest.mark.parametrize(
    ("target", "name", "dtype", "dims", "fp8", "on"),
    KERNELS,
    ids=["-".join((*k[:3], k[4], *k[5])) + "-stand-in" * ((k[2], k[0]) in STOOD_IN) for k in KERNELS],
)


def every_number(rows, columns, fp8):
    """All 256 patterns of bits, over and over."""
    return torch.arange(rows * columns).view(rows, columns).to(torch.uint8).view(FP8[fp8])


def multiplied(target, dtype, numbers):
    """As the matrix unit sees them: that of gfx90a takes subnormal fp16, which the least of e5m2 are, for zeros."""
    numbers = numbers.float()
    flushed = (target, dtype) == ("gfx90a", "fp16")
    return torch.where(numbers.abs() < 2**-14, 0.0, numbers) if flushed else numbers


@on_kernels
def test_every_number(target, name, dtype, dims, fp8, on):
    """Of a single key the value is the output, and each of its elements, to a query of a single one, the score."""
    head_dim, value_dim = dims
    batch = -(-256 // min(dims))
    bits = every_number(batch, head_dim, fp8).float()
    key = torch.where(bits.isfinite(), bits, 0.0).to(FP8[fp8]).view(batch, 1, 1, head_dim)
    value = every_number(batch, value_dim, fp8).view(batch, 1, 1, value_dim)
    query = torch.eye(head_dim).expand(batch, 1, head_dim, head_dim).to(DTYPES[dtype])
    options = {"causal": "causal" in on, "window": (3, 0) if "window" in on else None, "name": name}
    options |= {"alibi_slopes": torch.ones(head_dim) if "alibi" in on else None}
    options |= {"softcap": 1e3 if "softcap" in on else 0.0}
    if target in GPUS:  # the kernels of test_calls
        options["page_table"] = torch.arange(batch, dtype=torch.int32).view(batch, 1)
    # All heads share one KV head, or each has its own: few rows are another way through the CPU's kernels.
    for heads_kv in (1,) if target in GPUS else (1, head_dim):
        k, v = (t.expand(batch, 1, heads_kv, t.shape[-1]).contiguous() for t in (key, value))
        for batch_invariant in (False, True) if target in GPUS else ("batch_invariant" in on,):
            output, _ = attend(target, query, k, v, scale=1e-9, batch_invariant=batch_invariant, **options)
            exact = multiplied(target, dtype, value).to(DTYPES[dtype]).expand_as(output)
            torch.testing.assert_close(output, exact, rtol=0, atol=0, equal_nan=True)
            if "softcap" not in on:
                _, lse = attend(target, query, k, v, scale=4096.0, batch_invariant=batch_invariant, **options)
                scores = 4096 * multiplied(target, dtype, key.view(batch, -1))
                torch.testing.assert_close(lse[:, :, 0], scores, rtol=1e-6, atol=1e-4)
    key[:, :, :, 3] = math.nan
    output, lse = attend(target, query, key, value, **options)
    assert output.isnan().all() and lse.isnan().all()


@on_kernels
@settings(max_examples=4)
@given(data=st.data())
def test_calls(target, name, dtype, dims, fp8, on, data):
    """Every layout and option, with descales of each form; on a GPU, few keys."""
    on_gpu = target in GPUS
    layouts = ("paged", "packed over pages") if on_gpu else ("dense", "packed", "paged", "packed over pages")
    tokens = (1, 5, 33, 70) if on_gpu else LENGTHS
    how = {"lengths_q": tokens, "lengths_k": tokens, "strides": GPU_STRIDES if on_gpu else STRIDES[:3]}
    call = draw_call(data, dtype, dims, on, layouts, fp8=FP8[fp8], **how)
    causal, scale = "causal" in on, data.draw(st.sampled_from((None, 0.3, -0.2)))
    if on_gpu:  # needs no kernel of its own
        call.options["batch_invariant"] = data.draw(st.booleans())
    output, lse = attend(target, *call.tensors, causal, scale, name=name, **call.options)
    assert_sequences(output, lse, call.sequences, causal, scale)
    assert_rest_is_clear(call, output, lse)


@pytest.mark.parametrize(("target", "name"), [k[:2] for k in KERNELS if k[2:5] == ("bf16", (72, 72), "e4m3fn")])
def test_descales_of_any_sign(target, name):
    """Zero makes all scores alike, and a negative one turns them round."""
    query = randn(2, 3, 4, 72, dtype="bf16")
    key, value = (randn(2, 40, 2, 72, dtype="bf16").to(torch.float8_e4m3fn) for _ in "kv")
    options = {"causal": True, "name": name}
    if target == "gfx950":  # the kernels of the tests above
        options |= {"causal": False, "window": (-1, 0)}
    if target in GPUS:
        options["page_table"] = torch.arange(2, dtype=torch.int32).view(2, 1)
    for descale in (-0.5, 0.0):
        output, lse = attend(target, query, key, value, key_descale=torch.tensor([descale]), **options)
        same = attend(target, query, key, value, scale=descale * 72**-0.5, **options)
        assert torch.equal(output, same[0]) and torch.equal(lse, same[1])
    output, _ = attend(target, query, key, value, value_descale=torch.tensor([-2.0]), **options)
    assert torch.equal(output, -2 * attend(target, query, key, value, **options)[0])
