"""What one small call costs the host, whatever its shape and whatever was called before.

    python benchmarks/calls.py [--device cuda] [--json FILE]

Calls so small that the work is nothing: dense, packed, decoding from pages, the last two as FlashAttention has them
(varlen, with_kvcache, which also writes new tokens), the forward pass of training, and the same of PyTorch's operator
where it has one. Shapes repeat, grow by a token each call (a cache in use), or are random (what a server does). Of
each, many short rounds in turn with the others, so that a busy machine is as unkind to all; printed is the median over
rounds of the quickest tenth's time per call. On a GPU the time is the host's: calls are not waited for.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F

import aiter
from aiter import flash_attn

HEADS, HEAD_DIM, PAGE, LONGEST = 1, 8, 16, 64
SHAPES = ("repeated", "growing", "random")


def lengths_of(shape: str, seed: int) -> Iterator[int]:
    """Sequence lengths, one a call."""
    source, length = random.Random(seed), 0
    while True:
        length = {"repeated": 8, "growing": length % LONGEST + 1, "random": source.randint(1, LONGEST)}[shape]
        yield length


def calls(device: str, shape: str) -> dict[str, Callable[[], object]]:
    """Functions that each make one call; every one has its own, equal, series of lengths."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = torch.randn(1, LONGEST, HEADS, HEAD_DIM, device=device, dtype=dtype)
    trained = rows.clone().requires_grad_()
    flat = rows[0]
    cache = torch.randn(2, LONGEST // PAGE, HEADS, PAGE, HEAD_DIM, device=device, dtype=dtype)
    pages = torch.arange(LONGEST // PAGE, dtype=torch.int32, device=device).unsqueeze(0)
    held = [torch.tensor([n], dtype=torch.int32, device=device) for n in range(LONGEST + 1)]
    ends = [torch.tensor([0, n], dtype=torch.int32, device=device) for n in range(LONGEST + 1)]
    token, one = rows[:, :1], flat[:1]
    new = [token.clone() for _ in "kv"]
    output = torch.empty_like(one)
    by_token = cache.transpose(2, 3).contiguous()  # as FlashAttention has it: pages of tokens of heads

    def series() -> Iterator[int]:
        return lengths_of(shape, 0)

    def dense(lengths=series()):  # noqa: B008
        some = rows[:, : next(lengths)]
        return aiter.flash_attn_func(some, some, some)

    def pytorch(lengths=series()):  # noqa: B008
        some = rows[:, : next(lengths)].transpose(1, 2)
        return F.scaled_dot_product_attention(some, some, some)

    def packed(lengths=series()):  # noqa: B008
        n = next(lengths)
        some = flat[:n]
        return aiter.variable_length_attention(some, some, some, held[n], n)

    def paged(lengths=series()):  # noqa: B008
        return aiter.flash_attn_with_kvcache(token, cache, pages, PAGE, cache_seqlens=held[next(lengths)])

    def varlen(lengths=series()):  # noqa: B008
        n = next(lengths)
        some = flat[:n]
        return flash_attn.flash_attn_varlen_func(some, some, some, ends[n], ends[n], n, n, causal=True)

    def varlen_paged(lengths=series()):  # noqa: B008
        n = next(lengths)
        return flash_attn.flash_attn_varlen_func(
            *(one, *by_token, ends[1], None, 1, LONGEST),
            **{"causal": True, "seqused_k": held[n], "block_table": pages, "out": output},
        )

    def kvcache(lengths=series()):  # noqa: B008
        used = {"cache_seqlens": held[next(lengths)], "block_table": pages, "causal": True}
        return flash_attn.flash_attn_with_kvcache(token, *by_token, **used)

    def appending(lengths=series()):  # noqa: B008
        used = {"cache_seqlens": held[next(lengths) - 1], "block_table": pages, "causal": True}
        return flash_attn.flash_attn_with_kvcache(token, *by_token, *new, **used)

    def training(lengths=series()):  # noqa: B008
        some = trained[:, : next(lengths)]
        with torch.enable_grad():
            return aiter.flash_attn_func(some, some, some)

    def pytorch_training(lengths=series()):  # noqa: B008
        some = trained[:, : next(lengths)].transpose(1, 2)
        with torch.enable_grad():
            return F.scaled_dot_product_attention(some, some, some)

    def slicing(lengths=series()):  # noqa: B008
        return rows[:, : next(lengths)]

    def slicing_a_leaf(lengths=series()):  # noqa: B008
        with torch.enable_grad():
            return trained[:, : next(lengths)]

    return {
        "dense": dense,
        "packed": packed,
        "paged": paged,
        "varlen": varlen,
        "varlen paged, out=": varlen_paged,
        "paged, with_kvcache": kvcache,
        "paged, appending": appending,
        "training": training,
        "PyTorch dense": pytorch,
        "PyTorch training": pytorch_training,
        "(slice)": slicing,
        "(slice of a leaf)": slicing_a_leaf,
    }


def measure(functions: dict[str, Callable[[], object]], rounds: int, count: int) -> dict[str, float]:
    """Seconds per call of each: the median over rounds of their quickest tenth."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        for _ in range(2 * LONGEST):
            function()
    for _ in range(rounds):
        for name, function in functions.items():
            begin = time.perf_counter()
            for _ in range(count):
                function()
            times[name].append((time.perf_counter() - begin) / count)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
    return {name: statistics.median(sorted(values)[: max(1, rounds // 10)]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, dict[str, float]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for shape in SHAPES:
            report[shape] = measure(calls(options.device, shape), options.rounds, 50)
    for shape in SHAPES:  # the cost of making the arguments is nobody's
        row = report[shape]
        plain, leaf = row.pop("(slice)"), row.pop("(slice of a leaf)")
        for name in row:
            row[name] -= 0.0 if "paged" in name else leaf if "training" in name else plain
    print("us per call".ljust(20), *(shape.rjust(10) for shape in SHAPES))
    for name in report[SHAPES[0]]:
        print(name.ljust(20), *(f"{report[shape][name] * 1e6:10.1f}" for shape in SHAPES))
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": options.device, "torch": torch.__version__, "seconds": report}, file, indent=1)


if __name__ == "__main__":
    main()
