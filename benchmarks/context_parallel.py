"""Attention over a split sequence: ours by each scheme, PyTorch's context_parallel and a plain all-to-all, in one run.

    torchrun --nproc-per-node 4 benchmarks/context_parallel.py [--out FOLDER] [--tokens 16384,32768,65536,131072]
        [--heads 32/8,16/16] [--only REGEX, of names of cases: "^forward," leaves the backward passes out]
    python benchmarks/context_parallel.py --draw context_parallel-2.json context_parallel-4.json PICTURE.png

On GPUs over NCCL: bfloat16, head_dim 128, cuDNN in the peers. Without GPUs over gloo, with small shapes: that shows
that it runs, and what the schemes cost beside each other, no more. Prints, on rank 0, FLOP/s of a rank and, in
brackets, the share of what our own kernel does alone with the tokens of one rank (efficiency), twice: of calls in a
row, as the layers of a model make them, and of a call from an idle GPU to an idle GPU, of which the host's time until
the first launch is part. Medians, of the slowest rank. With --out also writes context_parallel.json and, where
matplotlib is installed, context_parallel.png; --draw makes one picture of several such files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel

import aiter
from aiter.distributed import context_parallel_attention, positions_of, shard

GPU = torch.cuda.is_available()
DTYPE, HEAD_DIM = (torch.bfloat16, 128) if GPU else (torch.float32, 64)
SCHEMES = ("allgather", "alltoall", "ring")
IN_A_ROW = 5 if GPU else 2


class Case(NamedTuple):
    name: str
    tokens: int
    heads_q: int
    heads_kv: int
    backward: bool
    window: int | None = None
    documents: tuple[int, ...] | None = None

    def flops(self, tokens: int) -> float:
        """Of a causal sequence of so many tokens, forward or forward and backward."""
        if self.documents is not None and tokens == self.tokens:
            pairs = sum((b - a) ** 2 / 2 for a, b in zip(self.documents, self.documents[1:], strict=False))
        elif self.window is not None:
            pairs = min(self.window, tokens / 2) * tokens
        else:
            pairs = tokens**2 / 2
        return 4 * HEAD_DIM * self.heads_q * pairs * (3.5 if self.backward else 1)


def cases(tokens: list[int], heads: list[tuple[int, int]]) -> list[Case]:
    found = []
    for count in tokens:
        for q, kv in heads:
            for backward in (False, True):
                direction = "forward + backward" if backward else "forward"
                found.append(Case(f"{direction}, {count} tokens, {q}/{kv}", count, q, kv, backward))
    longest, (q, kv) = tokens[-1], heads[0]
    found.append(Case(f"forward, window of 1/32, {longest} tokens", longest, q, kv, False, window=longest // 32))
    cuts = (0, 3, 11, 12, 20, 29, 32)  # of 32: documents of uneven length
    ends = tuple(longest * cut // 32 for cut in cuts)
    found.append(Case(f"forward, uneven documents, {longest} tokens", longest, q, kv, False, documents=ends))
    return found


def seconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Time of a call, of the slowest rank: one of several in a row, as layers of a model follow each other and the host
    runs ahead of the GPU; and one alone, from an idle GPU to an idle GPU. Medians."""
    for _ in range(2):
        call()

    def timed(calls: int) -> float:
        dist.barrier()
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        if GPU:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

    medians = [statistics.median(timed(calls) for _ in range(times)) for calls, times in ((IN_A_ROW, 3), (1, 5))]
    result = torch.tensor(medians, device=device, dtype=torch.float64)
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    in_a_row, alone = result.tolist()
    return in_a_row, alone


def step(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], backward: bool) -> Callable[[], object]:
    if not backward:
        return lambda: function(*tensors)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def both() -> None:
        output = function(*leaves)
        output.backward(torch.ones_like(output))

    return both


def heads_for_rows(tensor: torch.Tensor, back: bool) -> torch.Tensor:
    """What a plain all-to-all does, of heads that divide by the ranks."""
    world = dist.get_world_size()
    batch, rows, heads, dim = tensor.shape
    if back:
        sent = tensor.view(batch, world, rows // world, heads, dim).permute(1, 2, 0, 3, 4).contiguous()
    else:
        sent = tensor.view(batch, rows, world, heads // world, dim).permute(2, 1, 0, 3, 4).contiguous()
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    if back:  # (heads' ranks, rows, batch, heads, dim)
        return received.permute(2, 1, 0, 3, 4).reshape(batch, rows // world, heads * world, dim)
    return received.permute(2, 0, 1, 3, 4).reshape(batch, rows * world, heads // world, dim)


class PlainAllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, back):
        ctx.back = back
        return heads_for_rows(tensor, back)

    @staticmethod
    def backward(ctx, gradient):
        return heads_for_rows(gradient.contiguous(), not ctx.back), None


def sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if GPU else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def plain_alltoall(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    tensors = (PlainAllToAll.apply(tensor, False) for tensor in (query, key, value))
    return PlainAllToAll.apply(sdpa(*tensors).transpose(1, 2), True)


def pytorch_seconds(case: Case, mesh, device: torch.device) -> tuple[float, float]:
    """PyTorch's context_parallel, whose operators take as many KV heads as query heads. Inside, tensors are cut."""
    from torch.distributed.tensor.experimental import context_parallel

    tensors = [torch.randn(1, case.heads_q, case.tokens, HEAD_DIM, device=device, dtype=DTYPE) for _ in range(3)]

    def call(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    def both():
        output = call(*tensors)
        if case.backward:
            output.backward(torch.ones_like(output))

    with (
        sdpa_kernel(SDPBackend.CUDNN_ATTENTION),
        context_parallel(mesh, buffers=tensors, buffer_seq_dims=[2] * 3, no_restore_buffers=set(tensors)),
    ):
        for tensor in tensors:  # only now: the cut resizes them, which a leaf that takes a gradient refuses
            tensor.requires_grad_(case.backward)
        return seconds(both, device)


def rates_of(flops: float, times: tuple[float, float]) -> tuple[float, float]:
    return flops / times[0], flops / times[1]


def measure(case: Case, mesh, device: torch.device) -> dict:
    world = dist.get_world_size()
    torch.manual_seed(0)
    own_rows = case.tokens // world

    def randn(rows: int) -> list[torch.Tensor]:
        return [
            torch.randn(1, rows, heads, HEAD_DIM, device=device, dtype=DTYPE)
            for heads in (case.heads_q, case.heads_kv, case.heads_kv)
        ]

    options = {} if case.window is None else {"window_size": (case.window - 1, 0)}
    alone = step(lambda *t: aiter.flash_attn_func(*t, True, **options), randn(own_rows), case.backward)
    base = rates_of(case.flops(own_rows), seconds(alone, device))
    layout = "contiguous" if case.window else "zigzag"
    rates, memory = {}, {}
    tensors = randn(own_rows)
    if case.documents is not None:
        layout = positions_of(case.tokens, "zigzag", mesh, cu_seqlens=case.documents)
        tensors = [tensor[0] for tensor in randn(len(layout))]
        options["cu_seqlens"] = case.documents

    def ours(scheme: str) -> Callable[..., torch.Tensor]:
        return lambda *t: context_parallel_attention(*t, mesh, causal=True, layout=layout, scheme=scheme, **options)

    share = case.flops(case.tokens) / world
    for scheme in SCHEMES:
        call = step(ours(scheme), tensors, case.backward)
        if GPU:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        rates[scheme] = rates_of(share, seconds(call, device))
        if GPU:
            memory[scheme] = torch.cuda.max_memory_allocated() - before
    if case.window is None and case.documents is None:
        if case.heads_kv % world == 0:
            rates["plain all-to-all"] = rates_of(share, seconds(step(plain_alltoall, tensors, case.backward), device))
        if GPU:
            try:
                rates["PyTorch context_parallel"] = rates_of(share, pytorch_seconds(case, mesh, device))
            except (RuntimeError, NotImplementedError, torch.OutOfMemoryError) as error:
                if dist.get_rank() == 0:
                    print(f"{case.name}: PyTorch's context_parallel: {error}", file=sys.stderr)
    return {
        "case": case.name,
        "ranks": world,
        "tokens": case.tokens,
        "heads_q": case.heads_q,
        "heads_kv": case.heads_kv,
        "head_dim": HEAD_DIM,
        "backward": case.backward,
        "window": case.window,
        "documents": case.documents,
        "special": case.window is not None or case.documents is not None,
        "one GPU, FLOP/s": base[0],
        "FLOP/s": {name: rate for name, (rate, _) in rates.items()},
        "one GPU, from idle to idle": base[1],
        "from idle to idle": {name: rate for name, (_, rate) in rates.items()},
        "bytes beside the inputs": memory,
    }


def check(mesh, device: torch.device) -> None:
    """What is timed is right, gradients too: against one process, before any time is taken."""
    torch.manual_seed(1)
    group = mesh.get_group()
    tensors = [torch.randn(1, 512, heads, HEAD_DIM, device=device, dtype=DTYPE) for heads in (8, 4, 4, 8)]

    def both(function, *tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        output = function(*leaves)
        return output.detach(), *torch.autograd.grad(output, leaves, tensors[3])

    for options in ({}, {"window_size": (100, 0)}, {"softcap": 20.0}):
        whole = both(lambda *t, o=options: aiter.flash_attn_func(*t, True, **o), *tensors)
        own = [shard(tensor, 1, "zigzag", group) for tensor in tensors]
        for scheme in SCHEMES:
            how = {"causal": True, "layout": "zigzag", "scheme": scheme, **options}
            parts = both(lambda *t, how=how: context_parallel_attention(*t, mesh, **how), *own)
            for name, got, expected in zip(("output", "query", "key", "value"), parts, whole, strict=True):
                expected = shard(expected, 1, "zigzag", group)
                error = float((got.float() - expected.float()).norm() / expected.float().norm())
                assert error <= 4 * torch.finfo(DTYPE).eps, f"{scheme}, {options}, {name}: error {error}"


def picture(path: Path, runs: list[dict]) -> None:
    """Efficiency by tokens: a row of panels for each run, a panel for each direction and number of heads. Windows and
    documents: in the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [[case for case in run["cases"] if not case["special"]] for run in runs]
    panels = list(dict.fromkeys((case["heads_q"], case["heads_kv"], case["backward"]) for of in cases for case in of))
    names = list(dict.fromkeys(name for of in cases for case in of for name in case["FLOP/s"]))
    shape = {"squeeze": False, "sharey": True, "sharex": True}
    figure, axes = plt.subplots(len(runs), len(panels), figsize=(3.2 * len(panels) + 0.6, 3 * len(runs) + 0.9), **shape)
    lines = {}
    for of_run, run, own in zip(axes, runs, cases, strict=True):
        for panel, (heads_q, heads_kv, backward) in zip(of_run, panels, strict=True):
            rows = [
                case
                for case in own
                if (case["heads_q"], case["heads_kv"], case["backward"]) == (heads_q, heads_kv, backward)
            ]
            for number, name in enumerate(names):
                have = [row for row in rows if name in row["FLOP/s"]]
                share = [row["FLOP/s"][name] / row["one GPU, FLOP/s"] for row in have]
                (line,) = panel.plot([row["tokens"] for row in have], share, marker="o", color=f"C{number}")
                lines.setdefault(name, line)
            panel.axhline(1, color="0.8", zorder=0)
            panel.set_xscale("log", base=2)
            panel.set_title(
                f"{'forward + backward' if backward else 'forward'}, {heads_q}/{heads_kv} heads", fontsize=9
            )
        of_run[0].set_ylabel(f"{run['cases'][0]['ranks']} x {run['device']}\nof our kernel alone", fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel("tokens")
    axes[0][0].set_ylim(0, axes[0][0].get_ylim()[1])  # of all panels
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", default="16384,32768,65536,131072" if GPU else "1024")
    parser.add_argument("--heads", default="32/8,16/16" if GPU else "8/4")
    parser.add_argument("--only", default="", metavar="REGEX", help="the cases in whose names it is found")
    parser.add_argument("--draw", type=Path, nargs="+", help="JSON files, then the picture: measures nothing")
    given = parser.parse_args()
    if given.draw:
        *files, path = given.draw
        picture(path, [json.loads(file.read_text()) for file in files])
        return
    device = torch.device("cpu")
    if GPU:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if GPU else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    check(mesh, device)
    heads = [tuple(int(part) for part in pair.split("/")) for pair in given.heads.split(",")]
    rows = []
    for case in cases([int(count) for count in given.tokens.split(",")], heads):
        if not re.search(given.only, case.name):
            continue
        rows.append(measure(case, mesh, device))
        if dist.get_rank() == 0:
            row, base = rows[-1], rows[-1]["one GPU, FLOP/s"]
            print(f"{row['case']:48} alone {base / 1e12:7.2f} TFLOP/s", end="")
            for name, rate in row["FLOP/s"].items():
                idle = row["from idle to idle"][name] / row["one GPU, from idle to idle"]
                print(f"   {name} {rate / 1e12:.2f} ({rate / base:.2f}; {idle:.2f})", end="")
            print(flush=True)
            if given.out:  # what there is, should the run be ended
                given.out.mkdir(parents=True, exist_ok=True)
                run = {"device": torch.cuda.get_device_name() if GPU else "CPU, gloo", "cases": rows}
                (given.out / "context_parallel.json").write_text(json.dumps(run, indent=1))
    if given.out and rows and dist.get_rank() == 0:
        try:
            picture(given.out / "context_parallel.png", [run])
        except ImportError:
            print("no picture: matplotlib is not installed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
