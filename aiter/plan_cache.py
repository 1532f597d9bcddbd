"""The plans of this process: one for each kernel and device, found by what selects code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiter.plan import Key, Plan

# As many as there are kernels: nothing of a call's sizes is in a key, so there is no need for a limit.
plans: dict[Key, Plan] = {}
