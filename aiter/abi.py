"""The launch ABI as Python sees it: the ctypes mirror of kernels_src/include/aiter_abi.h, which documents each field.

tests/test_abi.py compiles the header and compares every field's offset and size with these.
"""

import ctypes
import struct
from typing import Any

ABI_VERSION = 4


class AttentionProblem(ctypes.Structure):
    """Sizes, strides and scalars of one attention call."""

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
        ("listed_pages", ctypes.c_int64),
        ("query_strides", ctypes.c_int64 * 3),
        ("key_strides", ctypes.c_int64 * 3),
        ("value_strides", ctypes.c_int64 * 3),
        ("output_strides", ctypes.c_int64 * 3),
        ("lse_strides", ctypes.c_int64 * 2),
        ("key_descale_strides", ctypes.c_int64 * 2),
        ("value_descale_strides", ctypes.c_int64 * 2),
        ("alibi_stride", ctypes.c_int64),
        ("softmax_scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window_left", ctypes.c_int32),
        ("window_right", ctypes.c_int32),
        ("clear_rest", ctypes.c_int32),
        ("batch_invariant", ctypes.c_int32),
        ("check_values", ctypes.c_int32),
        ("attention_chunk", ctypes.c_int32),
        ("dropout_threshold", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class AttentionTensors(ctypes.Structure):
    """Addresses of one call."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("query", "key", "value", "output", "lse", "seqlens_q", "seqlens_k", "starts_q", "starts_k"),
            *("query_offsets", "page_table", "page_indptr", "last_page_len", "alibi_slopes", "sinks", "rng_state"),
            *("key_descale", "value_descale", "workspace"),
        )
    )


class AttentionCall(ctypes.Structure):
    """What a launch takes."""

    _fields_ = (("problem", AttentionProblem), ("tensors", AttentionTensors))


class AttentionGradProblem(ctypes.Structure):
    """The forward problem and the layouts of the gradients."""

    _fields_ = (
        ("forward", AttentionProblem),
        ("grad_output_strides", ctypes.c_int64 * 3),
        ("grad_query_strides", ctypes.c_int64 * 3),
        ("grad_key_strides", ctypes.c_int64 * 3),
        ("grad_value_strides", ctypes.c_int64 * 3),
        ("lse_is_given", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )


class AttentionGradTensors(ctypes.Structure):
    """Addresses of one backward call."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("query", "key", "value", "output", "lse", "grad_output", "grad_lse", "grad_query", "grad_key"),
            *("grad_value", "seqlens_q", "seqlens_k", "starts_q", "starts_k", "query_offsets", "alibi_slopes"),
            *("rng_state", "workspace"),
        )
    )


class AttentionGradCall(ctypes.Structure):
    """What a backward launch takes."""

    _fields_ = (("problem", AttentionGradProblem), ("tensors", AttentionGradTensors))


class CacheWriteProblem(ctypes.Structure):
    """Sizes, strides and scalars of one write into a cache."""

    _fields_ = (
        *(
            (name, ctypes.c_int32)
            for name in (
                *("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_new", "head_dim", "value_dim", "page_size"),
                *("table_width", "rotary_dim", "rotary_length", "interleaved", "query_step", "wide_slots"),
            )
        ),
        *((name, ctypes.c_int64) for name in ("num_pages", "page_table_stride", "total_q", "total_new")),
        *(
            (f"{name}_strides", ctypes.c_int64 * 4)
            for name in ("query", "rotated", "key", "value", "key_cache", "value_cache")
        ),
        *((f"{name}_stride", ctypes.c_int64) for name in ("cos", "sin")),
        *((f"{name}_strides", ctypes.c_int64 * 2) for name in ("key_scale", "value_scale")),
    )


class CacheWriteTensors(ctypes.Structure):
    """Addresses of one write into a cache."""

    _fields_ = tuple(
        (name, ctypes.c_void_p)
        for name in (
            *("query", "rotated", "key", "value", "key_cache", "value_cache", "slots", "seqlens", "page_table"),
            *("starts_q", "starts_new", "rotary_cos", "rotary_sin", "rotary_positions", "key_scale", "value_scale"),
            "workspace",
        )
    )


class CacheWriteCall(ctypes.Structure):
    """What a launch that writes into a cache takes."""

    _fields_ = (("problem", CacheWriteProblem), ("tensors", CacheWriteTensors))


class CpuExecutor(ctypes.Structure):
    """Where CPU kernels run: the address of PyTorch's own GOMP_parallel (or null) and how many threads to use."""

    _fields_ = (("parallel", ctypes.c_void_p), ("num_threads", ctypes.c_int32), ("reserved", ctypes.c_int32))


class Description(ctypes.Structure):
    """What a kernel says of itself; the loader compares it with this module before the first launch."""

    _fields_ = (("abi_version", ctypes.c_uint32), ("call_bytes", ctypes.c_uint32))


def call_struct(kernel: str) -> type[ctypes.Structure]:
    """The struct that launches of `kernel` take."""
    return {"attention_backward": AttentionGradCall, "cache_write": CacheWriteCall}.get(kernel, AttentionCall)


def _format(field_type: Any) -> str:
    """What `struct` calls a field: arrays and inner structs laid flat. The structs have no gaps."""
    if issubclass(field_type, ctypes.Structure):
        return "".join(_format(inner) for _, inner, *_ in field_type._fields_)
    if issubclass(field_type, ctypes.Array):
        return _format(field_type._type_) * field_type._length_
    return {ctypes.c_int32: "i", ctypes.c_int64: "q", ctypes.c_float: "f", ctypes.c_void_p: "Q"}[field_type]


def _between(struct_type: type[ctypes.Structure], first: str, last: str) -> struct.Struct:
    """What packs the fields from one to another."""
    names = [name for name, *_ in struct_type._fields_]
    fields = struct_type._fields_[names.index(first) : names.index(last) + 1]
    return struct.Struct("=" + "".join(_format(kind) for _, kind, *_ in fields))


# A call as bytes, from the values of all fields in their order, in the two pieces in which they are known: how large
# the workspace, the last field, must be follows from the others. Six times as fast as filling a ctypes struct. Fields
# in which most calls have nothing to say are bytes of their own, made once for all of these calls: what is off costs
# them nothing.
_LAYOUT = _between(AttentionProblem, "packed_q", "listed_pages")
_MORE_STRIDES = _between(AttentionProblem, "key_descale_strides", "alibi_stride")
_OPTIONS = _between(AttentionProblem, "softcap", "reserved")
_ADDRESSES = _between(AttentionTensors, "seqlens_q", "value_descale")
_PROBLEM = f"=5i{_LAYOUT.size}s14q{_MORE_STRIDES.size}sf{_OPTIONS.size}s"
pack_layout, pack_more_strides = _LAYOUT.pack, _MORE_STRIDES.pack
pack_options, pack_addresses = _OPTIONS.pack, _ADDRESSES.pack
pack_call = struct.Struct(f"{_PROBLEM}5Q{_ADDRESSES.size}s").pack
_grad_fields = (_format(kind) for _, kind, *_ in AttentionGradProblem._fields_[1:])
pack_grad_call = struct.Struct(_PROBLEM + "".join(_grad_fields) + _format(AttentionGradTensors)[:-1]).pack
pack_cache_write = struct.Struct("=" + _format(CacheWriteCall)[:-1]).pack
pack_workspace = struct.Struct("=Q").pack
NO_WORKSPACE = pack_workspace(0)
# What a CPU kernel answers where check_values is set and values are out of range: launch_errors.h.
BAD_VALUES = 3
