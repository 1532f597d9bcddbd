"""Two streams that calls of kernels take in turn: where the last rows of one leave multiprocessors idle, blocks of the
next begin. On the caller's own stream stand what brings data there, and the waiting for both.

    lane 0      piece 0 ------------.  piece 2 -----
    lane 1              piece 1 --------------.
                               ^ idle but for piece 1, which has begun
On a CPU there is nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeAlias

import torch

LANES = 2
Moment: TypeAlias = "torch.cuda.Event | None"


@lru_cache(maxsize=64)
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(LANES))


def reached(device: torch.device) -> Moment:
    """When all that stands on the current stream until now is done."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def after(device: torch.device, moment: Moment) -> None:
    """The current stream waits for it."""
    if moment is not None:
        torch.cuda.current_stream(device).wait_event(moment)


class Lanes:
    """Used as `with`: at its end, the caller's stream waits for all that was begun within."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._taken = device, 0

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in _streams(self._device)[: self._taken] if self._device.type == "cuda" else ():
            torch.cuda.current_stream(self._device).wait_stream(stream)

    @contextmanager
    def next(self, ready: Moment) -> Iterator[None]:
        """What is called within stands on the lane whose turn it is, after `ready`. What is allocated within belongs to
        that lane: `hand_over` what is used outside."""
        if ready is None:
            yield
            return
        lane = _streams(self._device)[self._taken % LANES]
        self._taken += 1
        lane.wait_event(ready)
        with torch.cuda.stream(lane):
            yield


def hand_over(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors that a lane has made, for use on the current stream, which has waited for it."""
    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensors
