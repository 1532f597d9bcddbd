"""From a Hugging Face config.json to the kernels that its model needs: which head_dims, masks, options and dtypes.

    config.json ──> parts (text, vision, audio, decoder, …) ──> for each its attention's `Variant`s ──> Model

The names of sizes differ between families, but follow patterns: some `..head_dim`, or some width divided by some number
of heads. What a part leaves to its defaults is filled in by transformers, where it is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aiter.errors import AiterError
from aiter.kernels import HEAD_DIM_MAX, HEAD_DIM_STEP, LATENT_HEAD_DIM

DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}

# `head_dim` and its like, of attention that has a softmax: not of linear attention, of states, of an index of keys.
HEAD_DIM = re.compile(
    r"(?!linear|mamba|ssm|index|qk_|([a-z]+_)?v_head)([a-z0-9]+_)*(head_dim|dim_head|d_kv|kv_channels|d_head|attention_head_size)"
)
HEADS = re.compile(
    r"(?!.*(kv|key|value|expert|group|linear|mamba|ssm|index|guided))([a-z0-9]+_)*(heads?|heads_per_stage)"
)
WIDTHS = (
    *("true_hidden_size", "intra_bottleneck_size"),  # MobileBERT's layers are narrower than its hidden_size
    *("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "emb_dim", "width", "embed_dims", "hidden_sizes"),
)
# Parts that see all of their tokens at once; of others (text, sound) some do.
BIDIRECTIONAL = re.compile(r"vision|visual|siglip|(^|_)vit($|_)")

# What no kernel has a form of yet, where every layer of the model has it: (key of the configuration, what it is).
WITHOUT_KERNEL = (
    ("relative_attention_num_buckets", "a position bias"),
    ("alibi", "ALiBi, which transformers computes by attention of the model's own"),
)
FAMILIES_WITHOUT_KERNEL = dict.fromkeys(("bloom", "mpt"), WITHOUT_KERNEL[1][1])

# Keys that say of a part that some of its layers see a window (transformers sets them to null where none does).
WINDOWS = ("sliding_window", "sliding_window_size", "local_attention")
SOFT_CAP = "attn_logit_softcapping"


class ModelConfigError(AiterError):
    """A file that tells no attention, or one that no kernel computes; the message says which."""


class Variant(NamedTuple):
    """What kernels there are of each operation and dtype: see `kernels.specs_for`."""

    head_dim: int
    causal: bool
    value_dim: int
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """`kernels`: each once, sorted; `dtypes`: fp16, bf16, fp32, empty where the file names none;
    `notes`: what of the model no kernel serves, a sentence each."""

    kernels: tuple[Variant, ...]
    dtypes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def read_model(path: Path) -> Model:
    """The needs of the model that a config.json, or the one in a folder, describes; ModelConfigError where there is
    nothing to build."""
    if path.is_dir():
        path /= "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise ModelConfigError(f"--model {path}: not a model configuration ({error})") from None
    complete = _with_defaults(config)
    kernels: dict[Variant, None] = {}
    dtypes: dict[str, None] = {}
    notes: list[str] = []
    parts = list(_parts(complete, ""))
    decoder = "CausalLM" in _architectures(config) and complete.get("is_decoder", True)
    decoder = decoder and sum(bool(_head_dims(part)) for _, part in parts) == 1
    for name, part in parts:
        dtype = str(part.get("dtype") or part.get("torch_dtype") or "").removeprefix("torch.")
        if dtype in DTYPES:
            dtypes[DTYPES[dtype]] = None
        lacking = _without_kernel(part)
        where = name or str(part.get("model_type") or "the model")
        if lacking and _head_dims(part):
            notes.append(f"{where}: has {lacking}, which no kernel computes")
            continue
        sees_all = part.get("is_causal") is False or BIDIRECTIONAL.search(f"{name} {part.get('model_type')}")
        causals = (False,) if sees_all else (True,) if decoder else (False, True)
        softcap = ("softcap",) if part.get(SOFT_CAP) else ()
        # A window that hides nothing yet, of a short prompt, is none.
        chosen = [(causal, softcap) for causal in causals]
        if any(part.get(key) for key in WINDOWS) and part.get("use_sliding_window") is not False:
            chosen.append((False, (*softcap, "window")))
        for dims in _head_dims(part):
            head_dim, value_dim = (size + -size % HEAD_DIM_STEP for size in dims)
            latent = (head_dim, value_dim) == (LATENT_HEAD_DIM, HEAD_DIM_MAX)
            if max(head_dim, value_dim) > HEAD_DIM_MAX and not latent:
                notes.append(f"{where}: head_dim {max(dims)} is not supported; up to {HEAD_DIM_MAX} is")
                continue
            for causal, options in chosen:
                kernels[Variant(head_dim, causal, value_dim, options)] = None
    if not kernels:
        reason = "; ".join(notes) or "expected head_dim, or hidden_size and num_attention_heads"
        raise ModelConfigError(f"--model {path}: {reason}")
    return Model(tuple(sorted(kernels)), tuple(dtypes), tuple(dict.fromkeys(notes)))


def _with_defaults(config: dict) -> dict:
    """The whole configuration: a file leaves out what its parts have by default. As it is, without transformers."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        return CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict()
    except Exception:  # not installed, a model of somebody's own, a file of another version: take it as it is
        return config


def _architectures(config: dict) -> str:
    return " ".join(map(str, config.get("architectures") or []))


def _parts(config: dict, name: str) -> Iterator[tuple[str, dict]]:
    """The configuration and those inside it, with the names that they have there."""
    yield name, config
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _parts(value, f"{name}.{key}".lstrip("."))


def _head_dims(part: dict) -> list[tuple[int, int]]:
    """What the attention layers of a part have as head_dim of keys and of values, each pair once."""
    found: dict[tuple[int, int], None] = {}
    if isinstance(part.get("qk_nope_head_dim"), int) and isinstance(part.get("qk_rope_head_dim"), int):
        # Latent attention: its head_dim is that of the rotary part alone. Servers keep what keys and values are made
        # of, and attend to that: one KV head, whose first columns are the values.
        rotary, rank = part["qk_rope_head_dim"], part.get("kv_lora_rank")
        key = part["qk_nope_head_dim"] + rotary
        kept = [(rank + rotary, rank)] if isinstance(rank, int) and rank > 0 else []
        return [(key, part.get("v_head_dim") or key), *kept]
    explicit = {match[0]: part[match[0]] for match in map(HEAD_DIM.fullmatch, map(str, part)) if match}
    for name, value in explicit.items():
        of_values = part.get(name.replace("head_dim", "v_head_dim"))
        for size in value if isinstance(value, list) else [value]:
            if isinstance(size, int) and not isinstance(size, bool) and size > 0:
                found[size, of_values if isinstance(of_values, int) and of_values > 0 else size] = None
    for name in map(str, part):
        if HEADS.fullmatch(name) and not ("head_dim" in explicit and found and not _prefix(name)):
            for size in _divided(part, name):
                found[size, size] = None
    return list(found)


def _prefix(name: str) -> str:
    """`encoder_` of encoder_attention_heads; '' of num_attention_heads."""
    return re.sub(r"(num_|n_)?(self_|cross_)?(attention_|attn_)?(heads?|heads_per_stage)$", "", name).removeprefix(
        "num_"
    )


def _divided(part: dict, heads_name: str) -> Iterator[int]:
    """width / heads, for numbers and for lists with an entry for each stage."""
    prefix, heads = _prefix(heads_name), part[heads_name]
    names = [prefix + width for width in WIDTHS] + list(WIDTHS) if prefix else WIDTHS
    width = next((part[name] for name in names if isinstance(part.get(name), (int, list))), None)
    if width is None:
        return
    heads = heads if isinstance(heads, list) else [heads]
    if not isinstance(width, list):
        # Stages with as many times the heads have as many times the width.
        width = [width * count // heads[0] if isinstance(count, int) and heads[0] else 0 for count in heads]
    elif len(heads) == 1:
        heads = heads * len(width)
    for size, count in zip(width, heads, strict=False):
        counted = isinstance(size, int) and isinstance(count, int) and not isinstance(count, bool)
        if counted and 0 < count <= size:
            yield size // count


def _without_kernel(part: dict) -> str | None:
    """The name of what every layer of this part has and no kernel computes."""
    family = FAMILIES_WITHOUT_KERNEL.get(str(part.get("model_type")))
    return family or next((what for key, what in WITHOUT_KERNEL if part.get(key)), None)
