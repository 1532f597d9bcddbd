"""Plans by the layout of a call's arguments, and the passes that run them: what the operators of library.py do."""

from __future__ import annotations

import torch

from aiter.plan import GPU_ALIGNMENT, NO_INDICES, BackwardPlan, Indices, Plan

# Layouts are few in practice; a program that never repeats one must not grow without bound.
MAX_PLANS = 4096

plans: dict[tuple, Plan | BackwardPlan] = {}


def signature_of(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, indices: Indices, *rest: object
) -> tuple[object, ...]:
    """All that a plan depends on."""
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
        None if indices is NO_INDICES else tuple(None if tensor is None else tensor.shape for tensor in indices),
        rest,
    )
    if query.is_cuda:
        signature += tuple(tensor.data_ptr() % GPU_ALIGNMENT for tensor in (query, key, value))
    return signature


def keep(signature: tuple[object, ...], plan: Plan | BackwardPlan) -> Plan | BackwardPlan:
    if len(plans) >= MAX_PLANS:
        plans.clear()
    plans[signature] = plan
    return plan


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
    signature = signature_of(query, key, value, indices, causal, softmax_scale, max_seqlen)
    plan = plans.get(signature)
    if plan is None:
        plan = keep(signature, Plan(query, key, value, indices, causal, softmax_scale, max_seqlen))
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
    signature = signature_of(query, key, value, indices, *options)
    plan = plans.get(signature) or keep(signature, Plan(query, key, value, indices, *options))
    signature = (signature, grad_output.stride(), grad_output.data_ptr() % GPU_ALIGNMENT)
    backward_plan = plans.get(signature) or keep(signature, BackwardPlan(plan, grad_output, query, key))
    return backward_plan.run(grad_output, grad_lse, query, key, value, output, lse, indices)
