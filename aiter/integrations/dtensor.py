"""PyTorch's DTensor: how attention is split over a mesh, so that the operations take distributed tensors.

    import aiter.integrations.dtensor
    output = aiter.flash_attn_func(query, key, value)      # DTensors, and so is the output

Split by sequences (the batch), by heads where the mesh divides those of key and value, or not at all; each dimension of
a mesh as its tensors are. What is split otherwise, along the sequence or head_dim, PyTorch gathers first: rings are
not made here. Importing registers it, for the forward and the backward operator.
"""

from __future__ import annotations

from itertools import combinations
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

_operators: Any = torch.ops.aiter
_Placements = tuple[list, list]


def _by_name(operator: Any, arguments: tuple) -> dict[str, Any]:
    names = [argument.name for argument in operator._schema.arguments]
    return dict(zip(names, arguments, strict=False))


def _ways(operator: Any, arguments: tuple, outputs: list[str]) -> list[_Placements]:
    """What DTensor may choose from, for each dimension of a mesh: placements of the outputs and of the inputs.

    outputs: what each output is like: "query", "key", "value" or "lse"."""
    given = _by_name(operator, arguments)
    query, key = given["query"], given["key"]
    packed, paged = query.ndim == 3, given.get("page_table") is not None
    if given.get("rng_state") is not None:
        raise NotImplementedError(
            "dropout_p with DTensors: parts of a mesh would draw the same mask for different rows"
        )
    # Of each tensor, the dimension of sequences and of heads; None: it is whole.
    heads = 1 if packed else 2
    rows: dict[str, tuple[int | None, int | None]] = {name: (0, heads) for name in ("query", "output", "grad_output")}
    rows |= dict.fromkeys(("lse", "grad_lse"), (0, 0 if packed else 1))
    rows |= dict.fromkeys(("key", "value"), (None, 1) if paged else (0, heads))
    rows |= dict.fromkeys(("page_indptr", "last_page_len"), (None, None))
    rows |= dict.fromkeys(("seqlens_q", "seqlens_k", "page_table", "query_offsets", "starts_q", "starts_k"), (0, None))
    for name in ("sinks", "alibi_slopes", "k_descale", "v_descale"):  # a number, one for each head, or of each sequence
        tensor = given.get(name)
        if tensor is not None:
            rows[name] = (0, 1) if tensor.ndim == 2 else (None, 0 if tensor.ndim == 1 and tensor.shape[0] > 1 else None)

    def placed(way: int | None) -> _Placements:
        def place(name: str) -> Any:
            dim = None if way is None else rows[name][way]
            return Replicate() if dim is None else Shard(dim)

        def is_tensor(value: object) -> bool:
            return hasattr(value, "placements")

        inputs = [place(name) if is_tensor(value) else None for name, value in given.items()]
        return [place(output) for output in outputs], inputs

    ways = [placed(None)]
    if not packed and given.get("page_indptr") is None:  # packed sequences, and lists, are of different lengths
        ways.append(placed(0))
    if _divide(key.mesh.shape, key.shape[1] if paged else key.shape[heads]):
        ways.append(placed(1))
    return ways


def _divide(mesh: tuple[int, ...], heads: int) -> bool:
    """Whether heads stay whole groups over any of a mesh's dimensions; what has too few for it, DTensor leaves out."""
    counts = (prod(some) for many in range(1, len(mesh) + 1) for some in combinations(mesh, many))
    return all(heads % count == 0 or heads < count for count in counts)


@register_sharding(_operators.attention.default)
def _forward(*arguments: Any) -> list[_Placements]:
    return _ways(_operators.attention.default, arguments, ["query", "lse"])


@register_sharding(_operators.attention_backward.default)
def _backward(*arguments: Any) -> list[_Placements]:
    return _ways(_operators.attention_backward.default, arguments, ["query", "key", "value"])
