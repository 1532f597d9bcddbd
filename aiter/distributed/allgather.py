"""Keys from all ranks, some heads at a time; so each row has all its keys in one softmax, and nothing is merged.

    heads    h0         h1         h2         h3                2 pieces of all heads are there at once:
    arrive   =====      =====      =====      =====             that which is computed, and the next one
    compute       [ h0 -]    [ h2 -]                            two lanes: the end of one piece leaves room
                       [ h1 -]    [ h3 -]                       for the beginning of the next
    return                    ....       ....       ....  ....  backward: gradients of keys to those who hold them

There are so many pieces that both together are as large as one rank's keys and values: 2 * ranks where all keys are
wanted, few where a window wants its neighbours'. A piece holds the rows that are wanted, in order of position, this
rank's own among them: which are also what others are sent. Keys and values lie side by side: a message brings both.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import NamedTuple

import torch

from aiter.distributed import products
from aiter.distributed.exchange import Batch
from aiter.distributed.job import Gradients, Job
from aiter.distributed.lanes import Lanes, Moment, after, hand_over, reached
from aiter.distributed.layout import Layout, Run, placed
from aiter.distributed.needs import Mask, shared, wanted
from aiter.distributed.products import Heads, Product, product_of


class Plan(NamedTuple):
    """products: of each run of queries, those with most keys first, so that little is left to one row at the end. own:
    (rows here, rows of the buffer). sends: (rank, rows of the buffer); receives: the same of what others hold; in order
    of position. rows: of the buffer."""

    products: tuple[Product, ...]
    own: tuple[tuple[Run, Run], ...]
    sends: tuple[tuple[int, Run], ...]
    receives: tuple[tuple[int, Run], ...]
    rows: int


def within(part: Run, held: list[tuple[Run, int]]) -> Run:
    """The rows at which a run of positions lies."""
    for run, row in held:
        if run.start <= part.start and part.stop <= run.stop:
            return Run(part.start - run.start + row, part.stop - run.start + row)
    raise AssertionError(f"{part} is not held")


@lru_cache(maxsize=256)
def plan_of(layout: Layout, rank: int, mask: Mask, by_distance: bool) -> Plan:
    buffer = placed(wanted(layout.runs[rank], mask))
    held = layout.placed(rank)
    mine = [run for run, _ in buffer]
    sends, receives = [], []
    for peer in range(layout.world):
        if peer != rank:
            theirs = wanted(layout.runs[peer], mask)
            sends += [(peer, within(part, buffer)) for part in shared(theirs, layout.runs[rank])]
            receives += [(peer, within(part, buffer)) for part in shared(mine, layout.runs[peer])]
    calls = []
    for run, row in held:
        for keys, key_row in buffer:
            product = product_of(run, row, keys, key_row, mask, by_distance)
            if product is not None:
                calls.append(product)
    own = [(within(part, held), within(part, buffer)) for part in shared(mine, layout.runs[rank])]
    calls.sort(key=lambda product: -product.keys.length)
    rows = sum(run.length for run, _ in buffer)
    return Plan(tuple(calls), tuple(own), tuple(sends), tuple(receives), rows)


@lru_cache(maxsize=256)
def pieces_for(layout: Layout, mask: Mask) -> int:
    """How many pieces the heads are cut into, so that two of them are no larger than a rank's keys and values."""
    shares = [
        sum(run.length for run in wanted(runs, mask)) / max(layout.rows(rank), 1)
        for rank, runs in enumerate(layout.runs)
    ]
    return min(max(math.ceil(2 * max(shares)), 2), 2 * layout.world)


def pieces_of(job: Job) -> list[Heads]:
    """The heads in the order in which their keys come."""
    if job.world == 1:
        return list(job.heads)
    pieces, most = [], pieces_for(job.layout, job.asked.mask)
    for queries, keys in job.heads:
        ratio, count = queries.length // max(keys.length, 1), min(keys.length, most)
        cuts = [keys.length * i // count for i in range(count + 1)]
        for a, b in itertools.pairwise(cuts):
            of_queries = Run(queries.start + a * ratio, queries.start + b * ratio)
            pieces.append(Heads(of_queries, Run(keys.start + a, keys.start + b)))
    return pieces


class _Arriving:
    """Keys and values of one piece: (rows, batch, heads, head_dim) each."""

    def __init__(self, job: Job, plan: Plan, heads: Heads, key: torch.Tensor, value: torch.Tensor) -> None:
        dims = key.shape[3], value.shape[3]
        both = key.new_empty((plan.rows, key.shape[0], heads.keys.length, sum(dims)))
        self.buffers = both.split(dims, dim=3)
        for tensor, buffer in zip((key, value), self.buffers, strict=True):
            for rows, place in plan.own:
                buffer[place.start : place.stop] = products.cut(tensor, rows, heads.keys).transpose(0, 1)
        sends, receives = (
            [(peer, both[part.start : part.stop]) for peer, part in messages]
            for messages in (plan.sends, plan.receives)
        )
        self.batch = Batch(job.group, sends, receives)
        self.ready = reached(key.device)  # but for what others send

    def wait(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.batch.wait()
        keys, values = self.buffers
        return keys.transpose(0, 1), values.transpose(0, 1)


def _local(heads: Heads) -> Heads:
    """The heads as a piece has them, whose keys are of these heads alone."""
    return Heads(heads.queries, Run(0, heads.keys.length))


def forward(job: Job, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    plan = plan_of(job.layout, job.rank, job.asked.mask, job.by_distance)
    batch, seq, heads_q, _ = query.shape
    # Rows first, as they may be sent on.
    output = query.new_empty((seq, batch, heads_q, value.shape[-1])).transpose(0, 1)
    lse = query.new_empty((batch, heads_q, seq), dtype=torch.float32)
    if sum(product.rows.length for product in plan.products) < seq:  # rows that are in no document
        output.zero_()
        lse.fill_(-torch.inf)
    pieces = pieces_of(job)
    if job.world == 1:
        for heads in pieces:
            _attend(job, plan, heads, heads, query, (key, value), output, lse)
        return output, lse
    before: Moment = None  # is the piece before done, whose memory the one after takes
    arriving = _Arriving(job, plan, pieces[0], key, value) if pieces else None
    with Lanes(query.device) as lanes:
        for index, heads in enumerate(pieces):
            coming = arriving
            assert coming is not None
            if index + 1 < len(pieces):
                after(query.device, before)
                arriving = _Arriving(job, plan, pieces[index + 1], key, value)
            with lanes.next(coming.ready):
                _attend(job, plan, heads, _local(heads), query, coming.wait(), output, lse)  # keeps no keys
                before = reached(query.device)
    return output, lse


def _attend(
    job: Job,
    plan: Plan,
    heads: Heads,
    of: Heads,
    query: torch.Tensor,
    keys_and_values: tuple[torch.Tensor, torch.Tensor],
    output: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """The products of some heads; of: the same as they lie in keys and values."""
    for product in plan.products:
        _, part = products.forward(job.asked, product, of, query, *keys_and_values, output)
        products.cut_lse(lse, product.rows, heads.queries).copy_(part)


class _Returning:
    """Gradients of the keys and values of one piece, on their way to the ranks that hold them."""

    def __init__(self, job: Job, plan: Plan, heads: Heads, sums: list[torch.Tensor], dtype: torch.dtype) -> None:
        self.plan, self.heads, self.sums = plan, heads, sums
        sends = [(peer, buffer[part.start : part.stop].to(dtype)) for peer, part in plan.receives for buffer in sums]
        self.parts = [
            (peer, part, which, buffer.new_empty((part.length, *buffer.shape[1:]), dtype=dtype))
            for peer, part in plan.sends
            for which, buffer in enumerate(sums)
        ]
        self.batch = Batch(job.group, sends, [(peer, tensor) for peer, _, _, tensor in self.parts])

    def add(self, gradients: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Sums in float32: this rank's own, then the others' in their order."""
        self.batch.wait()
        for rows, place in self.plan.own:
            totals = [buffer[place.start : place.stop].float() for buffer in self.sums]
            for _, part, which, tensor in self.parts:
                if part.within(place).length > 0:
                    totals[which][part.start - place.start : part.stop - place.start] += tensor
            for gradient, total in zip(gradients, totals, strict=True):
                products.cut(gradient, rows, self.heads.keys).copy_(total.transpose(0, 1))


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
    plan = plan_of(job.layout, job.rank, job.asked.mask, job.by_distance)
    grad_query, grad_key, grad_value = (
        tensor.new_zeros((tensor.shape[1], tensor.shape[0], *tensor.shape[2:])).transpose(0, 1)
        for tensor in (query, key, value)
    )
    tensors = query, key, value, output, lse
    pieces = pieces_of(job)
    if job.world == 1:
        for heads in pieces:
            for product in plan.products:
                parts = products.backward(job.asked, product, heads, grad_output, grad_lse, *tensors, True)
                products.cut(grad_query, product.rows, heads.queries).copy_(parts[0])
                for gradient, part in zip((grad_key, grad_value), parts[1:], strict=True):
                    products.cut(gradient, product.keys, heads.keys).add_(part)
        return Gradients(grad_query, grad_key, grad_value)
    arriving, returning = _Arriving(job, plan, pieces[0], key, value), None
    with Lanes(query.device) as lanes:
        for index, heads in enumerate(pieces):
            coming = arriving
            if index + 1 < len(pieces):
                arriving = _Arriving(job, plan, pieces[index + 1], key, value)
            with lanes.next(coming.ready):
                keys, values = coming.wait()
                sums: list[torch.Tensor] = []
                for product in plan.products:
                    parts = products.backward(
                        *(job.asked, product, _local(heads), grad_output, grad_lse, query, keys, values),
                        *(output, lse, True),
                    )
                    products.cut(grad_query, product.rows, heads.queries).copy_(parts[0])
                    sums = _add(sums, product, plan, [part.transpose(0, 1) for part in parts[1:]])
                done = reached(query.device)
            if returning is not None:
                returning.add((grad_key, grad_value))
            after(query.device, done)
            returning = _Returning(job, plan, heads, hand_over(sums) or list(coming.buffers), key.dtype)
        if returning is not None:
            returning.add((grad_key, grad_value))
    return Gradients(grad_query, grad_key, grad_value)


def _add(sums: list[torch.Tensor], product: Product, plan: Plan, parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of a piece's keys and values, with those of one more product; float32 where there are several."""
    if not sums and product.keys.length == plan.rows:
        return parts if len(plan.products) == 1 else [part.float() for part in parts]
    if not sums:
        sums = [part.new_zeros((plan.rows, *part.shape[1:]), dtype=torch.float32) for part in parts]
    for total, part in zip(sums, parts, strict=True):
        total[product.keys.start : product.keys.stop] += part
    return sums
