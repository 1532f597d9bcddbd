"""Before data moves, all ranks know that they were asked for the same; or all raise, and none waits for another.

Each call gathers a few numbers from every rank: whether its arguments were refused, how many rows it has, and a digest
of all that must be the same. They go by way of the CPU, so that a GPU is not waited for. No call goes without, whatever
was agreed on before: a rank that is asked for something new would wait for those that are not. Only when the digests
differ are the descriptions themselves exchanged, which then all ranks do. The positions of a rank's rows, which are
long and its own, are told by a digest too, and themselves once: all ranks see all digests, so all know if they were.

    rank asks ──> numbers under way ────────────────> all agree ──> first message
                  plan, buffers, copies of own rows ─┘

A rank that was asked for the same before makes ready, while the numbers are under way, for what came of it then."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist

from aiter.distributed.exchange import Group, process_group, size_of
from aiter.errors import RankMismatchError
from aiter.jit.settings import compile_timeout

_controls: weakref.WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup] = weakref.WeakKeyDictionary()


# In compilers' timeouts: a rank may have several kernels to build before it comes.
PATIENCE = 4


def _control(group: Group) -> dist.ProcessGroup:
    """A gloo group of the same ranks, made once: for messages that take no GPU, and that wait for as long as compilers
    may take on ranks whose cache is empty."""
    own = process_group(group)
    if own not in _controls:
        _controls[own] = dist.new_group(
            dist.get_process_group_ranks(own),
            timeout=timedelta(seconds=PATIENCE * compile_timeout()),
            backend="gloo",
            use_local_synchronization=True,
        )
    return _controls[own]


def _in_order(group: Group, parts: list[Any]) -> list[Any]:
    """What the control group has gathered, in the order of the ranks of `group`: its own are sorted."""
    ranks = dist.get_process_group_ranks(process_group(group))
    by_rank = dict(zip(sorted(ranks), parts, strict=True))
    return [by_rank[rank] for rank in ranks]


def gather_numbers(groups: Sequence[Group], numbers: Sequence[int]) -> Callable[[], list[list[int]]]:
    """Those of every rank, in the order of the ranks: of the first group, within it of the next, and so on. They are
    under way when this returns, and what it returns waits for them."""
    *outer, own = groups
    message = torch.tensor(numbers, dtype=torch.int64)
    parts = [torch.empty_like(message) for _ in range(size_of(own))]
    coming = dist.all_gather(parts, message, group=_control(own), async_op=True)

    def arrived() -> list[list[int]]:
        coming.wait()
        every = torch.stack(_in_order(own, parts))
        for group in reversed(outer):
            further = [torch.empty_like(every) for _ in range(size_of(group))]
            dist.all_gather(further, every, group=_control(group))
            every = torch.stack(_in_order(group, further))
        return every.reshape(-1, len(numbers)).tolist()

    return arrived


def gather_objects(groups: Sequence[Group], value: Any) -> list[Any]:
    values = [value]
    for group in reversed(groups):
        parts: list[Any] = [None] * size_of(group)
        dist.all_gather_object(parts, values, group=_control(group))
        values = [one for part in _in_order(group, parts) for one in part]
    return values


class Memory(NamedTuple):
    """Of a group, or the groups of a mesh. told: what each rank told, by the digests of all; as the oldest is forgotten
    first, all ranks, whose calls are the same, have and lack the same. settled: what came of an agreement, by what this
    rank was asked and told; of this rank's own making, no other needs to have it. Without references to the groups."""

    told: dict[Any, Any]
    settled: dict[Any, Any]


MEMORY_MOST = 64
_memories: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[tuple[str, ...], Memory]] = weakref.WeakKeyDictionary()


def memory_of(groups: Sequence[Group]) -> Memory:
    own = _memories.setdefault(process_group(groups[0]), {})
    return own.setdefault(tuple(process_group(group).group_name for group in groups[1:]), Memory({}, {}))


def remember(memory: dict[Any, Any], key: Any, value: Any) -> None:
    if key not in memory and len(memory) >= MEMORY_MOST:
        del memory[next(iter(memory))]
    memory[key] = value


def gather_once(groups: Sequence[Group], digests: Sequence[tuple[int, int]], value: Any) -> list[Any]:
    """`gather_objects`, but once for values of these digests. digests: of all ranks, in their order."""
    told, key = memory_of(groups).told, tuple(digests)
    if key not in told:
        remember(told, key, gather_objects(groups, value))
    return told[key]


def digest_of(value: Any) -> tuple[int, int]:
    """Of a value whose repr tells all of it."""
    digest = hashlib.blake2b(repr(value).encode(), digest_size=16).digest()
    low, high = (int.from_bytes(digest[i : i + 8], "little", signed=True) for i in (0, 8))
    return low, high


class Known(NamedTuple):
    """What a rank tells of itself, which may differ from rank to rank: how many rows it has, how many ranks were
    started on its machine, and a digest of its positions."""

    rows: int
    local_ranks: int
    positions: tuple[int, int] = (0, 0)


def ask(
    groups: Sequence[Group],
    own: Known,
    description: dict[str, Any],
    digest: tuple[int, int],
    refused: Exception | None,
) -> Callable[[], list[Known]]:
    """Tells the others of this rank, and returns what waits for what each rank tells: that raises on all ranks if
    descriptions, and so their digests, differ, or a rank has refused its arguments."""
    coming = gather_numbers(groups, [refused is not None, own.rows, own.local_ranks, *own.positions, *digest])

    def answer() -> list[Known]:
        every = coming()
        if not any(of_rank[0] for of_rank in every) and all(of_rank[5:] == every[0][5:] for of_rank in every):
            return [Known(rows, local, (low, high)) for _, rows, local, low, high, *_ in every]
        told = None if refused is None else f"{type(refused).__name__}: {refused}"
        _refuse(gather_objects(groups, (told, description)), refused)

    return answer


class Changed(Exception):
    """What ranks tell is not what they told when this rank was last asked for the same."""

    def __init__(self, known: list[Known]) -> None:
        super().__init__("ranks have other rows than before")
        self.known = known


def _refuse(told: list[tuple[str | None, dict[str, Any]]], own: Exception | None) -> NoReturn:
    if own is not None:
        raise own
    refusals = [f"rank {rank} raised {error}" for rank, (error, _) in enumerate(told) if error is not None]
    if refusals:
        raise RankMismatchError(
            "context_parallel_attention cannot run, as not all ranks of the group can: " + "; ".join(refusals)
        )
    lines = []
    for name in told[0][1]:
        by_value: dict[str, list[int]] = {}
        for rank, (_, description) in enumerate(told):
            by_value.setdefault(str(description[name]), []).append(rank)
        if len(by_value) > 1:
            lines.append(
                f"{name}: "
                + ", ".join(
                    f"{value} on rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
                    for value, ranks in by_value.items()
                )
            )
    raise RankMismatchError(
        "the ranks of the group were asked for different things (ranks as the group numbers them); "
        + "; ".join(lines)
        + ". Give all ranks the same, but for their rows"
    )
