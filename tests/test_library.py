"""The operations as citizens of PyTorch: compile, export, fake tensors, autocast, vmap."""

import pytest
import torch
from accuracy import assert_as_accurate, pytorch_attend_one

import aiter
from aiter import reference


def qkv(batch=2, seqlen=33, heads_q=4, heads_kv=2, head_dim=64, dtype=torch.float32, **options):
    shapes = [(batch, seqlen, heads, head_dim) for heads in (heads_q, heads_kv, heads_kv)]
    return [torch.randn(shape).to(dtype).requires_grad_(options.get("requires_grad", False)) for shape in shapes]


SEQ_LENGTHS = torch.tensor([33, 5], dtype=torch.int32)
CALLS = {
    "dense": lambda q, k, v: aiter.flash_attn_func(q, k, v, causal=True),
    "lse": lambda q, k, v: aiter.flash_attn_func(q, k, v, return_lse=True),
    "grouped": lambda q, k, v: aiter.grouped_query_attention(q, k, v, num_groups=2),
    "multi query": lambda q, k, v: aiter.multi_query_attention(q, k[:, :, :1], v[:, :, :1]),
    # Lengths are made in the call: PyTorch 2.5 exports no global tensor.
    "variable length": lambda q, k, v: aiter.variable_length_attention(
        q, k, v, torch.tensor([33, 5], dtype=torch.int32), 33
    ),
    "paged": lambda q, k, v: aiter.flash_attn_with_kvcache(
        q, k.detach().transpose(1, 2).contiguous(), torch.tensor([[0], [1]], dtype=torch.int32), 33
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_compile_fullgraph(call):
    q, k, v = qkv()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v), rtol=0, atol=0)


def test_compile_with_dynamic_shapes_and_gradients():
    torch._dynamo.reset()
    compiled = torch.compile(CALLS["dense"], fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (5, 33, 70):
        eager, traced = qkv(seqlen=seqlen, requires_grad=True), qkv(seqlen=seqlen, requires_grad=True)
        for a, b in zip(eager, traced, strict=True):
            b.data.copy_(a.data)
        for run, tensors in ((CALLS["dense"], eager), (compiled, traced)):
            run(*tensors).square().sum().backward()
        for a, b in zip(eager, traced, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=0)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_export(call):
    class Module(torch.nn.Module):
        def forward(self, q, k, v):
            return call(q, k, v)

    q, k, v = qkv()
    program = torch.export.export(Module(), (q, k, v))
    torch.testing.assert_close(program.module()(q, k, v), call(q, k, v), rtol=0, atol=0)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = qkv()
        output, lse = aiter.flash_attn_func(q, k, v, return_lse=True)
        assert output.shape == q.shape and output.is_contiguous()
        assert lse.shape == (2, 4, 33) and lse.dtype == torch.float32


@pytest.mark.parametrize("requires_grad", (False, True))
@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(requires_grad, packed):
    lengths = torch.tensor([20, 13], dtype=torch.int32) if packed else None
    tensors = qkv(batch=1, requires_grad=requires_grad)
    if packed:
        tensors = [t.detach()[0].requires_grad_(requires_grad) for t in tensors]
    arguments = (*tensors, lengths, lengths, None, True, 0.125, 33 if packed else 0)
    torch.library.opcheck(torch.ops.aiter.attention.default, arguments)


def test_opcheck_backward():
    q, k, v = qkv()
    output, lse = torch.ops.aiter.attention(q, k, v, None, None, None, True, 0.125, 0)
    arguments = (torch.randn_like(output), torch.randn_like(lse), q, k, v, output, lse, None, None, True, 0.125, 0)
    torch.library.opcheck(torch.ops.aiter.attention_backward.default, arguments)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast(dtype):
    q, k, v = qkv()
    with torch.autocast("cpu", dtype=dtype):
        output = aiter.flash_attn_func(q, k.to(dtype), v)
    assert output.dtype == dtype
    torch.testing.assert_close(output, aiter.flash_attn_func(*(t.to(dtype) for t in (q, k, v))), rtol=0, atol=0)


def test_autocast_gradients_come_back_in_the_dtype_of_the_inputs():
    q, k, v = qkv(requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        aiter.flash_attn_func(q, k, v).float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.abs().sum() > 0 for t in (q, v))


def test_vmap_folds_into_the_batch():
    q, k, v = qkv(batch=6)
    expected = aiter.flash_attn_func(q, k, v, causal=True)
    stacked = [t.unflatten(0, (3, 2)) for t in (q, k, v)]
    mapped = torch.func.vmap(lambda q, k, v: aiter.flash_attn_func(q, k, v, causal=True))(*stacked)
    torch.testing.assert_close(mapped.flatten(0, 1), expected, rtol=0, atol=0)
    shared = torch.func.vmap(lambda q: aiter.flash_attn_func(q, k[:2], v[:2]))(stacked[0])
    torch.testing.assert_close(shared[1], aiter.flash_attn_func(stacked[0][1], k[:2], v[:2]), rtol=0, atol=0)


def test_vmap_over_lengths_is_a_clear_error():
    q, k, v = (t.unflatten(0, (1, 2)) for t in qkv())
    with pytest.raises(NotImplementedError, match="vmap over variable-length"):
        torch.func.vmap(lambda q, k, v: aiter.variable_length_attention(q, k, v, SEQ_LENGTHS, 33))(q, k, v)


def test_functional_gradients():
    q, k, v = qkv(batch=1)

    def loss(q):
        return aiter.flash_attn_func(q, k, v).square().sum()

    leaf = q.clone().requires_grad_()
    loss(leaf).backward()
    torch.testing.assert_close(torch.func.grad(loss)(q), leaf.grad, rtol=0, atol=0)


def test_parameters_and_inference_mode():
    q, k, v = qkv()
    expected = aiter.flash_attn_func(q, k, v)
    with torch.no_grad():
        torch.testing.assert_close(aiter.flash_attn_func(torch.nn.Parameter(q), k, v), expected, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(aiter.flash_attn_func(q, k, v), expected, rtol=0, atol=0)


def test_accuracy_through_the_operator():
    q, k, v = qkv(dtype=torch.bfloat16)
    output, _ = torch.ops.aiter.attention(q, k, v, None, None, None, False, 0.125, 0)
    expected, _ = reference.attend_one(q[0], k[0], v[0], False)
    assert_as_accurate(output[0], expected, pytorch_attend_one(q[0], k[0], v[0], False))
