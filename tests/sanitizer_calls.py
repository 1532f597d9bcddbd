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


def backward(dtype: torch.dtype, head_dim: int, causal: bool, seqlen: int) -> None:
    tensors = [randn(1, seqlen, heads, head_dim, dtype=dtype).requires_grad_() for heads in (4, 2, 2)]
    lengths = torch.tensor([seqlen // 3, seqlen - seqlen // 3], device=tensors[0].device, dtype=torch.int32)
    dense = aiter.flash_attn_func(*tensors, causal)
    packed = aiter.variable_length_attention(*(t[0] for t in tensors), lengths, seqlen, causal)
    for output in (dense, packed):
        grads = torch.autograd.grad(output, tensors, torch.ones_like(output))
        assert all(grad.isfinite().all() for grad in grads)


def main() -> None:
    torch.manual_seed(20)
    bf16, fp16 = torch.bfloat16, torch.float16
    for dtype, head_dim, causal in ((bf16, 128, True), (fp16, 64, False), (bf16, 72, True)):
        check_dense(dtype, head_dim, 200, 333, (4, 2), causal)
        check_dense(dtype, head_dim, 1, 5000, (8, 2), causal)  # decoding, split
        check_kvcache(dtype, head_dim, "pair", 16, [700, 1, 333], 1, (8, 2), causal)
        check_kvcache(dtype, head_dim, "shared", 48, [150, 90], 80, (4, 2), causal)
        check_variable_length(dtype, head_dim, "packed", [100, 0, 1, 260], 0, (4, 2), causal)
        check_variable_length(dtype, head_dim, "padded", [100, 0, 1, 130], 3, (4, 2), causal)
        backward(dtype, head_dim, causal, 300)
    torch.cuda.synchronize()
    print("all right")


if __name__ == "__main__":
    with sdpa_kernel(SDPBackend.MATH):
        main()
