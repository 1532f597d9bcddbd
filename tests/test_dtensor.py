"""Attention of DTensors over two processes: what one process gives, split as its tensors are."""

import pytest
import torch

pytest.importorskip("torch.distributed.tensor.experimental", reason="this PyTorch has no DTensor")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("PyTorch was built without gloo", allow_module_level=True)

from distributed import ranks

import aiter
from aiter.integrations.dtensor import _divide


def _grouped(query, key, value, sinks, lengths):
    return aiter.flash_attn_func(query, key, value, causal=True, sinks=sinks)


def _lengths(query, key, value, sinks, lengths):
    return aiter.flash_attn_func(query, key, value, causal=True, seqlens_k=lengths, window_size=(4, 0))


def _run(call, tensors):
    output = call(*tensors)
    output.square().sum().backward()
    return [output.detach(), *(t.grad for t in tensors if t.grad is not None)]


def _two_ranks():
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    tensors = [torch.randn(4, 9, heads, 16) for heads in (4, 2, 2)]
    tensors += [torch.randn(4), torch.tensor([9, 1, 5, 7], dtype=torch.int32)]
    whole, ways = Replicate(), {}
    ways["batch"] = [Shard(0)] * 3 + [whole, Shard(0)], Shard(0)
    ways["heads"] = [Shard(2)] * 3 + [Shard(0), whole], Shard(2)
    ways["whole"] = [whole] * 5, whole
    ways["sequence"] = [Shard(1)] * 3 + [whole, whole], None  # gathered: how it is split then is DTensor's choice
    for call in (_grouped, _lengths):
        expected = _run(call, [t.clone().requires_grad_(t.is_floating_point()) for t in tensors])
        for name, (placements, outputs) in ways.items():
            split = [distribute_tensor(t, mesh, [p]) for t, p in zip(tensors, placements, strict=True)]
            got = _run(call, [t.detach().requires_grad_(t.is_floating_point()) for t in split])
            assert isinstance(got[0], DTensor), name
            assert outputs is None or got[0].placements == (outputs,), (name, got[0].placements)
            assert len(got) == len(expected)
            for ours, right in zip(got, expected, strict=True):
                torch.testing.assert_close(ours.full_tensor(), right, rtol=1e-5, atol=1e-5)
    _eight_bits(mesh)


def _eight_bits(mesh):
    """Caches of 8-bit floats, whose scales are one number, one for each head, or of each sequence and head."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    query, (key, value) = torch.randn(4, 9, 4, 16), torch.randn(2, 4, 9, 2, 16).to(torch.float8_e4m3fn)
    for k_descale, by_heads, by_sequences in (
        (torch.tensor([0.3]), Replicate(), Replicate()),
        (torch.tensor([0.3, 2.0]), Shard(0), Replicate()),
        (torch.rand(4, 2) + 0.1, Shard(1), Shard(0)),
    ):
        v_descale = k_descale + 0.5
        expected = aiter.flash_attn_func(query, key, value, causal=True, k_descale=k_descale, v_descale=v_descale)
        for dim, scales in ((2, by_heads), (0, by_sequences)):
            placements = [Shard(dim)] * 3 + [scales] * 2
            split = [
                DTensor.from_local(
                    tensor.chunk(2, placement.dim)[mesh.get_rank()].contiguous()
                    if isinstance(placement, Shard)
                    else tensor,
                    mesh,
                    [placement],
                )
                for tensor, placement in zip((query, key, value, k_descale, v_descale), placements, strict=True)
            ]
            scaled = dict(zip(("k_descale", "v_descale"), split[3:], strict=True))
            got = aiter.flash_attn_func(*split[:3], causal=True, **scaled)
            assert got.placements == (Shard(dim),), "nothing is gathered"
            torch.testing.assert_close(got.full_tensor(), expected, rtol=1e-5, atol=1e-5)


def test_two_processes():
    ranks.run(2, _two_ranks)


def test_heads_are_split_in_whole_groups():
    assert _divide((2,), 4) and _divide((2, 2), 2) and _divide((2, 3), 6) and _divide((4,), 2)
    assert not _divide((2,), 3) and not _divide((2, 2), 6)
