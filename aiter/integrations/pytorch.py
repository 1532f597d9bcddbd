"""PyTorch's own attention on our kernels: scaled_dot_product_attention and torch.nn.attention.varlen.

    import aiter.integrations.pytorch
    aiter.integrations.pytorch.activate()      # or torch.nn.attention.activate_flash_attention_impl("aiter")

    scaled_dot_product_attention ──> _choose: can our kernels? ── yes ──> aten's FlashAttention operator ─┐
       (any model, compiled too)                               └─ no ───> PyTorch's own choice, said once │
    varlen_attn, nested tensors, context parallelism, graphs compiled before ─────────────────────────────┤
                                                           aten's FlashAttention operators, on CPU and GPU
                                                           and their gradients: our kernels, or, for what
                                                           those have no form of, PyTorch's own, said once

Both are entries in PyTorch's dispatcher, for the whole process, and gone after `deactivate()`. As the operators that
run are aten's, what knows those goes on: autograd, torch.compile, checkpointing policies, FlopCounterMode, and on GPUs
DTensor. Where PyTorch is older than `torch.library.get_kernel`, scaled_dot_product_attention calls our own operator
instead, and varlen_attn, if there is one, stays as it is.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from aiter import checks
from aiter.integrations import masks
from aiter.operations import flash_attn_func
from aiter.options import NO_LIMIT

NAME = "aiter"
_DEVICES = ("CPU", "CUDA")
_aten: Any = torch.ops.aten
_REPLACES_KERNELS = hasattr(torch.library, "get_kernel")
_registry: Any = torch.nn.attention
_HAS_REGISTRY = hasattr(_registry, "register_flash_attention_impl")

_OTHER_MASK = "attn_mask is neither padding nor causal nor a window, or its values cannot be looked at (torch.compile)"
_said: set[str] = set()
_active: _Installed | None = None  # where PyTorch has no registry of its own


def activate() -> None:
    """From now on, in every thread, PyTorch's attention runs on our kernels where they can do what is asked for.

    What they cannot, goes to PyTorch's own kernel, with one UserWarning for each reason.
    """
    global _active
    if _HAS_REGISTRY:
        _registry.activate_flash_attention_impl(NAME)
    elif _active is None:
        _active = _Installed()


def deactivate() -> None:
    """Gives PyTorch's attention back to PyTorch. What is not active stays as it is."""
    global _active
    if _HAS_REGISTRY:
        if _registry.current_flash_attention_impl() == NAME:
            _registry.restore_flash_attention_impl()
    elif _active is not None:
        _active.remove()
        _active = None


def is_active() -> bool:
    return _registry.current_flash_attention_impl() == NAME if _HAS_REGISTRY else _active is not None


@contextlib.contextmanager
def activated() -> Iterator[None]:
    """`activate()` for a block; afterwards, what was active before is so again."""
    before = NAME if is_active() else _registry.current_flash_attention_impl() if _HAS_REGISTRY else None
    activate()
    try:
        yield
    finally:
        if before != NAME:
            deactivate()
            if before is not None:
                _registry.activate_flash_attention_impl(before)


class _Installed:
    """Our entries in PyTorch's dispatcher, until `remove()`."""

    def __init__(self) -> None:
        _said.clear()
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():  # that there was a kernel before, as there is to be
            warnings.filterwarnings("ignore", message="Warning only once for all operators")
            if _REPLACES_KERNELS:
                self._replace("_scaled_dot_product_flash_attention_for_cpu", _cpu_forward, "CPU")
                self._replace("_scaled_dot_product_flash_attention_for_cpu_backward", _cpu_backward, "CPU")
                self._replace("_scaled_dot_product_flash_attention", _gpu_forward, "CUDA")
                self._replace("_scaled_dot_product_flash_attention_backward", _gpu_backward, "CUDA")
                for device in _DEVICES:
                    self._replace("_flash_attention_forward", _varlen_forward, device)
                    self._replace("_flash_attention_backward", _varlen_backward, device)
                    if hasattr(_aten, "_flash_attention_forward_no_dropout_inplace"):
                        self._replace("_flash_attention_forward_no_dropout_inplace", _varlen_out, device)
            for device in _DEVICES:  # the second is what inference tensors see
                for key in ("Autograd" + device, device):
                    self._library.impl("scaled_dot_product_attention", _choose, key)

    def _replace(self, name: str, kernel: Callable, device: str) -> None:
        """kernel(pytorchs, *arguments), where pytorchs(*arguments) is what there was before."""
        operator = getattr(_aten, name).default
        before = None
        if torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), device):
            before = torch.library.get_kernel(operator, device)

        def run(keys, *arguments, **keywords):
            def pytorchs(reason: str):
                if before is None:
                    raise NotImplementedError(
                        f"{name} on the {device}: neither aiter nor PyTorch has a kernel; {reason}"
                    )
                _say(reason)
                return before.call_boxed(keys, *arguments, **keywords)

            return kernel(pytorchs, *arguments, **keywords)

        self._library.impl(name, run, device, with_keyset=True)

    def remove(self) -> None:
        self._library._destroy()


if _HAS_REGISTRY:
    _registry.register_flash_attention_impl(NAME, register_fn=_Installed)


def _say(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        warnings.warn(f"aiter leaves attention to PyTorch's own kernel here: {reason}", UserWarning, stacklevel=2)


def _unlike_ours(dtype: torch.dtype, device: torch.device, *dims: int, dropout_p: float = 0.0) -> str | None:
    """Why our kernels cannot, if so."""
    if dtype not in checks.DTYPE_NAMES or (dtype == torch.float32 and device.type != "cpu"):
        return f"the dtype is {dtype} on {device.type}"
    if any(dim > checks.HEAD_DIM_MAX for dim in dims):
        return f"head_dim is {max(dims)}, and at most {checks.HEAD_DIM_MAX} for aiter"
    if dropout_p:
        return f"dropout_p is {dropout_p}, and PyTorch's operators keep its mask in a form of their own"
    return None


# ---- scaled_dot_product_attention: (batch, heads, seq, head_dim) ----


def _choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """In the place of `aten::scaled_dot_product_attention`, which is made of other operators, with their gradients."""
    plain = _is_a_call_of_flash_attention(query, key, value, enable_gqa)
    reason = f"dropout_p is {dropout_p}" if dropout_p >= 1 else None
    reason = reason or _unlike_ours(query.dtype, query.device, query.shape[-1], value.shape[-1])
    seen = None
    if plain and not reason and attn_mask is not None:
        plain = not is_causal and _is_a_mask(attn_mask, query, key)
        batch = query.shape[0] if query.dim() == 4 else 1
        seen = masks.read(attn_mask, batch, query.shape[-2], key.shape[-2]) if plain else None
        reason = None if seen else _OTHER_MASK
    if reason or not plain:
        if reason and plain:
            _say(reason)
        return _aten.scaled_dot_product_attention.default.decompose(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if query.dim() == 3:
        query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
        return _choose(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa).squeeze(
            0
        )

    value_dim = value.shape[-1]
    scale = _scale(scale, query)
    query, key, value = (_readable(tensor) for tensor in (query, key, value))
    square = not is_causal or query.shape[2] == key.shape[2]
    as_pytorchs = _REPLACES_KERNELS and not dropout_p and query.shape[-1] == value.shape[-1] and seen is None
    if as_pytorchs and (square or query.is_cpu):
        if query.is_cpu:
            run = _aten._scaled_dot_product_flash_attention_for_cpu
        else:
            run = _aten._scaled_dot_product_flash_attention
        output = run(query, key, value, 0.0, is_causal, scale=scale)[0]
    else:
        query, key, value = _swap(query, key, value)
        options: dict[str, Any] = {} if square else {"query_offsets": _first_at_first(query)}
        if seen is not None:
            is_causal = seen.causal
            key, value, options = masks.arrange(seen, query, key, value)
        if dropout_p:
            options["dropout_p"] = dropout_p
        output = flash_attn_func(query, key, value, is_causal, scale, **options).transpose(1, 2)
    return output if output.shape[-1] == value_dim else output[..., :value_dim]


def _is_a_call_of_flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> bool:
    """Whether it is one at all: not an error, nothing to be broadcast, nothing empty, and not switched off."""
    tensors = query, key, value
    dims = query.dim()
    return (
        torch.backends.cuda.flash_sdp_enabled()
        and dims in (3, 4)
        and all(
            tensor.dim() == dims
            and tensor.dtype == query.dtype
            and tensor.device == query.device
            and tensor.layout == torch.strided
            and not tensor.is_nested
            and tensor.numel() > 0
            for tensor in tensors
        )
        and query.shape[-1] == key.shape[-1]
        and key.shape[:-1] == value.shape[:-1]
        and (dims == 3 or query.shape[0] == key.shape[0])
        and (query.shape[-3] % key.shape[-3] == 0 if enable_gqa else query.shape[-3] == key.shape[-3])
    )


def _is_a_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether PyTorch would take it."""
    return (
        mask.dtype in (torch.bool, query.dtype)
        and mask.device == query.device
        and mask.layout == torch.strided
        and masks.fits(mask, *(query.shape[:1] if query.dim() == 4 else ()), *query.shape[-3:-1], key.shape[-2])
    )


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """With a last dimension that is adjacent, and a multiple of what kernels take: zeros change no score."""
    missing = -tensor.shape[-1] % checks.HEAD_DIM_STEP
    if missing:
        return F.pad(tensor, (0, missing))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _first_at_first(query: torch.Tensor) -> torch.Tensor:
    """query_offsets by which the first query stands at the first key, as PyTorch's is_causal has it."""
    return torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)


def _swap(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Between (batch, heads, seq, head_dim) and (batch, seq, heads, head_dim)."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _laid_out_like(tensor: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """Compiled code was promised the strides of torch.empty_like(model)."""
    target = torch.empty_like(model) if tensor.shape == model.shape else tensor
    return tensor if target.stride() == tensor.stride() else target.copy_(tensor)


def _scale(scale: float | None, query: torch.Tensor) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


# ---- the kernels of aten's operators; autograd is above them ----


def _dense_refusal(query: torch.Tensor, value: torch.Tensor, dropout_p: float) -> str | None:
    head_dim = query.shape[-1]
    if head_dim % checks.HEAD_DIM_STEP or value.shape[-1] != head_dim:
        return f"head_dim is {head_dim}, of value {value.shape[-1]}"
    return _unlike_ours(query.dtype, query.device, head_dim, dropout_p=dropout_p)


def _dense_forward(query, key, value, is_causal, scale, query_offsets=None) -> tuple[torch.Tensor, torch.Tensor]:
    output = torch.empty_like(query)
    lse = torch.ops.aiter.attention_out(
        *(*_swap(output, query, key, value), None, None, None, is_causal, _scale(scale, query), 0),
        query_offsets=query_offsets,
    )
    return output, lse


def _dense_backward(grad_out, query, key, value, out, lse, is_causal, scale, query_offsets=None):
    scale = _scale(scale, query)
    grad_out, query, key, value, out = _swap(grad_out, query, key, value, out)
    return _swap(
        *torch.ops.aiter.attention_backward(
            *(grad_out, None, query, key, value, out, lse, None, None, is_causal, scale, 0),
            query_offsets=query_offsets,
        )
    )


def _cpu_forward(pytorchs, query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    reason = _OTHER_MASK if attn_mask is not None else _dense_refusal(query, value, dropout_p)
    if reason:
        return pytorchs(reason)
    first = _first_at_first(query) if is_causal and query.shape[2] != key.shape[2] else None
    output, lse = _dense_forward(query, key, value, is_causal, scale, first)
    return output, lse.transpose(1, 2).contiguous().transpose(1, 2)  # as PyTorch's lies


def _cpu_backward(pytorchs, grad_out, query, key, value, out, lse, dropout_p, is_causal, *, attn_mask=None, scale=None):
    reason = _OTHER_MASK if attn_mask is not None else _dense_refusal(query, value, dropout_p)
    if reason:
        return pytorchs(reason)
    first = _first_at_first(query) if is_causal and query.shape[2] != key.shape[2] else None
    return _dense_backward(grad_out, query, key, value, out, lse, is_causal, scale, first)


def _gpu_forward(pytorchs, query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
    reason = "return_debug_mask is True" if return_debug_mask else _dense_refusal(query, value, dropout_p)
    if reason:
        return pytorchs(reason)
    output, lse = _dense_forward(query, key, value, is_causal, scale)
    return output, lse, None, None, query.shape[2], key.shape[2], *_no_randomness(query)


def _gpu_backward(
    pytorchs,
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *random,
    scale=None,
):
    reason = _dense_refusal(query, value, dropout_p)
    if reason:
        return pytorchs(reason)
    grads = _dense_backward(grad_out, query, key, value, out, lse, is_causal, scale)
    return tuple(_laid_out_like(grad, of) for grad, of in zip(grads, (query, key, value), strict=True))


def _no_randomness(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Seed, offset and probabilities, of which there are none, in the form that PyTorch's kernels give them."""
    dtype, size = (torch.int64, ()) if torch.version.hip else (torch.uint64, (2,))
    seed = torch.zeros(size, dtype=dtype, device=query.device)
    return seed, torch.zeros((), dtype=dtype, device=query.device), query.new_empty(0)


def _varlen_refusal(query, value, dropout_p, return_debug_mask=False) -> str | None:
    if return_debug_mask:
        return "return_debug_mask is True"
    for dim in (query.shape[-1], value.shape[-1]):
        if dim % checks.HEAD_DIM_STEP:
            return f"head_dim is {dim}, which is no multiple of {checks.HEAD_DIM_STEP}"
    return _unlike_ours(query.dtype, query.device, query.shape[-1], value.shape[-1], dropout_p=dropout_p)


def _varlen(
    output: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_q: torch.Tensor | None,
    cum_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed, (total, heads, head_dim), where cum_q is given, and else (batch, seq, heads, head_dim)."""
    if block_table is not None:  # key and value are pages (pages, page_size, heads_kv, head_dim)
        if seqused_k is None and cum_k is not None:
            seqused_k = cum_k.diff()
        key, value, cum_k = key.transpose(1, 2), value.transpose(1, 2), None
    call = (
        *(query, key, value, None, seqused_k, block_table, is_causal, _scale(scale, query), max_q, max_k, cum_q, cum_k),
        *_window(window_size_left, window_size_right),
    )
    # One split is asked for by those who need the same bits whatever the rest of the batch.
    options = {"alibi_slopes": alibi_slopes, "batch_invariant": num_splits == 1}
    if output is None:
        return torch.ops.aiter.attention(*call, **options)
    return output, torch.ops.aiter.attention_out(output, *call, **options)


def _varlen_forward(
    pytorchs,
    query,
    key,
    value,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    **options,
):
    reason = _varlen_refusal(query, value, dropout_p, return_debug_mask)
    if reason:
        return pytorchs(reason)
    output, lse = _varlen(None, query, key, value, cum_q, cum_k, max_q, max_k, is_causal, **options)
    return _laid_out_like(output, query), lse, *_no_randomness(query)


def _varlen_out(
    pytorchs,
    out,
    query,
    key,
    value,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    return_debug_mask,
    **options,
):
    reason = _varlen_refusal(query, value, dropout_p, return_debug_mask)
    if reason:
        return pytorchs(reason)
    return _varlen(out, query, key, value, cum_q, cum_k, max_q, max_k, is_causal, **options)[1]


def _varlen_backward(
    pytorchs,
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    cum_q,
    cum_k,
    max_q,
    max_k,
    dropout_p,
    is_causal,
    *random,
    scale=None,
    window_size_left=None,
    window_size_right=None,
):
    reason = _varlen_refusal(query, value, dropout_p)
    if reason:
        return pytorchs(reason)
    grads = torch.ops.aiter.attention_backward(
        *(grad_out, None, query, key, value, out, lse, None, None, is_causal, _scale(scale, query), max_q, max_k),
        *(cum_q, cum_k, *_window(window_size_left, window_size_right)),
    )
    return tuple(_laid_out_like(grad, of) for grad, of in zip(grads, (query, key, value), strict=True))


def _window(*sides: int | None) -> list[int]:
    return [NO_LIMIT if side is None else side for side in sides]
