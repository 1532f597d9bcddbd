"""Hugging Face transformers: importing this makes `attn_implementation="aiter"` one of its implementations.

What is registered, and how it works: aiter/integrations/transformers. Pages: docs/transformers.md.
"""

from aiter.integrations.transformers import FLASH_NAME, NAME, Mask, attention, padding_mask

__all__ = ["FLASH_NAME", "NAME", "Mask", "attention", "padding_mask"]
