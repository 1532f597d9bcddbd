"""Who sees which keys.

A query at position i sees key j of its own document where i - left <= j <= i + right. So a run of queries sees one
range of keys, and a run of keys is seen by one range of queries:

    keys      0 . . . . . . . . . . . . . . . . . . S
    queries                 |= run =|
    seen          [ left . .|       |. . right ]          cut at the ends of the first and the last document of the run
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from aiter.distributed.layout import Run, joined
from aiter.options import NO_LIMIT


class Mask(NamedTuple):
    """left, right: NO_LIMIT or how far a query sees. ends: where documents begin and end, ascending from 0; what lies
    behind the last sees nothing and is not seen."""

    left: int
    right: int
    ends: tuple[int, ...]

    def documents(self, run: Run) -> list[Run]:
        """The documents that have a position of the run, whole."""
        first = max(bisect_right(self.ends, run.start) - 1, 0)
        found = []
        for index in range(first, len(self.ends) - 1):
            document = Run(self.ends[index], self.ends[index + 1])
            if document.start >= run.stop:
                break
            if document.within(run).length > 0:
                found.append(document)
        return found

    def seen_by(self, queries: Run, document: Run) -> Run:
        """The keys of their document that these queries see."""
        start = document.start if self.left == NO_LIMIT else max(document.start, queries.start - self.left)
        stop = document.stop if self.right == NO_LIMIT else min(document.stop, queries.stop + self.right)
        return Run(start, stop)

    def that_see(self, keys: Run, document: Run) -> Run:
        """The queries of their document that see one of these keys."""
        return Mask(self.right, self.left, ()).seen_by(keys, document)


class Segment(NamedTuple):
    """Queries and keys of one document, by position, that are to be multiplied."""

    queries: Run
    keys: Run


def segments(queries: Run, keys: Run, mask: Mask) -> list[Segment]:
    """Those of a run of queries and a run of keys, in order: queries that see a key, keys that are seen."""
    found = []
    for document in mask.documents(queries):
        rows = queries.within(document)
        seen = mask.seen_by(rows, document).within(keys)
        if seen.length > 0:
            rows = rows.within(mask.that_see(seen, document))
            if rows.length > 0:
                found.append(Segment(rows, seen))
    return found


def wanted(runs: Sequence[Run], mask: Mask) -> tuple[Run, ...]:
    """All keys that the queries of these runs see, their own included."""
    return joined(
        [mask.seen_by(run.within(document), document) for run in runs for document in mask.documents(run)],
    )


def shared(wanted: Sequence[Run], held: Sequence[Run]) -> list[Run]:
    """What is in both lists of ascending runs."""
    both = (want.within(run) for want in wanted for run in held)
    return [run for run in both if run.length > 0]
