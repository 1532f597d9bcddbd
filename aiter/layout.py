"""How the tensors of a call lie: the sizes and strides that a kernel is told, and the rules that they must keep.

All operations have one common form. query is (batch, seqlen_q, heads_q, head_dim), or packed (total_q, heads_q,
head_dim); key and value are (batch, seqlen_k, heads_kv, head_dim), packed (total_k, heads_kv, head_dim), or, with a
page table or lists of pages, (pages, heads_kv, page_size, head_dim). The last dimension of value, and so of the output,
may be another.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch

from aiter import checks, reader
from aiter.options import readable_index


class Indices(NamedTuple):
    """The int32 tensors, on the device of the query, that say which rows are valid and where they lie; None where a
    call has none. The launch ABI (kernels_src/include/aiter_abi.h) describes each. page_table is (batch, max_pages) or,
    with page_indptr, one flat list."""

    seqlens_q: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    starts_q: torch.Tensor | None = None
    starts_k: torch.Tensor | None = None
    page_indptr: torch.Tensor | None = None
    last_page_len: torch.Tensor | None = None


NO_INDICES = Indices()


class Sizes(NamedTuple):
    """The first fields of the problem struct."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    packed_q: int
    packed_k: int
    page_size: int
    total_q: int
    total_k: int
    num_pages: int
    page_table_stride: int
    listed_pages: int


# Bound once, as they are used at every call.
_is_compiling, _Tensor, _int32, _strided = torch.compiler.is_compiling, torch.Tensor, torch.int32, torch.strided
_new = tuple.__new__  # a third of the time that a NamedTuple's own takes


def sizes_of(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> Sizes | None:
    """The sizes of a call, or None where a rule is broken: `check_common` says which. Index tensors are checked for
    their shapes alone.

    max_seqlen_q and max_seqlen_k bound the lengths of packed sequences, the latter those in lists of pages too, where 0
    is no bound.
    """
    in_c = reader.sizes_of
    sizes = in_c and in_c(query, key, value, indices, max_seqlen_q, max_seqlen_k)
    if sizes is None:
        sizes = read_sizes(query, key, value, indices, max_seqlen_q, max_seqlen_k)
    return None if sizes is None else _new(Sizes, sizes)


def read_sizes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    indices: Indices,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[int, ...] | None:
    """`sizes_of` in Python."""
    if query.is_nested or key.is_nested or value.is_nested:
        return None
    query_shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if len(query_shape) < 3 or len(key_shape) < 3:
        return None
    dtype, kept_dtype, head_dim = query.dtype, key.dtype, query_shape[-1]
    if not (
        (kept_dtype is dtype or kept_dtype in checks.FP8_NAMES)
        and value.dtype is kept_dtype
        and (query.is_cpu or query.get_device() == key.get_device() == value.get_device())
        and query.is_cpu is key.is_cpu is value.is_cpu
        and dtype in checks.DTYPE_NAMES
        and (key_shape == value_shape or key_shape[:-1] == value_shape[:-1])
        and key_shape[-1] == head_dim
        and head_dim in checks.HEAD_DIMS
        and value_shape[-1] in checks.VALUE_DIMS
    ):
        return None
    if indices is NO_INDICES:
        if len(query_shape) != 4 or len(key_shape) != 4:
            return None
        batch, seqlen_q, heads_q, _ = query_shape
        batch_k, seqlen_k, heads_kv, _ = key_shape
        if batch_k != batch or (heads_q % heads_kv if heads_kv else heads_q):
            return None
        return batch, heads_q, heads_kv, seqlen_q, seqlen_k, 0, 0, 0, 0, 0, 0, 0, 0

    seqlens_q, seqlens_k, page_table, starts_q, starts_k, page_indptr, last_page_len = indices
    heads_q, total_q, total_k, num_pages, page_size, table_stride, listed = query_shape[-2], 0, 0, 0, 0, 0, 0
    packed_q, packed_k = len(query_shape) == 3, len(key_shape) == 3
    if packed_q:
        if starts_q is not None:
            batch = starts_q.shape[0] - 1
        elif seqlens_q is not None:
            batch = seqlens_q.shape[0]
        else:
            return None
        total_q, seqlen_q = query_shape[0], max_seqlen_q
    elif len(query_shape) == 4:
        batch, seqlen_q = query_shape[0], query_shape[1]
    else:
        return None
    if page_table is not None:
        if len(key_shape) != 4:
            return None
        num_pages, heads_kv, page_size, _ = key_shape
        if page_indptr is not None:
            if page_table.dim() != 1 or page_indptr.shape != (batch + 1,):
                return None
            listed = page_table.shape[0]
            seqlen_k = min(listed * page_size, max_seqlen_k or checks.INT32_MAX, checks.INT32_MAX)
        elif page_table.dim() != 2 or page_table.shape[0] != batch:
            return None
        else:
            seqlen_k, table_stride = page_table.shape[1] * page_size, page_table.stride(0)
    elif packed_k:
        if seqlens_k is None and starts_k is None:
            return None
        total_k, heads_kv, seqlen_k = key_shape[0], key_shape[1], max_seqlen_k
    else:
        if len(key_shape) != 4 or key_shape[0] != batch:
            return None
        seqlen_k, heads_kv = key_shape[1], key_shape[2]
    if (
        (heads_q % heads_kv if heads_kv else heads_q)
        or batch < 0
        or seqlen_q < 0
        or seqlen_k < 0
        or (seqlens_q is not None and seqlens_q.shape != (batch,))
        or (seqlens_k is not None and seqlens_k.shape != (batch,))
        or (starts_q is not None and (not packed_q or starts_q.shape != (batch + 1,)))
        or (starts_k is not None and (not packed_k or starts_k.shape != (batch + 1,)))
        or (page_indptr is not None and page_table is None)
        or (last_page_len is not None and (page_indptr is None or last_page_len.shape != (batch,)))
    ):
        return None
    sizes = (batch, heads_q, heads_kv, seqlen_q, seqlen_k, packed_q, packed_k, page_size, total_q, total_k, num_pages)
    return *sizes, table_stride, listed


def index_tensor(
    name: str,
    index: object,
    shape: tuple[int | None, ...],
    layout: str,
    query: torch.Tensor,
    batch_of: checks.BatchOf | None = None,
) -> torch.Tensor | None:
    """An index tensor that a caller has given, checked, and as kernels read it; None stays None. In `shape`, None is
    any length, as every one but the first is; `layout` says it in words, `batch_of` whose batch the first is of."""
    if index is None:
        return None
    # Dynamo cannot trace what is not Python, and fake tensors warn when they are read by C.
    in_c = None if _is_compiling() else reader.is_index
    if in_c and type(index) is type(query) is _Tensor and in_c(index, shape, query):
        return index
    if not (
        isinstance(index, torch.Tensor)
        and index.layout is _strided
        and index.dtype is _int32
        and index.dim() == len(shape)
        and (shape[0] is None or index.shape[0] == shape[0])
        and index.is_cpu == query.is_cpu
        and index.get_device() == query.get_device()
    ):
        checks.indices(name, index, shape, layout, query, batch_of=batch_of)
        assert isinstance(index, torch.Tensor)
    return index if index.dtype is _int32 and index.is_contiguous() else readable_index(index)


def page_lists(
    page_indptr: torch.Tensor | None,
    page_indices: torch.Tensor | None,
    last_page_len: torch.Tensor | None,
    batch_of: checks.BatchOf,
    query: torch.Tensor,
    page_table: torch.Tensor | None,
    table_name: str = "page_table",
) -> dict[str, torch.Tensor | None]:
    """The fields of Indices that say where pages lie, of a call that has lists of them."""
    if page_table is not None:
        raise ValueError(f"{table_name} and page_indptr are two ways to name pages; give one of them")
    if page_indptr is None or page_indices is None:
        raise TypeError(
            f"pages are named by {table_name}, int32 (batch, max_blocks), or by page_indptr, int32 (batch + 1,), and "
            "page_indices, a flat int32 list"
        )
    batch = batch_of[2]
    indptr = index_tensor("page_indptr", page_indptr, (batch + 1,), "int32 (batch + 1,)", query, batch_of)
    return {
        "page_table": index_tensor("page_indices", page_indices, (None,), "int32 (listed pages,)", query),
        "page_indptr": indptr,
        "last_page_len": index_tensor("last_page_len", last_page_len, (batch,), "int32 (batch,)", query, batch_of),
    }


def check_tensors(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, names: checks.Names, paged: bool = False
) -> None:
    """Raises for tensors that go together in no call."""
    query_name, key_name, value_name = names[-3:]
    layout = f"{checks.BSHD}, or packed {checks.PACKED}"
    checks.tensor(query_name, query, (3, 4), layout)
    for name, tensor in ((key_name, key), (value_name, value)):
        checks.tensor(name, tensor, 4 if paged else (3, 4), checks.CACHE if paged else layout)
    checks.attention_kind(**{query_name: query, key_name: key, value_name: value})
    checks.equal_size(key_name, key.shape[-1], "head_dim", query_name, checks.head_dim(query, query_name))
    checks.head_dim(value, value_name, latent=False)
    checks.same_shape(value_name, value, key_name, key, but_last=True)


def check_common(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, indices: Indices, names: checks.Names
) -> NoReturn:
    """Raises for a call that `sizes_of` refuses; says which rule it breaks."""
    packed_q, packed_k, paged = query.dim() == 3, key.dim() == 3, indices.page_table is not None
    check_tensors(query, key, value, names, paged)
    query_name, key_name, _ = names[-3:]
    for name, packed, lengths, starts, called in (
        (query_name, packed_q, indices.seqlens_q, indices.starts_q, names.seqlens_q),
        (key_name, packed_k, indices.seqlens_k, indices.starts_k, names.seqlens_k),
    ):
        if packed and lengths is None and starts is None:
            raise ValueError(f"{name} is packed {checks.PACKED}: its lengths, {called} int32 (batch,), must be given")
    batch_of: checks.BatchOf = query_name, query, query.shape[0]
    if packed_q and indices.starts_q is not None:
        batch_of = names.starts_q, indices.starts_q, indices.starts_q.numel() - 1
    elif packed_q and indices.seqlens_q is not None:
        batch_of = names.seqlens_q, indices.seqlens_q, indices.seqlens_q.numel()
    batch = batch_of[2]
    if not (paged or packed_k):
        checks.equal_size(key_name, key.shape[0], "batch size", query_name, batch)
    listed = indices.page_indptr is not None
    if (listed and not paged) or (indices.last_page_len is not None and not listed):
        raise ValueError("lists of pages are page_indptr and page_indices, and last_page_len only with them")
    shapes: dict[str, tuple[tuple[int | None, ...], str]] = {
        "seqlens_q": ((batch,), "int32 (batch,)"),
        "seqlens_k": ((batch,), "int32 (batch,)"),
        "page_table": ((None,), "int32 (listed pages,)") if listed else ((batch, None), "int32 (batch, max_blocks)"),
        "starts_q": ((batch + 1,), "int32 (batch + 1,)"),
        "starts_k": ((batch + 1,), "int32 (batch + 1,)"),
        "page_indptr": ((batch + 1,), "int32 (batch + 1,)"),
        "last_page_len": ((batch,), "int32 (batch,)"),
    }
    for name, index in indices._asdict().items():
        if index is not None:
            called = "page_indices" if listed and name == "page_table" else getattr(names, name, name)
            checks.indices(called, index, *shapes[name], query, query_name, batch_of)
    for name, starts, tensor_name, packed in (
        (names.starts_q, indices.starts_q, query_name, packed_q),
        (names.starts_k, indices.starts_k, key_name, packed_k),
    ):
        if starts is not None and not packed:
            raise ValueError(f"{name} is given, but {tensor_name} is not packed {checks.PACKED}")
    checks.heads(query.shape[-2], key.shape[1] if paged else key.shape[-2], key_name, query_name)
    raise ValueError(
        f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit together"
    )
