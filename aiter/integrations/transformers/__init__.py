"""aiter as an attention implementation of Hugging Face transformers; `aiter.transformers` is its public name.

    import aiter.transformers
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="aiter")

    transformers ── mask function, sizes, padding ──> masks.py  ──> Mask, once for each forward pass
                 ── query, key, value, Mask, options ─> layers.py ──> the operations, once for each layer

Causal, bidirectional and cross attention; sliding windows, soft caps, sinks; padding on either side; documents packed
in one row; any cache; inference and training; torch.compile and torch.export. Every argument is used or refused by name
with ValueError: what the kernels have no form of (position biases, other masks) never gives another model's
results. A model that computes attention itself cannot mistake a `Mask` for a tensor.

docs/transformers.md says which model families work, which are refused, and why.
"""

from transformers import AttentionInterface, AttentionMaskInterface

from aiter.integrations.transformers.continuous_batching import FLASH_NAME, admit
from aiter.integrations.transformers.layers import attention
from aiter.integrations.transformers.masks import NAME, Mask, padding_mask

__all__ = ["FLASH_NAME", "NAME", "Mask", "attention", "padding_mask"]

AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, padding_mask)
admit()
