"""When a call may go straight to a kernel, and what of PyTorch would be missed if it did.

PyTorch's dispatcher is what makes a call take part in autograd, tracing, autocast and all else below. It costs several
times what a small launch costs, so that calls which need nothing of it pass it by.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

# Bound once, as they are asked at every call.
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_strided = torch.strided
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_active_dispatch_modes = torch._C._len_torch_dispatch_stack
_active_transform = torch._C._functorch.peek_interpreter_stack
_is_profiling = torch._C._autograd._profiler_enabled


def wants_gradient(*tensors: torch.Tensor) -> bool:
    """Whether autograd must record what is done with these tensors."""
    return _is_grad_enabled() and any([tensor.requires_grad for tensor in tensors])


def _are_tensors(*tensors: torch.Tensor) -> bool:
    """Whether none is of a subclass that means something of its own."""
    return all(type(tensor) in (_Tensor, _Parameter) for tensor in tensors)


def are_real(*tensors: torch.Tensor) -> bool:
    """Whether there is memory behind them, of which they are what they say: no fake ones, none in a transform."""
    return _are_tensors(*tensors) and _active_transform() is None


def may_look(tensor: torch.Tensor) -> bool:
    """Whether its values can be read, and nobody waits for that."""
    return not _is_compiling() and tensor.is_cpu and are_real(tensor)


def needs_nothing() -> bool:
    """Whether nobody is to know of calls but, perhaps, autograd."""
    return (
        # torch.jit.trace records what passes the dispatcher and nothing else.
        _tracing_state() is None
        # Modes see every operator: fake tensors, FLOP counters, make_fx.
        and not _active_dispatch_modes()
        # torch.func's vmap, grad, jvp wrap tensors.
        and _active_transform() is None
        # Forward-mode tangents ride on plain tensors.
        and forward_ad._current_level < 0
        # Autocast chooses another dtype.
        and not _is_autocast_enabled()
        # A profile should name the call.
        and not _is_profiling()
    )


# Of torch.autograd.grad(is_grads_batched=True): such a tensor says of itself that it is plain, and has no memory.
is_batched = torch._C._functorch.is_legacy_batchedtensor


def is_plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a call needs nothing of PyTorch's dispatcher but, perhaps, a gradient."""
    return (
        # torch.compile and torch.export would trace addresses. Asked first: Dynamo answers it and looks no further.
        not _is_compiling()
        # Subclasses (fake, nested, distributed tensors, ...) mean something of their own.
        and (type(query) is type(key) is type(value) is _Tensor or _are_tensors(query, key, value))
        # Other devices than a CPU or GPU, and other layouts, are refused by name.
        and ((query.is_cpu and key.is_cpu and value.is_cpu) or (query.is_cuda and key.is_cuda and value.is_cuda))
        and query.layout is _strided
        and key.layout is _strided
        and value.layout is _strided
        # Lazily negated: what memory holds is not the value.
        and not (query.is_neg() or key.is_neg() or value.is_neg())
        and needs_nothing()
    )
