"""Runs jobs with vLLM's engine, one after the other in this process, and writes down what came out.

    python engine.py JOBS RESULTS      both JSON; a job is {"name", "engine", "rounds", "sampling", "embed", "sounds"}

In a process of its own, as vLLM changes the process it is in: it binds threads and replaces functions of PyTorch.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback

import numpy


def run(job: dict) -> dict:
    from vllm import LLM, SamplingParams

    engine = LLM(disable_log_stats=False, seed=0, **job["engine"])
    result = {"backend": backend(engine)}
    try:
        if job.get("embed"):
            prompts = [{"prompt_token_ids": tokens} for tokens in job["rounds"][0]]
            pooled = engine.embed(prompts, use_tqdm=False)
            result["embeddings"] = [one.outputs.embedding for one in pooled]
            return result
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False, **job["sampling"])
        result["tokens"] = []
        for numbers in job["rounds"]:
            prompts = [{"prompt_token_ids": tokens} for tokens in numbers]
            for prompt, (samples, rate) in zip(prompts, job.get("sounds", ()), strict=False):
                prompt["multi_modal_data"] = {"audio": (numpy.asarray(samples, numpy.float32), rate)}
            done = engine.generate(prompts, sampling, use_tqdm=False)
            result["tokens"].append([list(one.outputs[0].token_ids) for one in done])
        counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
        for name in ("num_preemptions", "prefix_cache_hits"):
            result[name] = counters[f"vllm:{name}"]
        return result
    finally:
        del engine


def backend(engine: object) -> str:
    """The class that computes attention, as the first layer that attends says."""
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context.values()
    implementation = next(type(layer.impl) for layer in layers if hasattr(layer, "impl"))
    return f"{implementation.__module__}.{implementation.__qualname__}"


def main(jobs_file: str, results_file: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    with open(jobs_file) as file:
        jobs = json.load(file)
    results = {}
    for job in jobs:
        try:
            results[job["name"]] = run(job)
        except Exception:
            results[job["name"]] = {"error": traceback.format_exc()}
        cleanup_dist_env_and_memory()
        gc.collect()
    with open(results_file, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
