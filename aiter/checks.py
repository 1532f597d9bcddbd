"""Checks of arguments, made before anything is compiled or launched.

Every error names the argument, says what it was and what it must be. Nothing here reads values that live on a GPU,
unless AITER_CHECK_VALUES=1 asks for it: a call must not synchronise.
"""

from __future__ import annotations

import itertools
from math import inf
from numbers import Integral, Real
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeGuard

import torch

from aiter.errors import LengthError
from aiter.kernels import CACHE_DTYPES, HEAD_DIM_MAX, HEAD_DIM_STEP, LATENT_HEAD_DIM

if TYPE_CHECKING:
    from aiter.layout import Indices, Sizes
    from aiter.options import Options

VALUE_DIMS = frozenset(range(HEAD_DIM_STEP, HEAD_DIM_MAX + 1, HEAD_DIM_STEP))
HEAD_DIMS = VALUE_DIMS | {LATENT_HEAD_DIM}
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
FLOAT32_MAX = torch.finfo(torch.float32).max
DTYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# 8-bit floats that keys and values may be kept in, by their names in specs.
FP8_NAMES = {getattr(torch, f"float8_{name}"): name for name in CACHE_DTYPES}
INDEX_DTYPES = frozenset((torch.int32, torch.int64))

# What says how many sequences a call has: its name, itself, and how many those are.
BatchOf: TypeAlias = tuple[str, torch.Tensor, int]

# Layouts, for messages.
BSHD = "(batch, seq, heads, head_dim)"
PACKED = "(total_tokens, heads, head_dim)"
CACHE = "(num_blocks, heads_kv, block_size, head_dim)"


def tensor(name: str, value: object, ndim: int | tuple[int, ...], layout: str) -> torch.Tensor:
    """Returns `value` if it is a strided tensor of one of the ranks that `layout` describes."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor {layout}, not {type(value).__name__}")
    if value.layout != torch.strided or value.is_nested:
        given = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, not {given}")
    ranks = (ndim,) if isinstance(ndim, int) else ndim
    if value.dim() not in ranks:
        raise ValueError(f"{name} must be {layout}, but has {value.dim()} dimensions: {tuple(value.shape)}")
    return value


# A tensor whose storage was freed has as its address what it is further on in there. Few others lie so low, so that to
# ask them costs nearly nothing.
LOW_ADDRESSES = 2**40


def has_memory(tensor: torch.Tensor) -> bool:
    """Whether there is any behind its elements; not after `untyped_storage().resize_(0)`."""
    return tensor.data_ptr() != tensor.storage_offset() * tensor.element_size() or tensor.numel() == 0


def address(name: str, value: torch.Tensor | None) -> int:
    """Where a tensor lies, 0 where there is none. Refuses one whose memory was freed: whoever touched it would end the
    process."""
    if value is None:
        return 0
    found = value.data_ptr()
    if found < LOW_ADDRESSES and not has_memory(value):
        raise ValueError(f"{name} has shape {tuple(value.shape)} but no memory: {_GIVE_IT}")
    return found


_GIVE_IT = "its storage has 0 bytes (resize_(0)); give it memory before the call"


def is_freed(value: object, depth: int = 0) -> bool:
    """Whether it is, or has in it, a tensor without memory. A list may have itself in it: no argument is so deep."""
    if isinstance(value, (tuple, list)):
        return depth < 3 and any(is_freed(part, depth + 1) for part in value)
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, torch.nn.Parameter):
        return False  # subclasses mean something of their own
    if not (value.is_cpu or value.is_cuda) or torch._C._functorch.peek_interpreter_stack() is not None:
        return False  # the wrappers of transforms have no address, or 0
    try:
        return value.data_ptr() < LOW_ADDRESSES and not has_memory(value)
    except (RuntimeError, NotImplementedError):  # in a transform, nested, sparse: it has no address
        return False


def memory(**values: object) -> None:
    """Refuses tensors whose memory was freed, before anybody reads them; not while a compiler traces."""
    if torch.compiler.is_compiling():
        return
    for name, value in values.items():
        if is_freed(value):
            raise ValueError(f"{name} has no memory: {_GIVE_IT}")


def overlap(name: str, value: torch.Tensor) -> None:
    """Refuses what is to be written and has several elements in one place of memory."""
    if value.is_contiguous():
        return
    covered = 0  # elements from the first on, by the dimensions with smaller strides
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride <= covered:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)} and strides {value.stride()}: several of its elements are the "
                "same memory"
            )
        covered += (size - 1) * stride


def same_kind(**tensors: torch.Tensor) -> None:
    """Checks that all tensors share a floating dtype that attention takes, and a device that it runs on."""
    (first_name, first), *others = tensors.items()
    if first.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype) for dtype in DTYPE_NAMES)
        raise TypeError(f"{first_name} has dtype {first.dtype}; it must be one of {known}")
    if first.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{first_name} is on device {first.device}; it must be on the CPU or on a GPU ('cuda')")
    for name, other in others:
        if other.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {other.dtype}; it must be that of {first_name}, {first.dtype}")
        same_device(name, other, first_name, first)


def attention_kind(**tensors: torch.Tensor) -> None:
    """`same_kind` of query, key and value; key and value may both be 8-bit floats instead."""
    (query_name, query), (key_name, key), (value_name, value) = tensors.items()
    if key.dtype not in FP8_NAMES:
        return same_kind(**tensors)
    same_kind(**{query_name: query})
    if value.dtype != key.dtype:
        raise TypeError(f"{value_name} has dtype {value.dtype}; it must be that of {key_name}, {key.dtype}")
    same_device(key_name, key, query_name, query)
    same_device(value_name, value, query_name, query)


def same_device(name: str, value: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    if value.device != first.device:
        raise ValueError(f"{name} is on device {value.device}; it must be where {first_name} is, on {first.device}")


def same_shape(name: str, value: torch.Tensor, first_name: str, first: torch.Tensor, *, but_last: bool = False) -> None:
    got, expected = (tensor.shape[:-1] if but_last else tensor.shape for tensor in (value, first))
    if got != expected:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}; it must be that of {first_name}, {tuple(first.shape)}"
            + (", but for head_dim" if but_last else "")
        )


def equal_size(name: str, size: int, meaning: str, expected_name: str, expected: int) -> None:
    if size != expected:
        raise ValueError(f"{name} has {meaning} {size}; it must be that of {expected_name}, {expected}")


def head_dim(tensor: torch.Tensor, name: str = "query", *, latent: bool = True) -> int:
    """latent: of queries and keys, which may have one more."""
    size = tensor.shape[-1]
    if not (latent and size == LATENT_HEAD_DIM) and (size % HEAD_DIM_STEP or not 0 < size <= HEAD_DIM_MAX):
        raise ValueError(
            f"{name} has head_dim {size} (its last dimension); it must be a multiple of {HEAD_DIM_STEP} from "
            f"{HEAD_DIM_STEP} to {HEAD_DIM_MAX}" + (f", or {LATENT_HEAD_DIM} (latent attention)" if latent else "")
        )
    return size


def output(out: object, query: torch.Tensor, value: torch.Tensor, names: Names) -> torch.Tensor:
    """Returns `out` if the output of a call can go there."""
    out = tensor("out", out, query.dim(), f"of the shape of {names.query}, with {names.value}'s head_dim")
    if out.shape[:-1] != query.shape[:-1] or out.shape[-1] != value.shape[-1]:
        raise ValueError(f"out has shape {tuple(out.shape)}; it must be {(*query.shape[:-1], value.shape[-1])}")
    if out.dtype != query.dtype:
        raise TypeError(f"out has dtype {out.dtype}; it must be that of {names.query}, {query.dtype}")
    same_device("out", out, names.query, query)
    if torch.is_grad_enabled() and out.requires_grad:
        raise ValueError("out requires a gradient, which nothing that is written into it can have")
    overlap("out", out)
    return out


def not_in_place(out: torch.Tensor, key: torch.Tensor, value: torch.Tensor, names: Names) -> None:
    """Refuses an output that is the keys or the values, which are read until the last row is written."""
    for name, other in ((names.key, key), (names.value, value)):
        if out.data_ptr() == other.data_ptr() and out.numel() > 0 and other.numel() > 0:
            raise ValueError(f"out begins where {name} does; it may be {names.query}, or memory of its own")


def heads(heads_q: int, heads_kv: int, key_name: str = "key", query_name: str = "query") -> None:
    if heads_q == 0 and heads_kv == 0:
        return
    if heads_kv == 0 or heads_q % heads_kv:
        raise ValueError(
            f"{query_name} has {heads_q} heads and {key_name} {heads_kv}; the heads of {query_name} must be a multiple "
            f"of those of {key_name}"
        )


def sizes(**named: int) -> None:
    for name, size in named.items():
        if size > INT32_MAX:
            raise ValueError(f"{name} is {size}; at most {INT32_MAX} is supported")


def is_int(value: object) -> TypeGuard[int]:
    """Whether `value` is an integer: Python's, a compiler's symbol of one, or one of another library (NumPy)."""
    return isinstance(value, (int, torch.SymInt, Integral)) and not isinstance(value, bool)


def positive_int(name: str, value: object) -> int:
    if not is_int(value):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if value <= 0:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return value


def bound(name: str, value: object) -> int:
    """What lengths are bounded by."""
    if not is_int(value):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    if not 0 <= value <= INT32_MAX:
        raise ValueError(f"{name} is {value}; it must be from 0 to {INT32_MAX}")
    return value


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def finite(name: str, value: object, kind: str) -> float:
    """A number that float32, which kernels compute in, can hold."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {kind}, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # of an int
        number = inf
    if not abs(number) <= FLOAT32_MAX:
        raise ValueError(f"{name} is {number}; it must be a finite number of float32, up to {FLOAT32_MAX:.4g}")
    return number


def softmax_scale(value: object, size: int) -> float:
    """The scale to use: `value`, or 1/sqrt(head_dim) when it is None."""
    if value is None:
        return (int(size) if torch.jit.is_tracing() else size) ** -0.5  # sizes are tensors while torch.jit traces
    if torch.compiler.is_compiling() and isinstance(value, float):
        return value  # perhaps a symbol, that no question may be asked of; the operator looks at its value
    return finite("softmax_scale", value, "a float or None")


def per_kv_head(
    name: str,
    scale: object,
    scaled: torch.Tensor,
    batch: int | None,
    heads_kv: int | None,
    scaled_name: str = "the cache",
) -> torch.Tensor:
    """Returns `scale` if it can be what 8-bit floats, of a cache mostly, are to be multiplied by, or were divided by.
    Sizes that are None are not known."""
    layout = "float32 (1,), (heads_kv,) or (batch, heads_kv)"
    scale = tensor(name, scale, (0, 1, 2), layout)
    if scaled.dtype not in FP8_NAMES:
        raise ValueError(
            f"{name} is given, but {scaled_name} has dtype {scaled.dtype}, which is not scaled: leave it out"
        )
    same_device(name, scale, scaled_name, scaled)
    if scale.dtype != torch.float32:
        raise TypeError(f"{name} has dtype {scale.dtype}; it must be torch.float32")
    if torch.is_grad_enabled() and scale.requires_grad:
        raise ValueError(f"{name} takes no gradient: detach it, or use torch.no_grad()")
    for got, expected in zip(reversed(scale.shape), (heads_kv, batch), strict=False):
        if scale.numel() != 1 and expected is not None and got != expected:
            raise ValueError(
                f"{name} has shape {tuple(scale.shape)}; it must be {layout}: there are {heads_kv} heads"
                + ("" if batch is None else f", the batch size is {batch}")
            )
    return scale


def indices(
    name: str,
    value: object,
    shape: tuple[int | None, ...],
    layout: str,
    first: torch.Tensor,
    first_name: str = "the query",
    batch_of: BatchOf | None = None,
) -> None:
    """Checks an int32 or int64 tensor of lengths or page numbers on the device of the query. batch_of: what the first
    size of `shape` follows from."""
    value = tensor(name, value, len(shape), layout)
    if value.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; it must be torch.int32 (or torch.int64)")
    for got, expected in zip(value.shape, shape, strict=True):
        if expected is None or got == expected:
            continue
        if batch_of is None:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it must be {layout}: the batch size is {expected}"
            )
        # Either of the two may be the wrong one.
        other_name, other, batch = batch_of
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, of {_sequences(got - (expected - batch))}, but {other_name} has "
            f"shape {tuple(other.shape)}, of {_sequences(batch)}: both must be of one batch, {name} as {layout}"
        )
    same_device(name, value, first_name, first)


def _sequences(count: int) -> str:
    return "1 sequence" if count == 1 else f"{max(count, 0)} sequences"


def remember_given(index: torch.Tensor, given: torch.Tensor) -> None:
    """`index` was made of `given`, whose numbers messages show where int32 cannot hold them."""
    index._aiter_given = given  # type: ignore[attr-defined]


def as_given(index: torch.Tensor) -> torch.Tensor:
    return getattr(index, "_aiter_given", index)


class Names(NamedTuple):
    """What messages call things."""

    seqlens_q: str = "seqlens_q"
    seqlens_k: str = "seqlens_k"
    longest_q: str = "the longest that the query has room for"
    longest_k: str = "the longest that the key has room for"
    fill: bool = False  # the lengths of packed queries must add up to the rows there are
    starts_q: str = "starts_q"
    starts_k: str = "starts_k"
    page_table: str = "page_table"
    page_entry: str = "{table}[{row}, {column}]"  # of page_table, as the caller would write it
    pages: str = "pages"  # what its entries are numbers of
    query: str = "query"
    key: str = "key"
    value: str = "value"


def values(sizes: Sizes, indices: Indices, options: Options, names: Names) -> None:
    """Raises ValueError for the first length or page number that is out of range. Waits for a GPU."""
    seqlens_q, seqlens_k, page_table, starts_q, starts_k, page_indptr, last_page_len = indices
    if seqlens_q is not None:
        total = sizes.total_q if sizes.packed_q and starts_q is None else None
        _lengths(names.seqlens_q, seqlens_q, sizes.seqlen_q, names.longest_q, total, names.fill)
    if seqlens_k is not None:
        total = sizes.total_k if sizes.packed_k and starts_k is None else None
        name = names.seqlens_q if seqlens_k is seqlens_q else names.seqlens_k
        _lengths(name, seqlens_k, sizes.seqlen_k, names.longest_k, total)
    for name, starts, used, used_name, longest, total in (
        (names.starts_q, starts_q, seqlens_q, names.seqlens_q, sizes.seqlen_q, sizes.total_q),
        (names.starts_k, starts_k, seqlens_k, names.seqlens_k, sizes.seqlen_k, sizes.total_k),
    ):
        if starts is not None:
            broken = broken_start(name, starts, total, longest if used is None else total)
            if broken is not None:
                raise ValueError(broken)
            if used is not None:  # how many of the rows between two starts count
                _rows_between(name, starts, used_name, used)
    if page_table is not None and page_indptr is not None:
        page_table, seqlens_k = _lists(page_table, page_indptr, last_page_len, seqlens_k, sizes, names.seqlens_k)
        indices = indices._replace(page_table=page_table, seqlens_k=seqlens_k)
    if page_table is not None:
        first_seen = _first_keys_seen(sizes, indices, options)
        pages(names, page_table, sizes.num_pages, sizes.page_size, seqlens_k, sizes.seqlen_k, first_seen, page_indptr)


def no_length(name: str, index: int, length: int, longest_name: str, longest: int) -> LengthError:
    return LengthError(f"{name}[{index}] is {length}; it must be from 0 to {longest_name}, {longest}")


def _lengths(
    name: str, lengths: torch.Tensor, longest: int, longest_name: str, total: int | None, fill: bool = False
) -> None:
    numbers = as_given(lengths).tolist()
    for index, length in enumerate(numbers):
        if not 0 <= length <= longest:
            raise no_length(name, index, length, longest_name, longest)
    if total is not None and (sum(numbers) != total if fill else sum(numbers) > total):
        raise ValueError(f"{name} adds up to {sum(numbers)} tokens, but the packed tensor holds {total}")


def broken_start(name: str, starts: torch.Tensor, total: int, longest: int | None = None) -> str | None:
    """What is wrong with where packed sequences begin, if anything is."""
    for index, (start, end) in enumerate(itertools.pairwise(as_given(starts).tolist())):
        if not (0 <= start <= end <= total and (longest is None or end - start <= longest)):
            return (
                f"{name}[{index}] is {start} and the next {end}; they must rise from 0 to the {total} rows there are"
                + ("" if longest is None else f", by at most {longest}")
            )
    return None


def _rows_between(name: str, starts: torch.Tensor, lengths_name: str, lengths: torch.Tensor) -> None:
    for index, (length, rows) in enumerate(zip(as_given(lengths).tolist(), starts.diff().tolist(), strict=True)):
        if length > rows:
            raise ValueError(f"{lengths_name}[{index}] is {length}, but {name} gives that sequence {rows} rows")


def _lists(
    page_indices: torch.Tensor,
    indptr: torch.Tensor,
    last_page_len: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sizes: Sizes,
    lengths_name: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of pages as a page table (batch, max_pages) and how many tokens each sequence has."""
    listed, page_size = page_indices.shape[0], sizes.page_size
    starts = as_given(indptr).tolist()
    for index, (start, end) in enumerate(itertools.pairwise(starts)):
        if not 0 <= start <= end <= listed:
            raise ValueError(
                f"page_indptr[{index}] is {start} and the next {end}; they must rise from 0 to the {listed} entries of "
                "page_indices"
            )
    counts = indptr.diff().long()
    last = torch.full_like(counts, page_size) if last_page_len is None else last_page_len.long()
    for index in ((counts > 0) & ((last < 0) | (last > page_size))).nonzero().flatten().tolist():
        given = last if last_page_len is None else as_given(last_page_len)
        raise ValueError(f"last_page_len[{index}] is {int(given[index])}; it must be from 0 to a page's {page_size}")
    tokens = torch.where(counts > 0, (counts - 1) * page_size + last, 0)
    for index in (tokens > sizes.seqlen_k).nonzero().flatten().tolist():
        raise ValueError(
            f"the pages of sequence {index} hold {int(tokens[index])} tokens, more than max_seqlen_k, {sizes.seqlen_k}"
        )
    if lengths is not None:
        for index in (lengths > tokens).nonzero().flatten().tolist():
            length = int(as_given(lengths)[index])
            raise ValueError(f"{lengths_name}[{index}] is {length}, but its list of pages holds {int(tokens[index])}")
        tokens = lengths.long()
    columns = torch.arange(max(1, int(counts.max())) if len(counts) else 1, device=indptr.device)
    if listed == 0:
        return page_indices.new_zeros((len(counts), 1)), tokens
    return page_indices[(indptr[:-1].unsqueeze(1) + columns).clamp(max=listed - 1)], tokens


def _first_keys_seen(sizes: Sizes, indices: Indices, options: Options) -> torch.Tensor | None:
    """The first key of each sequence that a row sees, past the last one where there is no row; None: all are seen."""
    seqlens_q, seqlens_k, page_table, starts_q, *_ = indices
    chunk, limited = options.attention_chunk, options.window_left >= 0 or options.attention_chunk > 0
    if page_table is None or not (limited or seqlens_q is not None or starts_q is not None):
        return None
    rows = page_table.new_full((sizes.batch,), sizes.seqlen_q) if starts_q is None else starts_q.diff()
    if seqlens_q is not None:
        rows = torch.minimum(rows, seqlens_q)
    first = torch.zeros_like(rows)
    if limited:
        places = options.query_offsets
        if places is None:
            places = (sizes.seqlen_k if seqlens_k is None else seqlens_k) - rows
        places = places.long()
        if options.window_left >= 0:
            first = (places - options.window_left).clamp(0, sizes.seqlen_k)
        if chunk:
            first = torch.maximum(first, (places - places % chunk).clamp(0, sizes.seqlen_k))
    return torch.where(rows > 0, first, sizes.seqlen_k)


def pages(
    names: Names,
    page_table: torch.Tensor,
    num_pages: int,
    page_size: int,
    lengths: torch.Tensor | None,
    seqlen_k: int,
    first_seen: torch.Tensor | None,
    indptr: torch.Tensor | None = None,
) -> None:
    """The page numbers that the valid tokens need, from the first that a window lets a row see; what stands before and
    past them may be anything."""
    wrong = (page_table < 0) | (page_table >= num_pages)
    if first_seen is not None:
        ends = (torch.arange(page_table.shape[1], device=page_table.device) + 1) * page_size
        wrong &= (ends > first_seen.unsqueeze(1)) & (first_seen < (seqlen_k if lengths is None else lengths)).unsqueeze(
            1
        )
    if lengths is not None:
        needed = (lengths.clamp(max=seqlen_k) + (page_size - 1)) // page_size
        wrong &= torch.arange(page_table.shape[1], device=page_table.device) < needed.unsqueeze(1)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        if indptr is None:
            raise no_page(names, page_table, row, column, num_pages)
        entry = f"page_indices[{int(indptr[row]) + column}]"
        raise no_such(entry, int(page_table[row, column]), "the cache", names.pages, num_pages)


def no_page(names: Names, page_table: torch.Tensor, row: int, column: int, num_pages: int) -> ValueError:
    """For an entry of a page table that is out of range."""
    entry = names.page_entry.format(table=names.page_table, row=row, column=column)
    return no_such(entry, int(as_given(page_table)[row, column]), "the cache", names.pages, num_pages)


def no_such(entry: str, number: int, whole: str, parts: str, count: int) -> ValueError:
    return ValueError(f"{entry} is {number}; {whole} has " + (f"{parts} 0 to {count - 1}" if count else f"no {parts}"))
