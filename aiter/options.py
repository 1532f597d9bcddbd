"""What a call may ask of attention beyond its tensors, causal and softmax_scale: one value, from operation to kernel.

A new option is a field here, a field of the launch ABI or a macro of the spec, and the kernels' code; operations hand
on whatever keywords they get.
"""

from __future__ import annotations

import math
from typing import NamedTuple, TypedDict

import torch

from aiter import checks

NO_LIMIT = -1


class OptionKeywords(TypedDict, total=False):
    """The keywords of all operations that make an `Options`.

    window_size: (left, right), how many keys before and after its own position a query sees, both inclusive; -1 is no
        limit. Query i stands at key i + seq_k - seq_q. With `causal`, right is 0.
    softcap: 0.0 for none, or c > 0: scores become c * tanh(score / c), after softmax_scale and before the mask.
    alibi_slopes: float32 (heads_q,) or (batch, heads_q): score - slope * |distance|, after the soft cap.
    sinks: (heads_q,) float32 or of query's dtype: a score per head that joins the softmax's sum and has no value. The
        returned log-sum-exp is that of the keys alone.
    query_offsets: int32 (batch,): query 0 of sequence b stands at key query_offsets[b], instead of seq_k - seq_q.
    batch_invariant: no bit of a sequence's result depends on the rest of the batch, nor on how a prompt was cut into
        calls. Default: AITER_BATCH_INVARIANT.
    """

    window_size: tuple[int, int]
    softcap: float
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    query_offsets: torch.Tensor | None
    batch_invariant: bool | None


class Options(NamedTuple):
    """Checked, as kernels take them. The window is (NO_LIMIT, NO_LIMIT) where causal says all."""

    window_left: int = NO_LIMIT
    window_right: int = NO_LIMIT
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    query_offsets: torch.Tensor | None = None
    batch_invariant: bool = False


NO_OPTIONS = Options()


def read_options(query: torch.Tensor, causal: bool, keywords: OptionKeywords) -> tuple[bool, Options]:
    """`causal` and the options that an operation's keywords ask for. Raises TypeError and ValueError that name the
    keyword, for unknown ones too.

    A window that limits only what comes after a row's own key is a causal mask, for which there is code already.
    """
    if not keywords:
        return causal, NO_OPTIONS
    checks.flag("causal", causal)
    unknown = keywords.keys() - OptionKeywords.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are: {', '.join(OptionKeywords.__annotations__)}")
    left, right = _window(keywords.get("window_size", (NO_LIMIT, NO_LIMIT)))
    if causal:
        right = 0
    causal = (left, right) == (NO_LIMIT, 0)
    if causal:
        right = NO_LIMIT
    batch_invariant = keywords.get("batch_invariant")
    return causal, Options(
        left,
        right,
        _softcap(keywords.get("softcap", 0.0)),
        _per_head("alibi_slopes", keywords.get("alibi_slopes"), query, (1, 2)),
        _per_head("sinks", keywords.get("sinks"), query, (1,)),
        _offsets(keywords.get("query_offsets"), query),
        checks.flag("batch_invariant", batch_invariant) if batch_invariant is not None else checks.BATCH_INVARIANT,
    )


def _window(value: object) -> tuple[int, int]:
    if not (isinstance(value, (tuple, list)) and len(value) == 2):
        raise TypeError(f"window_size must be a pair (left, right) of ints, -1 for no limit, not {value!r}")
    for side in value:
        if not checks.is_int(side):
            raise TypeError(f"window_size must be a pair of ints, not {value!r}")
        if side < NO_LIMIT:
            raise ValueError(f"window_size is {tuple(value)}; each side must be -1 (no limit) or at least 0")
    return value[0], value[1]


def _softcap(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"softcap must be a float, 0.0 for none, not {type(value).__name__}")
    if not torch.compiler.is_compiling() and not (math.isfinite(value) and value >= 0):
        raise ValueError(f"softcap is {value}; it must be 0 (none) or a positive, finite number")
    return value


def _per_head(name: str, value: object, query: torch.Tensor, ranks: tuple[int, ...]) -> torch.Tensor | None:
    if value is None:
        return None
    layout = "(heads_q,)" if ranks == (1,) else "(heads_q,) or (batch, heads_q)"
    checks.tensor(name, value, ranks, layout)
    assert isinstance(value, torch.Tensor)
    checks.same_device(name, value, "query", query)
    if value.dtype not in checks.DTYPE_NAMES:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be torch.float32 (or query's)")
    if value.shape[-1] != query.shape[-2]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must be {layout}: query has {query.shape[-2]} heads")
    return value


def _offsets(value: object, query: torch.Tensor) -> torch.Tensor | None:
    if value is None:
        return None
    checks.indices("query_offsets", value, (None if query.dim() == 3 else query.shape[0],), "int32 (batch,)", query)
    assert isinstance(value, torch.Tensor)
    return value
