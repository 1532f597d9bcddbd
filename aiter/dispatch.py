"""From an operation's arguments to a launch: plans, made once per layout of the arguments and then looked up.

    operation ── query, key, value, options ──> Plan (checked; problem struct, kernel, what to allocate)
                                            ──> addresses ──> kernel.launch

Everything that follows from shapes, strides, dtype, device and options is worked out once and kept in a Plan, so that a
repeated call costs a dictionary look-up, the allocation of its result and one foreign call.
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

from aiter import abi, checks, jit
from aiter.errors import UnsupportedDtypeError
from aiter.jit.arch import arch_of, is_gpu
from aiter.jit.spec import Spec

# GPU kernels read rows in pieces of 16 bytes; a tensor that is not aligned to that is copied first.
GPU_ALIGNMENT = 16
# Up to this many rows (query tokens times query heads of one KV head) the decoding kernel wins: it splits the KV
# sequence over the GPU and reads it once for all rows, where the forward kernel gives a tile of rows to one block.
DECODE_ROWS = 64
# Layouts are few in practice; a program that never repeats one must not grow without bound.
MAX_PLANS = 4096


# Bound once, as they are asked at every call.
_Tensor = torch.Tensor
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_active_dispatch_modes = torch._C._len_torch_dispatch_stack
_active_transform = torch._C._functorch.peek_interpreter_stack
_get_num_threads = torch.get_num_threads


class Indices(NamedTuple):
    """The int32 tensors that say which rows are valid and where they lie; None where an operation has none."""

    seqlens_q: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None
    page_table: torch.Tensor | None = None


NO_INDICES = Indices()


def kernel_name(arch: str, rows: int) -> str:
    """The kernel for this many rows of one KV head in a sequence; the CPU has one kernel for all."""
    return "attention_decode" if is_gpu(arch) and rows <= DECODE_ROWS else "attention_forward"


def kernel_spec(kernel: str, dtype: str, head_dim: int, causal: bool, arch: str, paged: bool) -> Spec:
    if is_gpu(arch) and dtype == "fp32":
        raise UnsupportedDtypeError(f"fp32 is not supported on {arch}; supported there: fp16, bf16 (fp32 on CPUs)")
    options = (("paged", 1),) if paged and is_gpu(arch) else ()
    return Spec(kernel, dtype, head_dim, causal, arch, options)


# The public operations, and with which kinds of keys and values each is called: in pages or not.
OPERATIONS = {
    "flash_attn_func": (False,),
    "flash_attn_with_kvcache": (True,),
    "grouped_query_attention": (False,),
    "multi_query_attention": (False,),
    "variable_length_attention": (False, True),
}


def specs_for(operation: str, dtype: str, head_dim: int, causal: bool, arch: str, backward: bool = False) -> list[Spec]:
    """Every spec that calls of a public operation can need on `arch`: what `aiter prewarm` builds for it."""
    kernels = ("attention_forward", "attention_decode") if is_gpu(arch) else ("attention_forward",)
    specs = [kernel_spec(k, dtype, head_dim, causal, arch, paged) for paged in OPERATIONS[operation] for k in kernels]
    if backward and False in OPERATIONS[operation]:
        specs.append(kernel_spec("attention_backward", dtype, head_dim, causal, arch, False))
    return list(dict.fromkeys(specs))


class CpuQueue:
    """Where CPU kernels run: PyTorch's own thread pool, so that no second pool fights it for the cores."""

    def __init__(self) -> None:
        # PyTorch loads its OpenMP runtime with global symbols; where that is not libgomp, kernels start own threads.
        self.parallel = ctypes.cast(getattr(ctypes.CDLL(None), "GOMP_parallel", None), ctypes.c_void_p).value
        self.executors: dict[int, tuple[abi.CpuExecutor, int]] = {}
        # A forked child inherits the pool's data but not its threads: using it there would wait for ever.
        os.register_at_fork(after_in_child=self.leave_pool)

    def leave_pool(self) -> None:
        self.parallel = None
        self.executors = {}

    def executor(self) -> int:
        """The address of an executor with as many threads as PyTorch uses now."""
        num_threads = _get_num_threads()
        entry = self.executors.get(num_threads)
        if entry is None:
            struct = abi.CpuExecutor(self.parallel, num_threads, 0)
            entry = self.executors[num_threads] = (struct, ctypes.addressof(struct))
        return entry[1]


cpu_queue = CpuQueue()


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
        "output_shape",
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
        self.output_shape = query.shape
        # Nothing to write, or no key to read: nothing to compile.
        self.trivial = math.prod(self.output_shape) == 0 or seqlen_k == 0 or key.numel() == 0
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
        )
        name = kernel_name(arch, seqlen_q * (heads_q // heads_kv))
        dtype = checks.DTYPE_NAMES[query.dtype]
        self.kernel = jit.get_kernel(kernel_spec(name, dtype, head_dim, causal, arch, page_table is not None))
        self.workspace_bytes = self.kernel.workspace_bytes(self.problem)
        self.launch = launcher(self.kernel, self.problem, self.device)

    def run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, indices: Indices, return_lse: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Allocates the output and, if wanted, the log-sum-exp, and launches on the current stream."""
        output = query.new_empty(self.output_shape)
        lse = torch.empty(self.lse_shape, dtype=torch.float32, device=query.device) if return_lse else None
        if self.trivial:
            return output.zero_(), lse.fill_(-math.inf) if return_lse else None
        if self.copies:
            query, key, value = self.readable(query, key, value)
        seqlens_q, seqlens_k, page_table = indices
        workspace = query.new_empty(self.workspace_bytes, dtype=torch.uint8) if self.workspace_bytes else None
        tensors = abi.pack_tensors(
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            output.data_ptr(),
            0 if lse is None else lse.data_ptr(),
            0 if seqlens_q is None else seqlens_q.data_ptr(),
            0 if seqlens_k is None else seqlens_k.data_ptr(),
            0 if page_table is None else page_table.data_ptr(),
            0 if workspace is None else workspace.data_ptr(),
        )
        self.launch(tensors)
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
        self.workspace_bytes = self.kernel.workspace_bytes(self.problem)
        self.launch = launcher(self.kernel, self.problem, forward.device)

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
        tensors = abi.pack_grad_tensors(
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
            0 if workspace is None else workspace.data_ptr(),
        )
        self.launch(tensors)
        return grads


def launcher(kernel: jit.Kernel, problem: ctypes.Structure, device: torch.device) -> Callable[[bytes], None]:
    """A function of the packed tensors that launches where PyTorch would: on its CPU threads, or on the current stream
    of the tensors' GPU."""
    launch_raw, check, address = kernel.launch_raw, kernel.check, ctypes.addressof(problem)

    def on_cpu(tensors: bytes) -> None:
        code = launch_raw(address, tensors, cpu_queue.executor())
        if code:
            check(code)

    def on_gpu(tensors: bytes) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device.index)
        if device.index == torch.cuda.current_device():
            code = launch_raw(address, tensors, stream)
        else:
            with torch.cuda.device(device.index):
                code = launch_raw(address, tensors, stream)
        if code:
            check(code)

    return on_cpu if device.type == "cpu" else on_gpu


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


_plans: dict[tuple, Plan | BackwardPlan] = {}
# The last call of each operation, tried first: to compare a signature costs a third of hashing it.
_latest: dict[Callable[..., None], tuple[tuple, Plan]] = {}
_NO_PLAN = None, None


def attend(
    check: Callable[..., None],
    options: tuple,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    softmax_scale: float | None,
    return_lse: bool,
    indices: Indices = NO_INDICES,
    max_seqlen: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Runs one attention call. `check(query, key, value, *options)` raises where an argument is bad; it sees each
    layout of arguments once, so it must look at nothing but shapes, dtypes and devices."""
    if not _is_plain(query, key, value):
        if _is_autocast_enabled():
            query, key, value = autocast(query, key, value)
        check(query, key, value, *options)
        checks.flag("causal", causal)
        scale = checks.softmax_scale(softmax_scale, query.shape[-1])
        output, lse = torch.ops.aiter.attention(query, key, value, *indices, causal, scale, max_seqlen)
        return (output, lse) if return_lse else output
    try:
        signature = _signature(query, key, value, indices, causal, softmax_scale, max_seqlen, options)
        latest, plan = _latest.get(check, _NO_PLAN)
        if signature != latest:
            plan = _plans.get((check, signature))
    except (TypeError, RuntimeError):  # an unhashable option or a tensor without strides, which check names
        check(query, key, value, *options)
        raise
    if plan is None:
        check(query, key, value, *options)
        checks.flag("causal", causal)
        scale = checks.softmax_scale(softmax_scale, query.shape[-1])
        plan = _keep((check, signature), Plan(query, key, value, indices, causal, scale, max_seqlen))
    _latest[check] = signature, plan
    output, lse = plan.run(query, key, value, indices, return_lse)
    return (output, lse) if return_lse else output


def autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that autocast, where it is on for their device, wants attention to run in."""
    return tuple(
        tensor.to(torch.get_autocast_dtype(tensor.device.type))
        if isinstance(tensor, torch.Tensor)
        and torch.is_autocast_enabled(tensor.device.type)
        and tensor.dtype in checks.DTYPE_NAMES
        else tensor
        for tensor in tensors
    )


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: Indices,
    causal: bool,
    softmax_scale: float,
    max_seqlen: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What aiter::attention runs once PyTorch's dispatcher is done with it: output and log-sum-exp."""
    signature = _signature(query, key, value, indices, causal, softmax_scale, max_seqlen)
    plan = _plans.get(signature)
    if plan is None:
        plan = _keep(signature, Plan(query, key, value, indices, causal, softmax_scale, max_seqlen))
    return plan.run(query, key, value, indices, True)


def backward(
    grad_output: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    indices: Indices,
    causal: bool,
    softmax_scale: float,
    max_seqlen: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What aiter::attention_backward runs: the gradients of query, key and value. A gradient that is None is zero."""
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    if grad_lse is not None:
        grad_lse = grad_lse.contiguous()
    options = causal, softmax_scale, max_seqlen
    signature = _signature(query, key, value, indices, *options)
    plan = _plans.get(signature) or _keep(signature, Plan(query, key, value, indices, *options))
    signature = (signature, grad_output.stride(), grad_output.data_ptr() % GPU_ALIGNMENT)
    backward_plan = _plans.get(signature) or _keep(signature, BackwardPlan(plan, grad_output, query, key))
    return backward_plan.run(grad_output, grad_lse, query, key, value, output, lse, indices)


def _is_plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a call needs nothing of PyTorch's dispatcher: no gradient, autocast, tracing, transform or subclass."""
    return (
        type(query) is _Tensor
        and type(key) is _Tensor
        and type(value) is _Tensor
        and not (_is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad))
        and not _is_compiling()
        and not _is_autocast_enabled()
        and not _active_dispatch_modes()
        and _active_transform() is None
    )


def _signature(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, indices: Indices, *rest: object
) -> tuple[object, ...]:
    """All that a plan depends on."""
    page_table = indices[2]
    signature = (
        query.shape,
        key.shape,
        value.shape,
        query.stride(),
        key.stride(),
        value.stride(),
        query.dtype,
        key.dtype,
        value.dtype,
        query.device,
        key.device,
        value.device,
        None if page_table is None else page_table.shape,
        None if indices[0] is None else indices[0].shape,
        rest,
    )
    if query.is_cuda:
        signature += tuple(tensor.data_ptr() % GPU_ALIGNMENT for tensor in (query, key, value))
    return signature


def _keep(signature: tuple[object, ...], plan: Plan | BackwardPlan) -> Plan | BackwardPlan:
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    _plans[signature] = plan
    return plan
