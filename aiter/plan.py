"""From a checked call to a launch.

    what selects code     ── key ──> Plan: a loaded kernel on a device
    what is only a number ── sizes, strides, scalars, addresses ──> one struct.pack ──> one foreign call

So whether a call is taken or refused does not depend on the calls before it, and no call costs more for them. One that
is like another but for its addresses costs less: repeated.py.
"""

from __future__ import annotations

import functools
import math
import struct
import sys
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch

from aiter import checks, dropout, jit, kernels, reader
from aiter.abi import (
    NO_WORKSPACE,
    pack_addresses,
    pack_call,
    pack_grad_call,
    pack_layout,
    pack_more_strides,
    pack_options,
    pack_workspace,
)
from aiter.jit.arch import arch_of
from aiter.launch import SCRATCH_BYTES, cpu_queue, launcher
from aiter.layout import NO_INDICES, Indices, Sizes
from aiter.options import NO_OPTIONS, Options, strides_per_kv_head
from aiter.plan_cache import plans

# GPU kernels read rows in pieces of 8 elements; a tensor that is not aligned to that is copied first.
GPU_PIECE = 8

_READABLE = f"the last dimension adjacent and, on a GPU, every row at a multiple of {GPU_PIECE} elements"

# Bound once, as they are used at every call.
_empty, _empty_like, _contiguous_format = torch.empty, torch.empty_like, torch.contiguous_format

# kernel, device index (-1: CPU), dtype, head_dim of key and of value, causal, paged, what else selects code (sorted)
Key: TypeAlias = tuple[str, int, torch.dtype, int, int, bool, bool, tuple[str, ...]]


def on_gpu(tensor: torch.Tensor) -> bool:
    return not tensor.is_cpu


class Call(NamedTuple):
    """A checked call, but for query, key and value. `names` are for messages: see checks.values."""

    sizes: Sizes
    indices: Indices
    options: Options
    causal: bool
    softmax_scale: float
    names: checks.Names


class Longer(NamedTuple):
    """Lengths that a call makes of its own: those given, and so many more."""

    made: torch.Tensor
    given: torch.Tensor
    more: int


class Between(NamedTuple):
    """Memory that one launch fills and a later one reads."""

    made: torch.Tensor


class Apart(NamedTuple):
    """Numbers no two of which are equal, or the call would have been looked at more closely."""

    given: torch.Tensor


class Noted(threading.local):
    """What this thread launches, while somebody wants to know: plan, call, bytes of workspace; and what is made for
    them. None for what else is done to the output. See repeated.py."""

    launches: list[tuple[Plan, bytes, int] | Longer | Between | Apart | None] | None = None


noted = Noted()


def longer(lengths: torch.Tensor, more: int | torch.Tensor) -> torch.Tensor:
    made = lengths + more
    if noted.launches is not None and isinstance(more, int):
        noted.launches.append(Longer(made, lengths, more))
    return made


class Plan:
    """One kernel on one device, ready to launch; immutable, so that any number of threads may use it at once."""

    __slots__ = ("device", "kernel", "key", "launch", "workspace_raw")

    def __init__(self, key: Key, device: torch.device) -> None:
        self.key, self.device = key, device
        name, _, dtype, head_dim, value_dim, causal, paged, options = key
        spec = kernels.kernel_spec(
            name, checks.DTYPE_NAMES[dtype], head_dim, causal, arch_of(device), paged, value_dim, options
        )
        self.kernel = jit.get_kernel(spec)
        reader.take_from(self.kernel.library)
        self.workspace_raw = self.kernel.workspace_raw
        self.launch = launcher(self.kernel, device)

    def run(self, packed: bytes) -> int:
        """Launches a call that is packed but for its workspace. Returns 0 or BAD_VALUES; raises LaunchError."""
        needed = self.workspace_raw(packed)
        if noted.launches is not None:
            noted.launches.append((self, packed, needed))
        if not needed:
            return self.launch(packed + NO_WORKSPACE)
        address, _keep = self.workspace(needed)
        return self.launch(packed + pack_workspace(address))

    def workspace(self, needed: int) -> tuple[int, torch.Tensor | None]:
        """Its address, and what must be kept until the launch."""
        if needed <= SCRATCH_BYTES and self.device.type == "cpu":
            return cpu_queue.scratch(), None
        memory = _empty(needed, dtype=torch.uint8, device=self.device)
        return memory.data_ptr(), memory


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, never traced by torch.compile, whoever calls it: it holds addresses, and a trace lets go of the
    memory behind them. Loads no compiler where none is in use."""
    disabled: Callable[..., Any] | None = None

    def entry(*arguments: Any) -> Any:
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*arguments)
        if disabled is None:
            disabled = sys.modules["torch._dynamo"].disable(function)
        return disabled(*arguments)

    return entry


@untraced
def forward(
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    return_lse: bool,
    output: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output (new and contiguous, or the given one, of which rows that belong to no sequence are left alone) and, if
    wanted, log-sum-exp; launched on the current stream."""
    sizes, indices, options, _, _, _ = call
    head_dim, value_dim, gpu, given = query.shape[-1], value.shape[-1], on_gpu(query), output is not None
    if output is not None:
        check_writable(output)
    elif value_dim != head_dim:
        output = _empty((*query.shape[:-1], value_dim), dtype=query.dtype, device=query.device)
    elif query.is_contiguous():
        output = _empty_like(query)
    else:
        output = _empty_like(query, memory_format=_contiguous_format)
    lse = None
    if return_lse:
        lse = _empty(_lse_shape(sizes), dtype=torch.float32, device=query.device)
        if given:  # rows that belong to no sequence are left alone in the output; this is new
            lse.fill_(-math.inf)
            if noted.launches is not None:
                noted.launches.append(None)
    if 0 in sizes[:5] or (indices is not NO_INDICES and _has_no_rows(sizes)):
        # Nothing to write, or no key to read: nothing to compile.
        if not gpu and indices is not NO_INDICES:
            checks.values(sizes, indices, options, call.names)
        return _without_keys(call, output, given), None if lse is None else lse.fill_(-math.inf)

    plan = _plan_of(call, query, key, head_dim, value_dim, gpu)
    if options is NO_OPTIONS:
        more_strides, chosen = _NO_MORE_STRIDES, _NO_OPTIONS[_check(call, gpu), given]
    else:
        more_strides, chosen = _more_strides(options), _options(options, _check(call, gpu), given)
    if given and gpu and output.data_ptr() == query.data_ptr() and (call.causal or "window" in plan.key[-1]):
        # Rows are computed once more where hidden values are not finite, when the output may have been written.
        query = query.clone()
    in_c = reader.pack
    packed = in_c and in_c(call, query, key, value, output, lse, more_strides, chosen, gpu)
    if packed is None:
        if gpu or not query.stride(-1) == key.stride(-1) == value.stride(-1) == 1:
            names = call.names
            query, key, value = _readable(names.query, query), _readable(names.key, key), _readable(names.value, value)
        packed = pack(call, query, key, value, output, lse, more_strides, chosen)
    if plan.run(packed):
        _refuse_values(call)
    if given:
        torch.autograd.graph.increment_version(output)  # autograd may have saved it
    return output, lse


def check_writable(out: torch.Tensor) -> None:
    if _readable("out", out) is not out:
        raise ValueError(f"out has strides {out.stride()} that no kernel can write to: {_READABLE}")


def look(
    call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor | None = None
) -> None:
    """Raises for what `forward` would refuse: an output, and values that a CPU kernel looks at; for who must know
    before something is written. Of the large tensors, nothing is read."""
    if out is not None:
        check_writable(out)
    sizes = call.sizes
    if on_gpu(query) or call.indices is NO_INDICES:
        return
    if 0 in sizes[:5] or _has_no_rows(sizes):
        checks.values(sizes, call.indices, call.options, call.names)
        return
    plan = _plan_of(call, query, key, query.shape[-1], value.shape[-1], False)
    chosen = _options(call.options, _LOOK, True)
    if plan.run(pack(call, query, key, value, query, None, _more_strides(call.options), chosen)):
        _refuse_values(call)


def _plan_of(call: Call, query: torch.Tensor, key: torch.Tensor, head_dim: int, value_dim: int, gpu: bool) -> Plan:
    sizes, indices, options, causal, _, _ = call
    code = _CODE_OF_NONE if options is NO_OPTIONS and key.dtype is query.dtype else _code_options(options, query, key)
    kernel = "attention_forward"
    if gpu:
        device = _gpu(query.device)
        fits = key.dtype is query.dtype and head_dim <= kernels.CUT_HEAD_DIM_MAX >= value_dim
        cutting = device if fits else kernels.CUTS_NO_KEYS
        kernel = kernels.forward_kernel(sizes, head_dim, options, cutting, indices is NO_INDICES)
        if form := kernels.form_of(kernel, sizes, head_dim, options, device):
            code = tuple(sorted((*code, form)))
    plan_key = (
        kernel,
        query.get_device(),
        query.dtype,
        head_dim,
        value_dim,
        causal,
        indices.page_table is not None,
        code,
    )
    return plans.get(plan_key) or _make_plan(plan_key, call, query)


def pack(
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    more_strides: bytes,
    options: bytes,
) -> bytes:
    """A call as kernels take it, but for its workspace; of tensors that are `_readable`."""
    sizes, names, no_tensors = call.sizes, call.names, call.options is NO_OPTIONS and call.indices is NO_INDICES
    try:
        return pack_call(
            *sizes[:5],
            _NO_LAYOUT if call.indices is NO_INDICES else pack_layout(*sizes[5:]),
            *_strides(sizes, query.stride(), key.stride(), value.stride(), output.stride()),
            *((0, 0) if lse is None else _lse_strides(lse)),
            more_strides,
            call.softmax_scale,
            options,
            checks.address(names.query, query),
            checks.address(names.key, key),
            checks.address(names.value, value),
            checks.address("out", output),
            checks.address("lse", lse),
            _NO_ADDRESSES if no_tensors else pack_addresses(*_addresses(call)),
        )
    except struct.error:
        checks.sizes(**sizes._asdict())
        raise


@untraced
def backward(
    call: Call,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    lse_is_given: bool,
) -> tuple[torch.Tensor, ...]:
    """The gradients of query, key and value: new, contiguous. A gradient of output or log-sum-exp that is None is zero.

    lse_is_given: lse is not that of these keys alone, but what their weights are to be divided by.
    """
    sizes, gpu = call.sizes, on_gpu(query)
    grads = tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    if 0 in sizes[:5] or _has_no_rows(sizes) or (grad_output is None and grad_lse is None):
        return tuple(grad.zero_() for grad in grads)
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    names = call.names
    query, key, value = _readable(names.query, query), _readable(names.key, key), _readable(names.value, value)
    output, grad_output = _readable("the output", output), _readable("the gradient of the output", grad_output)
    checks.address("the log-sum-exp", lse)
    if lse.stride(-1) != 1 or (grad_lse is not None and grad_lse.stride() != lse.stride()):
        lse, grad_lse = lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()
    plan_key: Key = (
        *("attention_backward", query.get_device(), query.dtype, query.shape[-1], value.shape[-1]),
        *(call.causal, False, _code_options(call.options, query, key)),
    )
    *addresses, _, _, _, alibi_slopes, _, rng_state, _, _ = _addresses(call)
    plan = plans.get(plan_key) or _make_plan(plan_key, call, query)
    grad_strides = _strides(sizes, *(tensor.stride() for tensor in (grad_output, grads[1], grads[2], grads[0])))
    packed = pack_grad_call(
        *sizes[:5],
        pack_layout(*sizes[5:]),
        *_strides(sizes, query.stride(), key.stride(), value.stride(), output.stride()),
        *_lse_strides(lse),
        _more_strides(call.options),
        call.softmax_scale,
        _options(call.options, _check(call, gpu), False),
        *(*grad_strides[:3], *grad_strides[9:], *grad_strides[3:9]),
        lse_is_given,
        0,
        *(tensor.data_ptr() for tensor in (query, key, value, output, lse, grad_output)),
        0 if grad_lse is None else grad_lse.data_ptr(),
        *(grad.data_ptr() for grad in grads),
        *addresses,
        alibi_slopes,
        rng_state,
    )
    plan.run(packed)
    return grads


@functools.cache
def _gpu(device: torch.device) -> kernels.Gpu:
    return kernels.Gpu.of(arch_of(device), torch.cuda.get_device_properties(device).multi_processor_count)


def _code_options(options: Options, query: torch.Tensor, key: torch.Tensor) -> tuple[str, ...]:
    chosen = _CODE_OF_NONE if options is NO_OPTIONS else options.that_select_code
    return chosen if key.dtype is query.dtype else tuple(sorted((*chosen, checks.FP8_NAMES[key.dtype])))


def _has_no_rows(sizes: Sizes) -> bool:
    """Packed rows or pages that there are none of."""
    packed_q, packed_k, page_size, total_q, total_k, num_pages = sizes[5:11]
    return bool((packed_q and not total_q) or (packed_k and not total_k) or (page_size and not num_pages))


def _without_keys(call: Call, output: torch.Tensor, given: bool) -> torch.Tensor:
    """Zeros, but for rows of a given output that belong to no sequence."""
    if output.is_inference() and not torch.is_inference_mode_enabled():
        with torch.inference_mode():  # elsewhere PyTorch lets nobody write into such a tensor
            return _without_keys(call, output, given)
    sizes, seqlens_q, starts_q = call.sizes, call.indices.seqlens_q, call.indices.starts_q
    if not given or (seqlens_q is None and starts_q is None) or output.numel() == 0:
        return output.zero_()
    if not sizes.packed_q:
        assert seqlens_q is not None
        valid = torch.arange(sizes.seqlen_q, device=output.device) < seqlens_q.unsqueeze(1)
        return output.masked_fill_(valid[:, :, None, None], 0.0)
    rows = torch.arange(sizes.total_q, device=output.device)
    if starts_q is None:
        assert seqlens_q is not None
        valid = rows < seqlens_q.sum()
    else:
        sequence = torch.searchsorted(starts_q, rows, right=True, out_int32=True) - 1
        valid = (rows >= starts_q[0]) & (rows < starts_q[-1])
        if seqlens_q is not None:
            sequence = sequence.clamp(0, sizes.batch - 1)
            valid &= rows < starts_q[sequence] + seqlens_q[sequence]
    return output.masked_fill_(valid[:, None, None], 0.0)


def _make_plan(key: Key, call: Call, query: torch.Tensor) -> Plan:
    """A kernel that is yet to be compiled cannot look at values: so they are looked at here, if they may be."""
    if not on_gpu(query):
        checks.values(call.sizes, call.indices, call.options, call.names)
    plan = plans[key] = Plan(key, query.device)
    return plan


def _refuse_values(call: Call) -> None:
    """After a kernel has said that a value is out of range."""
    checks.values(call.sizes, call.indices, call.options, call.names)
    raise ValueError("a length or page number changed to one out of range while it was in use")


def _lse_shape(sizes: Sizes) -> tuple[int, ...]:
    batch, heads_q, _, seqlen_q, _, packed, _, _, total_q, *_ = sizes
    return (heads_q, total_q) if packed else (batch, heads_q, seqlen_q)


Strides: TypeAlias = tuple[int, ...]


def _strides(sizes: Sizes, q: Strides, k: Strides, v: Strides, o: Strides) -> tuple[int, ...]:
    """Batch, token and head of query, key, value and output; page, position and head of pages."""
    packed_q, packed_k, page_size = sizes[5:8]
    if packed_q:
        q, o = (0, *q), (0, *o)
    if page_size:
        k, v = (k[0], k[2], k[1]), (v[0], v[2], v[1])
    elif packed_k:
        k, v = (0, *k), (0, *v)
    return (q[0], q[1], q[2], k[0], k[1], k[2], v[0], v[1], v[2], o[0], o[1], o[2])


def _lse_strides(lse: torch.Tensor) -> tuple[int, int]:
    """Batch, head."""
    stride = lse.stride()
    return (0, stride[0]) if len(stride) == 2 else (stride[0], stride[1])


def _more_strides(options: Options) -> bytes:
    slopes = options.alibi_slopes
    return pack_more_strides(
        *strides_per_kv_head(options.k_descale),
        *strides_per_kv_head(options.v_descale),
        0 if slopes is None or slopes.dim() == 1 else slopes.stride(0),
    )


_LOOK = 3  # check as 1 does, and do nothing else


def _check(call: Call, gpu: bool) -> int:
    """What a CPU kernel is to check of a call's values."""
    return 0 if gpu or call.indices is NO_INDICES else 2 if call.names.fill else 1


def _options(options: Options, check: int, given: bool) -> bytes:
    """The last fields of the problem struct; the rest of a given output is left as it is."""
    window_left, window_right, softcap, _, _, _, batch_invariant, dropout_p, _, chunk, *_ = options
    threshold = dropout.threshold(dropout_p) if dropout_p else 0
    return pack_options(softcap, window_left, window_right, not given, batch_invariant, check, chunk, threshold, 0)


# The same, and the rest, of a call without options or indices.
_CODE_OF_NONE = NO_OPTIONS.that_select_code
_NO_LAYOUT = pack_layout(*[0] * 8)
_NO_MORE_STRIDES = _more_strides(NO_OPTIONS)
_NO_OPTIONS = {(check, given): _options(NO_OPTIONS, check, given) for check in range(3) for given in (False, True)}
_NO_ADDRESSES = pack_addresses(*[0] * 13)


def _addresses(call: Call) -> tuple[int, ...]:
    """Of what a call has beside the large tensors, in the order of the tensors struct."""
    seqlens_q, seqlens_k, page_table, starts_q, starts_k, page_indptr, last_page_len = call.indices
    _, _, _, alibi_slopes, sinks, query_offsets, _, _, rng_state, _, k_descale, v_descale = call.options
    names = call.names
    return (
        checks.address(names.seqlens_q, seqlens_q),
        checks.address(names.seqlens_k, seqlens_k),
        checks.address(names.starts_q, starts_q),
        checks.address(names.starts_k, starts_k),
        checks.address("query_offsets", query_offsets),
        checks.address(names.page_table, page_table),
        checks.address("page_indptr", page_indptr),
        checks.address("last_page_len", last_page_len),
        checks.address("alibi_slopes", alibi_slopes),
        checks.address("sinks", sinks),
        checks.address("rng_state", rng_state),
        checks.address("k_descale", k_descale),
        checks.address("v_descale", v_descale),
    )


def _readable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a kernel can read it: in place, or copied where it cannot take its strides."""
    address, strides = checks.address(name, tensor), tensor.stride()
    if strides[-1] == 1:
        if not on_gpu(tensor):
            return tensor
        size = tensor.element_size()
        alignment = GPU_PIECE * size
        together = 0
        for stride in strides[:-1]:
            together |= stride
        if not (address | together * size) % alignment:
            return tensor
        used = [stride for count, stride in zip(tensor.shape[:-1], strides, strict=False) if count > 1]
        if not (address % alignment or any(stride % GPU_PIECE for stride in used)):
            return tensor
    return tensor.clone(memory_format=_contiguous_format)
