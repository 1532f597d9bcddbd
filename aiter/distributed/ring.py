"""Keys go round the ranks, half a rank's at a time; partial rows are merged in float32 by their log-sum-exp.

    step      0            1            2            3            ...
    rank r    its own      r-1, first   r-1, second  r-2, first   halves of the ranks before, each from rank r - 1,
              r-1, first > r-1, second> r-2, first >              which arrive while the half before them is computed

A half goes on as far as the last rank that wants some of it, and of its rows only those that are wanted there or
further on. Backward, the gradients of a half follow it one step behind, in float32, and from the last rank go back to
the rank that holds it: each is of the very rows that the product at that step read."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from aiter.distributed import products
from aiter.distributed.allgather import within
from aiter.distributed.exchange import Batch
from aiter.distributed.job import Gradients, Job
from aiter.distributed.layout import Layout, Run, joined, placed
from aiter.distributed.needs import Mask, shared, wanted
from aiter.distributed.products import Product, product_of
from aiter.parts import merge_attention_states

HALVES = 2


class Half(NamedTuple):
    """Half of what rank `owner` holds, as it comes to one rank: the positions, ascending, and what is done."""

    owner: int
    runs: tuple[Run, ...]
    products: tuple[Product, ...]

    @property
    def rows(self) -> int:
        return sum(run.length for run in self.runs)


class Travel(NamedTuple):
    """Where the halves of one rank's keys go. carried[h][d - 1]: the positions that come to the rank d behind it."""

    carried: tuple[tuple[tuple[Run, ...], ...], ...]

    def last(self, half: int) -> int:
        """How far a half goes."""
        return sum(1 for runs in self.carried[half] if runs)


@lru_cache(maxsize=4096)
def travel_of(layout: Layout, owner: int, mask: Mask) -> Travel:
    middle = -(-layout.rows(owner) // HALVES)
    carried = []
    for half in range(HALVES):
        rows = Run(half * middle, min((half + 1) * middle, layout.rows(owner)))
        held = []
        for run, row in layout.placed(owner):
            part = rows.within(Run(row, row + run.length))
            if part.length > 0:
                held.append(Run(part.start - row + run.start, part.stop - row + run.start))
        onward: tuple[Run, ...] = ()
        by_distance = []
        for distance in range(layout.world - 1, 0, -1):
            rank = (owner + distance) % layout.world
            onward = joined([*onward, *shared(wanted(layout.runs[rank], mask), held)])
            by_distance.append(onward)
        carried.append(tuple(reversed(by_distance)))
    return Travel(tuple(carried))


def _products(layout: Layout, rank: int, keys: tuple[Run, ...], mask: Mask, by_distance: bool) -> tuple[Product, ...]:
    calls = (
        product_of(run, row, key_run, key_row, mask, by_distance)
        for run, row in layout.placed(rank)
        for key_run, key_row in placed(keys)
    )
    return tuple(call for call in calls if call is not None)


@lru_cache(maxsize=256)
def halves_of(layout: Layout, rank: int, mask: Mask, by_distance: bool) -> tuple[Half, ...]:
    """What comes to a rank at each step; step 0 is its own, all of it."""
    own = Half(rank, layout.runs[rank], _products(layout, rank, layout.runs[rank], mask, by_distance))
    halves = [own]
    for distance in range(1, layout.world):
        owner = (rank - distance) % layout.world
        for half in range(HALVES):
            runs = travel_of(layout, owner, mask).carried[half][distance - 1]
            halves.append(Half(owner, runs, _products(layout, rank, runs, mask, by_distance)))
    return tuple(halves)


def _rows_of(part: tuple[Run, ...], runs: tuple[Run, ...]) -> list[Run]:
    """Where positions that are among those of `runs` lie there."""
    where = placed(runs)
    return [within(Run(*run), where) for piece in part for run in shared([piece], runs)]


def _taken(buffer: torch.Tensor, rows: list[Run]) -> torch.Tensor:
    """Rows of a buffer, in one piece of memory: in place where they lie beside each other."""
    whole = joined(rows)
    if len(whole) == 1:
        return buffer[whole[0].start : whole[0].stop]
    return torch.cat([buffer[run.start : run.stop] for run in rows]) if rows else buffer[:0]


class Ring:
    """One rank's part in what goes round: keys and values of step i + 1 while step i is computed; gradients behind."""

    def __init__(self, job: Job, key: torch.Tensor, value: torch.Tensor) -> None:
        mask = job.asked.mask
        self.job, self.mask = job, mask
        self.halves = halves_of(job.layout, job.rank, mask, job.by_distance)
        self.there: dict[int, list[torch.Tensor]] = {0: [t.transpose(0, 1).contiguous() for t in (key, value)]}
        self.next, self.previous = (job.rank + 1) % job.world, (job.rank - 1) % job.world

    def distance(self, step: int) -> tuple[int, int]:
        """How far behind its owner this rank is, and which half it is, at a step from 1 on."""
        return 1 + (step - 1) // HALVES, (step - 1) % HALVES

    def messages(self, step: int) -> tuple[list[tuple[int, torch.Tensor]], list[tuple[int, torch.Tensor]]]:
        """The sends and receives by which the keys of `step` come to all ranks; the latter become `there[step]`."""
        if step >= len(self.halves):
            return [], []
        distance, half = self.distance(step)
        mine = self.halves[step]
        self.there[step] = [t.new_empty((mine.rows, *t.shape[1:])) for t in self.there[0]]
        sent_step = max(step - HALVES, 0)  # what I send as this step's is what came to me a rank earlier
        owner = self.halves[sent_step].owner if sent_step else self.job.rank
        runs = travel_of(self.job.layout, owner, self.mask).carried[half][distance - 1]
        rows = _rows_of(runs, self.halves[sent_step].runs)
        sends = [(self.next, _taken(tensor, rows)) for tensor in self.there[sent_step]]
        if sent_step:
            del self.there[sent_step]  # held by the batch until it is sent
        return sends, [(self.previous, tensor) for tensor in self.there[step]]

    def start(self, step: int) -> Batch:
        sends, receives = self.messages(step)
        return Batch(self.job.group, sends, receives)


def forward(job: Job, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    ring, asked = Ring(job, key, value), job.asked._replace(sinks=None)
    batch, seq, heads_q, _ = query.shape
    output = query.new_zeros((batch, seq, heads_q, value.shape[-1]), dtype=torch.float32)
    lse = query.new_full((batch, heads_q, seq), -torch.inf, dtype=torch.float32)
    for step, half in enumerate(ring.halves):
        coming = ring.start(step + 1)
        keys, values = (tensor.transpose(0, 1) for tensor in ring.there[step])
        for product in half.products:
            for heads in job.heads:
                part, part_lse = products.forward(asked, product, heads, query, keys, values)
                _merge(
                    products.cut(output, product.rows, heads.queries),
                    products.cut_lse(lse, product.rows, heads.queries),
                    *(part, part_lse),
                )
        coming.wait()
    if job.asked.sinks is not None:
        output, lse = merge_attention_states([output], [lse], sinks=job.asked.sinks)
    return output.to(query.dtype), lse


def _merge(output: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """merge_attention_states of two, in place, as a ring does it at every step: with few reads and writes."""
    total = torch.logaddexp(lse, part_lse)
    weight = (part_lse - total).exp().masked_fill(part_lse == -torch.inf, 0.0)
    output.lerp_(part.float(), weight.transpose(1, 2).unsqueeze(-1))
    lse.copy_(total)


class _Sums(NamedTuple):
    """Gradients of the keys and values that travel, float32 (rows, batch, heads, head_dim)."""

    key: torch.Tensor
    value: torch.Tensor


def _zeros(rows: int, like: list[torch.Tensor]) -> _Sums:
    key, value = (tensor.new_zeros((rows, *tensor.shape[1:]), dtype=torch.float32) for tensor in like)
    return _Sums(key, value)


class _Gradients:
    """Gradients on their way round, one step behind the keys they are of."""

    def __init__(self, ring: Ring) -> None:
        self.ring = ring
        self.arrived: dict[int, _Sums] = {}  # by the step that adds to them
        self.done: dict[int, _Sums] = {}  # by the step that has added to them
        self.returned: dict[int, _Sums] = {}  # by the half of this rank's own

    def travel(self, step: int) -> tuple[Travel, int, int]:
        distance, half = self.ring.distance(step)
        return travel_of(self.ring.job.layout, self.ring.halves[step].owner, self.ring.mask), distance, half

    def positions(self, step: int) -> tuple[Run, ...]:
        """Of all keys of the half that travel at all: their gradients go all the way."""
        travel, _, half = self.travel(step)
        return travel.carried[half][0]

    def sums(self, step: int) -> _Sums:
        """What the product of `step` adds to."""
        if step not in self.arrived:
            rows = sum(run.length for run in self.positions(step))
            self.arrived[step] = _zeros(rows, self.ring.there[0])
        self.done[step] = self.arrived.pop(step)
        return self.done[step]

    def messages(self, step: int) -> tuple[list[tuple[int, torch.Tensor]], list[tuple[int, torch.Tensor]]]:
        """Of what was added to at step - 1, here and everywhere."""
        job, ring = self.ring.job, self.ring
        sends: list[tuple[int, torch.Tensor]] = []
        receives: list[tuple[int, torch.Tensor]] = []
        if 1 <= step - 1 < len(ring.halves):
            sums = self.done.pop(step - 1)
            travel, distance, half = self.travel(step - 1)
            if distance <= travel.last(half):
                to = ring.next if distance < travel.last(half) else ring.halves[step - 1].owner
                sends = [(to, tensor) for tensor in sums]
        if HALVES < step + 1 < len(ring.halves):
            travel, distance, half = self.travel(step + 1)
            if distance <= travel.last(half):
                self.arrived[step + 1] = _zeros(sum(run.length for run in travel.carried[half][0]), ring.there[0])
                receives += [(ring.previous, tensor) for tensor in self.arrived[step + 1]]
        own = travel_of(job.layout, job.rank, ring.mask)
        for half in range(HALVES):
            last = own.last(half)
            if last and step - 1 == 1 + (last - 1) * HALVES + half:
                self.returned[half] = _zeros(sum(run.length for run in own.carried[half][0]), ring.there[0])
                receives += [((job.rank + last) % job.world, tensor) for tensor in self.returned[half]]
        return sends, receives


def backward(
    job: Job,
    grad_output: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
) -> Gradients:
    ring = Ring(job, key, value)
    round_trip = _Gradients(ring)
    grad_query = torch.zeros_like(query, dtype=torch.float32)
    own = _zeros(key.shape[1], ring.there[0])
    for step in range(len(ring.halves) + 1):
        sends, receives = ring.messages(step + 1)
        more_sends, more_receives = round_trip.messages(step)
        coming = Batch(job.group, sends + more_sends, receives + more_receives)
        if step < len(ring.halves):
            half = ring.halves[step]
            keys, values = (tensor.transpose(0, 1) for tensor in ring.there[step])
            sums, where = own, [Run(0, key.shape[1])]
            if step:
                sums = round_trip.sums(step)
                where = [within(run, placed(round_trip.positions(step))) for run in half.runs]
            rows = placed(half.runs)
            for product in half.products:
                place = product.keys
                if step:
                    (number,) = (i for i, (run, row) in enumerate(rows) if row <= place.start < row + run.length)
                    shift = where[number].start - rows[number][1]
                    place = Run(place.start + shift, place.stop + shift)
                for heads in job.heads:
                    parts = products.backward(
                        *(job.asked, product, heads, grad_output, grad_lse, query, keys, values, output, lse, False)
                    )
                    products.cut(grad_query, product.rows, heads.queries).add_(parts[0])
                    for total, part in zip(sums, parts[1:], strict=True):
                        places = total[place.start : place.stop, :, heads.keys.start : heads.keys.stop]
                        places.add_(part.transpose(0, 1))
        coming.wait()
    for number, sums in sorted(round_trip.returned.items()):
        runs = travel_of(job.layout, job.rank, ring.mask).carried[number][0]
        begin = 0
        for place in _rows_of(runs, job.layout.runs[job.rank]):
            for total, part in zip(own, sums, strict=True):
                total[place.start : place.stop] += part[begin : begin + place.length]
            begin += place.length
    of_key, of_value = (total.transpose(0, 1).to(key.dtype) for total in own)
    return Gradients(grad_query.to(query.dtype), of_key, of_value)
