"""What the ranks of a group do in tests: each has its rows of a sequence that every rank knows whole, and compares with
what one process computes."""

import functools

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import pad

import aiter
from aiter.distributed import context_parallel_attention, shard

SCHEMES = ("allgather", "alltoall", "ring")


def whole(shape, dtype, packed=False):
    """query, key, value and gradients of output and log-sum-exp: (batch, tokens, heads_q, heads_kv, dim, value_dim)."""
    batch, tokens, heads_q, heads_kv, dim, value_dim = shape
    outer = (tokens,) if packed else (batch, tokens)
    sizes = ((heads_q, dim), (heads_kv, dim), (heads_kv, value_dim), (heads_q, value_dim))
    query, key, value, grad = (torch.randn(*outer, *size).to(dtype) for size in sizes)
    grad_lse = torch.randn(*outer[:-1], heads_q, tokens)
    return query, key, value, grad, grad_lse


def alone(query, key, value, causal, cu_seqlens=None, **options):
    """The operation of one process, with return_lse."""
    if cu_seqlens is None:
        if query.dim() == 4:
            return aiter.flash_attn_func(query, key, value, causal, return_lse=True, **options)
        output, lse = aiter.flash_attn_func(query[None], key[None], value[None], causal, return_lse=True, **options)
        return output[0], lse[0]
    lengths, total = torch.tensor(cu_seqlens).diff().int(), cu_seqlens[-1]
    output, lse = aiter.variable_length_attention(
        *(t[:total] for t in (query, key, value)), lengths, int(lengths.max()), causal, return_lse=True, **options
    )
    behind = query.shape[0] - total
    return pad(output, (0, 0, 0, 0, 0, behind)), pad(lse, (0, behind), value=-torch.inf)


def compare(name, got, expected, units, largest=None):
    """Within `units` roundings of the largest value."""
    largest = expected.float().abs().max() if largest is None else largest
    allowed = units * torch.finfo(got.dtype).eps * float(largest)
    error = (got.float() - expected.float()).abs().max().item() if got.numel() else 0.0
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return error / allowed if allowed else 0.0


def attention(
    shape,
    dtype,
    scheme,
    layout,
    causal=False,
    cu_seqlens=None,
    group=None,
    sinks=False,
    alibi=False,
    with_lse=True,
    **options,
):
    """Forward and backward of one call, against one process."""
    packed = cu_seqlens is not None
    *leaves, grad, grad_lse = whole(shape, dtype, packed)
    heads_q, dim = shape[2], 0 if packed else 1
    if sinks:
        options["sinks"] = torch.randn(heads_q)
    if alibi:
        options["alibi_slopes"] = torch.rand(heads_q)
    expected_in = [t.clone().requires_grad_() for t in leaves]
    expected_options = dict(options)
    if sinks:
        expected_options["sinks"] = options["sinks"].clone().requires_grad_()
        options["sinks"] = options["sinks"].clone().requires_grad_()
    expected, expected_lse = alone(*expected_in, causal, cu_seqlens, **expected_options)
    torch.autograd.backward([expected, expected_lse][: 1 + with_lse], [grad, grad_lse][: 1 + with_lse])

    if isinstance(layout, list):
        layout = torch.tensor(layout[dist.get_rank()], dtype=torch.int64)

    def part(tensor, where):
        return shard(tensor, where, layout)

    own = [part(t, dim).clone().requires_grad_() for t in leaves]
    result = context_parallel_attention(
        *own, group, causal=causal, layout=layout, scheme=scheme, cu_seqlens=cu_seqlens, return_lse=True, **options
    )
    output, lse = result
    assert output.dtype == dtype and lse.dtype == torch.float32
    torch.autograd.backward(
        [output, lse][: 1 + with_lse], [part(grad, dim), part(grad_lse, grad_lse.dim() - 1)][: 1 + with_lse]
    )
    # A part is rounded once, and so is a result: by half a unit of values that are means of `value`. In float32 a few
    # sums count, too.
    units, own_lse = 8 if dtype == torch.float32 else 1.5, part(expected_lse.detach(), expected_lse.dim() - 1)
    worst = {
        "output": compare("output", output.detach(), part(expected.detach(), dim), units, leaves[2].abs().max()),
        "lse": float((lse - own_lse).detach().nan_to_num(0.0, 0.0, 0.0).abs().amax()) if lse.numel() else 0.0,
    }
    assert torch.equal(lse == -torch.inf, own_lse == -torch.inf)
    assert worst["lse"] < 1e-4
    for name, got, single in zip(("query", "key", "value"), own, expected_in, strict=True):
        whole_ = single.grad
        worst[name] = compare(f"gradient of {name}", got.grad, part(whole_, dim), 8, whole_.float().abs().max())
    if sinks:
        total = options["sinks"].grad.clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total, expected_options["sinks"].grad, rtol=1e-2, atol=1e-2)
    return worst


def on_mesh(sizes, *arguments, **keywords):
    mesh = _mesh(sizes)
    return attention(*arguments, group=mesh, **keywords)


@functools.lru_cache
def _mesh(sizes):
    return init_device_mesh("cpu", sizes, mesh_dim_names=("ring", "alltoall")[: len(sizes)])


def compiled(scheme, packed):
    """Under torch.compile, without a graph break, results are those of an eager call, bit for bit."""
    documents = {"cu_seqlens": torch.tensor([0, 20, 48], dtype=torch.int32)} if packed else {}
    query, key, value, grad, grad_lse = whole((2, 48, 4, 2, 32, 32), torch.float32, packed)
    sinks, dim = torch.randn(4), 0 if packed else 1

    def call(query, key, value, sinks):
        return context_parallel_attention(
            *(2 * query, key, value), causal=True, scheme=scheme, sinks=sinks, return_lse=True, **documents
        )

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [shard(t, dim).requires_grad_() for t in (query, key, value)] + [sinks.clone().requires_grad_()]
        outputs = function(*leaves)
        torch.autograd.backward(outputs, [shard(grad, dim), shard(grad_lse, grad_lse.dim() - 1)])
        results.append([t.detach() for t in outputs] + [leaf.grad for leaf in leaves])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)
