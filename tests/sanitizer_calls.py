"""Every GPU kernel on small problems, checked, for compute-sanitizer to watch:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool TOOL --kernel-name kns=aiter python tests/sanitizer_calls.py

TOOL is memcheck, racecheck or synccheck; initcheck too, but without --kernel-name, as it must see who writes. Without
PyTorch's cache each tensor is an allocation of its own, so that memcheck sees the byte past its end and initcheck what
nobody wrote. The kernels live in the namespace `aiter`. PyTorch's side is its unfused operator: initcheck does not see
what cuDNN's kernels write, and reports all that read it.
"""

import torch
from problems import check_dense, check_kvcache, check_variable_length, randn
from torch.nn.attention import SDPBackend, sdpa_kernel

import aiter
from aiter import flash_attn

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def options() -> None:
    """What the loops are built for beside dtype, head_dim and causal, in both passes; and what writes caches."""
    sinks = randn(4, dtype=torch.float32)
    for dims, causal, chosen in (
        ((128, 128), True, {"window_size": (100, 0), "softcap": 30.0, "sinks": sinks}),
        ((64, 64), False, {"window_size": (70, 20), "alibi_slopes": sinks.abs()}),
        ((192, 128), True, {}),
        ((320, 256), True, {"softcap": 30.0}),
        ((64, 64), True, {"dropout_p": 0.2}),
        ((128, 128), True, {"attention_chunk": 96}),
    ):
        tensors = [
            randn(2, 300, heads, dim, dtype=BF16).requires_grad_()
            for heads, dim in ((4, dims[0]), (2, dims[0]), (2, dims[1]))
        ]
        output = flash_attn.flash_attn_func(*tensors, causal=causal, **chosen)
        grads = torch.autograd.grad(output, tensors, torch.ones_like(output))
        assert all(grad.isfinite().all() for grad in (output, *grads))
    # One row each, which decoding kernels take; the last two are latent attention, in turn and in rounds.
    for heads, heads_kv, dims, chosen in (
        (8, 2, (128, 128), {"window_size": (100, 0), "softcap": 30.0, "alibi_slopes": sinks.abs().repeat(2)}),
        (8, 1, (512, 512), {}),
        (16, 1, (576, 512), {}),
        (80, 1, (576, 512), {}),
    ):
        key = randn(2, 500, heads_kv, dims[0], dtype=BF16)
        query = randn(2, 1, heads, dims[0], dtype=BF16)
        output = flash_attn.flash_attn_func(query, key, key[..., : dims[1]], causal=True, **chosen)
        assert output.isfinite().all()
    for dtype in (BF16, FP8):  # new tokens turned and written, all read in pages
        cache = [randn(20, 16, 2, 128, dtype=BF16).to(dtype) for _ in "kv"]
        angles = torch.rand(400, 32, device=sinks.device)
        table = torch.arange(20, device=sinks.device, dtype=torch.int32).view(2, 10)
        output = flash_attn.flash_attn_with_kvcache(
            *(randn(2, 3, 4, 128, dtype=BF16), *cache, *(randn(2, 3, 2, 128, dtype=BF16) for _ in "kv")),
            *(angles.cos().bfloat16(), angles.sin().bfloat16()),
            cache_seqlens=torch.tensor([17, 130], device=sinks.device, dtype=torch.int32),
            block_table=table,
            causal=True,
        )
        assert output.isfinite().all()
        lists = {"page_indptr": [0, 3, 10], "page_indices": list(range(10)), "last_page_len": [5, 16]}
        lists = {name: torch.tensor(x, device=sinks.device, dtype=torch.int32) for name, x in lists.items()}
        output = flash_attn.flash_attn_with_kvcache(randn(2, 1, 4, 128, dtype=BF16), *cache, **lists)
        assert output.isfinite().all()


def backward(dtype: torch.dtype, head_dim: int, causal: bool, seqlen: int) -> None:
    tensors = [randn(1, seqlen, heads, head_dim, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]
    lengths = torch.tensor([seqlen // 3, seqlen - seqlen // 3], device=tensors[0].device, dtype=torch.int32)
    dense = aiter.flash_attn_func(*tensors, causal)
    packed = aiter.variable_length_attention(*(t[0] for t in tensors), lengths, seqlen, causal)
    for output in (dense, packed):
        grads = torch.autograd.grad(output, tensors, torch.ones_like(output))
        assert all(grad.isfinite().all() for grad in grads)


def overlapping(head_dim: int) -> None:
    """Packed sequences whose starts fall: the last has rows of the first, and places of its sums in one pass."""
    tensors = [randn(1200, heads, head_dim, dtype=BF16).requires_grad_() for heads in (4, 2, 2)]
    starts = torch.tensor([0, 1090, 400, 1200], device=tensors[0].device, dtype=torch.int32)
    output = flash_attn.flash_attn_varlen_func(*tensors, starts, starts, 1200, 1200, causal=True)
    torch.autograd.grad(output, tensors, torch.ones_like(output))


def cut_keys() -> None:
    """Few rows on many keys, whose pieces are dealt, and many, or many sequences of few, which take them in turn and
    keep their sums in shared memory or, beyond 128 dimensions, in the workspace; or pieces of few rows, which clusters
    of blocks add up themselves or not: on sm_90a."""
    for batch, rows, keys, head_dim, invariant in (
        (1, 100, 5000, 128, False),
        (1, 1, 9000, 128, True),
        (1, 1, 3000, 128, True),
        (1, 3, 6000, 64, True),
        (1, 9000, 5000, 128, True),
        (80, 1, 4200, 256, True),
    ):
        lengths = ((rows, 4), (keys, 2), (keys, 2))
        tensors = [randn(batch, length, heads, head_dim, dtype=BF16) for length, heads in lengths]
        assert aiter.flash_attn_func(*tensors, causal=True, batch_invariant=invariant).isfinite().all()


def many_packed() -> None:
    """More sequences than a wave looks at together, some of them empty, with a mask and without."""
    lengths = torch.tensor([0] * 33 + [300, 1, 0, 700] * 10, device="cuda", dtype=torch.int32)
    packed = [randn(int(lengths.sum()), heads, 64, dtype=BF16) for heads in (4, 2, 2)]
    for causal in (False, True):
        assert aiter.variable_length_attention(*packed, lengths, 700, causal).isfinite().all()


def main() -> None:
    torch.manual_seed(20)
    for dtype, head_dim, causal in ((BF16, 128, True), (torch.float16, 64, False), (BF16, 72, True)):
        check_dense(dtype, head_dim, 200, 333, (4, 2), causal)
        check_dense(dtype, head_dim, 1, 5000, (8, 2), causal)  # decoding, split
        check_kvcache(dtype, head_dim, "pair", 16, [700, 1, 333], 1, (8, 2), causal)
        check_kvcache(dtype, head_dim, "shared", 48, [150, 90], 80, (4, 2), causal)
        check_variable_length(dtype, head_dim, "packed", [100, 0, 1, 260], 0, (4, 2), causal)
        check_variable_length(dtype, head_dim, "padded", [100, 0, 1, 130], 3, (4, 2), causal)
        backward(dtype, head_dim, causal, 300)
    for head_dim, causal in ((64, True), (96, False), (128, True), (256, True)):
        backward(BF16, head_dim, causal, 1090)  # all gradients in one pass, on sm_90a
        overlapping(head_dim)
    options()
    cut_keys()
    many_packed()
    torch.cuda.synchronize()
    print("all right")


if __name__ == "__main__":
    with sdpa_kernel(SDPBackend.MATH):
        main()
