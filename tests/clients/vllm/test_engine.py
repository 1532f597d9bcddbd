"""vLLM's engine on tiny random models: with our backend it says what it says with its own, and what transformers does.

Prompts are read a few tokens at a time (chunked prefill), beside sequences that decode; a second round finds prompts
in the cache (prefix caching); one cache is too small, so that sequences are thrown out and begin again (preemption).

Greedy tokens are compared one by one with the scores that transformers gives the same text: a token that is not the
best one by more than rounding explains is a fault. In float32 that is next to nothing; in bfloat16 it is what
transformers' own bfloat16 differs from its float32.
"""

from __future__ import annotations

import random

import models
import numpy
import pytest
import torch
from transformers import AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

LENGTHS = (1, 7, 40, 130, 300)
NEW_TOKENS = 16
OURS, THEIRS = (
    "aiter.integrations.vllm.backend.Attention",
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl",
)
LATENT_BACKENDS = (
    "aiter.integrations.vllm.latent.LatentAttention",
    "vllm.v1.attention.backends.mla.cpu_mla.CPUMLAImpl",
)
_ENGINE = {"enforce_eager": True, "dtype": "float32", "max_model_len": 512}
_GENERATE = {"block_size": 32, "max_num_batched_tokens": 64, "max_num_seqs": 8}
PREEMPTED, COMPILED, BF16, WHISPER = "llama-preempted", "llama-compiled", "gemma2-bf16", "whisper"
# Of queries (tokens, heads, head_size), vLLM 0.32's own rotary operator for CPUs takes the stride of heads as that of
# tokens; its Python does not.
RIGHT_ROTATION = {"custom_ops": ["-rotary_embedding"]}
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}  # what the cache is called, and holds


def prompts_of(*lengths: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(3, models.VOCABULARY) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="session")
def references(tmp_path_factory):
    """Name: transformers' model and its folder."""
    base = tmp_path_factory.mktemp("models")
    names = (*models.DECODERS, *models.LATENT, *models.ENCODERS)
    return {name: (models.make(name, base / name), base / name) for name in names}


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    """transformers' model, what makes features of sounds, how texts begin, folder, sounds of at most two seconds."""
    folder = tmp_path_factory.mktemp("models") / "whisper"
    source = numpy.random.default_rng(0)
    sounds = [source.standard_normal(length, dtype=numpy.float32) for length in (32000, 20000, 9000)]
    return *models.make_whisper(folder), folder, sounds


@pytest.fixture(scope="session")
def jobs(references, whisper):
    prompts = prompts_of(*LENGTHS)
    again = [prompts[4][:100] + prompts[2], *prompts]  # of the first, three blocks are known
    found = {}
    for name in models.DECODERS:
        engine = {**_ENGINE, **_GENERATE, "model": str(references[name][1])}
        found[name] = {"engine": engine, "rounds": [prompts, again], "sampling": {"max_tokens": NEW_TOKENS}}
    llama = found["llama"]
    found[PREEMPTED] = {
        "engine": {**llama["engine"], "max_model_len": 256, "num_gpu_blocks_override": 16},
        "rounds": [prompts_of(*[60] * 6, seed=1)],
        "sampling": {"max_tokens": 60},
    }
    found[COMPILED] = {**llama, "engine": {**llama["engine"], "enforce_eager": False}, "rounds": [prompts]}
    bf16 = found["gemma2"]
    found[BF16] = {**bf16, "engine": {**bf16["engine"], "dtype": "bfloat16"}}
    for dtype in FP8:
        found[dtype] = {**llama, "engine": {**llama["engine"], "kv_cache_dtype": dtype}}
    for name in models.LATENT:  # blocks are of 16, and vLLM's own backend reads prompts in one piece
        engine = {**_ENGINE, "model": str(references[name][1]), "compilation_config": RIGHT_ROTATION}
        engine["attention_backend"] = "CPU_MLA"  # with AMX it would be another, which takes no float32
        found[name] = {"engine": engine, "rounds": [prompts], "sampling": {"max_tokens": NEW_TOKENS}}
    for name in models.ENCODERS:
        found[name] = {
            "engine": {**_ENGINE, "model": str(references[name][1]), "runner": "pooling"},
            "rounds": [prompts],
            "embed": True,
        }
    _, _, start, folder, sounds = whisper
    found[WHISPER] = {
        "engine": {**_ENGINE, "model": str(folder), "max_model_len": 64, "limit_mm_per_prompt": {"audio": 1}},
        "rounds": [[start] * len(sounds)],
        "sounds": [(sound.tolist(), models.SAMPLES_A_SECOND) for sound in sounds],
        "sampling": {"max_tokens": NEW_TOKENS},
    }
    return {name: {"name": name, **job} for name, job in found.items()}


# What our backend does not do: what the engine is given, and what it says.
REFUSED = {
    "another dtype": ({"kv_cache_dtype": "bfloat16"}, {}, "a cache of bfloat16 for a model of torch.float32"),
    "head size": ({}, {"head_dim": 36}, "head_size not supported"),
    "block size": ({"block_size": 24}, {}, "block_size not supported"),
}


@pytest.fixture(scope="session")
def ours(run_engine, jobs):
    llama = jobs["llama"]
    refused = [
        {**llama, "name": name, "engine": {**llama["engine"], **engine, "hf_overrides": overrides}}
        for name, (engine, overrides, _) in REFUSED.items()
    ]
    results, log = run_engine([*jobs.values(), *refused], True, VLLM_CPU_CI_ENV="1")
    assert log.count("Attention is aiter's") == 1
    return results


@pytest.fixture(scope="session")
def theirs(run_engine, jobs):
    results, log = run_engine(list(jobs.values()), False, VLLM_CPU_CI_ENV="1")
    assert "Attention is aiter's" not in log, "it is installed, and not asked for"
    return results


def scores(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Of each place that a token was generated for, the logits (tokens, vocabulary), given those before it."""
    with torch.no_grad():
        return model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].double()


def regret(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """By how much each token is worse than the best one."""
    return logits.amax(-1) - logits.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("name", [*models.DECODERS, *models.LATENT, PREEMPTED, COMPILED])
def test_same_tokens(name, jobs, ours, theirs, references):
    mine, other = ours[name], theirs[name]
    assert "error" not in mine, mine["error"]
    backends = LATENT_BACKENDS if name in models.LATENT else (OURS, THEIRS)
    assert (mine["backend"], other.get("backend")) == backends, other.get("error")
    model, _ = references[name.split("-preempted")[0].split("-compiled")[0]]
    for prompts, mine_round, other_round in zip(jobs[name]["rounds"], mine["tokens"], other["tokens"], strict=True):
        for prompt, tokens, theirs_too in zip(prompts, mine_round, other_round, strict=True):
            logits = scores(model, prompt, tokens)
            close = 1e-4 * logits.std()  # hundred times what float32 differs by; such a gap is rare
            assert (regret(logits, tokens) < close).all(), f"a prompt of {len(prompt)} tokens"
            if (logits.topk(2).values.diff() < -close).all():  # no tie on the way
                assert tokens == theirs_too, f"a prompt of {len(prompt)} tokens"
    if name == PREEMPTED:
        assert mine["num_preemptions"] > 0, "the cache was not too small"
    elif name in models.DECODERS:
        assert mine["prefix_cache_hits"] > 0 and mine["prefix_cache_hits"] == other["prefix_cache_hits"]


def test_bfloat16(jobs, ours, theirs, references, tmp_path):
    """Where scores are closer together than bfloat16 can tell apart, another token is no fault."""
    job, mine = jobs[BF16], ours[BF16]
    assert "error" not in mine, mine["error"]
    rounded = models.make("gemma2", tmp_path, torch.bfloat16)
    plain = models.make("gemma2", tmp_path, torch.bfloat16).float()
    regrets, transformers_regrets = [], []
    for prompts, tokens_of_round in zip(job["rounds"], mine["tokens"], strict=True):
        for prompt, tokens in zip(prompts, tokens_of_round, strict=True):
            logits, in_bfloat16 = scores(plain, prompt, tokens), scores(rounded, prompt, tokens)
            rounding = (in_bfloat16 - logits).abs().amax()
            regrets.append(regret(logits, tokens))
            transformers_regrets.append(regret(logits, in_bfloat16.argmax(-1).tolist()))
            assert (regrets[-1] <= 2 * rounding).all(), f"a prompt of {len(prompt)} tokens"
    assert torch.cat(regrets).mean() <= 2 * torch.cat(transformers_regrets).mean()


@pytest.mark.parametrize("name", FP8)
def test_cache_of_8_bits(name, jobs, ours, references):
    """Beside transformers, with keys and values rounded as the cache rounds them. A number that stands between two
    neighbours may be rounded to either, which is more than float32's own rounding."""
    mine = ours[name]
    assert "error" not in mine, mine["error"]

    def attention(module, query, key, value, *arguments, **keywords):
        key, value = (tensor.to(FP8[name]).to(tensor.dtype) for tensor in (key, value))
        return eager_attention_forward(module, query, key, value, *arguments, **keywords)

    ALL_ATTENTION_FUNCTIONS.register(f"rounded-{name}", attention)
    AttentionMaskInterface.register(f"rounded-{name}", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    plain, folder = references["llama"]
    rounded = type(plain).from_pretrained(folder, attn_implementation=f"rounded-{name}", dtype=torch.float32).eval()
    rounding_matters = False
    for prompts, tokens_of_round in zip(jobs[name]["rounds"], mine["tokens"], strict=True):
        for prompt, tokens in zip(prompts, tokens_of_round, strict=True):
            logits = scores(rounded, prompt, tokens)
            close = 0.01 * logits.std()
            assert (regret(logits, tokens) < close).all(), f"a prompt of {len(prompt)} tokens"
            rounding_matters |= bool((regret(scores(plain, prompt, tokens), tokens) > close).any())
    assert rounding_matters, "a cache of the model's dtype would have passed"


def test_encoder_and_decoder(jobs, ours, theirs, whisper):
    """Cross attention over what the encoder has left in the cache."""
    mine, other = ours[WHISPER], theirs[WHISPER]
    assert "error" not in mine, mine["error"]
    assert mine["backend"] == OURS
    assert mine["tokens"] == other["tokens"]
    model, features, start, _, sounds = whisper
    for sound, tokens in zip(sounds, mine["tokens"][0], strict=True):
        heard = features(sound, sampling_rate=models.SAMPLES_A_SECOND, return_tensors="pt").input_features
        with torch.no_grad():
            logits = model(input_features=heard, decoder_input_ids=torch.tensor([start + tokens])).logits
        assert logits[0, len(start) - 1 : -1].argmax(-1).tolist() == tokens
    assert len({tuple(tokens) for tokens in mine["tokens"][0]}) > 1, "all sounds give one text"


@pytest.mark.parametrize("name", models.ENCODERS)
def test_same_embeddings(name, jobs, ours, theirs, references):
    mine, other = ours[name], theirs[name]
    assert "error" not in mine, mine["error"]
    assert (mine["backend"], other.get("backend")) == (OURS, THEIRS), other.get("error")
    model, _ = references[name]
    for prompt, embedding, theirs_too in zip(
        jobs[name]["rounds"][0], mine["embeddings"], other["embeddings"], strict=True
    ):
        with torch.no_grad():
            hidden = model(torch.tensor([prompt])).last_hidden_state[0]
        expected = torch.nn.functional.normalize(hidden[0], dim=-1)
        torch.testing.assert_close(torch.tensor(embedding), expected, atol=2e-6, rtol=0)
        torch.testing.assert_close(torch.tensor(embedding), torch.tensor(theirs_too), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("gemma2", {"sliding_window": 4096}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gpt-oss", {"sliding_window": 4096}),
        ("gpt-oss", {"sinks": None}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_options_matter(name, changes, jobs, ours, references):
    """A backend that swallowed one of these would be found out: without it, other tokens are the best."""
    model, folder = references[name]
    options = {key: value for key, value in changes.items() if key != "sinks"}
    without = (
        type(model)
        .from_pretrained(
            folder, config=models.config(name, **options), attn_implementation="eager", dtype=torch.float32
        )
        .eval()
    )
    if "sinks" in changes:
        for path, parameter in without.named_parameters():
            if path.endswith("sinks"):
                parameter.data.fill_(-1e4)
    prompt, tokens = jobs[name]["rounds"][0][3], ours[name]["tokens"][0][3]
    logits = scores(without, prompt, tokens)
    assert (regret(logits, tokens) > 0.01 * logits.std()).any()


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, ours):
    _, _, message = REFUSED[name]
    assert message in ours[name]["error"]
    assert "aiter's attention backend cannot run this model" in ours[name]["error"]
