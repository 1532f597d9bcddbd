"""aiter as an attention implementation of Hugging Face transformers.

    import aiter.transformers
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="aiter")

Dense and padded batches, causal and bidirectional, grouped heads, any cache, inference and training. Padding is taken
out before the call and put back after it. What the kernels have no form of (sliding windows, soft caps, attention
sinks, dropout, masks other than padding) raises ValueError instead of giving another model's results.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, flash_attention_mask

from aiter.operations import flash_attn_func

NAME = "aiter"
_MASKS = (causal_mask_function, bidirectional_mask_function)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | None = None,
    **kwargs,
) -> torch.Tensor | None:
    """The (batch, tokens so far) mask of the tokens that are not padding, or None where all are."""
    if mask_function not in _MASKS:
        raise ValueError(
            f"attn_implementation={NAME!r} takes causal and bidirectional masks with padding; this model or batch asks "
            "for another one (a sliding window, several documents in one row, …): use 'sdpa' or 'eager'"
        )
    held = int(q_offset) + q_length
    if attention_mask is None and held < kv_length:
        # A static cache, not full yet. One element, expanded: `attention` sees by the strides that all are valid.
        return torch.ones((), dtype=torch.bool, device=device).expand(batch_size, held)
    return flash_attention_mask(
        batch_size, q_length, kv_length, q_offset, mask_function=mask_function, attention_mask=attention_mask, **kwargs
    )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """query (batch, heads_q, seq_q, head_dim), key and value (batch, heads_kv, seq_k, head_dim), as transformers calls
    it; attention_mask as `padding_mask` returns it. Returns (batch, seq_q, heads_q, head_dim) and no weights."""
    unknown = [name for name in ("sliding_window", "softcap", "s_aux") if kwargs.get(name) is not None]
    if dropout:
        unknown.append("dropout")
    if unknown:
        raise ValueError(f"attn_implementation={NAME!r} has no {', '.join(unknown)}: use 'sdpa' or 'eager'")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask must be (batch, tokens), but has shape {tuple(attention_mask.shape)}")
        # A static cache is longer than what it holds so far.
        key, value = (tensor[:, : attention_mask.shape[1]] for tensor in (key, value))
    if attention_mask is None or attention_mask.stride() == (0, 0):
        return flash_attn_func(query, key, value, causal, scaling), None
    return _without_padding(query, key, value, attention_mask.bool(), causal, scaling), None


def _without_padding(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    valid: torch.Tensor,
    causal: bool,
    scaling: float | None,
) -> torch.Tensor:
    """Packs the valid tokens, wherever in their rows they stand, attends, and leaves zeros where padding was."""
    seq_q, head_dim = query.shape[1], query.shape[3]
    valid_q = valid[:, -seq_q:]  # the query's tokens are the last of those in the cache
    tokens_q, tokens_k = (mask.flatten().nonzero().squeeze(1) for mask in (valid_q, valid))
    packed, _ = torch.ops.aiter.attention(
        query.flatten(0, 1)[tokens_q],
        key.flatten(0, 1)[tokens_k],
        value.flatten(0, 1)[tokens_k],
        valid_q.sum(1, dtype=torch.int32),
        valid.sum(1, dtype=torch.int32),
        None,
        causal,
        head_dim**-0.5 if scaling is None else scaling,
        valid.shape[1],
    )
    output = query.new_zeros(query.flatten(0, 1).shape)
    return output.index_copy(0, tokens_q, packed).view(query.shape)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
