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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


# Between two ranks, of a batch: more messages than these go as one, as each costs the host 10 µs or more at either end,
# and what lies in many runs of positions is many; one costs a copy at either end.
SEPARATE_MOST = 4


_held: weakref.WeakKeyDictionary[dist.ProcessGroup, Callable[[], None]] = weakref.WeakKeyDictionary()


@contextmanager
def held(group: Group, confirm: Callable[[], None] | None) -> Iterator[None]:
    """Nothing is sent over the group before `confirm` has returned: the first batch calls it, or else the end."""
    own = process_group(group)
    if confirm is not None:
        _held[own] = confirm
    try:
        yield
        _release(group)
    finally:
        _held.pop(own, None)


def _release(group: Group) -> None:
    confirm = _held.pop(process_group(group), None)
    if confirm is not None:
        confirm()


class Batch:
    """Sends and receives, each (rank in the group, tensor), under way from the moment this is made; received tensors
    are contiguous, and there after `wait`."""

    def __init__(
        self,
        group: Group,
        sends: Sequence[tuple[int, torch.Tensor]] = (),
        receives: Sequence[tuple[int, torch.Tensor]] = (),
    ) -> None:
        self._apart: list[tuple[torch.Tensor, list[torch.Tensor]]] = []  # what came as one, and where it belongs
        operations = []
        for peer, tensors in _by_peer(receives, group):
            if len(tensors) > SEPARATE_MOST:
                one = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
                self._apart.append((one, tensors))
                tensors = [one]
            operations += [dist.P2POp(dist.irecv, tensor, peer, group) for tensor in tensors]
        for peer, tensors in _by_peer(sends, group):
            if len(tensors) > SEPARATE_MOST:
                one = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
                torch._foreach_copy_(_parts(one, tensors), tensors)
                tensors = [one]
            operations += [dist.P2POp(dist.isend, tensor.contiguous(), peer, group) for tensor in tensors]
        self._held = [operation.tensor for operation in operations]
        _release(group)
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        for work in self._works:
            work.wait()
        for one, tensors in self._apart:
            torch._foreach_copy_(tensors, _parts(one, tensors))
        self._works, self._held, self._apart = [], [], []


def _by_peer(messages: Sequence[tuple[int, torch.Tensor]], group: Group) -> list[tuple[int, list[torch.Tensor]]]:
    """The messages that are any, by the other rank (as all groups number it) and by dtype: alike at both ends."""
    found: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
    for peer, tensor in messages:
        if tensor.numel():
            found.setdefault((peer, tensor.dtype), []).append(tensor)
    return [(global_rank(group, peer), tensors) for (peer, _), tensors in found.items()]


def _parts(one: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of one tensor, as large as these one after the other."""
    return [part.view(t.shape) for part, t in zip(one.split([t.numel() for t in tensors]), tensors, strict=True)]


_connected: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()


def connect(group: Group, device: torch.device) -> None:
    """NCCL makes a communicator at a group's first call, which all ranks must then take part in; of a batch, only those
    do that send or receive something."""
    own = process_group(group)
    if device.type != "cpu" and own not in _connected:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _connected.add(own)
