"""Attention over a sequence that is split over the ranks of a torch.distributed process group.

    from aiter.distributed import context_parallel_attention, shard
    output = context_parallel_attention(query, key, value, group, causal=True, layout="zigzag")

        layout.py     who holds which positions (and tensors cut that way: `shard`, `unshard`)
        needs.py      who sees which keys: one description, from which every scheme takes what it sends and computes
        products.py   one product of queries and keys that both lie in memory: the kernels, forward and backward
        exchange.py   rows on their way between ranks: batches of sends and receives that overlap with the products
        allgather.py  scheme: keys come from all ranks, some heads at a time; every row has all its keys in one softmax
        ring.py       scheme: keys go round, half a rank's at a time; partial rows are merged by log-sum-exp in float32
        alltoall.py   scheme: heads for rows; then each rank has whole sequences of some heads (beside any of the above)
        agree.py      before data moves, all ranks know that they were asked for the same; or all raise
        cost.py       how long each scheme takes, from a few constants: scheme="auto", and predictions
        attention.py  `context_parallel_attention`: arguments, autograd, and the operator that torch.compile sees
        decode.py     `context_parallel_decode`: a cache that is split over ranks

Everything is planned in positions of the whole sequence. A rank holds *runs* of positions, ascending; the mask and the
documents say which keys a run sees, which is one range. Whatever is needed from others follows by intersection, on
every rank alike and without asking. Buffers hold rows first, (rows, batch, heads, head_dim), so that a run is one
piece of memory, which is sent and received in place; kernels read them by strides.

Sums are made in float32, in an order that the ranks' numbers alone decide, so that results repeat bit for bit.
docs/context_parallel.md says what to use when, and what has been run where.
"""

import torch.distributed

if not torch.distributed.is_available():
    raise ImportError("aiter.distributed needs a PyTorch that was built with torch.distributed")

from aiter.distributed.attention import context_parallel_attention
from aiter.distributed.decode import context_parallel_decode, merge_over_ranks
from aiter.distributed.layout import positions_of, shard, unshard

__all__ = [
    "context_parallel_attention",
    "context_parallel_decode",
    "merge_over_ranks",
    "positions_of",
    "shard",
    "unshard",
]
