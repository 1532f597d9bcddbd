"""What context parallelism is predicted to cost on 8 to 1024 GPUs: aiter/distributed/cost.py, printed.

    python benchmarks/context_parallel_model.py [--tokens-per-gpu 16384] [--heads 32/8] [--forward]
        [--flops 550e12 --within 200e9 --between 40e9 --node 8] [--measured context_parallel.json]

Every figure of the table is predicted: nothing here was measured, but what --measured reads, a file that
benchmarks/context_parallel.py has written; its rows are printed beside the predictions for the same case.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from aiter.distributed.cost import Machine, Problem, predict

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
SCHEMES = ("allgather", "alltoall", "ring", "alltoall+ring")


def problem(
    tokens: int,
    world: int,
    heads: tuple[int, int],
    backward: bool,
    window: int | None = None,
    head_dim: int = 128,
    size: int = 2,
    documents: list[int] | None = None,
) -> Problem:
    """Causal and balanced; in a window, contiguous: only the rows before a rank's own are sent. documents: where they
    end, with 0; each is cut by itself."""
    if documents is not None:
        pairs = sum((stop - start) ** 2 / 2 for start, stop in itertools.pairwise(documents))
        seen, span, runs = pairs / tokens**2, (world - 1) / world, 2 * (len(documents) - 1)
    elif window is None:
        seen, span, runs = 0.5, (world - 1) / world, 2
    else:
        seen, span, runs = min(0.5, window / tokens), min(window / tokens, (world - 1) / world), 1
    return Problem(tokens, 1, *heads, head_dim, head_dim, size, seen, span, 1.0, runs, backward)


def row(case: Problem, world: int, machine: Machine) -> dict[str, float]:
    """Efficiency of each scheme that can be: the time of a rank's products over all of its time."""
    inner = min(machine.node, world, case.heads_q)
    found = {}
    for scheme in SCHEMES:
        if scheme == "alltoall" and world > case.heads_q:
            continue
        if scheme == "alltoall+ring" and world <= inner:
            continue
        found[scheme] = predict(scheme, case, world, machine, inner).efficiency
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens-per-gpu", type=int, default=16384)
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads")
    parser.add_argument("--window", type=int)
    parser.add_argument("--forward", action="store_true", help="the forward pass alone")
    parser.add_argument("--measured", type=Path, help="JSON of benchmarks/context_parallel.py")
    for name in Machine._fields:
        default = Machine._field_defaults[name]
        parser.add_argument(f"--{name}", type=type(default), default=default)
    given = parser.parse_args()
    machine = Machine(*(getattr(given, name) for name in Machine._fields))
    heads_q, heads_kv = (int(part) for part in given.heads.split("/"))

    print(f"predicted, from {machine}")
    what = "forward" if given.forward else "forward and backward"
    print(f"efficiency, {what}, causal, {given.tokens_per_gpu} tokens a GPU, {given.heads} heads of 128, bf16")
    print(f"{'GPUs':>6} {'tokens':>10}" + "".join(f"{scheme:>16}" for scheme in SCHEMES) + f"{'step ms (best)':>16}")
    for world in WORLDS:
        tokens = world * given.tokens_per_gpu
        case = problem(tokens, world, (heads_q, heads_kv), not given.forward, given.window)
        found = row(case, world, machine)
        compute = predict("allgather", case, world, machine).compute
        cells = "".join(f"{found[scheme]:16.2f}" if scheme in found else f"{'-':>16}" for scheme in SCHEMES)
        print(f"{world:6d} {tokens:10d}{cells}{1e3 * compute / max(found.values()):16.1f}")

    if given.measured:
        print("\nmeasured, and predicted from the speed of one GPU in the same run")
        for measured in json.loads(given.measured.read_text())["cases"]:
            machine = machine._replace(flops=measured["one GPU, FLOP/s"])
            case = problem(
                *(measured["tokens"], measured["ranks"], (measured["heads_q"], measured["heads_kv"])),
                *(measured["backward"], measured["window"], measured["head_dim"]),
                documents=measured.get("documents"),
            )
            found = row(case, measured["ranks"], machine)
            for scheme, rate in measured["FLOP/s"].items():
                if scheme in found:
                    print(
                        f"{measured['case']:44} {scheme:12} measured {rate / measured['one GPU, FLOP/s']:5.2f}   "
                        f"predicted {found[scheme]:5.2f}"
                    )


if __name__ == "__main__":
    main()
