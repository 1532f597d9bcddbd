"""What the first call costs, cold and warm, and what every later one costs the host.

    python benchmarks/first_call.py [--device cuda] [--dtypes fp32,bf16] [--head-dims 64,128]

Each first call is made in a process of its own, with a cache of its own: once with the cache empty (cold: the kernel is
compiled) and once with what that left (warm: a new process finds it). PyTorch's operator runs in the same processes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Each of these runs in a process of its own and prints one JSON value.
IMPORT = """
import json, time
import torch
begin = time.perf_counter()
import aiter
print(json.dumps(time.perf_counter() - begin))
"""

FIRST_CALL = """
import json, sys, time
import torch, aiter
device, dtype, head_dim, causal, backward = json.loads(sys.argv[1])
q, k, v = (torch.randn(1, 64, 2, head_dim, device=device, dtype=getattr(torch, dtype)) for _ in range(3))
def synchronize():
    if device != "cpu":
        torch.cuda.synchronize()
synchronize()
if backward:
    q.requires_grad_()
begin = time.perf_counter()
output = aiter.flash_attn_func(q, k, v, causal=causal)
if backward:
    begin = time.perf_counter()
    output.sum().backward()
synchronize()
print(json.dumps(time.perf_counter() - begin))
"""

SMALL_CALL = """
import json, sys, time
import torch, aiter
import torch.nn.functional as F
device, dtype = json.loads(sys.argv[1])
q, k, v = (torch.randn(1, 16, 1, 64, device=device, dtype=getattr(torch, dtype)) for _ in range(3))
tq, tk, tv = (t.transpose(1, 2) for t in (q, k, v))
calls = {
    "aiter": lambda: aiter.flash_attn_func(q, k, v),
    "PyTorch": lambda: F.scaled_dot_product_attention(tq, tk, tv),
}
best = {name: float("inf") for name in calls}
with torch.inference_mode():
    for call in calls.values():
        for _ in range(2000):
            call()
    for _ in range(30):  # in turns, so that both meet the machine in the same moods
        for name, call in calls.items():
            begin = time.perf_counter()
            for _ in range(500):
                call()
            took = (time.perf_counter() - begin) / 500  # on a GPU: what the host spends; the launches run behind
            best[name] = min(best[name], took)
            if device != "cpu":
                torch.cuda.synchronize()
print(json.dumps(best))
"""


def ask(script: str, *arguments: object, cache: str) -> object:
    """The JSON value that a script prints, run in a new process with the kernel cache `cache`."""
    environment = {**os.environ, "AITER_CACHE_DIR": cache, "PYTHONPATH": str(ROOT), "AITER_LOG": "error"}
    # Byte code is kept, as in an installed package.
    environment |= {"PYTHONPYCACHEPREFIX": f"{cache}/bytecode", "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", script, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd="/")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", default="fp32,bf16,fp16")
    parser.add_argument("--head-dims", default="64,128")
    options = parser.parse_args()
    dtypes = [d for d in options.dtypes.split(",") if options.device == "cpu" or d != "fp32"]
    with tempfile.TemporaryDirectory(prefix="aiter-first-call-") as cache:
        imports = [ask(IMPORT, cache=cache) for _ in range(6)][1:]  # the first one writes the byte code
        print(f"import aiter, after import torch: {1e3 * statistics.median(imports):.1f} ms (limit 50)\n")
        print("first call                      cold, s   warm, ms")
        worst_cold = worst_warm = 0.0
        for backward in (False, True):
            for dtype in dtypes:
                for head_dim in map(int, options.head_dims.split(",")):
                    for causal in (False, True):
                        call = (options.device, DTYPES[dtype], head_dim, causal, backward)
                        cold = ask(FIRST_CALL, *call, cache=cache)
                        warm = statistics.median(ask(FIRST_CALL, *call, cache=cache) for _ in range(3))
                        worst_cold, worst_warm = max(worst_cold, cold), max(worst_warm, warm)
                        name = f"{'backward' if backward else 'forward'} {dtype} d{head_dim}{' causal' * causal}"
                        print(f"{name:<28} {cold:10.2f} {1e3 * warm:10.1f}", flush=True)
        print(f"{'worst (limits 3 and 10)':<28} {worst_cold:10.2f} {1e3 * worst_warm:10.1f}\n")
        print("small call (1, 16, 1, 64), host µs     aiter    PyTorch")
        for dtype in dtypes:
            best = ask(SMALL_CALL, options.device, DTYPES[dtype], cache=cache)
            print(f"{dtype:<35} {1e6 * best['aiter']:8.1f} {1e6 * best['PyTorch']:10.1f}")


if __name__ == "__main__":
    main()
