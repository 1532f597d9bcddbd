"""From a call's arguments to who does what.

    arguments ──> Request (what this rank was asked) ── kernels are built ──> agree ──> Work (who does what)

With all-to-all, rows are exchanged for heads within the last group of `groups`; what is left is rows that are split
over the first, which is one rank where there is no other group."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias

import torch
import torch.distributed as dist

from aiter import checks, library
from aiter.distributed import allgather, cost, ring
from aiter.distributed import layout as layouts
from aiter.distributed.agree import Changed, Known, ask, digest_of, gather_once, memory_of, remember
from aiter.distributed.alltoall import Exchange, heads_of
from aiter.distributed.exchange import Group, GroupOrMesh, connect, global_rank, groups_of, place_in, size_of
from aiter.distributed.job import Job
from aiter.distributed.layout import Layout, Run
from aiter.distributed.needs import Mask, wanted
from aiter.distributed.products import Asked, Heads, Product, compile_kernels
from aiter.layout import NO_INDICES, check_common, sizes_of
from aiter.options import NO_LIMIT, OptionKeywords, Options, read_options

Scheme: TypeAlias = Literal["auto", "allgather", "alltoall", "ring", "alltoall+ring"]
SCHEMES = ("auto", "allgather", "alltoall", "ring", "alltoall+ring")
POSITIONS = "positions"
NOTHING = (0, 0)  # instead of a digest


class Numbers(NamedTuple):
    """What a call is asked for besides tensors, the same on all ranks."""

    layout: str
    scheme: str
    left: int
    right: int
    scale: float
    softcap: float
    batch_invariant: bool


class Work(NamedTuple):
    """Who does what. inner: ranks that exchange rows for heads, neighbours; 1: none do."""

    groups: tuple[Group, ...]
    layout: Layout
    rank: int
    inner: int
    rows: str  # the scheme of rows that are split over groups of `inner` ranks
    mask: Mask
    numbers: Numbers

    def exchange(self, heads_q: int, heads_kv: int) -> Exchange | None:
        if self.inner == 1:
            return None
        first = self.rank - self.rank % self.inner
        heads = tuple(heads_of(rank, self.inner, heads_q, heads_kv) for rank in range(self.inner))
        return Exchange(self.groups[-1], self.rank % self.inner, self.layout.runs[first : first + self.inner], heads)

    def job(self, heads: tuple[Heads, ...], alibi_slopes: torch.Tensor | None, sinks: torch.Tensor | None) -> Job:
        numbers = self.numbers
        asked = Asked(self.mask, numbers.scale, numbers.softcap, alibi_slopes, sinks, numbers.batch_invariant)
        return Job(self.groups[0], self.rank // self.inner, self.layout.merged(self.inner), heads, asked)

    def products(self, by_distance: bool) -> Sequence[Product]:
        """Which this rank computes, of its heads."""
        place = self.layout.merged(self.inner), self.rank // self.inner
        if self.rows == "ring":
            halves = ring.halves_of(*place, self.mask, by_distance)
            return [product for half in halves for product in half.products]
        return allgather.plan_of(*place, self.mask, by_distance).products


class Request(NamedTuple):
    """What this rank was asked for, checked; tensors (batch, rows, heads, head_dim)."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    sinks: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    ends: tuple[int, ...] | None  # of documents
    runs: tuple[Run, ...] | None  # this rank's, where positions are given
    numbers: Numbers
    gradients: bool
    return_lse: bool

    def description(self) -> dict[str, Any]:
        """All that must be the same on all ranks."""
        query, key, value = self.query, self.key, self.value
        return {
            "query (batch, heads, head_dim)": (query.shape[0], *query.shape[2:]),
            "key (heads, head_dim)": tuple(key.shape[2:]),
            "value head_dim": value.shape[3],
            "dtype": str(query.dtype),
            "device": query.device.type,
            "window (left, right)": (self.numbers.left, self.numbers.right),
            "softmax_scale": self.numbers.scale,
            "softcap": self.numbers.softcap,
            "sinks": None if self.sinks is None else f"{self.sinks.dtype} {tuple(self.sinks.shape)}",
            "alibi_slopes": None if self.alibi_slopes is None else tuple(self.alibi_slopes.shape),
            "cu_seqlens": self.ends,
            "layout": self.numbers.layout,
            "scheme": self.numbers.scheme,
            "batch_invariant": self.numbers.batch_invariant,
            "gradients wanted": self.gradients,
            "return_lse": self.return_lse,
        }

    def digest(self) -> tuple[int, int]:
        return digest_of(sorted(self.description().items()))

    def known(self) -> Known:
        """What may differ from rank to rank."""
        return Known(self.query.shape[1], local_ranks(), NOTHING if self.runs is None else digest_of(self.runs))


# Options that a split sequence can have; where rows stand, `layout` says.
OFFERED = ("window_left", "window_right", "softcap", "alibi_slopes", "sinks", "batch_invariant")


def refuse_others(options: Options) -> None:
    for name, default in Options._field_defaults.items():
        given = getattr(options, name)
        if name not in OFFERED and (isinstance(given, torch.Tensor) or given != default):
            raise ValueError(f"{name} is not offered for a sequence that is split over ranks")


def _documents(cu_seqlens: torch.Tensor | Sequence[int], query: torch.Tensor) -> tuple[int, ...]:
    if query.dim() != 3:
        raise ValueError(
            f"cu_seqlens is given, but query has shape {tuple(query.shape)}; it must be packed {checks.PACKED}"
        )
    if isinstance(cu_seqlens, torch.Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in checks.INDEX_DTYPES:
            raise TypeError(
                f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; it must be int32 (documents + 1,)"
            )
        cu_seqlens = cu_seqlens.tolist()
    ends = tuple(int(end) for end in cu_seqlens)
    if len(ends) < 2 or ends[0] != 0 or any(b < a for a, b in itertools.pairwise(ends)):
        raise ValueError(
            f"cu_seqlens is {list(ends[:8])}{'…' if len(ends) > 8 else ''}; it must rise from 0: where each document "
            "of the whole sequence begins, and where the last ends"
        )
    return ends


def _request(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: Sequence[Group],
    causal: bool,
    softmax_scale: float | None,
    layout: object,
    scheme: object,
    cu_seqlens: torch.Tensor | Sequence[int] | None,
    return_lse: bool,
    keywords: OptionKeywords,
) -> Request:
    packed = f"{checks.BSHD}, or packed {checks.PACKED}"
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        checks.tensor(name, tensor, (3, 4), packed)
        if hasattr(tensor, "to_local"):
            raise TypeError(f"{name} is a {type(tensor).__name__}; give this rank's part of it, {name}.to_local()")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be that of query, {query.dtype}")
    if query.dim() != key.dim() or query.shape[: query.dim() - 2] != key.shape[: key.dim() - 2]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in rows; context parallelism is for "
            "self-attention, where each rank has queries, keys and values of the same positions"
        )
    checks.flag("causal", causal)
    checks.flag("return_lse", return_lse)
    scale = checks.softmax_scale(softmax_scale, query.shape[-1])
    causal, options = read_options(causal, keywords)
    refuse_others(options)
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; it must be one of {SCHEMES}")
    if len(groups) == 2 and scheme not in ("auto", "alltoall+ring"):
        raise ValueError(f"scheme is {scheme!r}, but the mesh has two dimensions, which are for 'alltoall+ring'")
    if len(groups) == 1 and scheme == "alltoall+ring":
        raise ValueError(
            "scheme is 'alltoall+ring', but there is one group; give a mesh of two dimensions: the ring's, then the "
            "all-to-all's, e.g. init_device_mesh('cuda', (nodes, gpus), mesh_dim_names=('ring', 'alltoall'))"
        )
    ends = None if cu_seqlens is None else _documents(cu_seqlens, query)
    if query.dim() == 3:
        query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
    query, key, value = library.autocast(query, key, value)
    if sizes_of(query, key, value, NO_INDICES, 0, 0) is None:
        check_common(query, key, value, NO_INDICES, checks.Names())
    options.check(query, key)
    runs = None
    if isinstance(layout, torch.Tensor):
        if layout.shape != (query.shape[1],) or layout.dtype not in checks.INDEX_DTYPES:
            raise ValueError(
                f"layout is {layout.dtype} {tuple(layout.shape)}; positions must be int64 ({query.shape[1]},), one for "
                "each row of query"
            )
        runs = layouts.runs_of(layout)
        layout = POSITIONS
    else:
        layout = layouts.check_name(layout)
    left, right = (NO_LIMIT, 0) if causal else (options.window_left, options.window_right)
    numbers = Numbers(layout, str(scheme), left, right, scale, options.softcap, options.batch_invariant)
    needs = [query, key, value, *([] if options.sinks is None else [options.sinks])]
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in needs)
    alibi = options.readable().alibi_slopes
    return Request(query, key, value, options.sinks, alibi, ends, runs, numbers, gradients, return_lse)


@lru_cache(maxsize=256)
def _problem(
    layout: Layout, mask: Mask, batch: int, heads: tuple[int, int], dims: tuple[int, int], size: int, backward: bool
) -> cost.Problem:
    pairs = []
    for runs in layout.runs:
        pairs.append(sum(_pairs(run, document, mask) for run in runs for document in mask.documents(run)))
    span = max(sum(run.length for run in wanted(runs, mask)) - sum(run.length for run in runs) for runs in layout.runs)
    total, mean = layout.total, max(sum(pairs) / layout.world, 1)
    return cost.Problem(
        *(total, batch, *heads, *dims, size, sum(pairs) / max(total, 1) ** 2, max(span, 0) / max(total, 1)),
        *(max(pairs) / mean, max(len(runs) for runs in layout.runs), backward),
    )


def _pairs(run: Run, document: Run, mask: Mask) -> float:
    """How many keys the rows of a run in a document see together: as the first, the middle and the last say."""
    rows = run.within(document)
    places = (rows.start, (rows.start + rows.stop - 1) // 2, rows.stop - 1)
    seen = [mask.seen_by(Run(place, place + 1), document).length for place in places]
    return rows.length * (seen[0] + 2 * seen[1] + seen[2]) / 4


def _work(groups: Sequence[Group], layout: Layout, request: Request, local: int) -> Work:
    """Raises ValueError, on all ranks alike, for documents that are longer than the sequence."""
    ends = request.ends or (0, layout.total)
    if ends[-1] > layout.total:
        raise ValueError(
            f"cu_seqlens ends at {ends[-1]}, but the ranks together have {layout.total} rows; it describes the whole "
            "sequence"
        )
    mask = Mask(request.numbers.left, request.numbers.right, ends)
    scheme = request.numbers.scheme
    if scheme == "auto" and len(groups) == 1:
        query, key, value = request[:3]
        problem = _problem(
            *(layout, mask, query.shape[0], (query.shape[2], key.shape[2]), (query.shape[3], value.shape[3])),
            *(query.element_size(), request.gradients),
        )
        scheme = cost.choose(problem, layout.world, _machine(groups[0], local))
    inner = size_of(groups[-1]) if len(groups) == 2 else layout.world if scheme == "alltoall" else 1
    rank, _ = place_in(groups)
    rows = "ring" if scheme in ("ring", "alltoall+ring") and layout.world > inner else "allgather"
    return Work(tuple(groups), layout, rank, inner, rows, mask, request.numbers)


def local_ranks() -> int:
    """How many ranks torchrun says it has started on this machine; without it, all are taken to be on one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def _machine(group: Group, local: int) -> cost.Machine:
    """What "auto" takes the machine to be: of the group, as many ranks share a node as their numbers say."""
    nodes = Counter(global_rank(group, rank) // local for rank in range(size_of(group)))
    return cost.Machine(node=min(nodes.values()))


def _layout(groups: Sequence[Group], request: Request, known: list[Known]) -> Layout:
    if request.runs is not None:
        digests = [of_rank.positions for of_rank in known]
        return layouts.from_runs(tuple(gather_once(groups, digests, request.runs)))
    rows = [of_rank.rows for of_rank in known]
    made = layouts.named(request.numbers.layout, sum(rows), len(rows))
    expected = [made.rows(rank) for rank in range(len(rows))]
    if rows != expected:
        raise ValueError(
            f"the ranks have {rows} rows; layout {request.numbers.layout!r} of {sum(rows)} positions gives them "
            f"{expected}: cut tensors by aiter.distributed.shard, or give this rank's positions as layout"
        )
    return made


def _build(groups: Sequence[Group], request: Request) -> None:
    """The kernels, by a layout of as many rows on every rank as there are here."""
    _, world = place_in(groups)
    total = request.query.shape[1] * world
    ends = request.ends
    if ends is not None and ends[-1] > total:
        ends = (*(end for end in ends if end < total), total)
    name = "contiguous" if request.runs is not None else request.numbers.layout
    work = _work(groups, layouts.named(name, total, world), request._replace(ends=ends), local_ranks())
    asked = Asked(work.mask, request.numbers.scale, request.numbers.softcap, request.alibi_slopes)
    by_distance = request.alibi_slopes is not None
    compile_kernels(asked, work.products(by_distance), request.query, request.value, request.gradients)


def prepare(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: Sequence[Group],
    causal: bool,
    softmax_scale: float | None,
    layout: object,
    scheme: object,
    cu_seqlens: torch.Tensor | Sequence[int] | None,
    return_lse: bool,
    keywords: OptionKeywords,
    gradients: bool | None = None,
    ahead: bool = False,
) -> tuple[Request, Work, Callable[[], None] | None]:
    """All that comes before data moves. gradients: whether they are wanted, where tensors do not say it. ahead: that
    ranks agree need not be waited for where this rank was asked for the same before. What is then returned as third
    must be called before data moves: it raises what ranks disagree about, or `Changed`, for which there is `settle`."""
    request, refused, before = None, None, None
    own, description, digest = Known(0, local_ranks()), {}, NOTHING
    try:
        request = _request(
            *(query, key, value, groups, causal, softmax_scale, layout, scheme, cu_seqlens, return_lse, keywords)
        )
        if gradients is not None:
            request = request._replace(gradients=gradients)
        own, description, digest = request.known(), request.description(), request.digest()
        before = memory_of(groups).settled.get((own, digest, request.query.device))
        # Before ranks wait for each other: a compiler may take longer than a collective's patience.
        if before is None:
            _build(groups, request)
    except Exception as error:
        refused = error
    answer = ask(groups, own, description, digest, refused)
    if request is None or before is None or not ahead or len(groups) > 1:
        known = answer()
        assert request is not None
        return request, settle(groups, request, known), None
    expected, work = before

    def confirm() -> None:
        known = answer()
        if known != expected:
            raise Changed(known)

    return request, work._replace(groups=tuple(groups)), confirm


def settle(groups: Sequence[Group], request: Request, known: list[Known]) -> Work:
    """Who does what, when all ranks are known to be asked for the same."""
    layout = _layout(groups, request, known)
    work = _work(groups, layout, request, min(of_rank.local_ranks for of_rank in known))
    for group in groups:
        connect(group, request.query.device)
    key = request.known(), request.digest(), request.query.device
    remember(memory_of(groups).settled, key, (known, work._replace(groups=())))
    return work


def refuse(group: GroupOrMesh, error: Exception) -> NoReturn:
    """Raises what keeps this rank from its call, and on the others that this rank cannot make it."""
    ask(groups_of(group), Known(0, local_ranks()), {}, NOTHING, error)()
    raise error
