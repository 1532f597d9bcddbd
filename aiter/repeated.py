"""Calls that are like one before, sent off without being looked at again.

Most calls differ from an earlier one in nothing but where their tensors lie: layers call with the same shapes, steps of
decoding with the same caches. What all the checks of such a call find, and what is made of it, is then known:

    form_of      all arguments but addresses, as bytes: kinds, shapes, strides, devices, numbers, which tensors are one
    first time   the function runs as ever
    second       likewise, while `noted` keeps what it launches; if that is one call, or several, whose addresses are
                 those of the arguments, of lengths made of them, and of what it returns, it is kept
    from then    that call with other addresses: 2 to 3 us in place of 6 to 18

Kept is only what depends on nothing but the form: a call with a tensor that Python has read or copied (lengths of
int64, a window in a tensor) has addresses of its own, or none of that tensor's, and always goes the long way. So does
whatever needs something of PyTorch (torch_state.py), a call whose values a CPU kernel refuses, for the message, and one
with equal numbers where they mostly differ (plan.Apart).
Functions whose calls are never alike are asked every 16th time only.
"""

from __future__ import annotations

import functools
import inspect
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from aiter import checks, plan, reader, torch_state
from aiter.abi import NO_WORKSPACE, AttentionTensors, CacheWriteTensors
from aiter.jit import settings

P = ParamSpec("P")
R = TypeVar("R")

MOST_KEPT = 64  # calls of one function; the oldest goes
MOST_MISSED = 32  # forms that were met once
PATIENCE = 16  # calls in a row that are like none before, and how rarely the next ones are asked

# Places of addresses that are not an argument's; as in call_reader.h.
NOTHING, OUTPUT, LSE, WORKSPACE = 255, 254, 253, 252
_CACHES = "key_cache", "value_cache"  # what a launch that writes into caches calls them
_REFUSED = object()
_is_compiling, _is_grad_enabled, _empty = torch.compiler.is_compiling, torch.is_grad_enabled, torch.empty
_empty_strided, _empty_like = torch.empty_strided, torch.empty_like
_increment_version = torch._C._increment_version


class Step(NamedTuple):
    """A launch that needs nothing but addresses."""

    plan: plan.Plan
    call: bytes
    places: bytes  # of each address: the number of an argument's tensor or of lengths made, or one of the above
    workspace_bytes: int

    def send(self, addresses: bytes, output: torch.Tensor | None, lse: torch.Tensor | None) -> bool:
        """Whether it was taken."""
        address = 0
        if self.workspace_bytes:
            address, _keep = self.plan.workspace(self.workspace_bytes)
        assert reader.fill is not None
        call = reader.fill(self.call, self.places, addresses, output, lse, address)
        return call is not None and not self.plan.launch(call)


class Made(NamedTuple):
    """What is to be made for the launches: lengths, those of an argument and so many more; or memory."""

    argument: int | None
    more: int
    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def like(cls, entry: plan.Longer | plan.Between, arguments: list[torch.Tensor]) -> Made | None:
        if isinstance(entry, plan.Between):
            return cls(None, 0, entry.made.shape, entry.made.dtype)
        numbers = [i for i, tensor in enumerate(arguments) if tensor is entry.given]
        return cls(numbers[0], entry.more, entry.made.shape, entry.made.dtype) if len(numbers) == 1 else None

    def anew(self, arguments: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        if self.argument is None:
            return _empty(self.shape, dtype=self.dtype, device=device)
        return arguments[self.argument] + self.more


class Kept(NamedTuple):
    """A call of one launch or, when tokens are appended before, a few."""

    before: tuple[Step, ...]
    last: Step
    made: tuple[Made, ...]
    output_shape: torch.Size | None  # None: the caller's own, or there is none
    output_strides: tuple[int, ...] | None  # contiguous, where a size of 1 may have any
    output_dtype: torch.dtype | None
    like: int | None  # the number of a positional argument that the output is like in all of that
    lse_shape: torch.Size | None
    returns: tuple[int | None, ...] | int | None  # OUTPUT and LSE, in what the function returns
    out: bool  # is `out` among the keywords?
    written: tuple[int | str, ...]  # arguments whose versions are to rise, by place or by name
    apart: tuple[int, ...]  # the numbers of arguments that may have no two equal entries
    looks: bool  # is somebody to look at values where AITER_CHECK_VALUES is set?

    def send(self, addresses: bytes, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """What the function would return, or _REFUSED."""
        own = self.last.plan
        if plan.plans.get(own.key) is not own or (self.looks and settings.flag("AITER_CHECK_VALUES")):
            return _REFUSED
        if self.before:
            if any([plan.plans.get(step.plan.key) is not step.plan for step in self.before]):
                return _REFUSED
            tensors = _tensors(arguments, keywords)
            for i in self.apart:
                numbers = tensors[i].tolist()
                if len(set(numbers)) < len(numbers):
                    return _REFUSED
            made = [of.anew(tensors, own.device) for of in self.made]  # which stay until all is launched
            addresses += struct.pack(f"={len(made)}Q", *[tensor.data_ptr() for tensor in made])
            if not all(step.send(addresses, None, None) for step in self.before):  # none after one that is refused
                return _REFUSED
        output = lse = None
        if self.like is not None:
            output = _empty_like(arguments[self.like])
        elif self.output_shape is not None and self.output_strides is not None:
            output = _empty_strided(self.output_shape, self.output_strides, dtype=self.output_dtype, device=own.device)
        if self.lse_shape is not None:
            lse = _empty(self.lse_shape, dtype=torch.float32, device=own.device)
        if not self.last.send(addresses, output, lse):
            return _REFUSED
        if self.written:
            _increment_version([keywords[of] if isinstance(of, str) else arguments[of] for of in self.written])
        if self.out:
            output = keywords["out"]
        if isinstance(self.returns, tuple):
            return tuple([output if place == OUTPUT else lse if place == LSE else None for place in self.returns])
        return output if self.returns == OUTPUT else None


def repeats(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which launches a kernel or two, with a memory of calls."""
    kept: dict[bytes, Kept | None] = {}  # None: not to be kept
    missed: dict[bytes, bool] = {}
    misses = rest = 0

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        nonlocal misses, rest
        if _is_compiling():  # asked first: Dynamo answers it and looks no further
            return function(*arguments, **keywords)
        form, asks = None, False
        if rest:
            rest -= 1
        # Whoever learns a call around this one is to see its launch.
        elif reader.form_of is not None and plan.noted.launches is None and torch_state.needs_nothing():
            form, asks = reader.form_of(arguments, keywords, _is_grad_enabled()), True
        if form is None:
            _check_memory(function, arguments, keywords)
        else:
            found = kept.get(form[0])
            if found is not None:
                result = found.send(form[1], arguments, keywords)
                misses = 0
                if result is not _REFUSED:
                    return result
            elif missed.pop(form[0], False):
                return _learn(kept, form[0], function, arguments, keywords)
            elif form[0] not in kept:
                if len(missed) >= MOST_MISSED:
                    missed.clear()
                missed[form[0]] = True
        if asks:
            misses += 1
            if misses >= PATIENCE:
                rest = PATIENCE - 1
        return function(*arguments, **keywords)

    return call


def _check_memory(function: Callable, arguments: tuple, keywords: dict[str, Any]) -> None:
    """Refuses tensors whose memory was freed, by name, before anybody reads them; a form has none of those in it."""
    if reader.lacks_memory(arguments, keywords):
        try:
            named = inspect.signature(function).bind(*arguments, **keywords).arguments
        except TypeError:  # which the call says better
            return
        named.update(named.pop("others", {}) | named.pop("options", {}))
        checks.memory(**named)


def _learn(
    kept: dict[bytes, Kept | None], form: bytes, function: Callable, arguments: tuple, keywords: dict[str, Any]
) -> Any:
    launches = plan.noted.launches = []
    try:
        result = function(*arguments, **keywords)
    finally:
        plan.noted.launches = None
    if len(kept) >= MOST_KEPT:
        kept.pop(next(iter(tuple(kept))), None)  # a copy: other threads may add to it
    kept[form] = _kept(launches, result, arguments, keywords)
    return result


def _tensors(arguments: tuple, keywords: dict[str, Any]) -> list[torch.Tensor]:
    """In the order of the form."""
    tensors: list[torch.Tensor] = []
    for value in (*arguments, *keywords.values()):
        tensors += [part for part in (value if type(value) is tuple else (value,)) if isinstance(part, torch.Tensor)]
    return tensors


def _kept(launches: list, result: Any, by_position: tuple[Any, ...], keywords: dict[str, Any]) -> Kept | None:
    """The launches, if they follow from the form and the addresses of arguments alone."""
    arguments, out = _tensors(by_position, keywords), keywords.get("out")
    made: list[plan.Longer | plan.Between] = []
    apart: list[int] = []
    steps: list[tuple[plan.Plan, bytes, int]] = []
    for entry in launches:
        if entry is None:
            return None
        if isinstance(entry, (plan.Longer, plan.Between)):
            if entry.made is not result:
                made.append(entry)
        elif isinstance(entry, plan.Apart):
            numbers = [i for i, tensor in enumerate(arguments) if tensor is entry.given]
            if not numbers:
                return None
            apart += numbers
        else:
            steps.append(entry)
    to_make = tuple([Made.like(entry, arguments) for entry in made])
    if not steps or None in to_make:
        return None
    own, call, _ = steps[-1]
    of_last = _addresses(own, call)
    called = {OUTPUT: "rotated" if "rotated" in of_last else "output", LSE: "lse"}

    # What the function returns: the output and, perhaps, the log-sum-exp and what there is none of.
    fresh: dict[int, torch.Tensor] = {}
    returns: list[int | None] = []
    for tensor in result if isinstance(result, tuple) else () if result is None else (result,):
        place = None if tensor is None else LSE if OUTPUT in returns else OUTPUT
        if place is not None and not (place == OUTPUT and tensor is out):
            if place in fresh or not tensor.is_contiguous() or tensor.data_ptr() != of_last[called[place]]:
                return None
            fresh[place] = tensor
        returns.append(place)
    if (out is not None) != (OUTPUT in returns and OUTPUT not in fresh):
        return None

    of_result = {called[place]: place for place in fresh}
    tensors, kept = [*arguments, *[entry.made for entry in made]], []
    written: list[int | str] = [] if out is None else ["out"]
    used: Counter[int] = Counter()  # how many of the addresses of a launch each of them may be
    for launch in steps:
        step = _step(*launch, tensors, of_result if launch is steps[-1] else {})
        if step is None:
            return None
        kept.append(step[0])
        used |= step[1]
        if launch[0].key[0] == "cache_write":
            addresses = _addresses(*launch[:2])
            for name in _CACHES:
                cache = _argument_at(addresses[name], by_position, keywords)
                if cache is None:
                    return None
                written.append(cache)
    # Is there one that nobody but Python has read? It may lie where another does, which the kernel reads.
    starts = Counter(tensor.data_ptr() for tensor in tensors)
    if any(used[i] < starts[tensor.data_ptr()] for i, tensor in enumerate(tensors)):
        return None
    output, lse = fresh.get(OUTPUT), fresh.get(LSE)
    return Kept(
        tuple(kept[:-1]),
        kept[-1],
        tuple([of for of in to_make if of is not None]),
        None if output is None else output.shape,
        None if output is None else output.stride(),
        None if output is None else output.dtype,
        next((i for i, tensor in enumerate(by_position) if _alike(tensor, output)), None),
        None if lse is None else lse.shape,
        tuple(returns) if isinstance(result, tuple) else returns[0] if returns else None,
        out is not None,
        tuple(written),
        tuple(apart),
        looks=own.device.type != "cpu" and any(tensor.dtype is torch.int32 for tensor in arguments),
    )


def _argument_at(address: int, by_position: tuple[Any, ...], keywords: dict[str, Any]) -> int | str | None:
    """The place or the name of a tensor that has this address in it."""
    named: list[tuple[int | str, Any]] = [*enumerate(by_position), *keywords.items()]
    tensors = [(of, value) for of, value in named if isinstance(value, torch.Tensor)]
    at_start = [of for of, tensor in tensors if tensor.data_ptr() == address]
    return next(iter([*at_start, *[of for of, tensor in tensors if address in _extent(tensor)]]), None)


def _addresses(own: plan.Plan, call: bytes) -> dict[str, int]:
    """Of a packed call, but for the workspace's."""
    tensors = CacheWriteTensors if own.key[0] == "cache_write" else AttentionTensors
    names = [name for name, *_ in tensors._fields_]
    return dict(zip(names, memoryview(call)[-8 * (len(names) - 1) :].cast("Q"), strict=False))


def _step(
    own: plan.Plan, call: bytes, workspace_bytes: int, tensors: list[torch.Tensor], of_result: dict[str, int]
) -> tuple[Step, Counter[int]] | None:
    """Where each address comes from, and how many of them each tensor may be."""
    places, further = bytearray(), []
    used: Counter[int] = Counter()
    for name, address in _addresses(own, call).items():
        if name in of_result or not address:
            places.append(of_result.get(name, NOTHING) if address else NOTHING)
            further.append(0)
            continue
        sources = [i for i, tensor in enumerate(tensors) if tensor.data_ptr() == address]
        if sources and any(tensor.dim() == 5 and address in _extent(tensor)[1:] for tensor in tensors):
            return None  # an argument at the second half of stacked caches: who knows which of the two is meant
        if not sources:  # a part of an argument, and of one alone
            sources = [i for i, tensor in enumerate(tensors) if address in _extent(tensor)]
            if len(sources) != 1:
                return None
        start = tensors[sources[0]].data_ptr()
        used.update(i for i, tensor in enumerate(tensors) if tensor.data_ptr() == start)
        places.append(sources[0])
        further.append(address - start)
    filled = call[: -8 * len(further)] + struct.pack(f"={len(further)}Q", *further) + NO_WORKSPACE
    return Step(own, filled, bytes((*places, WORKSPACE)), workspace_bytes), used


def _alike(argument: Any, output: torch.Tensor | None) -> bool:
    """Whether empty_like() of an argument is such an output: it costs a third less than saying what that is."""
    return (
        output is not None
        and isinstance(argument, torch.Tensor)
        and argument.is_contiguous()
        and (argument.shape, argument.stride()) == (output.shape, output.stride())
        and (argument.dtype, argument.device) == (output.dtype, output.device)
    )


def _extent(tensor: torch.Tensor) -> range:
    """The addresses of its elements, and those between."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return range(tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size())
