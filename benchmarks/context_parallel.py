"""Attention over a split sequence: ours by each scheme, PyTorch's context_parallel and a plain all-to-all, in one run.

    torchrun --nproc-per-node 4 benchmarks/context_parallel.py [--out FOLDER] [--tokens 16384,32768,65536,131072]

On GPUs over NCCL: bfloat16, head_dim 128, cuDNN in the peers. Without GPUs over gloo, with small shapes: that shows
that it runs, and what the schemes cost beside each other, no more. Prints, on rank 0, FLOP/s of a rank and the share of
what our own kernel does alone with the tokens of one rank (efficiency); with --out also writes context_parallel.json
and, where matplotlib is installed, context_parallel.png. Times are the medians of repeated calls, of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
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


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, of the slowest rank."""
    for _ in range(2):
        call()
    times = []
    for _ in range(9):
        dist.barrier()
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    result = torch.tensor([statistics.median(times)], device=device, dtype=torch.float64)
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return float(result)


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


def pytorch_seconds(case: Case, mesh, device: torch.device) -> float:
    """PyTorch's context_parallel, whose operators take as many KV heads as query heads. Inside, tensors are cut."""
    from torch.distributed.tensor.experimental import context_parallel

    tensors = [
        torch.randn(1, case.heads_q, case.tokens, HEAD_DIM, device=device, dtype=DTYPE, requires_grad=case.backward)
        for _ in range(3)
    ]

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
        return seconds(both, device)


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
    base = case.flops(own_rows) / seconds(alone, device)
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
        rates[scheme] = share / seconds(call, device)
        if GPU:
            memory[scheme] = torch.cuda.max_memory_allocated() - before
    if case.window is None and case.documents is None:
        if case.heads_kv % world == 0:
            rates["plain all-to-all"] = share / seconds(step(plain_alltoall, tensors, case.backward), device)
        if GPU:
            try:
                rates["PyTorch context_parallel"] = share / pytorch_seconds(case, mesh, device)
            except (RuntimeError, NotImplementedError, torch.OutOfMemoryError) as error:
                print(f"PyTorch's context_parallel: {error}", file=sys.stderr)
    return {
        "case": case.name,
        "ranks": world,
        "tokens": case.tokens,
        "heads_q": case.heads_q,
        "heads_kv": case.heads_kv,
        "head_dim": HEAD_DIM,
        "backward": case.backward,
        "window": case.window,
        "special": case.window is not None or case.documents is not None,
        "one GPU, FLOP/s": base,
        "FLOP/s": rates,
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


def picture(path: Path, rows: list[dict]) -> None:
    """Efficiency by tokens, a panel for each direction and number of heads. Windows and documents: in the table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[dict]] = {}
    for row in rows:
        if not row["special"]:
            direction = "forward + backward" if row["backward"] else "forward"
            panels.setdefault(f"{direction}, {row['heads_q']}/{row['heads_kv']} heads", []).append(row)
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 4), sharey=True, squeeze=False)
    for panel, (title, of_panel) in zip(axes[0], panels.items(), strict=True):
        for name in dict.fromkeys(name for row in of_panel for name in row["FLOP/s"]):
            have = [row for row in of_panel if name in row["FLOP/s"]]
            efficiency = [row["FLOP/s"][name] / row["one GPU, FLOP/s"] for row in have]
            panel.plot([row["tokens"] for row in have], efficiency, marker="o", label=name)
        panel.set_xscale("log", base=2)
        panel.set_xlabel("tokens")
        panel.set_title(title, fontsize=9)
    axes[0][0].set_ylabel("of our kernel alone with a rank's tokens")
    axes[0][0].set_ylim(bottom=0)
    axes[0][-1].legend(fontsize=7)
    figure.suptitle(f"{rows[0]['ranks']} ranks, {'NCCL' if GPU else 'gloo on a CPU'}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", default="16384,32768,65536,131072" if GPU else "1024")
    parser.add_argument("--heads", default="32/8,16/16" if GPU else "8/4")
    given = parser.parse_args()
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
        rows.append(measure(case, mesh, device))
        if dist.get_rank() == 0:
            row, base = rows[-1], rows[-1]["one GPU, FLOP/s"]
            print(f"{row['case']:48} alone {base / 1e12:7.2f} TFLOP/s", end="")
            for name, rate in row["FLOP/s"].items():
                print(f"   {name} {rate / 1e12:.2f} ({rate / base:.2f})", end="")
            print(flush=True)
    if given.out and dist.get_rank() == 0:
        given.out.mkdir(parents=True, exist_ok=True)
        name = torch.cuda.get_device_name() if GPU else "CPU, gloo"
        (given.out / "context_parallel.json").write_text(json.dumps({"device": name, "cases": rows}, indent=1))
        try:
            picture(given.out / "context_parallel.png", rows)
        except ImportError:
            print("no picture: matplotlib is not installed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
