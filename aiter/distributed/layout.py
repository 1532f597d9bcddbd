"""Who holds which positions of a sequence.

    contiguous  rank 0 | rank 1 | rank 2 | rank 3              in order; causal, the last rank has most to do
    zigzag      0 | 1 | 2 | 3 | 3 | 2 | 1 | 0                  a chunk from either end: causal, all have the same to do
    positions   whatever each rank says, all positions once    runs of them; the fewer, the better

Lengths need not be divisible: chunks then differ by one row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist

from aiter import checks
from aiter.distributed.exchange import Group, GroupOrMesh, groups_of, place_in, rank_in

LayoutName: TypeAlias = Literal["contiguous", "zigzag"]
NAMES = ("contiguous", "zigzag")


class Run(NamedTuple):
    """Positions from start up to stop, or rows of a tensor."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    def within(self, other: Run) -> Run:
        """What both have; its length is 0 or less where that is nothing."""
        return Run(max(self.start, other.start), min(self.stop, other.stop))


def joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    """The same positions in as few runs as there can be, ascending."""
    result: list[Run] = []
    for run in sorted(run for run in runs if run.length > 0):
        if result and run.start <= result[-1].stop:
            result[-1] = Run(result[-1].start, max(result[-1].stop, run.stop))
        else:
            result.append(run)
    return tuple(result)


class Layout(NamedTuple):
    """The runs of each rank, ascending, which is also the order of its rows."""

    runs: tuple[tuple[Run, ...], ...]

    @property
    def world(self) -> int:
        return len(self.runs)

    @property
    def total(self) -> int:
        return sum(self.rows(rank) for rank in range(self.world))

    def rows(self, rank: int) -> int:
        return sum(run.length for run in self.runs[rank])

    def placed(self, rank: int) -> list[tuple[Run, int]]:
        """The runs of a rank, each with the row at which it begins there."""
        return placed(self.runs[rank])

    def merged(self, size: int) -> Layout:
        """The layout over groups of `size` neighbouring ranks that put their rows together, in order of position."""
        groups = [self.runs[i : i + size] for i in range(0, self.world, size)]
        return Layout(tuple(joined([run for runs in group for run in runs]) for group in groups))


def placed(runs: Sequence[Run]) -> list[tuple[Run, int]]:
    ends = itertools.accumulate((run.length for run in runs), initial=0)
    return list(zip(runs, ends, strict=False))


@lru_cache(maxsize=1024)
def named(name: str, total: int, world: int) -> Layout:
    """A layout that the sequence's length and the number of ranks decide."""
    chunks = world if name == "contiguous" else 2 * world
    cuts = [total * i // chunks for i in range(chunks + 1)]
    pieces = [Run(*cut) for cut in itertools.pairwise(cuts)]
    if name == "contiguous":
        return Layout(tuple(joined([piece]) for piece in pieces))
    return Layout(tuple(joined([pieces[rank], pieces[chunks - 1 - rank]]) for rank in range(world)))


# Documents shorter than this share of a rank's rows are cut together: every run of positions is a call of a kernel.
SHORT = 1 / 4


@lru_cache(maxsize=256)
def by_documents(name: str, ends: tuple[int, ...], total: int, world: int) -> Layout:
    """A named layout of each document, or of some short ones together, and of what is behind the last: so all ranks
    have the same to do, however documents lie."""
    runs: list[list[Run]] = [[] for _ in range(world)]
    start = 0
    for end in (*(end for end in ends[1:] if end < total), total):
        if end == total or end - start >= SHORT * total / world:
            for own, of_rank in zip(runs, named(name, end - start, world).runs, strict=True):
                own += [Run(start + run.start, start + run.stop) for run in of_rank]
            start = end
    return Layout(tuple(joined(own) for own in runs))


def runs_of(positions: torch.Tensor) -> tuple[Run, ...]:
    """Raises ValueError where positions, int64 or int32 (rows,), do not ascend. By a few operators on the host, as they
    are as many as a rank has rows."""
    positions = positions.cpu()
    if not positions.numel():
        return ()
    steps = positions.diff()
    if positions[0] < 0 or bool((steps <= 0).any()):
        place = 0 if positions[0] < 0 else int((steps <= 0).nonzero()[0]) + 1
        before = int(positions[place - 1]) if place else "nothing"
        raise ValueError(
            f"layout, as positions, has {int(positions[place])} after {before}; the positions of a rank must ascend, "
            "from 0: sort its rows by position"
        )
    (ends,) = (steps != 1).nonzero(as_tuple=True)
    starts = [int(positions[0]), *positions[ends + 1].tolist()]
    stops = [*(positions[ends] + 1).tolist(), int(positions[-1]) + 1]
    return tuple(map(Run, starts, stops))


@lru_cache(maxsize=64)
def from_runs(runs: tuple[tuple[Run, ...], ...]) -> Layout:
    """Raises ValueError unless the ranks together hold all positions once."""
    expected = 0
    for run, rank in sorted((run, rank) for rank, of_rank in enumerate(runs) for run in of_rank):
        if run.start != expected:
            what = "twice" if run.start < expected else "by no rank"
            position = min(run.start, expected)
            raise ValueError(
                f"layout: position {position} is held {what} (looked for the one that follows {expected - 1}, found "
                f"{run.start} on rank {rank}); the ranks must hold all positions from 0 on, each once"
            )
        expected = run.stop
    return Layout(runs)


def check_name(layout: object) -> str:
    if layout not in NAMES:
        given = repr(layout) if isinstance(layout, str) else type(layout).__name__
        raise ValueError(f"layout is {given}; it must be one of {NAMES}")
    return str(layout)


def positions_of(
    total: int,
    layout: LayoutName = "contiguous",
    group: GroupOrMesh = None,
    *,
    cu_seqlens: torch.Tensor | Sequence[int] | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The positions, int64 (rows,), that this rank holds of a sequence of `total`: what rotary embeddings need.

    cu_seqlens: where documents begin, and the last ends: each is then cut by the layout, rather than the sequence. The
    result is itself a layout for `shard`, `unshard` and attention, which have no name for it.
    """
    checks.positive_int("total", total)
    rank, world = place_in(groups_of(group))
    name = check_name(layout)
    if cu_seqlens is None:
        runs = named(name, total, world).runs[rank]
    else:
        ends = tuple(int(end) for end in cu_seqlens)
        if len(ends) < 2 or ends[0] != 0 or ends[-1] > total or list(ends) != sorted(ends):
            raise ValueError(f"cu_seqlens must rise from 0 to at most total, {total}, but is {list(ends[:8])}")
        runs = by_documents(name, ends, total, world).runs[rank]
    parts = [torch.arange(run.start, run.stop, device=device) for run in runs]
    return torch.cat(parts) if parts else torch.arange(0, device=device)


def shard(
    tensor: torch.Tensor, dim: int = 1, layout: LayoutName | torch.Tensor = "contiguous", group: GroupOrMesh = None
) -> torch.Tensor:
    """This rank's part of a tensor that every rank has whole: tokens, labels, position ids, keys, anything with the
    sequence in dimension `dim`. layout: a name, or this rank's positions. Differentiable; sends nothing."""
    checks.tensor("tensor", tensor, tuple(range(1, 9)), "with a dimension for the sequence")
    if not isinstance(layout, torch.Tensor):
        layout = positions_of(tensor.shape[dim], layout, group, device=tensor.device)
    return tensor.index_select(dim, layout.to(tensor.device))


def unshard(
    tensor: torch.Tensor, dim: int = 1, layout: LayoutName | torch.Tensor = "contiguous", group: GroupOrMesh = None
) -> torch.Tensor:
    """The whole tensor, on every rank, of which each has the part that `shard` gives it.

    Differentiable: the gradient of a rank's part is that of its rows in the whole, summed over the ranks.
    """
    checks.tensor("tensor", tensor, tuple(range(1, 9)), "with a dimension for the sequence")
    groups = groups_of(group)
    if len(groups) != 1:
        raise ValueError("unshard takes a group of one dimension: of a mesh of two, give the flattened one")
    _, world = place_in(groups)
    own_group = groups[0]
    # Told to all, as none may wait for a rank that raises alone.
    refused = isinstance(layout, torch.Tensor) and layout.shape != (tensor.shape[dim],)
    rows = torch.tensor([-1 if refused else tensor.shape[dim]], device=tensor.device)
    lengths = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(lengths, rows, group=own_group)
    counts = [int(length) for length in lengths]
    if -1 in counts:
        raise ValueError(
            f"layout must be a position for each row in dimension {dim}, int64 (rows,); on rank "
            f"{counts.index(-1)} of the group it is not"
        )
    if isinstance(layout, torch.Tensor):
        own = layout.to(tensor.device, torch.int64)
        positions = torch.cat(_gathered(own, counts, own_group))
    else:
        runs = named(check_name(layout), sum(counts), world)
        if counts != [runs.rows(r) for r in range(world)]:
            raise ValueError(
                f"the ranks have {counts} rows in dimension {dim}, but layout {layout!r} of {sum(counts)} gives them "
                f"{[runs.rows(r) for r in range(world)]}"
            )
        positions = torch.cat(
            [torch.arange(run.start, run.stop, device=tensor.device) for of_rank in runs.runs for run in of_rank]
        )
    return _Unshard.apply(tensor, dim, positions, tuple(counts), own_group)


def _gathered(rows: torch.Tensor, counts: Sequence[int], group: Group) -> list[torch.Tensor]:
    """The rows of all ranks, counts[rank] each."""
    longest = max(counts)
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, dim, positions, counts, group):
        ctx.dim, ctx.counts, ctx.group = dim, counts, group
        ctx.save_for_backward(positions)
        rows = torch.cat(_gathered(tensor.movedim(dim, 0).contiguous(), counts, group))
        whole = torch.empty_like(rows)
        whole[positions] = rows
        return whole.movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx, gradient):
        (positions,) = ctx.saved_tensors
        rank = rank_in(ctx.group)
        # Summed where every rank can: all have the whole gradient, and keep their rows of the sum.
        whole = gradient.movedim(ctx.dim, 0).float().contiguous()
        dist.all_reduce(whole, group=ctx.group)
        first = sum(ctx.counts[:rank])
        rows = whole[positions[first : first + ctx.counts[rank]]].to(gradient.dtype)
        return rows.movedim(0, ctx.dim), None, None, None, None
