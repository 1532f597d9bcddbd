"""The launch ABI as Python sees it: the ctypes mirror of kernels_src/include/aiter_abi.h, which documents each field.

tests/test_abi.py compiles the header and compares every field's offset and size with these.
"""

import ctypes
import struct

ABI_VERSION = 1


class AttentionProblem(ctypes.Structure):
    """Sizes, strides and scale of one attention call; the same for every call with tensors of the same layout."""

    _fields_ = (
        ("batch", ctypes.c_int32),
        ("heads_q", ctypes.c_int32),
        ("heads_kv", ctypes.c_int32),
        ("seqlen_q", ctypes.c_int32),
        ("seqlen_k", ctypes.c_int32),
        ("packed_q", ctypes.c_int32),
        ("packed_k", ctypes.c_int32),
        ("page_size", ctypes.c_int32),
        ("total_q", ctypes.c_int64),
        ("total_k", ctypes.c_int64),
        ("num_pages", ctypes.c_int64),
        ("page_table_stride", ctypes.c_int64),
        ("query_strides", ctypes.c_int64 * 3),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("output_strides", ctypes.c_int64 * 3),
        ("lse_strides", ctypes.c_int64 * 2),
        ("softmax_scale", ctypes.c_float),
        ("reserved", ctypes.c_int32),
    )


class AttentionTensors(ctypes.Structure):
    """Addresses of one call. Calls pass `pack_tensors(...)`, which is these fields as bytes and cheaper to make."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in ("query", "key", "value", "output", "lse", "seqlens_q", "seqlens_k", "page_table", "workspace")
    )


class AttentionGradProblem(ctypes.Structure):
    """The forward problem and the layouts of the gradients."""

    _fields_ = (
        ("forward", AttentionProblem),
        ("grad_output_strides", ctypes.c_int64 * 3),
        ("grad_query_strides", ctypes.c_int64 * 3),
        ("grad_key_strides", ctypes.c_int64 * 3),
        ("grad_value_strides", ctypes.c_int64 * 3),
    )


class AttentionGradTensors(ctypes.Structure):
    """Addresses of one backward call; passed as bytes by `pack_grad_tensors(...)`."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("query", "key", "value", "output", "lse", "grad_output", "grad_lse"),
            *("grad_query", "grad_key", "grad_value", "seqlens_q", "seqlens_k", "workspace"),
        )
    )


class CpuExecutor(ctypes.Structure):
    """Where CPU kernels run: the address of PyTorch's own GOMP_parallel (or null) and how many threads to use."""

    _fields_ = (("parallel", ctypes.c_void_p), ("num_threads", ctypes.c_int32), ("reserved", ctypes.c_int32))


class Description(ctypes.Structure):
    """What a kernel says of itself; the loader compares it with this module before the first launch."""

    _fields_ = (
        ("abi_version", ctypes.c_uint32),
        ("problem_bytes", ctypes.c_uint32),
        ("tensors_bytes", ctypes.c_uint32),
    )


pack_tensors = struct.Struct(f"{len(AttentionTensors._fields_)}P").pack
pack_grad_tensors = struct.Struct(f"{len(AttentionGradTensors._fields_)}P").pack


def launch_structs(kernel: str) -> tuple[type[ctypes.Structure], type[ctypes.Structure]]:
    """The problem and tensors structs that launches of `kernel` take."""
    backward = kernel == "attention_backward"
    return (AttentionGradProblem, AttentionGradTensors) if backward else (AttentionProblem, AttentionTensors)
