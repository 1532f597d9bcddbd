"""Caches of keys and values, and what writes into them.

    from aiter.kv_cache import reshape_and_cache

A cache is seen as (pages, page_size, heads_kv, head_dim), one tensor for keys and one for values, whatever its strides:
(pages, heads_kv, page_size, head_dim) is that after transpose(1, 2); keys and values that share one tensor are two
slices of it; a pool with a row for each token has pages of one token, pool.unsqueeze(1). Nothing but what is named is
written; nothing waits for a GPU, and all of it can be captured in a CUDA graph, once its kernel has been compiled by a
first call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from aiter import checks, plan, torch_state
from aiter.abi import pack_cache_write
from aiter.errors import LengthError, OverlapError
from aiter.kernels import ANY_HEAD_DIM
from aiter.options import readable_index, strides_per_kv_head
from aiter.plan import untraced
from aiter.plan_cache import plans
from aiter.repeated import repeats

__all__ = ["reshape_and_cache"]

DIM_MAX = 1024
_CACHE = "(pages, page_size, heads_kv, head_dim)"


class _Names(NamedTuple):
    """What messages call things."""

    key: str
    value: str
    key_cache: str
    value_cache: str
    k_scale: str
    v_scale: str


_BY_SLOTS = _Names("key", "value", "key_cache", "value_cache", "k_scale", "v_scale")
_BY_LENGTHS = _Names("k", "v", "k_cache", "v_cache", "k_descale", "v_descale")

# For what the operator finds out, which does not know what its table was made of.
_TABLE = checks.Names(page_table="block_table", longest_k="what a row of block_table (or of the cache) has room for")

_increment_version = torch._C._increment_version


@repeats
def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Writes new keys and values into a cache, in place.

    key: (tokens, heads_kv, head_dim), value: (tokens, heads_kv, value_dim), float16 or bfloat16, on CPUs float32 too.
    key_cache: (pages, page_size, heads_kv, head_dim), value_cache: (pages, page_size, heads_kv, value_dim), of any
    strides. slot_mapping: int32 or int64 (n,), n <= tokens: token t goes to position slot_mapping[t] % page_size of
    page slot_mapping[t] // page_size; where it is negative, nowhere. Tokens from n on are not written. What is kept of
    two tokens with one slot is not defined: it may be the key of one and the value of the other.

    Caches have the dtype of key, or are torch.float8_e4m3fn, float8_e4m3fnuz or float8_e5m2. Those hold value / scale,
    rounded to nearest even; what is beyond their range becomes its largest number. k_scale, v_scale: float32 (1,) or
    (heads_kv,), on the device of key; None is 1. They are for such caches alone.

    Raises TypeError and ValueError that name the argument; on the CPU also for a slot that the cache does not have (on
    a GPU, such a token is not written).
    """
    if _is_plain(key, value, key_cache, value_cache):
        _reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)
    else:
        _refuse_gradient(_BY_SLOTS, key, value, key_cache, value_cache)
        if not torch.compiler.is_compiling():
            _check_tokens(key, value, key_cache, value_cache, 3, _BY_SLOTS)
        torch.ops.aiter.reshape_and_cache(key, value, key_cache, value_cache, slot_mapping, k_scale, v_scale)


class Rotary(NamedTuple):
    """Rotary embedding: angles by place in the sequence, and how elements pair up."""

    cos: torch.Tensor  # (places, rotary_dim / 2), of the dtype of query
    sin: torch.Tensor
    positions: torch.Tensor | None  # int32 (batch,): where each sequence's first new token stands; None: at its length
    interleaved: bool
    query_moves: bool  # each query stands one place further than the one before, else all where the first does


def append(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor | None = None,
    starts_new: torch.Tensor | None = None,
    rotary: Rotary | None = None,
    query: torch.Tensor | None = None,
    starts_q: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    batch_index: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Writes new tokens behind those that each sequence has in its cache, in place; with `rotary`, keys are rotated on
    their way, and query, rotated, is returned.

    key, value: (batch, seq_new, heads_kv, dim), or packed (total_new, heads_kv, dim) by starts_new int32 (batch + 1,).
    Caches as in `reshape_and_cache`; page_table: int32 (batch, max_pages), or None: sequence b has page b. k_scale,
    v_scale: as there, or (batch, heads_kv).
    cache_seqlens: int32 (batch,) before the new tokens. query: (batch, seq_q, heads_q, head_dim), or packed by
    starts_q. batch_index: (batch,), the rows of a larger table, or of the cache, that page_table has; on the CPU, two
    sequences of one row may not write to one place.
    """
    if batch_index is not None:
        _check_apart(batch_index, cache_seqlens, key, starts_new)
    tensors = key, value, key_cache, value_cache, cache_seqlens, page_table, starts_new
    cos, sin, positions, interleaved, query_moves = rotary or (None, None, None, False, False)
    rest = query if rotary else None, starts_q, cos, sin, positions, interleaved, query_moves, k_scale, v_scale
    if _is_plain(key, value, key_cache, value_cache) and (
        query is None or (torch_state.is_plain(query, key, value) and not torch_state.wants_gradient(query))
    ):
        rotated = _append(*tensors, *rest)
    else:
        _refuse_gradient(_BY_LENGTHS, key, value, key_cache, value_cache)
        if query is not None and torch_state.wants_gradient(query):
            raise ValueError("writing into a cache takes no gradient, but q requires one: use torch.no_grad()")
        if not torch.compiler.is_compiling():
            _check_tokens(key, value, key_cache, value_cache, 4 if starts_new is None else 3, _BY_LENGTHS)
        rotated = torch.ops.aiter.append_to_cache(*tensors, *rest)
    return rotated if rotary and query is not None else None


class New(NamedTuple):
    """New tokens, and what says where they go: arguments of `append`."""

    key: torch.Tensor
    key_cache: torch.Tensor
    cache_seqlens: torch.Tensor
    page_table: torch.Tensor | None
    starts_new: torch.Tensor | None
    rotary: Rotary | None
    query: torch.Tensor | None
    starts_q: torch.Tensor | None


def misfit(names: checks.Names, new: New) -> ValueError | None:
    """For the first rule that new tokens break, if one is broken that can be seen from here. It looks at one sequence
    after the other, so it is for who knows already that something is wrong."""
    looked_at = new.cache_seqlens, new.page_table, new.starts_new, new.starts_q, new.rotary and new.rotary.positions
    if not all(t is None or torch_state.may_look(t) for t in looked_at) or checks.is_freed(looked_at):
        return None
    for error in _broken_rules(names, new):
        return type(error)(f"{error}. Nothing was written.")
    return None


def _broken_rules(names: checks.Names, new: New) -> Iterator[ValueError]:
    """Each rule takes it that those before it are kept."""
    key, key_cache, cache_seqlens, page_table, starts_new, rotary, query, starts_q = new
    if rotary is None:  # then nothing is done to queries
        query = None
    for called, starts, packed in (("cu_seqlens_k_new", starts_new, key), ("cu_seqlens_q", starts_q, query)):
        if starts is not None and packed is not None:
            broken = checks.broken_start(called, starts, packed.shape[0])
            if broken is not None:
                yield ValueError(broken)
    lengths, counts = checks.as_given(cache_seqlens).tolist(), _counts(key, starts_new, cache_seqlens.shape[0])
    pages, page_size = key_cache.shape[:2]
    room = page_size * (1 if page_table is None else page_table.shape[1])
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        tokens = "1 new token" if count == 1 else f"{count} new tokens"
        if count > room:
            yield LengthError(f"sequence {b} has {tokens}, more than {names.longest_k}, {room}")
        elif count == 0 and not 0 <= length <= room:
            yield checks.no_length("cache_seqlens", b, length, names.longest_k, room)
        elif not 0 <= length <= room - count:
            yield LengthError(
                f"cache_seqlens[{b}] is {length}; it must be from 0 to {room - count}, which with {tokens} is "
                f"{names.longest_k}, {room}"
            )
    if page_table is not None:
        for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            for column in range(length // page_size, -(-(length + count) // page_size)) if count else ():
                if not 0 <= int(page_table[b, column]) < pages:
                    yield checks.no_page(names, page_table, b, column, pages)
    if rotary is None:
        return
    places, name, begins = rotary.cos.shape[0], "cache_seqlens", lengths
    if rotary.positions is not None:
        name, begins = "rotary_seqlens", checks.as_given(rotary.positions).tolist()
    rows = [0] * len(lengths) if query is None else _counts(query, starts_q, len(lengths))
    if not rotary.query_moves:  # all stand where the first does
        rows = [min(count, 1) for count in rows]
    for called, each in (("new tokens", counts), ("queries", rows)):
        for b, (begin, count) in enumerate(zip(begins, each, strict=True)):
            if count and not 0 <= begin <= places - count:
                reached = f"place {begin}" if count == 1 else f"places {begin} to {begin + count - 1}"
                yield ValueError(
                    f"{name}[{b}] is {begin}, so that {called} are rotated by the angles of {reached}; rotary_cos and "
                    f"rotary_sin have " + (f"places 0 to {places - 1}" if places else "no places")
                )


def _check_apart(
    batch_index: torch.Tensor, cache_seqlens: torch.Tensor, key: torch.Tensor, starts_new: torch.Tensor | None
) -> None:
    """Raises where cache_batch_idx gives sequences one row, and new tokens of several one place in it. Nothing else
    would: all of them fit. Asked at every call on the CPU, so that the answer of most is one look."""
    if not torch_state.may_look(batch_index):
        return
    if plan.noted.launches is not None:
        plan.noted.launches.append(plan.Apart(batch_index))
    rows = batch_index.tolist()
    if len(set(rows)) == len(rows) or not torch_state.may_look(cache_seqlens):
        return
    lengths, counts = cache_seqlens.tolist(), _counts(key, starts_new, len(cache_seqlens))
    ends: dict[int, tuple[int, int]] = {}  # of each row: how far it is written, and by whom
    for row, begin, b, count in sorted(zip(rows, lengths, range(len(lengths)), counts, strict=True)):
        if count <= 0:
            continue
        end, other = ends.get(row, (begin, b))
        if begin < end:
            raise OverlapError(
                f"cache_batch_idx[{min(b, other)}] and cache_batch_idx[{max(b, other)}] are both {row}, and new tokens "
                f"of both sequences would go to place {begin} there; give each that has new tokens a row of its own. "
                "Nothing was written."
            )
        ends[row] = begin + count, b


def _counts(tokens: torch.Tensor, starts: torch.Tensor | None, batch: int) -> list[int]:
    """How many each sequence has of tokens that are (batch, seq, ...) or packed."""
    if starts is None:
        return [tokens.shape[1]] * batch
    return [end - start for start, end in itertools.pairwise(checks.as_given(starts).tolist())]


# ---- as PyTorch sees it ----

_library = torch.library.Library("aiter", "FRAGMENT")
_library.define(
    "reshape_and_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slot_mapping, "
    "Tensor? k_scale=None, Tensor? v_scale=None) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "append_to_cache(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor cache_seqlens, "
    "Tensor? page_table, Tensor? starts_new, Tensor? query, Tensor? starts_q, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? rotary_positions, bool interleaved, bool query_moves, Tensor? k_scale=None, Tensor? v_scale=None) "
    "-> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("aiter::reshape_and_cache", lib=_library)
def _(*arguments):
    return None


@torch.library.register_fake("aiter::append_to_cache", lib=_library)
def _(key, value, key_cache, value_cache, cache_seqlens, page_table, starts_new, query, *rest):
    return key.new_empty((0,) if query is None else query.shape)


def _is_plain(key: torch.Tensor, value: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    """Whether a call may go straight to the kernel. What is no tensor is found by the checks."""
    for tensor in (key, value, key_cache, value_cache):
        if not isinstance(tensor, torch.Tensor):
            _check_tokens(key, value, key_cache, value_cache, 3, _BY_SLOTS)
    return (
        torch_state.is_plain(key, value, key_cache)
        and torch_state.is_plain(key, value, value_cache)
        and not torch_state.wants_gradient(key, value, key_cache, value_cache)
    )


def _refuse_gradient(names: _Names, *tensors: torch.Tensor) -> None:
    for name, tensor in zip(names, tensors, strict=False):
        if torch_state.wants_gradient(tensor):
            raise ValueError(f"writing into a cache takes no gradient, but {name} requires one: use torch.no_grad()")


# ---- checks ----


def _tokens_fit(key: object, value: object, key_cache: object, value_cache: object, rank: int) -> bool:
    """Whether there is no need for `_check_tokens`, of a call in one dtype: the same questions, asked cheaply."""
    if not (
        isinstance(key, torch.Tensor)
        and isinstance(value, torch.Tensor)
        and isinstance(key_cache, torch.Tensor)
        and isinstance(value_cache, torch.Tensor)
    ):
        return False
    new_key, new_value, keys, values = key.shape, value.shape, key_cache.shape, value_cache.shape
    return (
        len(new_key) == len(new_value) == rank
        and len(keys) == len(values) == 4
        and key.dtype in checks.DTYPE_NAMES
        and key.dtype == value.dtype == key_cache.dtype == value_cache.dtype
        and key.device == value.device == key_cache.device == value_cache.device
        and new_key[:-1] == new_value[:-1]
        and keys[:3] == values[:3]
        and keys[2:] == new_key[-2:]
        and values[3] == new_value[-1]
        and 0 < new_key[-1] <= DIM_MAX
        and 0 < new_value[-1] <= DIM_MAX
        and keys[1] > 0
    )


def _check_tokens(key: object, value: object, key_cache: object, value_cache: object, rank: int, names: _Names) -> None:
    key_name, value_name, key_cache_name, value_cache_name, *_ = names
    layout = "(tokens, heads_kv, head_dim)" if rank == 3 else "(batch, seq_new, heads_kv, head_dim)"
    key, value = checks.tensor(key_name, key, rank, layout), checks.tensor(value_name, value, rank, layout)
    checks.same_kind(**{key_name: key, value_name: value})
    checks.same_shape(value_name, value, key_name, key, but_last=True)
    for name, new, cache_name, cache in (
        (key_name, key, key_cache_name, key_cache),
        (value_name, value, value_cache_name, value_cache),
    ):
        cache = checks.tensor(cache_name, cache, 4, _CACHE)
        if cache.dtype != key.dtype and cache.dtype not in checks.FP8_NAMES:
            known = ", ".join(str(dtype) for dtype in (key.dtype, *checks.FP8_NAMES))
            raise TypeError(f"{cache_name} has dtype {cache.dtype}; it must be one of {known}")
        checks.same_device(cache_name, cache, key_name, key)
        if cache.shape[2:] != new.shape[-2:] or not 0 < new.shape[-1] <= DIM_MAX:
            raise ValueError(
                f"{cache_name} has shape {tuple(cache.shape)}; it must be {_CACHE} with the heads_kv and head_dim (up "
                f"to {DIM_MAX}) of {name}, which has shape {tuple(new.shape)}"
            )
        if cache.is_neg():
            raise ValueError(
                f"{cache_name} is lazily negated (resolve_neg() gives an ordinary tensor): not to be written"
            )
        if cache.shape[1] == 0:
            raise ValueError(f"{cache_name} has shape {tuple(cache.shape)}; a page must have room for a token")
    assert isinstance(key_cache, torch.Tensor) and isinstance(value_cache, torch.Tensor)
    checks.same_shape(value_cache_name, value_cache, key_cache_name, key_cache, but_last=True)
    if value_cache.dtype != key_cache.dtype:
        raise TypeError(
            f"{value_cache_name} has dtype {value_cache.dtype}; it must be that of {key_cache_name}, {key_cache.dtype}"
        )


def _scale_strides(
    cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    batch: int,
    heads: int,
    names: _Names,
) -> tuple[int, ...]:
    for name, scale in ((names.k_scale, k_scale), (names.v_scale, v_scale)):
        if scale is not None:
            checks.per_kv_head(name, scale, cache, batch, heads)
    return (*strides_per_kv_head(k_scale), *strides_per_kv_head(v_scale))


def _check_rotary(query: torch.Tensor | None, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    for name, tensor in (("rotary_cos", cos), ("rotary_sin", sin)):
        checks.tensor(name, tensor, 2, "(places, rotary_dim / 2)")
        checks.same_device(name, tensor, "k", key)
        if tensor.dtype != key.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be that of k, {key.dtype}")
    checks.same_shape("rotary_sin", sin, "rotary_cos", cos)
    if not 0 < 2 * cos.shape[1] <= key.shape[-1]:
        raise ValueError(
            f"rotary_cos has shape {tuple(cos.shape)}; it must be (places, rotary_dim / 2), with rotary_dim from 2 to "
            f"head_dim, {key.shape[-1]}"
        )
    if query is not None:
        checks.same_kind(k=key, q=query)
        checks.equal_size("q", query.shape[-1], "head_dim", "k", key.shape[-1])


# ---- to the kernel ----


@untraced
def _reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    if not _tokens_fit(key, value, key_cache, value_cache, 3):
        _check_tokens(key, value, key_cache, value_cache, 3, _BY_SLOTS)
    checks.overlap("key_cache", key_cache)
    checks.overlap("value_cache", value_cache)
    slots = checks.tensor("slot_mapping", slot_mapping, 1, "int32 or int64 (n,)")
    if slots.dtype not in checks.INDEX_DTYPES:
        raise TypeError(f"slot_mapping has dtype {slots.dtype}; it must be torch.int32 or torch.int64")
    checks.same_device("slot_mapping", slots, "key", key)
    count = slots.shape[0]
    if count > key.shape[0]:
        raise ValueError(f"slot_mapping has {count} slots; key has {key.shape[0]} tokens, and needs as many or more")
    slots = slots.contiguous()
    pages, page_size, heads, _ = key_cache.shape
    scales = _scale_strides(key_cache, k_scale, v_scale, 1, heads, _BY_SLOTS)
    if 0 in (count, heads, pages):
        return
    refused = _launch(
        key,
        key_cache,
        *(1, 0, heads, 0, count, key.shape[2], value.shape[2], page_size, 0, 0, 0, 0, 0, slots.dtype is torch.int64),
        *(pages, 0, 0, 0, *_NONE, *_NONE, 0, *key.stride(), 0, *value.stride()),
        *(*key_cache.stride(), *value_cache.stride(), 0, 0, *scales),
        *(0, 0, _address("key", key), _address("value", value), _address("key_cache", key_cache)),
        *(_address("value_cache", value_cache), _address("slot_mapping", slots), 0, 0, 0, 0, 0, 0, 0),
        *(_address("k_scale", k_scale), _address("v_scale", v_scale)),
    )
    if refused:
        raise ValueError(
            f"slot_mapping has a slot {int(slots.max())}; the cache has slots 0 to {pages * page_size - 1} "
            f"({pages} pages of {page_size}). Nothing was written."
        )
    _increment_version((key_cache, value_cache))  # autograd may have saved them


@repeats
@untraced
def _append(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor | None,
    starts_new: torch.Tensor | None,
    query: torch.Tensor | None,
    starts_q: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    rotary_positions: torch.Tensor | None,
    interleaved: bool,
    query_moves: bool,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Query rotated, or an empty tensor."""
    rank = 4 if starts_new is None else 3
    if not _tokens_fit(key, value, key_cache, value_cache, rank):
        _check_tokens(key, value, key_cache, value_cache, rank, _BY_LENGTHS)
    checks.overlap("k_cache", key_cache)
    checks.overlap("v_cache", value_cache)
    batch = cache_seqlens.shape[0]
    batch_of = "cache_seqlens", cache_seqlens, batch
    indices = {
        "cache_seqlens": (cache_seqlens, (batch,)),
        "block_table": (page_table, (batch, None)),
        "cu_seqlens_k_new": (starts_new, (batch + 1,)),
        "cu_seqlens_q": (starts_q, (batch + 1,)),
        "rotary_seqlens": (rotary_positions, (batch,)),
    }
    readable: dict[str, torch.Tensor | None] = {}
    for name, (index, shape) in indices.items():
        if index is not None:
            checks.indices(name, index, shape, f"int32 {shape}", key, "k", batch_of)
        readable[name] = None if index is None else readable_index(index)
    seqlens, table, first_new, first_q, positions = readable.values()
    if starts_new is None:
        checks.equal_size("k", key.shape[0], "batch size", "cache_seqlens", batch)
    pages, page_size, heads, _ = key_cache.shape
    scales = _scale_strides(key_cache, k_scale, v_scale, batch, heads, _BY_LENGTHS)
    if table is None and pages < batch:
        shape = tuple(key_cache.shape)
        raise ValueError(
            f"k_cache has shape {shape}; without a block_table it needs a row for each of {batch} sequences"
        )
    angles, cos_strides = (0, 0), (0, 0)
    if rotary_cos is not None and rotary_sin is not None:
        _check_rotary(query, key, rotary_cos, rotary_sin)
        rotary_cos, rotary_sin = (t if t.stride(1) == 1 else t.contiguous() for t in (rotary_cos, rotary_sin))
        angles, cos_strides = (
            (2 * rotary_cos.shape[1], rotary_cos.shape[0]),
            (rotary_cos.stride(0), rotary_sin.stride(0)),
        )
    if query is None:
        rotated, heads_q, seqlen_q, total_q = key.new_empty(0), 0, 0, 0
        query_strides = rotated_strides = _NONE
    else:
        rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if plan.noted.launches is not None:
            plan.noted.launches.append(plan.Between(rotated))
        heads_q, seqlen_q = query.shape[-2], 0 if first_q is not None else query.shape[1]
        total_q = 0 if first_q is None else query.shape[0]
        query_strides, rotated_strides = _four(query), _four(rotated)
    seqlen_new, total_new = (key.shape[1], 0) if first_new is None else (0, key.shape[0])
    if not (batch and pages and (key.numel() + rotated.numel())):
        return rotated
    refused = _launch(
        key,
        key_cache,
        *(batch, heads_q, heads, seqlen_q, seqlen_new, key.shape[-1], value.shape[-1], page_size),
        *(0 if table is None else table.shape[1], *angles, interleaved, query_moves, 0),
        *(pages, 0 if table is None else table.stride(0), total_q, total_new, *query_strides, *rotated_strides),
        *(*_four(key), *_four(value), *key_cache.stride(), *value_cache.stride(), *cos_strides, *scales),
        *(_address("q", query), rotated.data_ptr() if query is not None else 0, _address("k", key)),
        *(_address("v", value), _address("k_cache", key_cache), _address("v_cache", value_cache), 0),
        *(_address("cache_seqlens", seqlens), _address("block_table", table), _address("cu_seqlens_q", first_q)),
        *(_address("cu_seqlens_k_new", first_new), _address("rotary_cos", rotary_cos)),
        *(_address("rotary_sin", rotary_sin), _address("rotary_seqlens", positions)),
        *(_address("k_descale", k_scale), _address("v_descale", v_scale)),
    )
    if refused:
        rotary = None
        if rotary_cos is not None and rotary_sin is not None:
            rotary = Rotary(rotary_cos, rotary_sin, rotary_positions, interleaved, query_moves)
        new = New(key, key_cache, cache_seqlens, page_table, starts_new, rotary, query, starts_q)
        raise misfit(_TABLE, new) or ValueError(
            "a length or page number changed to one out of range while it was in use. Nothing was written."
        )
    _increment_version((key_cache, value_cache))
    return rotated


for _device in ("CPU", "CUDA"):
    _library.impl("reshape_and_cache", _reshape_and_cache, _device)
    _library.impl("append_to_cache", _append, _device)

_NONE: tuple[int, ...] = (0, 0, 0, 0)
_address = checks.address


def _four(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of batch, token, head, element."""
    return tensor.stride() if tensor.dim() == 4 else (0, *tensor.stride())


def _launch(like: torch.Tensor, cache: torch.Tensor, *fields: int) -> int:
    """0, or BAD_VALUES."""
    options = () if cache.dtype is like.dtype else (checks.FP8_NAMES[cache.dtype],)
    key: plan.Key = ("cache_write", like.get_device(), like.dtype, ANY_HEAD_DIM, ANY_HEAD_DIM, False, False, options)
    found = plans.get(key)
    if found is None:
        found = plans[key] = plan.Plan(key, like.device)
    return found.run(pack_cache_write(*fields))
