"""What a scheme is asked to do, as the schemes share it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from aiter.distributed.exchange import Group
from aiter.distributed.layout import Layout
from aiter.distributed.products import Asked, Heads


class Job(NamedTuple):
    """Attention of rows that are split over a group; queries, keys and values are (batch, rows, heads, head_dim).

    heads: those that are here, each part of which has one ratio of query heads to KV heads.
    """

    group: Group
    rank: int
    layout: Layout
    heads: tuple[Heads, ...]
    asked: Asked

    @property
    def world(self) -> int:
        return self.layout.world

    @property
    def by_distance(self) -> bool:
        return self.asked.alibi_slopes is not None


class Gradients(NamedTuple):
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
