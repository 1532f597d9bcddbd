"""How far the timing model can be trusted: kernels of others, unmodified, against published figures of their speed.

    python benchmarks/amd_validation.py --checkouts FOLDER --objects FOLDER [--compiler "hipcc ..."]
                                        [--json FILE] [--plot FILE]

checkouts: a folder with checkouts of the repositories in amd_peers.py, each under its name. objects: where built code
objects are kept. Every kernel is executed at two lengths, the rows of the workgroup that was timed are compared with
attention in float32, and its cost, linear in the length, gives the others'. Nothing is fitted on these figures.

MfmaUtil is compared where it was published. Elsewhere TFLOP/s are, for which the clock must be guessed: see
`timing.clock_at`. Kernels marked as `other_code` came out of the compiler at hand with other waits or registers than
their authors had; they are shown, but count in no error.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

import amd_predict  # first: it finds the test tree
import emulator
import torch
from amd_peers import PEERS, Peer, Problem
from emulator import timing


def run(peer: Peer, variant: str, seq: int, options: argparse.Namespace, shared: set[float]) -> dict:
    """Executes the peer at that length and plays it, for each number of CUs that share cache lines."""
    problem = Problem(seq, peer.heads, peer.head_dim, peer.causal)
    launch = peer.launch(problem)
    code = peer.code(options.checkouts, options.objects, options.compiler, seq, variant, options.triton)
    with emulator.session(peer.arch) as gpu:
        gpu.strict(False)
        for tensor in (problem.query, problem.key, problem.value):
            gpu.allow(tensor)
        for tensor in (problem.output, problem.lse):
            gpu.allow(tensor, writable=True)
        if launch.prepare:
            launch.prepare(gpu, code)
        with timing.recorded([launch.group]):
            gpu.launch(code, launch.kernel, launch.grid, (launch.block,), launch.arguments, launch.lds_bytes)
        seen = gpu.stats()[launch.kernel]
    clock = timing.clock_at(peer.arch, 1.0)
    groups = amd_predict.TURNS * timing.resident_groups(seen)
    played = {n: timing.play(peer.arch, launch.kernel, seen, groups=groups, clock_mhz=clock, sharers=n) for n in shared}
    return {"seen": seen, "played": played, "error": problem.error(launch.rows)}


def validate(peer: Peer, options: argparse.Namespace) -> list[dict]:
    def shared(seq: int) -> float:
        return amd_predict.sharers(peer.arch, seq, peer.rows)

    lengths = {shared(figure[2]) for figure in peer.published}
    variants = [[run(peer, variant, seq, options, lengths) for seq in peer.sizes] for variant in peer.variants]
    rows = []
    for batch, heads, seq, what, published, where in peer.published:
        keys = amd_predict.workgroups(batch, heads, seq, peer.rows, peer.causal, peer.order, peer.equal)
        flops = 4 * seq * seq * peer.head_dim * batch * heads / (2 if peer.causal else 1)
        wholes = []
        for runs in variants:
            played = [done["played"][shared(seq)] for done in runs]
            cost = amd_predict.Cost.between(list(zip(peer.sizes, played, strict=True)))
            wholes.append(amd_predict.launch(peer.arch, cost, played[0].resident, keys))
        utils = [whole.matrix_util for whole in wholes]
        # An autotuner gives each choice the same time, and counters were averaged over launches: the fast count more.
        util = sum(u * u for u in utils) / sum(utils)
        best = max(range(len(utils)), key=utils.__getitem__)
        played = [done["played"][shared(seq)] for done in variants[best]]
        share = amd_predict.useful(peer.arch, wholes[best].matrix, flops)
        predicted = 100 * util if what == "MfmaUtil" else share * timing.tflops(peer.arch, util)
        rows.append({
            "kernel": peer.name, "arch": peer.arch, "repository": peer.repository, "head_dim": peer.head_dim,
            "causal": peer.causal, "batch": batch, "heads": heads, "seq": seq, "what": what, "published": published,
            "predicted": round(predicted, 1), "error": round(predicted / published - 1, 3), "source": where,
            "main loop MfmaUtil": round(played[1].matrix_util, 3), "bound": played[1].bound,
            "largest difference": max(done["error"] for runs in variants for done in runs),
            "registers": variants[best][0]["seen"]["registers"],
            "other_code": peer.other_code,
        })  # fmt: skip
    return rows


def summary(rows: list[dict]) -> dict:
    """Median and worst error over all figures, and over the longest length of each kernel."""
    rows = [row for row in rows if not row["other_code"]]
    longest = {}
    for row in rows:
        if row["seq"] >= longest.get(row["kernel"], row)["seq"]:
            longest[row["kernel"]] = row
    result = {}
    utils = [row for row in rows if row["what"] == "MfmaUtil"]
    for name, chosen in (("all", rows), ("longest", list(longest.values())), ("MfmaUtil", utils)):
        if not chosen:
            continue
        errors = [abs(row["error"]) for row in chosen]
        result[name] = {"figures": len(errors), "median": round(median(errors), 3), "worst": round(max(errors), 3)}
    return result


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5))
    for axis, what in zip(axes, ("MfmaUtil", "TFLOP/s"), strict=True):
        chosen = [row for row in rows if row["what"] == what]
        for kernel in dict.fromkeys(row["kernel"] for row in chosen):
            points = [row for row in chosen if row["kernel"] == kernel]
            other = points[0]["other_code"]
            axis.scatter(
                [p["published"] for p in points], [p["predicted"] for p in points], s=18,
                label=kernel + " (other code)" * bool(other), marker="x" if other else "o",
            )  # fmt: skip
        most = 1.15 * max((max(row["published"], row["predicted"]) for row in chosen), default=1)
        for factor, style in ((1, "-"), (1.1, ":"), (0.9, ":")):
            axis.plot([0, most], [0, most * factor], style, color="grey", linewidth=0.8)
        axis.set(xlim=(0, most), ylim=(0, most), xlabel=f"published {what}", ylabel=f"predicted {what}")
        axis.legend(fontsize=7)
    figure.suptitle(
        "AMD timing model against published figures; dotted: 10 %.\n"
        "No number was fitted on these; docs/gpu.md says which rules were changed."
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", type=Path, required=True)
    parser.add_argument("--objects", type=Path, required=True)
    parser.add_argument("--compiler", default="hipcc", help="with options that every source needs")
    parser.add_argument("--triton", default=sys.executable, help="an interpreter that has Triton, for its kernel")
    parser.add_argument("--only", default="", help="a part of the kernels' names")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    print("| kernel | arch | shape | what | published | predicted | error | bound | largest difference |")
    print("| --- " * 9 + "|")
    for peer in PEERS:
        if options.only not in peer.name:
            continue
        for row in validate(peer, options):
            rows.append(row)
            shape = f"{row['batch']}x{row['heads']}x{row['seq']}, D {row['head_dim']}{', causal' * row['causal']}"
            print(
                f"| {row['kernel']} | {row['arch']} | {shape} | {row['what']} | {row['published']} "
                f"| {row['predicted']} | {row['error']:+.1%} | {row['bound']} | {row['largest difference']:.4f} |",
                flush=True,
            )
    print(summary(rows))
    if options.json:
        options.json.write_text(json.dumps({"summary": summary(rows), "rows": rows}, indent=1) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
