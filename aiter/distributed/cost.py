"""How long each scheme takes, from a few constants: what scheme="auto" goes by, and what larger machines are predicted
by.

    time = start + max(products, bytes that move meanwhile, the host's part in products) + what is waited for
           + messages and launches

Products are FLOPs of the busiest rank over what kernels sustain; messages are bytes that a rank receives over what its
link brings, within a node, or between nodes where some messages leave one. Keys of all-gather move while products run,
but for the first piece; the exchanges of an all-to-all are waited for, and so, by what was measured, are the ring's:
its products take all multiprocessors, which messages then wait for. The ring reads and writes float32 rows to merge
them. benchmarks/context_parallel_model.py prints tables of this."""

from __future__ import annotations

import math
from typing import NamedTuple

from aiter.distributed.exchange import SEPARATE_MOST


class Machine(NamedTuple):
    """Of a GPU: FLOP/s that kernels sustain; bytes/s that it receives within a node, copies at both ends in it, and
    from other nodes; bytes/s of its memory; seconds for a send or a receive, for a launch, of the host for a product of
    some rows and its copies, and from a call to its first launch; how many share a node. Defaults: `within`, `message`
    and `start` are fitted to forward passes on 2 and 4 H200 with NVLink, `product` to those of documents, whose many
    runs leave the GPUs waiting for the host (docs/context_parallel.md, its tables); `between`, a network of 400 Gbit/s
    a GPU, and `memory` are rounded from what others have published."""

    flops: float = 550e12
    within: float = 200e9
    between: float = 40e9
    memory: float = 2.4e12
    message: float = 20e-6
    call: float = 12e-6
    product: float = 250e-6
    start: float = 1.5e-3
    node: int = 8


class Problem(NamedTuple):
    """A whole sequence, or a batch of them. seen: the share of all pairs of query and key that the mask leaves. span:
    the share of all keys that a rank's queries want from others. imbalance: products of the busiest rank over the mean.
    runs: of positions on a rank."""

    tokens: int
    batch: int
    heads_q: int
    heads_kv: int
    head_dim: int
    value_dim: int
    bytes: int
    seen: float
    span: float
    imbalance: float
    runs: int
    backward: bool


# Of a backward pass, over those of the forward pass: products; keys that move; rows that an all-to-all exchanges (rows
# come back as gradients); calls.
BACKWARD_PRODUCTS, BACKWARD_KEYS, BACKWARD_ROWS, BACKWARD_CALLS = 2.5, 2.0, 1.0, 1.0
# Of merging, bytes of a number of the output that are read and written at a step, as ring.py does it.
MERGE_BYTES = 18
SCHEMES = ("allgather", "alltoall", "ring")


class Prediction(NamedTuple):
    """Seconds. compute: of this rank's share of the products, were nothing else to be done."""

    total: float
    compute: float

    @property
    def efficiency(self) -> float:
        return self.compute / self.total if self.total else 1.0


def predict(scheme: str, problem: Problem, world: int, machine: Machine, inner: int = 1) -> Prediction:
    """Of a forward pass, and with `problem.backward` of both passes. inner: how many ranks exchange rows for heads in
    "alltoall+ring"."""
    p, back = problem, problem.backward
    pairs = p.batch * p.heads_q * float(p.tokens) ** 2 * p.seen
    compute = 2 * (p.head_dim + p.value_dim) * pairs * (1 + BACKWARD_PRODUCTS * back) / world / machine.flops
    keys = p.batch * p.heads_kv * p.tokens * (p.head_dim + p.value_dim) * p.bytes  # of all ranks
    rows = p.batch * p.heads_q * p.tokens / world * (p.head_dim + p.value_dim) * p.bytes  # queries and output of one
    calls = (1 + BACKWARD_CALLS * back) * machine.call
    host = (1 + BACKWARD_CALLS * back) * machine.product
    message = (1 + BACKWARD_CALLS * back) * machine.message
    link = machine.within if world <= machine.node else machine.between

    def batch(peers: float, between_two: int) -> float:
        """Of so many messages, to and from each of so many ranks."""
        return 2 * peers * (between_two if between_two <= SEPARATE_MOST else 1) * message

    def exchange(ranks: int, link: float) -> float:
        copies = max(1.0, ranks / max(p.heads_kv, 1))  # a KV head goes to all whose query heads read it
        return (
            (rows + keys / world * copies) * (ranks - 1) / ranks * (1 + BACKWARD_ROWS * back) / link
            + batch(ranks - 1, 3 * p.runs)
            + batch(ranks - 1, p.runs)
        )

    def ring(ranks: int, inner: int) -> float:
        """After an exchange among `inner` ranks, each has that share of the heads, and of keys so many more rows."""
        whole = (world - 1) / world
        span = p.span / whole * (ranks - 1) / ranks if world > 1 else 0.0
        share = max(1 / inner, 1 / max(p.heads_kv, 1))
        steps = 2 * math.ceil(span * ranks)  # of those with keys that somebody wants
        # Gradients of keys are float32, on their way round.
        moved = keys * share * span * (1 + (1 + 4 / p.bytes) * back) / link
        merges = 1 + steps * min(p.seen, 1.0)  # of all rows: a causal mask leaves half of them in a step
        merging = MERGE_BYTES * p.batch * p.heads_q * p.tokens / world * p.value_dim * merges / machine.memory
        products = compute * p.imbalance + merging
        parts = (steps + 1) * p.runs
        return max(products, parts * host) + moved + parts * calls + steps * batch(1, 2)

    if scheme == "alltoall":
        busiest = -(-p.heads_q // world) * world / max(p.heads_q, 1)
        return Prediction(machine.start + compute * busiest + exchange(world, link) + calls, compute)
    if scheme == "alltoall+ring":
        inner_link = machine.within if inner <= machine.node else machine.between
        return Prediction(machine.start + ring(world // inner, inner) + exchange(inner, inner_link), compute)
    if scheme == "ring":
        return Prediction(machine.start + ring(world, 1), compute)
    if scheme == "allgather":
        pieces = max(min(p.heads_kv, math.ceil(2 * (1 + p.span * world)), 2 * world), 1)
        moved = keys * p.span * (1 + BACKWARD_KEYS * back) / link
        waited = keys * p.span * (1 + back) / link / pieces  # the first piece; backward, the last one's gradients
        messages = batch(min(math.ceil(p.span * world), world - 1), p.runs)
        of_pieces = pieces * (p.runs * calls + messages * (1 + back))  # gradients go back in two messages
        busy = max(compute * p.imbalance, moved, pieces * p.runs * host)
        return Prediction(machine.start + busy + waited + of_pieces, compute)
    raise ValueError(f"scheme is {scheme!r}; there are {', '.join(SCHEMES)} and alltoall+ring")


def choose(problem: Problem, world: int, machine: Machine) -> str:
    """The fastest scheme over one group, by prediction; the same on all ranks."""
    return min(SCHEMES, key=lambda scheme: predict(scheme, problem, world, machine).total)
