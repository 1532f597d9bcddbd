"""Hugging Face diffusers: "aiter" as one of the backends that its attention dispatcher chooses from.

    import aiter.integrations.diffusers
    pipeline.transformer.set_attention_backend("aiter")          # or: with attention_backend("aiter"): ...

    dispatch_attention_fn ── query, key, value, mask, options ──> _attention ──> flash_attn_func
                          ── the same, with a parallel config ──> diffusers' templates ──> _forward, _backward

The dispatcher's names are an Enum; one is added to it, so that all of its functions know the backend. (Its own
"aiter_fa2_hub" is ROCm's library, fetched from a server.) Masks that are padding or causal are served; what the kernels
have no form of raises ValueError by name.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName

from aiter.integrations import masks
from aiter.operations import flash_attn_func
from aiter.parts import attention_backward

NAME = "aiter"
_USE_OTHERS = "use attention_backend('native')"


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """query (batch, seq_q, heads_q, head_dim), key and value (batch, seq_k, heads_kv, head_dim), and so the output.

    attn_mask: bool (batch, seq_k), which keys are tokens, or what `masks.read` knows. Fewer heads of keys are taken
    with or without enable_gqa. The log-sum-exp is (batch, heads_q, seq_q).
    """
    if _parallel_config is not None:
        for name, given in (("attn_mask", attn_mask is not None), ("dropout_p", dropout_p)):
            if given:
                raise ValueError(f"attention backend {NAME!r} takes no {name} in context parallelism: {_USE_OTHERS}")
        return attention_dispatch._templated_context_parallel_attention(
            *(query, key, value, None, dropout_p, is_causal, scale, enable_gqa, return_lse),
            forward_op=_forward,
            backward_op=_backward,
            _parallel_config=_parallel_config,
        )
    options: dict[str, Any] = {}
    if attn_mask is not None:
        if is_causal:
            raise ValueError(f"attention backend {NAME!r} takes attn_mask or is_causal, not both: {_USE_OTHERS}")
        seen = _read(attn_mask, query, key)
        is_causal = seen.causal
        key, value, options = masks.arrange(seen, query, key, value)
    elif is_causal and query.shape[1] != key.shape[1]:  # as PyTorch has it, the first query stands at the first key
        options["query_offsets"] = torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)
    if dropout_p:
        options["dropout_p"] = dropout_p
    return flash_attn_func(query, key, value, is_causal, scale, return_lse=return_lse, **options)


def _read(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> masks.Seen:
    (batch, seq_q, heads), seq_k = query.shape[:3], key.shape[1]
    if mask.dtype == torch.bool and mask.shape == (batch, seq_k):
        return masks.Seen(mask)
    seen = None
    if mask.dtype in (torch.bool, query.dtype) and masks.fits(mask, batch, heads, seq_q, seq_k):
        seen = masks.read(mask, batch, seq_q, seq_k)
    if seen is None:
        raise ValueError(
            f"attention backend {NAME!r} takes an attn_mask that says which keys are tokens, bool {(batch, seq_k)} or "
            f"{(batch, 1, 1, seq_k)}, or one with the same for all heads that is padding, causal or a window, not this "
            f"{mask.dtype} {tuple(mask.shape)}: {_USE_OTHERS}"
        )
    return seen


def _forward(
    ctx: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    return_lse: bool,
    _save_ctx: bool = True,
    _parallel_config: Any = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One part of context parallelism. Its log-sum-exps are (batch, seq, heads)."""
    output, lse = flash_attn_func(query, key, value, is_causal, scale, return_lse=True)
    lse = lse.transpose(1, 2)
    if _save_ctx:
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.is_causal, ctx.scale = is_causal, scale
    return (output, lse) if return_lse else output


def _backward(
    ctx: Any,
    grad_out: torch.Tensor,
    *_: Any,
    query: torch.Tensor | None = None,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one part: around a ring, output and log-sum-exp are those of whole rows, of which these keys are a part."""
    given = query, key, value, out, lse
    query, key, value, out, lse = (
        saved if tensor is None else tensor for tensor, saved in zip(given, ctx.saved_tensors, strict=True)
    )
    lse = lse.transpose(1, 2).float()
    return attention_backward(grad_out, query, key, value, out, lse, ctx.is_causal, ctx.scale)[:3]


def _register() -> None:
    if NAME in AttentionBackendName._value2member_map_:
        return
    member = str.__new__(AttentionBackendName, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    member._sort_order_ = len(AttentionBackendName)
    AttentionBackendName._member_names_.append(member._name_)
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._value2member_map_[NAME] = member
    attention_dispatch._AttentionBackendRegistry.register(
        member,
        constraints=[attention_dispatch._check_device, attention_dispatch._check_shape],
        supports_context_parallel=True,
    )(_attention)


_register()
