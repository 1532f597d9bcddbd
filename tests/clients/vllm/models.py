"""Tiny models with random weights, saved by transformers: one for each thing that attention is asked for.

Weights are larger than those that training starts from, so that what a token attends to decides what comes next.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

VOCABULARY = 512
WINDOW = 48

_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_TIED = {"tie_word_embeddings": True}  # vLLM knows these models in no other form
_GPT_OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
# Name: transformers' type, and what differs from _SMALL.
DECODERS = {
    "llama": ("llama", {}),
    "gemma2": (
        "gemma2",
        {"sliding_window": WINDOW, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 32, **_TIED},
    ),
    "gpt-oss": ("gpt_oss", _GPT_OSS),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4, **_TIED}),  # ALiBi
}
LATENT = {  # latent attention: CPU_MLA takes these sizes alone
    "deepseek": (
        "deepseek_v3",
        {
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 48,
            "head_dim": 64,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 2,  # no layer with experts
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
}
ENCODERS = {
    "bert": ("bert", {}),
    "modernbert": (
        "modernbert",
        {"local_attention": WINDOW, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 1},
    ),
}


def config(name: str, **changes: object) -> PretrainedConfig:
    kind, options = {**DECODERS, **LATENT, **ENCODERS}[name]
    return AutoConfig.for_model(kind, **{**_SMALL, **options, **changes})


def make(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model, and the same in a folder."""
    torch.manual_seed(0)
    kind = AutoModel if name in ENCODERS else AutoModelForCausalLM
    model = kind.from_config(config(name), attn_implementation="eager").eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("sinks"):
                parameter.normal_(std=3.0)
            elif model.config.tie_word_embeddings:  # else each token is followed by itself
                if "word_embeddings.weight" in path or "embed_tokens" in path:
                    parameter.mul_(0.1)
                elif path.endswith(("dense.weight", "dense_4h_to_h.weight")):
                    parameter.mul_(10.0)
    model = model.to(dtype)
    model.save_pretrained(folder)
    # vLLM's server and its encoders ask for a tokenizer, though prompts are numbers.
    words = WordLevel({str(token): token for token in range(VOCABULARY)}, unk_token="2")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="2").save_pretrained(folder)
    return model


SAMPLES_A_SECOND = 16000
_WHISPER_MARKS = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")


def make_whisper(folder: Path) -> tuple[PreTrainedModel, WhisperFeatureExtractor, list[int]]:
    """An encoder-decoder model of two seconds of sound, the same in a folder, and how its texts begin."""
    torch.manual_seed(0)
    folder.mkdir()
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    marks = {mark: len(letters) + number for number, mark in enumerate(_WHISPER_MARKS)}
    (folder / "vocab.json").write_text(json.dumps({**letters, **marks}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), additional_special_tokens=list(_WHISPER_MARKS[1:])
    )
    features = WhisperFeatureExtractor(feature_size=80, chunk_length=2)
    WhisperProcessor(features, tokenizer).save_pretrained(folder)
    end, *start = marks.values()
    settings = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=80,
        max_source_positions=100,
        max_target_positions=128,
        init_std=0.3,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        decoder_start_token_id=start[0],
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration._from_config(settings, attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model, features, start
