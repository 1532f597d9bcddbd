"""What FlashAttention's arguments mean on this package's kernels: the helpers of `aiter.flash_attn`."""

from __future__ import annotations

import itertools
from functools import partial
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F

from aiter import checks
from aiter.dispatch import First, Operation, attend
from aiter.dropout import draw_rng_state, keep_mask
from aiter.layout import NO_INDICES, Indices, check_tensors
from aiter.options import OptionKeywords, check_rng_state, chunk_in_range, dropout_in_range
from aiter.reference import attend_one

# Taken and of no consequence: how fast, on how many units, in which order. None is taken for each, too.
HINTS: dict[str, tuple[type, ...]] = {
    "num_splits": (int,),
    "pack_gqa": (bool, int),
    "sm_margin": (int,),
    "scheduler_metadata": (torch.Tensor,),
    "how_v3_bf16_cvt": (int,),
    "min_seqlen_q": (int,),
    "is_v3_atomic_fp32": (bool, int),
}
# Not offered; None asks for nothing.
_NOT_OFFERED = ("q_descale", "bias", "cu_seqlens_q_padded", "cu_seqlens_k_padded", "learnable_sink")


def _operation(names: checks.Names) -> Operation:
    return Operation(partial(check_tensors, names=names), None, names)


NAMES = checks.Names(
    *("seqused_q", "seqused_k", "max_seqlen_q", "max_seqlen_k", False, "cu_seqlens_q", "cu_seqlens_k", "block_table"),
    query="q",
    key="k",
    value="v",
)
OPERATION = _operation(NAMES)
_PAGED_NAMES = NAMES._replace(longest_k="what block_table has room for")
PAGED = _operation(_PAGED_NAMES)
PAGED_BY_STARTS = _operation(_PAGED_NAMES._replace(seqlens_k="the length in cu_seqlens_k"))
CACHE_NAMES = NAMES._replace(longest_k="what the cache has room for", key="k_cache", value="v_cache")


def _cached(paged: bool, indexed: bool, appends: bool) -> Operation:
    names = CACHE_NAMES._replace(seqlens_k="cache_seqlens + new tokens" if appends else "cache_seqlens")
    if paged:
        names = names._replace(longest_k=_PAGED_NAMES.longest_k)
    if paged and indexed:
        names = names._replace(page_entry="{table}[cache_batch_idx[{row}], {column}]")
    elif indexed:
        names = names._replace(page_table="cache_batch_idx", page_entry="{table}[{row}]", pages="rows")
    return _operation(names)


# By whether there are a block_table, a cache_batch_idx, and new tokens.
CACHED = {case: _cached(*case) for case in itertools.product((False, True), repeat=3)}


def attend_any_head_dim(
    operation: Operation,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
    options: OptionKeywords,
    out: torch.Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
    return_lse: bool,
    first: First | None = None,
) -> Any:
    """`attend`, of head_dims that need not be multiples of 8."""
    names = operation.names
    for name, flag in (
        ("deterministic", deterministic),
        ("return_attn_probs", return_attn_probs),
        ("return_lse", return_lse),
    ):
        if flag is not True and flag is not False:
            checks.flag(name, flag)
    for name, tensor in ((names.query, q), (names.key, k), (names.value, v)):
        checks.tensor(name, tensor, (3, 4), f"{checks.BSHD}, or packed {checks.PACKED}")
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    checks.equal_size(names.key, k.shape[-1], "head_dim", names.query, head_dim)
    for name, size in ((names.query, head_dim), (names.value, value_dim)):
        if not 0 < size <= checks.HEAD_DIM_MAX and size != checks.LATENT_HEAD_DIM:
            raise ValueError(f"{name} has head_dim {size}; it must be from 1 to {checks.HEAD_DIM_MAX}")
    for name, bound in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if type(bound) is not int or not 0 <= bound <= checks.INT32_MAX:
            checks.bound(name, bound)
    if indices is not NO_INDICES:  # a bound of 0 is one that nothing but empty sequences keeps
        max_seqlen_q = max(max_seqlen_q, 1)
        if indices.page_indptr is None:
            max_seqlen_k = max(max_seqlen_k, 1)
    if softmax_scale is None:
        softmax_scale = checks.softmax_scale(None, head_dim)
    padded = head_dim % checks.HEAD_DIM_STEP or value_dim % checks.HEAD_DIM_STEP
    target = out
    if padded:
        if out is not None:
            target = _pad(checks.output(out, q, v, names))
        if first is None:
            q, k, v = _padded(q, k, v)
        else:
            unpadded, step = first.do, checks.HEAD_DIM_STEP
            q, k, v = (_shape_of(tensor, -(-tensor.shape[-1] // step) * step) for tensor in (q, k, v))
            first = First(lambda: _padded(*unpadded()), first.explain)
    wants_lse = return_attn_probs or return_lse
    if return_attn_probs and options.get("dropout_p"):
        options.setdefault("rng_state", draw_rng_state(q.device))
    result: Any = attend(
        *(operation, (), q, k, v, causal, softmax_scale, wants_lse, options, indices, max_seqlen_q, max_seqlen_k),
        *(target, first),
    )
    output, lse = result if wants_lse else (result, None)
    if padded:
        output = output[..., :value_dim]
        output = output.contiguous() if out is None else copy_into(out, output)
    if return_attn_probs:
        weights = _signed_weights(q, k, indices, max_seqlen_q, max_seqlen_k, softmax_scale, causal, options)
        return output, lse, weights
    return (output, lse) if return_lse else output


def widened(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    others: dict[str, Any],
    names: checks.Names,
    starts_q: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """8-bit queries as bfloat16, times the q_descale among the other keywords: float32 of one element, (heads_kv,) or
    (batch, heads_kv), each for the query heads of a KV head. The product is rounded once. Keys and values as they are,
    without a gradient."""
    checks.tensor(names.query, q, *((4, checks.BSHD) if starts_q is None else (3, checks.PACKED)))
    for name, tensor in ((names.key, k), (names.value, v)):
        checks.tensor(name, tensor, (3, 4), f"{checks.BSHD}, or packed {checks.PACKED}")
    k, v, heads_kv = k.detach(), v.detach(), k.shape[-2]
    checks.heads(q.shape[-2], heads_kv, names.key, names.query)
    descale = others.pop("q_descale", None)
    if descale is not None:
        batch = q.shape[0] if starts_q is None else starts_q.shape[0] - 1
        checks.per_kv_head("q_descale", descale, q, batch, heads_kv, names.query)
    q = q.detach().to(torch.bfloat16)
    if descale is None:
        return q, k, v
    if descale.numel() != 1:
        descale = descale.repeat_interleave(q.shape[-2] // heads_kv, -1)
        if descale.dim() == 2 and starts_q is not None:  # a row of scales for each row of q
            rows = torch.arange(q.shape[0], device=q.device)
            sequence = torch.searchsorted(starts_q, rows, right=True).sub(1).clamp(0, descale.shape[0] - 1)
            descale = descale[sequence]
        elif descale.dim() == 2:
            descale = descale.unsqueeze(1)
        descale = descale.unsqueeze(-1)
    return (q.float() * descale.detach()).to(torch.bfloat16), k, v


def with_values(
    q: torch.Tensor,
    qv: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None,
    copies: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Query, key and scale such that scores are those of q and k and those of qv and v together. Where k and v lie side
    by side in one memory the key is that memory, else a copy of both, or only of that shape."""
    check_values(q, qv, k, v)
    both = q.shape[-1] + qv.shape[-1]
    scale = checks.softmax_scale(None, both) if softmax_scale is None else softmax_scale
    if _is_behind(v, k):
        return torch.cat((qv, q), -1), v.as_strided((*v.shape[:-1], both), v.stride()), scale
    if _is_behind(k, v):
        return torch.cat((q, qv), -1), k.as_strided((*k.shape[:-1], both), k.stride()), scale
    return torch.cat((q, qv), -1), torch.cat((k, v), -1) if copies else _shape_of(k, both), scale


def check_values(q: torch.Tensor, qv: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raises for a qv that does not go with the others."""
    checks.tensor("qv", qv, q.dim(), "of the shape of q, with v's head_dim")
    if qv.shape != (*q.shape[:-1], v.shape[-1]) or qv.dtype != q.dtype:
        expected = (*q.shape[:-1], v.shape[-1])
        raise ValueError(f"qv is {qv.dtype} {tuple(qv.shape)}; it must be {q.dtype} {expected}: q's, with v's head_dim")
    checks.same_device("qv", qv, "q", q)
    checks.same_shape("v", v, "k", k, but_last=True)
    checks.equal_size("k", k.shape[-1], "head_dim", "q", q.shape[-1])
    both = q.shape[-1] + qv.shape[-1]
    if both > checks.HEAD_DIM_MAX and (both, v.shape[-1]) != (checks.LATENT_HEAD_DIM, checks.HEAD_DIM_MAX):
        raise NotImplementedError(
            f"qv is not offered for head_dims of q and v that add up to {both}; up to {checks.HEAD_DIM_MAX}, and "
            f"{checks.LATENT_HEAD_DIM - checks.HEAD_DIM_MAX} with {checks.HEAD_DIM_MAX}, they are"
        )


def _is_behind(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether each row of the second lies right behind one of the first, in one memory."""
    return (
        not torch.compiler.is_compiling()
        and not (torch.is_grad_enabled() and (first.requires_grad or second.requires_grad))
        and first.stride() == second.stride()
        and first.stride(-1) == 1
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.shape[-1] == second.storage_offset()
    )


@torch.no_grad()
def _signed_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    indices: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    options: OptionKeywords,
) -> torch.Tensor | None:
    """S_dmask: see flash_attn_func."""
    dropout_p, rng_state = options.get("dropout_p", 0.0), options.get("rng_state")
    if not dropout_p or rng_state is None:
        return None
    if indices.page_table is not None:
        raise NotImplementedError("return_attn_probs is not offered for pages with dropout_p; leave out one of them")
    used_q, used_k, _, starts_q, starts_k, *_ = indices
    batch = q.shape[0] if starts_q is None else starts_q.shape[0] - 1
    seq_q = q.shape[1] if starts_q is None else max_seqlen_q
    seq_k = k.shape[1] if starts_k is None else max_seqlen_k
    heads = q.shape[-2]
    weights = q.new_zeros((batch, heads, seq_q, seq_k))
    kept = keep_mask(rng_state, dropout_p, batch, heads, seq_q, seq_k)
    slopes = options.get("alibi_slopes")
    for b in range(batch):
        rows, keys = (
            tensor[b] if starts is None else tensor[int(starts[b]) : int(starts[b + 1])]
            for tensor, starts in ((q, starts_q), (k, starts_k))
        )
        rows, keys = (part if used is None else part[: int(used[b])] for part, used in ((rows, used_q), (keys, used_k)))
        if not (len(rows) and len(keys)):
            continue
        values = torch.eye(len(keys), device=q.device).unsqueeze(1).expand(-1, keys.shape[1], -1)
        own, _ = attend_one(
            *(rows, keys, values, causal, softmax_scale),
            window=options.get("window_size"),
            softcap=options.get("softcap", 0.0),
            alibi_slopes=None if slopes is None else slopes if slopes.dim() == 1 else slopes[b],
            chunk=options.get("attention_chunk", 0),
        )
        relative = (own / own.amax(-1, keepdim=True)).nan_to_num(0.0).transpose(0, 1)  # rows that see nothing: 0 / 0
        place = b, slice(None), slice(len(rows)), slice(len(keys))
        weights[place] = torch.where(kept[place], relative, -relative).to(q.dtype)
    return weights


def copy_into(out: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    if torch.compiler.is_compiling() or not out.is_inference():
        return out.copy_(output)
    with torch.inference_mode():  # elsewhere PyTorch lets nobody write into such a tensor
        return out.copy_(output)


def _pad(tensor: torch.Tensor) -> torch.Tensor:
    return F.pad(tensor, (0, -tensor.shape[-1] % checks.HEAD_DIM_STEP))


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _pad(q), _pad(k), _pad(v)


def _shape_of(tensor: torch.Tensor, head_dim: int) -> torch.Tensor:
    """What checks can be asked about, in place of a copy with that head_dim that is yet to be made."""
    return tensor.new_empty(()).expand(*tensor.shape[:-1], head_dim)


def options_of(
    dropout_p: float,
    causal: bool,
    window_size: tuple[int, ...],
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    sinks: torch.Tensor | None,
    others: dict[str, Any],
    qv: torch.Tensor | None,
) -> OptionKeywords:
    """What is asked for beyond tensors, in this package's words. Raises for what is not offered or not known."""
    checks.flag("causal", causal)
    if isinstance(window_size, torch.Tensor) and window_size.is_cpu:
        checks.tensor("window_size", window_size, 1, "(left, right)")
        window_size = tuple(window_size.tolist())
    if window_size is None:
        window_size = (-1, -1)
    if not isinstance(window_size, (tuple, list)):
        raise TypeError(f"window_size must be a pair (left, right) of ints, -1 for no limit, not {window_size!r}")
    for side in window_size:
        if not checks.is_int(side):
            raise TypeError(f"window_size must be a pair (left, right) of ints, -1 for no limit, not {window_size!r}")
    if len(window_size) == 3:  # ROCm's third is a number of sink tokens
        if window_size[2]:
            raise NotImplementedError(f"window_size {tuple(window_size)} keeps sink tokens, which is not offered")
        window_size = window_size[:2]
    options: OptionKeywords = {}
    if type(dropout_p) is not float or dropout_p != 0.0:
        dropout_p = dropout_in_range(dropout_p)
        if dropout_p:
            options["dropout_p"] = dropout_p
    for name, value in others.items():
        if name in ("sink_ptr", "s_aux") and name in others:
            if sinks is not None and value is not None:
                raise ValueError(f"sinks and {name} are one argument; give one of them")
            sinks = value if value is not None else sinks
        elif name in ("k_descale", "v_descale"):
            if value is not None and qv is not None:
                raise NotImplementedError(f"{name} is not offered with qv, whose keys are k and v of one scale")
            if value is not None:
                options[name] = value  # type: ignore[literal-required]
        elif name in _NOT_OFFERED:
            if value is not None:
                given = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
                raise NotImplementedError(f"{name} is not offered (it was {given}); leave it out, or give None")
        elif name in HINTS:
            if value is not None and not isinstance(value, HINTS[name]):
                kinds = " or ".join(kind.__name__ for kind in HINTS[name])
                raise TypeError(f"{name} must be {kinds} or None, not {type(value).__name__}")
        elif name not in ("rng_state", "attention_chunk"):
            raise TypeError(f"there is no argument {name!r}")
    if others.get("rng_state") is not None:
        check_rng_state(others["rng_state"])
        options["rng_state"] = others["rng_state"]
    if others.get("attention_chunk") is not None:
        options["attention_chunk"] = chunk_in_range(others["attention_chunk"])
    if tuple(window_size) != (-1, -1):
        options["window_size"] = tuple(window_size)  # type: ignore[typeddict-item]
    if isinstance(softcap, bool) or not isinstance(softcap, Real) or softcap != softcap:
        raise TypeError(f"softcap must be a number, 0.0 for none, not {softcap!r}")
    if softcap > 0:  # FlashAttention takes any other number for none
        options["softcap"] = softcap
    if alibi_slopes is not None:
        options["alibi_slopes"] = alibi_slopes
    if sinks is not None:
        options["sinks"] = sinks
    return options


def batch_of_starts(starts: torch.Tensor) -> int:
    if starts.shape[0] == 0:
        raise ValueError("cu_seqlens_q has shape (0,); it must be int32 (batch + 1,), from 0 on")
    return starts.shape[0] - 1


def unpacked(name: str, tensor: torch.Tensor, count: int) -> tuple[torch.Tensor, ...]:
    checks.memory(**{name: tensor})
    if tensor.shape[-3] != count:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; its third dimension from the end must be {count}")
    return tensor.unbind(-3)
