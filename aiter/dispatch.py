"""From an operation's arguments to a launch: finds the plan of their layout, or makes it, and runs it.

    operation ── query, key, value, options ──> Plan (checked; problem struct, kernel, what to allocate)
                                            ──> addresses ──> launch

A repeated call costs the look-up of its plan, the allocation of its result and one foreign call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from aiter import checks
from aiter.library import TransformedAttention, autocast
from aiter.plan import NO_INDICES, Indices, Plan
from aiter.plan_cache import keep, plans, signature_of

# Bound once, as they are asked at every call.
_Tensor = torch.Tensor
_is_grad_enabled = torch.is_grad_enabled
_is_compiling = torch.compiler.is_compiling
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_active_dispatch_modes = torch._C._len_torch_dispatch_stack
_active_transform = torch._C._functorch.peek_interpreter_stack

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
        output, lse = _operator()(query, key, value, *indices, causal, scale, max_seqlen)
        return (output, lse) if return_lse else output
    try:
        signature = signature_of(query, key, value, indices, causal, softmax_scale, max_seqlen, options)
        latest, plan = _latest.get(check, _NO_PLAN)
        if signature != latest:
            plan = plans.get((check, signature))
            if plan is not None:
                _latest[check] = signature, plan
    except (TypeError, RuntimeError):  # an unhashable option or a tensor without strides, which check names
        check(query, key, value, *options)
        raise
    if plan is None:
        check(query, key, value, *options)
        checks.flag("causal", causal)
        scale = checks.softmax_scale(softmax_scale, query.shape[-1])
        plan = keep((check, signature), Plan(query, key, value, indices, causal, scale, max_seqlen))
        _latest[check] = signature, plan
    output, lse = plan.run(query, key, value, indices, return_lse)
    return (output, lse) if return_lse else output


def _operator() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Attention as PyTorch's dispatcher takes it at this moment."""
    if _active_transform() is None or _is_compiling():
        return torch.ops.aiter.attention
    return TransformedAttention.apply


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
