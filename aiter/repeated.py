"""Calls that are like one before, sent off without being looked at again.

Most calls differ from an earlier one in nothing but where their tensors lie: layers call with the same shapes, steps of
decoding with the same caches. What all the checks of such a call find, and what is made of it, is then known:

    form_of      all arguments but addresses, as bytes: kinds, shapes, strides, devices, numbers, which tensors are one
    first time   the function runs as ever
    second       likewise, while `noted` keeps what it launches; if that is one call whose addresses are those of the
                 arguments and of what it returns, it is kept
    from then    that call with other addresses: 2 to 3 us in place of 6 to 18

Kept is only what depends on nothing but the form: a call with a tensor that Python has read or copied (lengths of
int64, a window in a tensor) has addresses of its own, or none of that tensor's, and always goes the long way. So does
whatever needs something of PyTorch (torch_state.py), and a call whose values a CPU kernel refuses, for the message.
Functions whose calls are never alike are asked every 16th time only.
"""

from __future__ import annotations

import functools
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from aiter import plan, reader, torch_state
from aiter.abi import NO_WORKSPACE, AttentionTensors, CacheWriteTensors
from aiter.jit import settings

P = ParamSpec("P")
R = TypeVar("R")

MOST_KEPT = 64  # calls of one function; the oldest goes
MOST_MISSED = 32  # forms that were met once
PATIENCE = 16  # calls in a row that are like none before, and how rarely the next ones are asked

# Places of addresses that are not an argument's; as in call_reader.h.
NOTHING, OUTPUT, LSE, WORKSPACE = 255, 254, 253, 252
_REFUSED = object()
_is_compiling, _is_grad_enabled, _empty = torch.compiler.is_compiling, torch.is_grad_enabled, torch.empty
_empty_strided, _empty_like = torch.empty_strided, torch.empty_like
_increment_version = torch.autograd.graph.increment_version


class Kept(NamedTuple):
    """A call that needs nothing but addresses."""

    plan: plan.Plan
    call: bytes
    places: bytes  # of each address: the number of an argument's tensor, or one of the above
    workspace_bytes: int
    output_shape: torch.Size | None  # None: the caller's own, or there is none
    output_strides: tuple[int, ...] | None  # contiguous, where a size of 1 may have any
    output_dtype: torch.dtype | None
    like: int | None  # the number of a positional argument that the output is like in all of that
    lse_shape: torch.Size | None
    returns: tuple[int | None, ...] | int | None  # OUTPUT and LSE, in what the function returns
    out: bool  # is `out` among the keywords?
    looks: bool  # is somebody to look at values where AITER_CHECK_VALUES is set?

    def send(self, addresses: bytes, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        """What the function would return, or _REFUSED."""
        own = self.plan
        if plan.plans.get(own.key) is not own or (self.looks and settings.flag("AITER_CHECK_VALUES")):
            return _REFUSED
        output = lse = None
        if self.like is not None:
            output = _empty_like(arguments[self.like])
        elif self.output_shape is not None and self.output_strides is not None:
            output = _empty_strided(self.output_shape, self.output_strides, dtype=self.output_dtype, device=own.device)
        if self.lse_shape is not None:
            lse = _empty(self.lse_shape, dtype=torch.float32, device=own.device)
        address = 0
        if self.workspace_bytes:
            address, _keep = own.workspace(self.workspace_bytes)
        assert reader.fill is not None
        call = reader.fill(self.call, self.places, addresses, output, lse, address)
        if call is None or own.launch(call):
            return _REFUSED
        if self.out:
            output = keywords["out"]
            _increment_version(output)
        if isinstance(self.returns, tuple):
            return tuple([output if place == OUTPUT else lse if place == LSE else None for place in self.returns])
        return output if self.returns == OUTPUT else None


def repeats(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which calls one kernel, with a memory of calls."""
    kept: dict[bytes, Kept | None] = {}  # None: not to be kept
    missed: dict[bytes, bool] = {}
    misses = rest = 0

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        nonlocal misses, rest
        if _is_compiling():  # asked first: Dynamo answers it and looks no further
            return function(*arguments, **keywords)
        if rest:
            rest -= 1
            return function(*arguments, **keywords)
        form_of = reader.form_of
        # Whoever learns a call around this one is to see its launch.
        if form_of is None or plan.noted.launches is not None or not torch_state.needs_nothing():
            return function(*arguments, **keywords)
        form = form_of(arguments, keywords, _is_grad_enabled())
        if form is not None:
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
        misses += 1
        if misses >= PATIENCE:
            rest = PATIENCE - 1
        return function(*arguments, **keywords)

    return call


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
    tensors = []  # in the order of the form
    for value in (*arguments, *keywords.values()):
        tensors += [part for part in (value if type(value) is tuple else (value,)) if isinstance(part, torch.Tensor)]
    kept[form] = _kept(launches, tensors, result, arguments, keywords.get("out"))
    return result


def _kept(
    launches: list,
    arguments: list[torch.Tensor],
    result: Any,
    by_position: tuple[Any, ...],
    out: torch.Tensor | None,
) -> Kept | None:
    """The call that was launched, if it follows from the form and the addresses of arguments alone."""
    if len(launches) != 1 or launches[0] is None:
        return None
    own, call, workspace_bytes = launches[0]
    tensors = CacheWriteTensors if own.key[0] == "cache_write" else AttentionTensors
    names = [name for name, *_ in tensors._fields_]
    called = {OUTPUT: "rotated" if "rotated" in names else "output", LSE: "lse"}
    addresses = dict(zip(names, memoryview(call)[-8 * (len(names) - 1) :].cast("Q"), strict=False))  # but the workspace

    # What the function returns: the output and, perhaps, the log-sum-exp and what there is none of.
    fresh: dict[int, torch.Tensor] = {}
    returns: list[int | None] = []
    for tensor in result if isinstance(result, tuple) else () if result is None else (result,):
        place = None if tensor is None else LSE if OUTPUT in returns else OUTPUT
        if place is not None and not (place == OUTPUT and tensor is out):
            if place in fresh or not tensor.is_contiguous() or tensor.data_ptr() != addresses[called[place]]:
                return None
            fresh[place] = tensor
        returns.append(place)
    if (out is not None) != (OUTPUT in returns and OUTPUT not in fresh):
        return None

    # Where each address comes from.
    of_result = {called[place]: place for place in fresh}
    places, further = bytearray(), []
    used: Counter[int] = Counter()  # how many of the addresses each argument may be
    for name, address in addresses.items():
        if name in of_result or not address:
            places.append(of_result.get(name, NOTHING) if address else NOTHING)
            further.append(0)
            continue
        sources = [i for i, tensor in enumerate(arguments) if tensor.data_ptr() == address]
        if sources and any(tensor.dim() == 5 and address in _extent(tensor)[1:] for tensor in arguments):
            return None  # an argument at the second half of stacked caches: who knows which of the two is meant
        if not sources:  # a part of an argument, and of one alone
            sources = [i for i, tensor in enumerate(arguments) if address in _extent(tensor)]
            if len(sources) != 1:
                return None
        start = arguments[sources[0]].data_ptr()
        used.update(i for i, tensor in enumerate(arguments) if tensor.data_ptr() == start)
        places.append(sources[0])
        further.append(address - start)
    # Is there one that nobody but Python has read? It may lie where another does, which the kernel reads.
    starts = Counter(tensor.data_ptr() for tensor in arguments)
    if any(used[i] < starts[tensor.data_ptr()] for i, tensor in enumerate(arguments)):
        return None
    output, lse = fresh.get(OUTPUT), fresh.get(LSE)
    return Kept(
        own,
        call[: -8 * len(further)] + struct.pack(f"={len(further)}Q", *further) + NO_WORKSPACE,
        bytes((*places, WORKSPACE)),
        workspace_bytes,
        None if output is None else output.shape,
        None if output is None else output.stride(),
        None if output is None else output.dtype,
        next((i for i, tensor in enumerate(by_position) if _alike(tensor, output)), None),
        None if lse is None else lse.shape,
        tuple(returns) if isinstance(result, tuple) else returns[0] if returns else None,
        out is not None,
        looks=own.device.type != "cpu" and any(tensor.dtype is torch.int32 for tensor in arguments),
    )


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
