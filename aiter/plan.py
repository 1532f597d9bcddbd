"""Plans: all that follows from the shapes, strides, dtypes, device and options of a call, worked out once."""

from __future__ import annotations

import dataclasses
import math
import struct
from typing import NamedTuple

import torch

from aiter import abi, checks, jit
from aiter.jit.arch import arch_of, is_gpu
from aiter.kernels import kernel_name, kernel_spec
from aiter.launch import launcher

# GPU kernels read rows in pieces of 16 bytes; a tensor that is not aligned to that is copied first.
GPU_ALIGNMENT = 16

# Bound once, as they are used at every call.
_empty_like, _contiguous_format = torch.empty_like, torch.contiguous_format


class Indices(NamedTuple):
    """The int32 tensors that say which rows are valid and where they lie; None where an operation has none."""

    seqlens_q: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None
    page_table: torch.Tensor | None = None


NO_INDICES = Indices()


class Plan:
    """One checked layout of arguments, ready to launch; immutable, so that any number of threads may use it at once.

    query is (batch, seqlen_q, heads_q, head_dim), or packed (total, heads_q, head_dim); key and value are
    (batch, seqlen_k, heads_kv, head_dim), packed (total, heads_kv, head_dim) if query is, or, with a page table,
    (pages, heads_kv, page_size, head_dim). `max_seqlen` bounds the lengths of packed sequences.
    """

    __slots__ = (
        "copies",
        "device",
        "kernel",
        "launch",
        "lse_shape",
        "problem",
        "trivial",
        "workspace_bytes",
    )

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        indices: Indices,
        causal: bool,
        softmax_scale: float,
        max_seqlen: int,
    ) -> None:
        packed, page_table = query.dim() == 3, indices.page_table
        *_, heads_q, head_dim = query.shape
        if packed:
            batch, seqlen_q = indices.seqlens_q.shape[0], max_seqlen
            self.lse_shape = (heads_q, query.shape[0])
        else:
            batch, seqlen_q = query.shape[:2]
            self.lse_shape = (batch, heads_q, seqlen_q)
        if page_table is not None:
            heads_kv, page_size = key.shape[1:3]
            seqlen_k = page_table.shape[1] * page_size
        else:
            heads_kv, page_size = key.shape[-2], 0
            seqlen_k = max_seqlen if packed else key.shape[1]
        checks.sizes(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, heads=heads_q)
        self.device = query.device
        # Nothing to write, or no key to read: nothing to compile.
        self.trivial = query.numel() == 0 or seqlen_k == 0 or key.numel() == 0
        if self.trivial:
            return
        arch = arch_of(self.device)
        copies = tuple(_needs_copy(tensor, is_gpu(arch)) for tensor in (query, key, value))
        self.copies = copies if any(copies) else None
        query, key, value = (
            _contiguous(tensor) if copy else tensor for tensor, copy in zip((query, key, value), copies, strict=True)
        )
        key_packed = packed and page_table is None
        key_dims = (0, 1, 2) if page_table is None else (0, 2, 1)
        self.problem = abi.AttentionProblem(
            batch=batch,
            heads_q=heads_q,
            heads_kv=heads_kv,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            packed_q=packed,
            packed_k=key_packed,
            page_size=page_size,
            total_q=query.shape[0] if packed else 0,
            total_k=key.shape[0] if key_packed else 0,
            num_pages=0 if page_table is None else key.shape[0],
            page_table_stride=0 if page_table is None else page_table.shape[1],
            query_strides=_strides(query, packed),
            key_strides=_strides(key, key_packed, key_dims),
            value_strides=_strides(value, key_packed, key_dims),
            output_strides=(0 if packed else seqlen_q * heads_q * head_dim, heads_q * head_dim, head_dim),
            lse_strides=(0, query.shape[0]) if packed else (heads_q * seqlen_q, seqlen_q),
            softmax_scale=softmax_scale,
            clear_rest=1,
        )
        name = kernel_name(arch, seqlen_q * (heads_q // heads_kv))
        dtype = checks.DTYPE_NAMES[query.dtype]
        self.kernel = jit.get_kernel(kernel_spec(name, dtype, head_dim, causal, arch, page_table is not None))
        self.workspace_bytes = self.kernel.workspace_raw(bytes(self.problem))
        self.launch = launcher(self.kernel, self.device)

    def run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, indices: Indices, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Allocates the output and, if wanted, the log-sum-exp, and launches on the current stream."""
        output = _empty_like(query, memory_format=_contiguous_format)  # new_empty takes twice as long
        lse = torch.empty(self.lse_shape, dtype=torch.float32, device=query.device) if return_lse else None
        if self.trivial:
            return output.zero_(), lse.fill_(-math.inf) if return_lse else None
        if self.copies:
            query, key, value = self.readable(query, key, value)
        seqlens_q, seqlens_k, page_table = indices
        workspace = query.new_empty(self.workspace_bytes, dtype=torch.uint8) if self.workspace_bytes else None
        tensors = struct.pack(
            "=14Q",
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            output.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            0 if seqlens_q is None else seqlens_q.data_ptr(),
            0 if seqlens_k is None else seqlens_k.data_ptr(),
            *(0, 0, 0),
            0 if page_table is None else page_table.data_ptr(),
            *(0, 0),
            0 if workspace is None else workspace.data_ptr(),
        )
        self.launch(bytes(self.problem) + tensors)
        return output, lse

    def readable(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """query, key and value as the kernel can read them: in place, or copied where it cannot take their strides."""
        if not self.copies:
            return tensors
        return tuple(
            tensor.clone(memory_format=torch.contiguous_format) if copy else tensor
            for tensor, copy in zip(tensors, self.copies, strict=True)
        )


class BackwardPlan:
    """The backward pass of one layout of arguments: the forward's Plan, and the layouts of the gradients.

    Gradients are new contiguous tensors; that of the output is read in place where its strides allow."""

    __slots__ = ("copy_grad_output", "forward", "kernel", "launch", "problem", "workspace_bytes")

    def __init__(self, forward: Plan, grad_output: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
        self.forward = forward
        if forward.trivial:
            return
        spec = forward.kernel.spec
        self.copy_grad_output = _needs_copy(grad_output, is_gpu(spec.arch))
        packed = query.dim() == 3
        like_query, like_key = (_strides(_contiguous(tensor), packed) for tensor in (query, key))
        self.problem = abi.AttentionGradProblem(
            forward=forward.problem,
            grad_output_strides=like_query if self.copy_grad_output else _strides(grad_output, packed),
            grad_query_strides=like_query,
            grad_key_strides=like_key,
            grad_value_strides=like_key,
        )
        self.kernel = jit.get_kernel(dataclasses.replace(spec, kernel="attention_backward"))
        self.workspace_bytes = self.kernel.workspace_raw(bytes(self.problem))
        self.launch = launcher(self.kernel, forward.device)

    def run(
        self,
        grad_output: torch.Tensor,
        grad_lse: torch.Tensor | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        lse: torch.Tensor,
        indices: Indices,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of query, key and value."""
        grads = tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
        if self.forward.trivial:
            return tuple(grad.zero_() for grad in grads)
        query, key, value = self.forward.readable(query, key, value)
        if self.copy_grad_output:
            grad_output = grad_output.clone(memory_format=torch.contiguous_format)
        seqlens_q, seqlens_k, _ = indices
        workspace = query.new_empty(self.workspace_bytes, dtype=torch.uint8) if self.workspace_bytes else None
        tensors = struct.pack(
            "=17Q",
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            output.data_ptr(),
            lse.data_ptr(),
            grad_output.data_ptr(),
            0 if grad_lse is None else grad_lse.data_ptr(),
            *(grad.data_ptr() for grad in grads),
            0 if seqlens_q is None else seqlens_q.data_ptr(),
            0 if seqlens_k is None else seqlens_k.data_ptr(),
            *(0, 0, 0, 0),
            0 if workspace is None else workspace.data_ptr(),
        )
        self.launch(bytes(self.problem) + tensors)
        return grads


def _needs_copy(tensor: torch.Tensor, on_gpu: bool) -> bool:
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
    if tensor.stride(-1) != 1:
        return True
    unit = GPU_ALIGNMENT // tensor.element_size()
    return on_gpu and (tensor.data_ptr() % GPU_ALIGNMENT != 0 or any(stride % unit for stride in strides[:-1]))


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor without memory that has the strides of a contiguous copy."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.contiguous_format)


def _strides(tensor: torch.Tensor, packed: bool, dims: tuple[int, int, int] = (0, 1, 2)) -> tuple[int, int, int]:
    strides = tensor.stride()
    return (0, strides[0], strides[1]) if packed else tuple(strides[d] for d in dims)
