"""Dropout of attention weights: the mask that every kernel draws, in PyTorch, and where its numbers come from.

A weight is left out or kept by a hash of a seed, an offset and its place, Philox 4x32-10 (Salmon et al., 2011,
https://doi.org/10.1145/2063384.2063405), as kernels_src/include/philox.h describes. Nothing is stored for the backward
pass but the seed and the offset.
"""

from __future__ import annotations

import torch

UNIT = 65536  # probabilities are multiples of 1 / UNIT
_LOW = 0xFFFFFFFF


def draw_rng_state(device: torch.device | str) -> torch.Tensor:
    """A seed and an offset, int64 (2,) on `device`, from PyTorch's generator of that device: `torch.manual_seed` says
    which, and whatever restores the generator's state (activation checkpointing) brings the same mask again."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def threshold(dropout_p: float) -> int:
    """What 16 random bits must reach for a weight to be kept."""
    return min(round(dropout_p * UNIT), UNIT - 1)


def scale(dropout_p: float) -> float:
    """What weights that are kept are multiplied by, so that their mean over all masks is that of all weights."""
    return UNIT / (UNIT - threshold(dropout_p))


def keep_mask(
    rng_state: torch.Tensor, dropout_p: float, batch: int, heads: int, seq_q: int, seq_k: int, first_sequence: int = 0
) -> torch.Tensor:
    """Which weights an operation keeps that is called with this rng_state and dropout_p: bool (batch, heads, seq_q,
    seq_k), on rng_state's device, where heads are those of query. Rows and keys count within their sequence, so that
    packed and padded calls have the mask of dense ones. For tests, and for whoever wants to see a mask.

    first_sequence: the batch index that the mask begins with.
    """
    device = rng_state.device
    seed, offset = rng_state.tolist()
    heads_all = torch.arange(first_sequence * heads, (first_sequence + batch) * heads, device=device).view(-1, 1, 1)
    row, key = torch.arange(seq_q, device=device).view(-1, 1), torch.arange(seq_k, device=device)
    words = [key & ~9, row & ~8, heads_all & _LOW, torch.tensor(offset & _LOW, device=device)]
    words = [word.expand(batch * heads, seq_q, seq_k) for word in words]
    key_low, key_high = seed & _LOW, seed >> 32 & _LOW
    for _ in range(10):
        high_0, low_0 = _wide_product(words[0], 0xD2511F53)
        high_2, low_2 = _wide_product(words[2], 0xCD9E8D57)
        words = [high_2 ^ words[1] ^ key_low, low_2, high_0 ^ words[3] ^ key_high, low_0]
        key_low, key_high = (key_low + 0x9E3779B9) & _LOW, (key_high + 0xBB67AE85) & _LOW
    first, second = (torch.where(key & 8 != 0, words[i + 1], words[i]) for i in (0, 2))
    word = torch.where(row & 8 != 0, second, first)
    bits = torch.where(key & 1 != 0, word >> 16, word) & 0xFFFF
    return (bits >= threshold(dropout_p)).view(batch, heads, seq_q, seq_k)


def _wide_product(word: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of 32-bit numbers, which int64 would be too small for."""
    low, high = (word & 0xFFFF) * constant, (word >> 16) * constant
    middle = (low >> 16) + high
    return middle >> 16, (middle << 16 | low & 0xFFFF) & _LOW
