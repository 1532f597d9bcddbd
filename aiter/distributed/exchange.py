"""Rows on their way between ranks.

    batch i:   rows of step i + 1  ·····> (in flight while step i is computed)
               gradients of step i - 1 ··>

A batch is a list of sends and receives that all ranks post under one number, so that none waits for a batch that
another has yet to reach. Between two ranks, messages match in the order in which both list them. On a GPU the backend
copies on a stream of its own, which begins when the current stream has written what is sent; `Batch.wait` makes the
current stream wait for what was received. Kernels run on the current stream alone, and memory that is in flight is held
by its batch."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Group: TypeAlias = "dist.ProcessGroup | None"
GroupOrMesh: TypeAlias = "dist.ProcessGroup | DeviceMesh | None"


def process_group(group: Group) -> dist.ProcessGroup:
    """The group, or that of all ranks."""
    own = group or dist.group.WORLD
    assert own is not None, "there is no process group"
    return own


def size_of(group: Group) -> int:
    return dist.get_world_size(group)


def rank_in(group: Group) -> int:
    return dist.get_rank(group)


def global_rank(group: Group, rank: int) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def groups_of(group: GroupOrMesh) -> tuple[Group, ...]:
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "context parallelism needs a process group: call torch.distributed.init_process_group first (torchrun sets "
            "what it reads)"
        )
    if group is None or isinstance(group, dist.ProcessGroup):
        return (group,)
    if hasattr(group, "get_all_groups") and hasattr(group, "ndim"):
        groups = tuple(group.get_all_groups())
        if len(groups) not in (1, 2):
            raise ValueError(
                f"group is a mesh of {len(groups)} dimensions; give the one over which the sequence is split, as in "
                "mesh['cp'], or two: a ring's and an all-to-all's"
            )
        return groups
    raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None, not {type(group).__name__}")


def place_in(groups: Sequence[Group]) -> tuple[int, int]:
    """This rank, and how many there are, over all groups: those of the last are neighbours."""
    rank, world = 0, 1
    for group in groups:
        rank, world = rank * size_of(group) + rank_in(group), world * size_of(group)
    return rank, world


class Batch:
    """Sends and receives, each (rank in the group, contiguous tensor), under way from the moment this is made."""

    def __init__(
        self,
        group: Group,
        sends: Sequence[tuple[int, torch.Tensor]] = (),
        receives: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> None:
        operations = [
            dist.P2POp(operation, tensor, global_rank(group, peer), group)
            for operation, messages in ((dist.irecv, receives), (dist.isend, sends))
            for peer, tensor in messages
            if tensor.numel()
        ]
        self._held = [operation.tensor for operation in operations]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        self._works, self._held = [], []


_connected: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def connect(group: Group, device: torch.device) -> None:
    """NCCL makes a communicator at a group's first call, which all ranks must then take part in; of a batch, only those
    do that send or receive something."""
    own = process_group(group)
    if device.type != "cpu" and own not in _connected:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _connected.add(own)
