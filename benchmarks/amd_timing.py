"""When AMD kernels do what, predicted by the timing model of tests/emulator: how busy the matrix unit is, what waves
wait for, and the speed that follows. Predicted, never measured: every table names the model's error on others' kernels.

    AITER_HIPCC=... python benchmarks/amd_timing.py --arch gfx942 --head-dim 128 [--causal] [--seq 16384] [--batch 2]
                           [--heads 32] [--kernel forward|backward|decode] [--json FILE] [--plot FILE] [--listing 20]
    python benchmarks/amd_timing.py --arch gfx942 --code-object FILE --symbol NAME --grid 8,1,1 --block 256
                           --arguments "buffer:1048576 buffer:4096 i32:1024 f32:0.125"
    python benchmarks/amd_timing.py --arch gfx942 --parameters [--probe FILE]

The machine code of a few workgroups, as many as a CU holds, is executed and played on one CU
(tests/emulator/timing.cpp) at two lengths; a launch of the whole shape follows from their costs. --probe: what a card
measured (benchmarks/amd_probe) in place of the table's numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import amd_predict  # first: it finds the test tree
import emulator
import torch
from amd_peers import aligned
from driver import EMULATED, attend, gradients
from emulator import timing

PASSES = ("dQ", "dK and dV", "dK", "dV")
COLOURS = {
    "matrix": "#d62728", "vector": "#1f77b4", "lds": "#2ca02c", "memory": "#9467bd", "scalar": "#7f7f7f",
    "scalar memory": "#bcbd22",
}  # fmt: skip


def record(call: Callable[[dict], object], groups: Callable[[dict], list[int]]) -> dict[str, dict]:
    """Statistics of the kernels that the call launches, with the workgroups recorded that suit the last of them."""
    stats: dict[str, dict] = {}
    with timing.recorded([0]):
        call(stats)
    chosen = groups(stats)
    stats.clear()
    with timing.recorded(chosen):
        call(stats)
    return stats


def query_rows(options: argparse.Namespace, keys: int) -> int:
    """Of a head in the call that is recorded: whole tiles of any kernel's."""
    return keys if options.causal or options.kernel == "backward" else 256


def problem(options: argparse.Namespace, arch: str, keys: int) -> tuple[Callable, Callable]:
    """A call of our kernel with so many keys, one head for each workgroup on the CU, and which workgroups to record."""
    heads = 1 if options.kernel == "decode" else 4
    rows = query_rows(options, keys)
    if options.kernel == "decode":
        query = torch.randn(1, 1, options.heads, options.head_dim).bfloat16()
        key, value = (aligned(keys, options.kv_heads, options.head_dim) for _ in range(2))
        where = {}
        if options.page_size:
            key, value = (tensor.view(-1, options.page_size, *tensor.shape[2:]) for tensor in (key, value))
            where["page_table"] = torch.randperm(len(key)).int().view(1, -1)
        return (
            lambda stats: attend(
                arch, query, key, value, name="attention_decode", softcap=options.softcap, stats=stats, **where
            ),
            lambda stats: list(range(max(on_a_cu(arch, seen) for seen in stats.values()))),
        )
    query, key, value, grad = (aligned(n, heads, options.head_dim) for n in (rows, keys, keys, rows))

    def groups(stats: dict) -> list[int]:
        seen = max(stats.values(), key=lambda costs: costs["total"]["cycles"]["matrix"])
        of_head = seen["workgroups"] // heads
        # The first workgroups of different heads: with a mask they see most keys.
        return [(i % heads) * of_head for i in range(timing.resident_groups(seen))]

    if options.kernel == "forward":
        return lambda stats: attend(
            arch, query, key, value, causal=options.causal, softcap=options.softcap, stats=stats
        ), groups
    lse = torch.zeros(1, heads, rows)
    call = lambda stats: gradients(  # noqa: E731
        arch, query, key, value, query, lse, grad, causal=options.causal, softcap=options.softcap, stats=stats
    )
    return call, groups


def on_a_cu(arch: str, seen: dict) -> int:
    """Workgroups that a CU has at a time: as many as it holds, if the launch has as many for each."""
    return min(timing.resident_groups(seen), -(-seen["workgroups"] // int(timing.values(arch)["cus"])))


def kernels(stats: dict[str, dict]) -> dict[str, dict]:
    """Those that do the work: with matrix products, or else with most instructions."""
    busy = {name: seen for name, seen in stats.items() if seen["total"]["cycles"]["matrix"]}
    return busy or dict([max(stats.items(), key=lambda item: sum(item[1]["total"]["instructions"].values()))])


def title(name: str) -> str:
    if match := re.search(r"attention_backwardILi(\d)E", name):
        return PASSES[int(match[1])]
    return next((word for word in ("forward", "decode", "merge") if word in name), name)


def predict(options: argparse.Namespace, arch: str) -> list[dict]:
    lengths = [options.seq] if options.kernel == "decode" else [options.length, 2 * options.length]
    # Where memory bounds a kernel, power does not.
    clock = options.clock or timing.clock_at(arch, 0.0 if options.kernel == "decode" else 1.0)
    with emulator.session(arch):
        pass  # from here on the runtime has this arch's number of CUs, by which workspaces are measured
    runs = []
    for keys in lengths:
        call, groups = problem(options, arch, keys)
        stats = kernels(record(call, groups))
        rows = {name: max(1, query_rows(options, keys) * 4 // seen["workgroups"]) for name, seen in stats.items()}
        plays = {}
        for name, seen in stats.items():
            sharers = 1.0 if options.kernel == "decode" else amd_predict.sharers(arch, options.seq, rows[name])
            turns = 1 if options.kernel == "decode" else amd_predict.TURNS
            resident = on_a_cu(arch, seen) if options.kernel == "decode" else timing.resident_groups(seen)
            plays[name] = timing.play(
                arch, name, seen, resident=resident, groups=turns * resident, clock_mhz=clock, sharers=sharers,
                events=bool(options.plot),
            )  # fmt: skip
        runs.append((keys, stats, plays, rows))
    return [row(options, arch, clock, name, runs) for name in runs[-1][1]]


def row(options: argparse.Namespace, arch: str, clock: float, name: str, runs: list) -> dict:
    """Figures of one kernel."""
    _, stats, plays, rows = runs[-1]
    seen, played = stats[name], plays[name]
    loop = seen["main_loop"] or seen["total"]
    result = {
        "kernel": title(name), "arch": arch, "head_dim": options.head_dim, "causal": options.causal,
        "batch": options.batch, "heads": options.heads, "seq": options.seq,
        "registers": seen["registers"], "AGPRs": seen["agprs"], "SGPRs": seen["sgprs"],
        "LDS KB": seen["lds_bytes"] / 1024, "scratch": seen["scratch_bytes"],
        "LDS conflicts": loop["lds_conflicts"], "narrowest load": loop["narrowest_load"],
        "lines / least": loop["lines"] / loop["lines_least"] if loop["lines_least"] else None,
        "workgroups on a CU": played.resident,
        "waves a SIMD": played.resident * -(-seen["block"] // 64) / timing.SIMDS,
        "cycles an iteration": round(played.period), "drift": round(played.drift, 3),
        "MfmaUtil": played.matrix_util, "VALU": played.vector_util, "LDS": played.lds_util,
        "L2 bytes a cycle": played.bytes_per_cycle("l2"), "memory bytes a cycle": played.bytes_per_cycle("memory"),
        "bound": played.bound, "waves' time": {reason: round(share, 3) for reason, share in played.reasons.items()},
        "clock_mhz": clock, "trust": amd_predict.trust(), "played": played,
    }  # fmt: skip
    known = timing.values(arch)
    if options.kernel == "decode":
        rate = played.total["memory_bytes"] / played.cycles * known["cus"] * clock * 1e6
        result["TB/s"] = rate * 1e-12
        result["of the data sheet"] = rate * 1e-9 / known["memory_gb_per_s"]
        return result
    cost = amd_predict.Cost.between([(keys, played_there[name]) for keys, _, played_there, _ in runs])
    keys = amd_predict.workgroups(options.batch, options.heads, options.seq, rows[name], options.causal)
    whole = amd_predict.launch(arch, cost, played.resident, keys)
    result |= {"MfmaUtil of the launch": whole.matrix_util, "cycles": whole.cycles, "matrix cycles": whole.matrix}
    return result


def speeds(options: argparse.Namespace, arch: str, rows: list[dict]) -> dict:
    """TFLOP/s of all passes together, at the data sheet's clock and under the power limit."""
    cycles = sum(r["cycles"] for r in rows)
    matrix = sum(r["matrix cycles"] for r in rows)
    known = timing.values(arch)
    flops = 4 * options.seq**2 * options.head_dim * options.batch * options.heads / (2 if options.causal else 1)
    flops *= 2.5 if options.kernel == "backward" else 1
    util = matrix / (cycles * known["cus"])
    share = amd_predict.useful(arch, matrix, flops)
    return {
        "MfmaUtil": util, "useful": share,
        "TFLOP/s at the data sheet's clock": share * util * timing.peak(arch),
        "TFLOP/s under the power limit": share * timing.tflops(arch, util),
        "clock under it, MHz": timing.clock_at(arch, util),
    }  # fmt: skip


def show(rows: list[dict], total: dict | None, listing: int) -> None:
    for r in rows:
        print(f"{r['kernel']} {r['arch']} D {r['head_dim']}{' causal' * r['causal']}: {r['registers']} registers, "
              f"{r['waves a SIMD']:g} waves a SIMD, {r['cycles an iteration']} cycles an iteration "
              f"(drift {r['drift']:.1%})")  # fmt: skip
        print(f"  {r['LDS KB']:g} KB of LDS, conflicts {r['LDS conflicts']:.1%}, {r['scratch']} bytes of scratch, "
              f"narrowest load {r['narrowest load']} bytes")  # fmt: skip
        l2, memory = r["L2 bytes a cycle"], r["memory bytes a cycle"]
        print(f"  main loop: MfmaUtil {r['MfmaUtil']:.1%}, VALU {r['VALU']:.1%}, LDS {r['LDS']:.1%}, "
              f"{l2:.1f} B a cycle from L2, {memory:.1f} from memory")  # fmt: skip
        shares = r["waves' time"].items()
        print("  waves: " + ", ".join(f"{reason} {share:.1%}" for reason, share in shares))
        if "TB/s" in r:
            share = r["of the data sheet"]
            print(f"  {r['TB/s']:.2f} TB/s at {r['clock_mhz']:.0f} MHz, {share:.0%} of the data sheet's")
        played = r["played"]
        stalls = [(cycles, why, i) for i, reasons in played.stalls.items() for why, cycles in reasons.items()]
        for cycles, why, i in sorted((s for s in stalls if s[1] != "issued"), reverse=True)[:listing]:
            print(f"    {cycles:8d} {why:8s} {played.texts[i][1]}")
    if total:
        print("  launch: " + ", ".join(f"{k} {v:.3g}" if v < 10 else f"{k} {v:.0f}" for k, v in total.items()))
    print(f"  predicted, not measured; the model's error: {rows[0]['trust']}")


def result_of(rows: list[dict], whole: dict | None) -> dict:
    return {"launch": whole, "kernels": [{k: v for k, v in row.items() if k != "played"} for row in rows]}


def table(results: list[dict]) -> None:
    """One line for each kernel, in Markdown; speeds are those of all of a call's kernels together."""
    print(
        "\n| kernel | arch | D | registers | waves a SIMD | MfmaUtil, loop | launch | VALU | LDS | waits for | speed |"
    )
    print("| --- " * 11 + "|")
    for result in results:
        for r in result["kernels"]:
            waits = [(why, share) for why, share in r["waves' time"].items() if why not in ("issued", "other")][:3]
            speed = f"{r['TB/s']:.2f} TB/s" if "TB/s" in r else ""
            if result["launch"]:
                speed = f"{result['launch']['TFLOP/s under the power limit']:.0f} TFLOP/s"
            launch = r.get("MfmaUtil of the launch")
            print(f"| {r['kernel']} | {r['arch']} | {r['head_dim']} | {r['registers']} | {r['waves a SIMD']:g} "
                  f"| {r['MfmaUtil']:.0%} | {f'{launch:.0%}' if launch else ''} | {r['VALU']:.0%} | {r['LDS']:.0%} "
                  f"| {', '.join(f'{why} {share:.0%}' for why, share in waits)} | {speed} |")  # fmt: skip


def plot(played: timing.Played, path: Path, heading: str) -> None:
    """A strip of the main loop: waves by cycles, units by colour, and below whether each SIMD's matrix unit works."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    begin = played.window[0]
    length = int(2 * played.period) or 4000
    waves = sorted({(event[0], event[1]) for event in played.events})
    figure, axis = pyplot.subplots(figsize=(14, 1.2 + 0.32 * (len(waves) + timing.SIMDS)))
    bars: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for group, wave, cycle, busy, unit, _ in played.events:
        if unit in COLOURS and cycle < begin + length:
            line = waves.index((group, wave))
            bars.setdefault((line, unit), []).append((cycle - begin, busy))
            if unit == "matrix":
                bars.setdefault((len(waves) + line % timing.SIMDS, unit), []).append((cycle - begin, busy))
    for (line, unit), spans in bars.items():
        axis.broken_barh(spans, (line + 0.1, 0.8), facecolors=COLOURS[unit], linewidth=0)
    names = [f"workgroup {group}, wave {wave}" for group, wave in waves]
    names += [f"matrix unit {i}" for i in range(timing.SIMDS)]
    axis.set_yticks([i + 0.5 for i in range(len(names))], names, fontsize=7)
    axis.set(xlim=(0, length), ylim=(len(names), 0), xlabel="cycle", title=f"{heading} (predicted)")
    handles = [patches.Patch(color=colour, label=unit) for unit, colour in COLOURS.items()]
    axis.legend(handles=handles, ncols=len(handles), fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def arguments_of(text: str) -> tuple[bytes, list[torch.Tensor]]:
    """Packed arguments and the buffers that they point to."""
    packed, buffers = b"", []
    for word in text.split():
        kind, value = word.split(":")
        if kind == "buffer":
            buffers.append(torch.randn(int(value) // 4 + 64))
            packed += b"\0" * (-len(packed) % 8) + struct.pack("<Q", buffers[-1].data_ptr())
        elif kind in ("i32", "i64", "f32"):
            code, size = {"i32": ("i", 4), "i64": ("q", 8), "f32": ("f", 4)}[kind]
            number = float(value) if kind == "f32" else int(value)
            packed += b"\0" * (-len(packed) % size) + struct.pack(f"<{code}", number)
        else:
            raise SystemExit(f"an argument is {word!r}; it must be buffer:BYTES, i32:, i64: or f32:VALUE")
    return packed, buffers


def play_object(options: argparse.Namespace, arch: str) -> dict:
    """A code object of one's own, launched as the options say; the first workgroups are recorded."""
    code = options.code_object.read_bytes()
    grid, packed = [int(n) for n in options.grid.split(",")], arguments_of(options.arguments)

    def run(groups: list[int]) -> dict:
        with emulator.session(arch) as gpu:
            gpu.strict(options.strict)
            for buffer in packed[1]:
                gpu.allow(buffer, writable=True)
            with timing.recorded(groups):
                gpu.launch(code, options.symbol, grid, (options.block,), packed[0], options.lds)
            return gpu.stats()[options.symbol]

    seen = run(list(range(timing.resident_groups(run([0])))))
    clock = options.clock or timing.values(arch)["clock_mhz"]
    played = timing.play(arch, options.symbol, seen, clock_mhz=clock, events=bool(options.plot))
    alike = {"kernel": "decode", "head_dim": options.head_dim[0]}
    return row(argparse.Namespace(**vars(options) | alike), arch, clock, options.symbol,
               [(0, {options.symbol: seen}, {options.symbol: played}, {})])  # fmt: skip


def some_of(allowed: Sequence[str], name: str) -> Callable[[str], list[str]]:
    """The type of an argument that is one or more of these, with commas."""

    def words(text: str) -> list[str]:
        for word in text.split(","):
            if word not in allowed:
                raise argparse.ArgumentTypeError(f"{word!r} is no {name}")
        return text.split(",")

    return words


def main() -> None:
    archs = some_of(EMULATED, f"arch of the emulator's: {', '.join(EMULATED)}")
    kernels = some_of(("forward", "backward", "decode"), "kernel of these: forward, backward, decode")
    head_dims = some_of([str(dim) for dim in range(8, 513, 8)], "multiple of 8 up to 512")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=archs, default="gfx942", help=f"one or more of {','.join(EMULATED)}")
    parser.add_argument("--kernel", type=kernels, default="forward", help="one or more of forward, backward, decode")
    parser.add_argument("--head-dim", type=head_dims, default="128", help="one or more, with commas")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8, help="decode only: others have as many as heads")
    parser.add_argument("--page-size", type=int, default=0, help="decode only: tokens of a page; 0: contiguous")
    parser.add_argument("--softcap", type=float, default=0.0, help="0: none")
    parser.add_argument("--seq", type=int, default=16384, help="of the launch that is predicted")
    parser.add_argument("--length", type=int, default=1024, help="keys of the shorter run that is played")
    parser.add_argument("--clock", type=float, help="MHz; without it what power allows")
    parser.add_argument("--listing", type=int, default=0, help="instructions with the most waiting to list")
    parser.add_argument("--probe", type=Path, help="parameters that a card measured: JSON by arch and name")
    parser.add_argument("--parameters", action="store_true", help="list the model's numbers and their sources")
    parser.add_argument("--table", action="store_true", help="a line for each kernel at the end, in Markdown")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--code-object", type=Path)
    parser.add_argument("--symbol")
    parser.add_argument("--grid", default="1,1,1")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--lds", type=int, default=0, help="bytes of dynamic LDS")
    parser.add_argument("--arguments", default="")
    parser.add_argument("--strict", action="store_true", help="hold the code object to the emulator's rules")
    options = parser.parse_args()
    if options.code_object and not options.symbol:
        parser.error("--code-object needs --symbol, the kernel's name in it")
    torch.manual_seed(0)
    results = []
    for arch in options.arch:
        if options.probe:
            measured = json.loads(options.probe.read_text())[arch]
            timing.replace(arch, {name: value for name, value in measured.items() if not name.startswith("seen_")})
        if options.parameters:
            for name, (value, source) in timing.parameters(arch).items():
                print(f"{arch} {name} = {value:g}: {source}")
        elif options.code_object:
            rows = [play_object(options, arch)]
            show(rows, None, options.listing)
            results.append(result_of(rows, None))
        else:
            for kernel, head_dim in itertools.product(options.kernel, options.head_dim):
                chosen = argparse.Namespace(**vars(options) | {"kernel": kernel, "head_dim": int(head_dim)})
                rows = predict(chosen, arch)
                whole = None if kernel == "decode" else speeds(chosen, arch, rows)
                show(rows, whole, options.listing)
                results.append(result_of(rows, whole))
                if options.plot:
                    plot(rows[-1]["played"], options.plot, f"{rows[-1]['kernel']} {arch} D {head_dim}")
    if options.table:
        table(results)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
