"""vLLM's engine on CPUs: throughput with our attention backend beside that with its own, in one run.

    python benchmarks/vllm_engine.py [--dtype bfloat16] [--rounds 7] [--json FILE]

A Llama with random weights, made here. Two loads: long prompts with short answers (prefill), short prompts with long
answers (decode). Each backend's engine is a process of its own; they take turns, round by round, so that a busy machine
is as unkind to both. Printed are tokens a second, by the median round, and the median over rounds of the two times'
ratio: above 1.00 ours is faster. Then the same of CPU time, which others on the machine change less: of the whole
process, and of the engine's thread while it is in the backend, cache and metadata included. Both mean something with
one thread (OMP_NUM_THREADS=1). Needs vLLM (docs/vllm.md).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

VOCABULARY = 2000
# glibc gives large blocks back to the system when they are freed, or not, as the order of frees in a process happens to
# be: a third of the time went into page faults, in engines of either backend. vLLM advises tcmalloc, which keeps them.
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 32), "MALLOC_MMAP_THRESHOLD_": str(1 << 32)}
BACKENDS = {"aiter": "1", "vLLM's own": "0"}
# Prompts, tokens of each, tokens of each answer.
LOADS = {"prefill": (8, 1024, 4), "decode": (32, 128, 64), "long decode": (8, 1500, 32)}
_MARK = "RESULT "


def make_model(folder: str, options: argparse.Namespace) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=options.hidden,
        intermediate_size=3 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.hidden // options.head_dim,
        num_key_value_heads=options.hidden // options.head_dim // 4,
        head_dim=options.head_dim,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).to(getattr(torch, options.dtype)).save_pretrained(folder)


def serve(folder: str, dtype: str) -> None:
    """Reads loads, one a line, and answers each with the seconds it took: see `Seconds`."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=2048,
        max_num_seqs=64,
    )
    in_backend = watch(engine)
    print(_MARK + "ready", flush=True)
    for line in sys.stdin:
        seed, (count, length, answer) = json.loads(line)
        source = random.Random(seed)
        prompts = [{"prompt_token_ids": source.choices(range(VOCABULARY), k=length)} for _ in range(count)]
        sampling = SamplingParams(temperature=0.0, max_tokens=answer, ignore_eos=True, detokenize=False)
        in_backend.clear()
        began = time.perf_counter(), time.process_time()
        engine.generate(prompts, sampling, use_tqdm=False)
        taken = time.perf_counter() - began[0], time.process_time() - began[1], sum(in_backend)
        print(_MARK + json.dumps(taken), flush=True)


def watch(engine: Any) -> list[float]:
    """Seconds of CPU time of each call of the backend from now on."""
    seconds: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            began = time.thread_time()
            result = function(*arguments, **keywords)
            seconds.append(time.thread_time() - began)
            return result

        return call

    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layer = next(layer for layer in runner.compilation_config.static_forward_context.values() if hasattr(layer, "impl"))
    backend = layer.get_attn_backend()
    ours = backend.__module__.partition(".")[0] == "aiter"
    if ours != (os.environ["AITER_VLLM"] == "1"):
        print(f"{_MARK}the engine attends with {backend.__module__}: is aiter installed here, beside vLLM?", flush=True)
        raise SystemExit(1)
    for kind, names in (
        (backend.get_impl_cls(), ("forward", "do_kv_cache_update")),
        (backend.get_builder_cls(), ("build",)),
    ):
        for name in names:
            setattr(kind, name, timed(getattr(kind, name)))
    return seconds


class Seconds(NamedTuple):
    clock: float
    cpu: float
    backend: float


class Engine:
    """A process that serves with one backend."""

    def __init__(self, variable: str, folder: str, dtype: str) -> None:
        environment = {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            **KEEP_MEMORY,
            **os.environ,
            "AITER_VLLM": variable,
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
        }
        command = [sys.executable, __file__, "--serve", folder, "--dtype", dtype]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        if (said := self.answer()) != "ready\n":
            raise SystemExit(said)

    def answer(self) -> str:
        for line in self.process.stdout:
            if line.startswith(_MARK):
                return line.removeprefix(_MARK)
        raise SystemExit(f"an engine ended with code {self.process.wait()}; --serve FOLDER alone says why")

    def time(self, seed: int, load: tuple[int, int, int]) -> Seconds:
        print(json.dumps((seed, load)), file=self.process.stdin, flush=True)
        return Seconds(*json.loads(self.answer()))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(engines: dict[str, Engine], rounds: int) -> dict[str, dict[str, list[Seconds]]]:
    """Of each load, backend and round."""
    seconds = {load: {name: [] for name in engines} for load in LOADS}
    for number in range(rounds + 1):  # the first is not counted
        for load, what in LOADS.items():
            order = list(engines) if number % 2 else list(engines)[::-1]
            for name in order:
                taken = engines[name].time(number, what)
                if number:
                    seconds[load][name].append(taken)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, options.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, options)
        engines = {name: Engine(variable, folder, options.dtype) for name, variable in BACKENDS.items()}
        seconds = measure(engines, options.rounds)
        for engine in engines.values():
            engine.close()
    report = {}
    print(f"{options.dtype}, tokens/s".ljust(20), *(name.rjust(12) for name in BACKENDS), "  ratio  CPU time  backend")
    for load, (count, length, answer) in LOADS.items():
        tokens = count * (length + answer)
        speeds = {name: tokens / statistics.median(one.clock for one in seconds[load][name]) for name in BACKENDS}
        both = [seconds[load][name] for name in BACKENDS]
        ratios = Seconds(
            *(statistics.median(theirs[i] / ours[i] for ours, theirs in zip(*both, strict=True)) for i in range(3))
        )
        report[load] = {"tokens_per_second": speeds, "ratios": ratios._asdict(), "seconds": seconds[load]}
        columns = f"{ratios.clock:8.2f} {ratios.cpu:9.2f} {ratios.backend:8.2f}"
        print(load.ljust(20), *(f"{speed:12.0f}" for speed in speeds.values()), columns)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"options": vars(options), "loads": report}, file, indent=1)


if __name__ == "__main__":
    main()
