"""FlashAttention's own tests, from a checkout of theirs and unchanged, against aiter.flash_attn.

    python tests/peers/flash_attention.py PATH_OF_CHECKOUT [--count 20] [--tests kvcache] [--longest 512]

Its tests have hundreds of thousands of parametrisations: of each test, `count` are drawn, with a seed. They import
aiter.flash_attn as flash_attn; helpers in pure Python (padding, rotary embedding) come from the checkout, compiled
parts of it are stood in for. On the CPU, tensors that tests make on "cuda" are made there, and the device says that
it is an H100 with little memory, so that tests leave out what is largest. Needs einops.

Prints for each test how many were drawn, passed, failed, were skipped by the test itself, or ask for what is not
offered, by its name; then the failures. Not part of the suite: nothing here is named test_*.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import math
import random
import re
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode

from aiter import flash_attn
from aiter.errors import UnsupportedError

MEMORY = 16 << 30  # from here on the tests' references may be large


class OnCpu(TorchFunctionMode):
    """What is asked for on "cuda" is made on the CPU, but for memory that is only to be taken from others."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
            if function is torch.empty and all(type(size) is int for size in args) and math.prod(args) > MEMORY:
                args = (0,)
        args = tuple(
            "cpu" if isinstance(argument, str) and argument.startswith("cuda") else argument for argument in args
        )
        return function(*args, **kwargs)


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> torch.Tensor:
    """Stands in for their Triton kernel: x (batch, seq, heads, dim)."""
    assert cu_seqlens is None and not inplace and not conjugate
    pairs, offsets = cos.shape[-1], torch.as_tensor(seqlen_offsets).view(-1, 1)
    places = (offsets.to(x.device) + torch.arange(x.shape[1], device=x.device)).expand(x.shape[0], -1)
    c, s = (table.float()[places.clamp(max=len(table) - 1).long()].unsqueeze(2) for table in (cos, sin))
    low, high = (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)) if interleaved else (
        slice(0, pairs), slice(pairs, 2 * pairs))  # fmt: skip
    result, a, b = x.float().clone(), x[..., low].float(), x[..., high].float()
    result[..., low], result[..., high] = a * c - b * s, b * c + a * s
    return result.to(x.dtype)


def stand_in(checkout: Path) -> None:
    """`flash_attn` as the tests import it."""

    def module(name: str, **content: Any) -> None:
        made = sys.modules[name] = types.ModuleType(name)
        made.__dict__.update(content)

    functions = {name: getattr(flash_attn, name) for name in flash_attn.__all__}
    module("flash_attn", __path__=[str(checkout / "flash_attn")], **functions)
    # S_dmask is relative to the greatest weight of its whole row: there is one block of keys.
    blocks = {"_get_block_size_n": lambda *arguments: 1 << 30, "USE_TRITON_ROCM": False}
    module("flash_attn.flash_attn_interface", **functions, **blocks)
    module("flash_attn.ops", __path__=[])
    module("flash_attn.ops.triton", __path__=[])
    module("flash_attn.ops.triton.rotary", apply_rotary=apply_rotary)
    # FlashAttention 3's: a module of its own beside its tests. A plan of its scheduler means nothing here.
    module("flash_attn_interface", **functions, get_scheduler_metadata=lambda *arguments, **keywords: None)
    sys.path.insert(0, str(checkout / "hopper"))


def redirect() -> None:
    """Questions about the device, answered for a CPU."""
    torch.cuda.get_device_capability = lambda *device: (9, 0)
    torch.cuda.get_device_properties = lambda *device: types.SimpleNamespace(total_memory=MEMORY)
    torch.cuda.synchronize = lambda *device: None


class Test(NamedTuple):
    name: str
    function: Callable[..., None]
    parameters: list[tuple[list[str], list[Any]]]
    skipped: bool

    @property
    def count(self) -> int:
        return math.prod(len(values) for _, values in self.parameters)

    def draws(self, chance: random.Random, count: int, longest: int) -> Iterator[dict[str, Any]]:
        """`count` different ones, or as many as there are."""
        seen: set[str] = set()
        for _ in range(20 * count):
            arguments: dict[str, Any] = {}
            for names, values in self.parameters:
                value = chance.choice(values)
                arguments.update(zip(names, value if len(names) > 1 else (value,), strict=True))
            long = any("seqlen" in name and type(value) is int and value > longest for name, value in arguments.items())
            if not long and str(arguments) not in seen and len(seen) < count:
                seen.add(str(arguments))
                yield arguments


def tests_of(path: Path, rounds: int) -> Iterator[Test]:
    spec = importlib.util.spec_from_file_location("peer_tests", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Races that only a GPU has are looked for in hundreds of rounds: a loop of so many ends after a few.
    vars(module)["range"] = lambda *limits: range(
        min(rounds, limits[0]) if len(limits) == 1 and limits[0] >= 100 else limits[0], *limits[1:]
    )
    for name, function in vars(module).items():
        if name.startswith("test_") and callable(function):
            parameters, skipped = [], False
            for mark in getattr(function, "pytestmark", []):
                if mark.name == "parametrize":
                    names, values = mark.args[:2]
                    parameters.append((re.split(r"\s*,\s*", names) if isinstance(names, str) else names, list(values)))
                skipped |= mark.name == "skip" or (mark.name == "skipif" and bool(mark.args[0]))
            yield Test(name, function, parameters, skipped)


def outcome_of(test: Test, arguments: dict[str, Any]) -> tuple[str, str]:
    """passed, failed, skipped or not offered; and why."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            test.function(**arguments)
    except pytest.skip.Exception as reason:
        return "skipped", str(reason)
    except (NotImplementedError, UnsupportedError) as reason:
        return "not offered", re.split(r" is not offered| \(", str(reason))[0]
    except AttributeError as reason:
        if "_OpNamespace" not in str(reason):
            return "failed", f"AttributeError: {reason}"
        return "not offered", f"an internal operator of theirs: {reason}"
    except ImportError as reason:
        return "not offered", f"an internal function of theirs: {reason}".split(" from ")[0]
    except (Exception, pytest.fail.Exception) as reason:
        return "failed", f"{type(reason).__name__}: {reason}".split("\n")[0][:200]
    return "passed", ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a checkout of FlashAttention")
    parser.add_argument("--file", default="tests/test_flash_attn.py", help="of the checkout (default: %(default)s)")
    parser.add_argument("--tests", default="", help="only tests whose names contain this")
    parser.add_argument("--count", type=int, default=20, help="parametrisations of each test (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=1 << 30, help="draw no longer sequences than this")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each test; then the next one")
    parser.add_argument("--rounds", type=int, default=3, help="of a test that repeats itself (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    stand_in(options.checkout)
    if options.device == "cpu":
        redirect()
    with OnCpu() if options.device == "cpu" else contextlib.nullcontext():
        return run(options)


def run(options: argparse.Namespace) -> int:
    columns = "drawn", "passed", "failed", "skipped", "not offered"
    print(f"{'test':44}{'of':>8}" + "".join(f"{column:>13}" for column in columns))
    features: Counter[str] = Counter()
    failures: list[str] = []
    offered = wanted = 0.0
    for test in tests_of(options.checkout / options.file, options.rounds):
        if options.tests not in test.name or test.skipped:
            continue
        counts: Counter[str] = Counter()
        chance, end = random.Random(f"{options.seed} {test.name}"), time.monotonic() + options.seconds
        for arguments in test.draws(chance, options.count, options.longest):
            if time.monotonic() > end:
                break
            outcome, why = outcome_of(test, arguments)
            counts["drawn"] += 1
            counts[outcome] += 1
            if outcome == "not offered":
                features[why] += 1
            if outcome == "failed":
                failures.append(f"{test.name}({', '.join(f'{n}={v}' for n, v in arguments.items())}): {why}")
                print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
        print(f"{test.name:44}{test.count:>8}" + "".join(f"{counts[column]:>13}" for column in columns), flush=True)
        asked = counts["drawn"] - counts["skipped"]
        if asked:
            wanted += test.count
            offered += test.count * (asked - counts["not offered"]) / asked
    print(f"\noffered, each test by its number of parametrisations: {100 * offered / max(wanted, 1):.0f} %")
    for feature, count in features.most_common():
        print(f"not offered, {count} times: {feature}")
    for failure in failures:
        print(f"failed: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
