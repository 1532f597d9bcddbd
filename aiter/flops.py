"""How many floating-point operations a call takes, for PyTorch's FlopCounterMode.

Counted as PyTorch counts its own operators: the products of matrices, two forward and five backward, keys that a mask
hides included. Lengths count where their values can be looked at; of a traced call, their bounds do.
"""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from aiter import library  # noqa: F401 - defines the operators


@register_flop_formula(torch.ops.aiter.attention, get_raw=True)
def _forward(query, key, value, *arguments, **keywords) -> int:
    pairs = _pairs(query, key, _named(torch.ops.aiter.attention, (query, key, value, *arguments), keywords))
    return 2 * pairs * query.shape[-2] * (query.shape[-1] + value.shape[-1])


@register_flop_formula(torch.ops.aiter.attention_out, get_raw=True)
def _forward_out(output, *arguments, **others) -> int:
    return _forward(*arguments, **others)


@register_flop_formula(torch.ops.aiter.attention_backward, get_raw=True)
def _backward(grad_output, grad_lse, query, key, value, *arguments, **keywords) -> int:
    given = (grad_output, grad_lse, query, key, value, *arguments)
    pairs = _pairs(query, key, _named(torch.ops.aiter.attention_backward, given, keywords))
    # Scores again, and the gradients of query and key; those of the weights and of value.
    return 2 * pairs * query.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def count_shares(forward: Any, backward: Any) -> None:
    """For `aiter.distributed`, whose operators these are: of each rank, its share of all pairs."""

    @register_flop_formula(forward, get_raw=True)
    def _(query, key, value, *arguments, **keywords) -> int:
        pairs = _share(query, key, _named(forward, (query, key, value, *arguments), keywords))
        return 2 * pairs * query.shape[-2] * (query.shape[-1] + value.shape[-1])

    @register_flop_formula(backward, get_raw=True)
    def _(grad_output, grad_lse, query, key, value, *arguments, **keywords) -> int:
        given = (grad_output, grad_lse, query, key, value, *arguments)
        pairs = _share(query, key, _named(backward, given, keywords))
        return 2 * pairs * query.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _share(query: torch.Tensor, key: torch.Tensor, given: dict[str, Any]) -> int:
    groups = (torch.distributed.distributed_c10d._resolve_process_group(name) for name in given["groups"])
    ranks = prod(group.size() for group in groups)
    documents = _lengths(None, given.get("cu_seqlens"))
    if documents is not None:
        return sum(length * length for length in documents) // ranks
    batch = query.shape[0] if query.dim() == 4 else 1
    return batch * query.shape[-3] * key.shape[-3] * ranks


def count_pages(by_table: Any, by_lists: Any) -> None:
    """For `aiter.integrations.rocm`, whose operators these are: one query of each sequence."""

    def count(query: torch.Tensor, value_cache: torch.Tensor, keys: list[int] | None) -> int:
        return 2 * sum(keys or ()) * query.shape[-2] * (query.shape[-1] + value_cache.shape[-1])

    @register_flop_formula(by_table, get_raw=True)
    def _(*arguments, **keywords) -> int:
        given = _named(by_table, arguments, keywords)
        return count(given["query"], given["value_cache"], _values(given["context_lens"]))

    @register_flop_formula(by_lists, get_raw=True)
    def _(*arguments, **keywords) -> int:
        given = _named(by_lists, arguments, keywords)
        keys = _listed(given["kv_indptr"], given.get("kv_last_page_lens"), given["block_size"])
        return count(given["query"], given["value_cache"], keys)


def _named(operator: Any, arguments: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
    """An operator's arguments by their names, without those that are None or left out."""
    names = [argument.name for argument in operator.default._schema.arguments]
    given = {**dict(zip(names, arguments, strict=False)), **keywords}
    return {name: value for name, value in given.items() if value is not None}


def _pairs(query: torch.Tensor, key: torch.Tensor, given: dict[str, Any]) -> int:
    """How many pairs of a query and a key of one sequence there are."""
    rows, keys = (_lengths(given.get(f"seqlens_{side}"), given.get(f"starts_{side}")) for side in "qk")
    pages, lists = given.get("page_table"), given.get("page_indptr")
    if query.dim() == 4:
        batch, longest = query.shape[:2]
    else:
        starts = [given[name].shape[0] - 1 for name in ("starts_q", "page_indptr") if name in given]
        lengths = [given[name].shape[0] for name in ("seqlens_q", "seqlens_k", "page_table") if name in given]
        batch, longest = (starts + lengths)[0], given["max_seqlen"]
    if lists is not None:
        keys, longest_k = _listed(lists, given.get("last_page_len"), key.shape[2]), given.get("max_seqlen_k", 0)
    elif pages is not None:
        longest_k = pages.shape[1] * key.shape[2]
    else:
        longest_k = key.shape[1] if key.dim() == 4 else given.get("max_seqlen_k") or given["max_seqlen"]
    return sum(row * key for row, key in zip(rows or [longest] * batch, keys or [longest_k] * batch, strict=True))


def _lengths(lengths: torch.Tensor | None, starts: torch.Tensor | None) -> list[int] | None:
    if lengths is not None:
        return _values(lengths)
    ends = None if starts is None else _values(starts)
    return None if ends is None else [end - start for start, end in pairwise(ends)]


def _listed(lists: torch.Tensor, last_page_len: torch.Tensor | None, page_size: int) -> list[int] | None:
    """Tokens of sequences whose pages are listed."""
    ends = _values(lists)
    if ends is None:
        return None
    last = [page_size] * len(ends) if last_page_len is None else last_page_len.tolist()
    pages = [end - start for start, end in pairwise(ends)]
    return [(count - 1) * page_size + rest if count else 0 for count, rest in zip(pages, last, strict=False)]


def _values(tensor: torch.Tensor) -> list[int] | None:
    return tensor.tolist() if type(tensor) is torch.Tensor and not tensor.is_meta else None
