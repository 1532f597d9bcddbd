"""How many floating-point operations a call takes, for PyTorch's FlopCounterMode.

Counted as PyTorch counts its own operators: the products of matrices, two forward and five backward, keys that a mask
hides included. Lengths count where their values can be looked at; of a traced call, their bounds do.
"""

from __future__ import annotations

from itertools import pairwise
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
