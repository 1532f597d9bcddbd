"""Random combinations of all that a call of the GPU kernels may have, on emulated AMD GPUs and on a CUDA device: the
kernels of test_gpu_options.py, problems drawn as for the CPU kernels."""

import drawn
import pytest
from driver import GPUS, attend, gradients, randn
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import GPU_STRIDES, assert_sequences
from random_calls import assert_rest_is_clear, draw_call
from test_cpu_backward import check
from test_gpu_options import BACKWARD, DECODE, FORWARD, KERNELS

# Around tiles; the emulator takes a millisecond for some thousand products.
ROWS = {FORWARD: (1, 2, 17, 63, 64, 65, 129), DECODE: (1, 2, 3, 5, 8), BACKWARD: (2, 17, 63, 65)}
KEYS = (1, 16, 31, 33, 64, 65, 127, 130, 200)


def on_kernels(*names):
    cases = [
        (target, kernel)
        for target in GPUS
        for kernel in KERNELS[target]
        if kernel.name in names and (target == "cuda" or kernel.head_dim <= 256)
    ]
    return pytest.mark.parametrize("target, kernel", cases, ids=[f"{t}-{k}" for t, k in cases])


def draw(data, target, kernel, **how):
    on = {kernel.mask} | {name for name in ("softcap", "alibi", "chunk", "dropout") if getattr(kernel, name)}
    on |= {"batch_invariant"} if data.draw(st.booleans()) else set()  # needs no kernel of its own
    dims = kernel.head_dim, kernel.value_dim
    lengths = {"lengths_q": ROWS[kernel.name], "lengths_k": KEYS}
    call = draw_call(data, kernel.dtype, dims, on, strides=GPU_STRIDES, **lengths, **how)
    drawn.note_call(
        "CUDA" if target == "cuda" else target,
        kernel.name.removeprefix("attention_"),
        call,
        dims,
        kernel.mask == "causal",
    )
    return call


@on_kernels(FORWARD, DECODE)
@settings(max_examples=6)
@given(data=st.data())
def test_forward_and_decode(target, kernel, data):
    layouts = ("paged", "packed over pages") if kernel.paged else ("dense", "packed")
    call = draw(data, target, kernel, layouts=layouts)
    causal = kernel.mask == "causal"
    output, lse = attend(target, *call.tensors, causal, name=kernel.name, **call.options)
    assert_sequences(output, lse, call.sequences, causal)
    assert_rest_is_clear(call, output, lse)


@on_kernels(BACKWARD)
@settings(max_examples=4)
@given(data=st.data())
def test_backward(target, kernel, data):
    call = draw(data, target, kernel, layouts=("dense", "packed"), fewest_keys=31, sinks=False)
    causal = kernel.mask == "causal"
    output, lse = attend(target, *call.tensors, causal, **call.options)
    grad_output = randn(*output.shape, dtype=kernel.dtype)
    results = gradients(target, *call.tensors, output, lse, grad_output, None, causal, **call.options)
    with_keys = [(s, keys) for s, keys in zip(call.sequences, call.keys, strict=True) if len(s.query) and len(s.key)]
    if with_keys:
        check(with_keys, results, grad_output, None, causal)
