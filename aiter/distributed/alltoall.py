"""Heads for rows: every rank has whole sequences of some heads, and attends to them as if there were no others.

    rank   rows  heads 0 1 2 3            rank   heads  rows 0 1 2 3
    0      0     = = = =                  0      0      = = = =
    1      1     = = = =    exchange ->   1      1      = = = =    attention, and back
    2      2     = = = =                  2      2      = = = =

Query heads are dealt out evenly, whatever their number; a KV head goes to every rank whose query heads read it, and its
gradients are summed in float32, in the order of the ranks. Rows arrive in order of position, whatever the layout, so
that the attention is the very call that one process would make. Over a second group the rows may be split further: it
is then that of another scheme."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from aiter.distributed.allgather import within
from aiter.distributed.exchange import Batch, Group
from aiter.distributed.layout import Run, placed
from aiter.distributed.products import Heads


@lru_cache(maxsize=256)
def heads_of(rank: int, world: int, heads_q: int, heads_kv: int) -> tuple[Heads, ...]:
    """What a rank has of the heads, in up to three parts: the first and the last KV head with some of their query
    heads, those between with all."""
    if not heads_kv:
        return ()
    ratio = heads_q // heads_kv
    start, stop = heads_q * rank // world, heads_q * (rank + 1) // world
    parts: list[Heads] = []
    for head in range(start // ratio, -(-stop // ratio)) if stop > start else ():
        queries = Run(head * ratio, (head + 1) * ratio).within(Run(start, stop))
        last = parts[-1] if parts else None
        if last and queries.length * last.keys.length == last.queries.length:
            parts[-1] = Heads(Run(last.queries.start, queries.stop), Run(last.keys.start, head + 1))
        else:
            parts.append(Heads(queries, Run(head, head + 1)))
    return tuple(parts)


def _span(runs: list[Run]) -> Run:
    return Run(runs[0].start, runs[-1].stop) if runs else Run(0, 0)


class Exchange(NamedTuple):
    """runs: of each rank's rows, ascending; heads: of each rank, see heads_of."""

    group: Group
    rank: int
    runs: tuple[tuple[Run, ...], ...]
    heads: tuple[tuple[Heads, ...], ...]

    @property
    def positions(self) -> list[tuple[Run, int]]:
        """Where the rows of all ranks lie together, in order of position."""
        return placed(sorted(run for runs in self.runs for run in runs))

    def own_heads(self) -> tuple[Heads, ...]:
        """This rank's, as they are numbered here."""
        parts = self.heads[self.rank]
        if not parts:
            return ()
        (first_q, first_k) = (parts[0].queries.start, parts[0].keys.start)
        return tuple(
            Heads(Run(q.start - first_q, q.stop - first_q), Run(k.start - first_k, k.stop - first_k)) for q, k in parts
        )

    def spans(self, of_keys: bool) -> list[Run]:
        """The heads of each rank."""
        return [_span([part.keys if of_keys else part.queries for part in parts]) for parts in self.heads]

    def to_heads(self, tensors: list[torch.Tensor], of_keys: list[bool]) -> list[torch.Tensor]:
        """Of this rank's rows (batch, rows, all heads, …), all rows of its heads: (batch, all rows, heads, …), rows
        first in memory."""
        sends, receives, results, where = [], [], [], self.positions
        rows = sum(run.length for run, _ in where)
        for tensor, kind in zip(tensors, of_keys, strict=True):
            spans = self.spans(kind)
            mine = spans[self.rank]
            result = tensor.new_empty((rows, tensor.shape[0], mine.length, *tensor.shape[3:]))
            results.append(result.transpose(0, 1))
            for peer, span in enumerate(spans):
                for run, row in placed(self.runs[self.rank]):
                    part = tensor[:, row : row + run.length, span.start : span.stop].transpose(0, 1)
                    place = within(run, where)
                    if peer == self.rank:
                        result[place.start : place.stop] = part
                    else:
                        sends.append((peer, part))
                if peer != self.rank:
                    for run in self.runs[peer]:
                        place = within(run, where)
                        receives.append((peer, result[place.start : place.stop]))
        Batch(self.group, sends, receives).wait()
        return results

    def to_rows(self, tensors: list[torch.Tensor], of_keys: list[bool], heads: list[int]) -> list[torch.Tensor]:
        """The way back, to (batch, rows, all heads, …); what several ranks have of a head is summed in float32."""
        arrived: list[torch.Tensor | None] = []
        sends, receives, where = [], [], self.positions
        own_runs = self.runs[self.rank]
        rows = sum(run.length for run in own_runs)
        places = [within(run, where) for run in own_runs]
        for tensor, kind in zip(tensors, of_keys, strict=True):
            first = tensor.transpose(0, 1)
            for peer, span in enumerate(self.spans(kind)):
                if peer == self.rank:
                    arrived.append(None)  # is not sent, and not copied but to its place
                    continue
                for run in self.runs[peer]:
                    place = within(run, where)
                    sends.append((peer, first[place.start : place.stop]))
                part = first.new_empty((rows, first.shape[1], span.length, *first.shape[3:]))
                arrived.append(part)
                for run, row in placed(own_runs):
                    receives.append((peer, part[row : row + run.length]))
        Batch(self.group, sends, receives).wait()
        results = []
        for index, (tensor, kind, count) in enumerate(zip(tensors, of_keys, heads, strict=True)):
            parts = arrived[index * len(self.heads) : (index + 1) * len(self.heads)]
            shape = (tensor.shape[0], rows, count, *tensor.shape[3:])
            spans = self.spans(kind)
            once = sum(span.length for span in spans) == count  # then each head is written, by one part
            total = tensor.new_empty(shape) if once else tensor.new_zeros(shape, dtype=torch.float32)
            put = torch.Tensor.copy_ if once else torch.Tensor.add_
            for got, span in zip(parts, spans, strict=True):
                of_heads = total[:, :, span.start : span.stop]
                if got is not None:
                    put(of_heads, got.transpose(0, 1))
                    continue
                for place, (run, row) in zip(places, placed(own_runs), strict=True):
                    put(of_heads[:, row : row + run.length], tensor[:, place.start : place.stop])
            results.append(total.to(tensor.dtype))
        return results
