"""How long each scheme takes, from a few constants: what scheme="auto" goes by, and what larger machines may be told.

    time of a rank = what cannot be hidden + max(its products, its messages) + calls

Products are FLOPs of the busiest rank over what kernels sustain. Messages are bytes over the bandwidth of a rank's
link: within a node, or, where a message leaves it, between nodes. Keys of all-gather and ring move while products run,
but for the first piece; the exchanges of all-to-all are waited for. Merging in the ring reads and writes float32 rows.
"""

from __future__ import annotations

from typing import NamedTuple


class Machine(NamedTuple):
    """Per GPU: FLOP/s that kernels sustain, bytes/s of a rank's link within a node and between nodes, bytes/s of
    memory, seconds for a batch of messages and for a call, and how many ranks a node has."""

    flops: float = 600e12
    within: float = 330e9
    between: float = 45e9
    memory: float = 2.6e12
    message: float = 25e-6
    call: float = 12e-6
    node: int = 8


class Problem(NamedTuple):
    """Of the whole sequence. seen: the share of all pairs of query and key that a mask leaves; span: the share of all
    keys that the queries of one rank want from others, at most (world - 1) / world. imbalance: products of the busiest
    rank over the mean. runs: of positions on a rank."""

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


# Products of the backward pass over those of the forward pass; messages likewise: keys again, and gradients of them.
BACKWARD_PRODUCTS, BACKWARD_MESSAGES = 2.5, 2.0


class Prediction(NamedTuple):
    """Seconds. compute is what one rank would take for its share, if nothing else were to be done."""

    total: float
    compute: float

    @property
    def efficiency(self) -> float:
        return self.compute / self.total if self.total else 1.0


def predict(scheme: str, problem: Problem, world: int, machine: Machine, inner: int = 1) -> Prediction:
    """A forward pass, and a backward pass too if `problem.backward`. inner: ranks of the all-to-all within
    "alltoall+ring"."""
    p = problem
    pairs = p.batch * p.heads_q * float(p.tokens) ** 2 * p.seen
    flops = 2 * (p.head_dim + p.value_dim) * pairs * (1 + BACKWARD_PRODUCTS * p.backward)
    compute = flops / world / machine.flops
    keys = p.batch * p.heads_kv * p.tokens * (p.head_dim + p.value_dim) * p.bytes
    rows = p.batch * p.heads_q * (p.tokens / world) * (p.head_dim + p.value_dim) * p.bytes
    passes = 1 + BACKWARD_MESSAGES * p.backward
    link = machine.within if world <= machine.node else machine.between
    if scheme == "alltoall":
        busiest = -(-p.heads_q // world) * world / p.heads_q
        kv_copies = max(1.0, world / p.heads_kv) if p.heads_kv else 1.0
        moved = (rows + keys / world * kv_copies) * (world - 1) / world * (1 + p.backward)
        total = compute * busiest + moved / link + 2 * (1 + p.backward) * (machine.message + machine.call)
        return Prediction(total, compute)
    if scheme == "alltoall+ring":
        outer = world // inner
        within = predict("alltoall", p._replace(seen=0.0, tokens=p.tokens // outer), inner, machine)
        between = predict("ring", p, world, machine._replace(node=1) if world > machine.node else machine)
        steps = (outer - 1) / max(world - 1, 1)  # of the ring's, each with a part `inner` times as long
        moved = between.total - between.compute * p.imbalance
        return Prediction(
            compute * p.imbalance + within.total * (1 + p.backward) + moved * max(steps, 1 / max(world - 1, 1)), compute
        )
    moved = keys * p.span * passes
    products = compute * p.imbalance
    if scheme == "allgather":
        pieces = min(p.heads_kv, 2 * world) or 1
        calls = pieces * (p.runs * machine.call + machine.message) * (1 + p.backward)
        return Prediction(max(products, moved / link) + moved / link / pieces + calls, compute)
    if scheme == "ring":
        steps = max(2 * (world - 1), 1)
        # Neighbours: but one of a node's ranks send within it, and all wait for those that do not.
        accumulators = p.batch * p.heads_q * (p.tokens / world) * p.value_dim
        merged = accumulators * (2 * 4 + p.bytes) * 4 * steps / machine.memory
        moved += keys * p.span * 2 * p.backward  # gradients travel in float32, twice as long
        calls = steps * (p.runs * 2 * machine.call + machine.message) * (1 + p.backward)
        return Prediction(max(products + merged, moved / link) + calls, compute)
    raise ValueError(f"scheme is {scheme!r}; there are allgather, alltoall, ring and alltoall+ring")


def choose(problem: Problem, world: int, machine: Machine) -> str:
    """The fastest scheme on a group of one dimension, by prediction; the same on all ranks."""
    schemes = ("allgather", "alltoall", "ring")
    return min(schemes, key=lambda scheme: predict(scheme, problem, world, machine).total)
