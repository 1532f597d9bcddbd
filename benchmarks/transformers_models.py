"""Which model families of transformers run on aiter: tiny random models of all that can be built, against eager.

    python benchmarks/transformers_models.py [--families llama,bart] [--prewarm]
    python benchmarks/transformers_models.py --prewarm --markdown table.md        (most of an hour on one core)

For each model type a configuration is shrunk until a model of it is small, and the model runs twice with the
same weights, eager and on aiter: without a mask, padded left and right, and, where it has a cache, continued by one
token and by three. "works" means that every result equals eager's in float32; "refused" that aiter says by name what it
has no form of. With --prewarm, `aiter prewarm --model` is given the configuration first, and the model then runs with
compiling forbidden. Each family runs in a process of its own; a family takes some seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
import warnings

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import transformers  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402 (what every family imports, before the processes part)
from transformers.models.auto import configuration_auto, modeling_auto  # noqa: E402

import aiter.transformers  # noqa: E402, F401

TOLERANCE = 1e-3  # of the largest value; sums of float32 in another order, through two layers
TOO_LARGE = 150e6  # parameters
VOCABULARY = 200
MAPPINGS = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
)

# What the sizes of a configuration are called, and how small they are made.
SMALL = {
    r"(hidden_size|d_model|n_embd|embed_dim|dim|width|decoder_hidden_size|encoder_hidden_size)": 64,
    r"(head_dim|d_kv|attention_head_dim|global_head_dim|kv_channels|encoder_head_dim|decoder_head_dim)": 16,
    r"(num_|n_|encoder_|decoder_)*(attention_heads?|head|heads)": 4,
    r"num_(key_value_heads|kv_heads|global_key_value_heads|query_groups)|n_kv_heads": 2,
    r"(num_|n_|encoder_|decoder_)*(hidden_layers|layers|layer|blocks|depth)": 2,
    r"([a-z]+_)*(intermediate_size|ffn_dim|d_ff|n_inner|ffn_hidden_size|mlp_dim)": 96,
    r"(num_|n_)(local_|routed_)?experts|num_moe_experts|moe_num_experts": 4,
    r"num_experts_per_tok|num_experts_per_token|experts_per_token|top_k_experts|moe_top_?k|num_selected_experts": 2,
    r"n_group|topk_group|num_expert_groups?|num_groups": 1,
    r"vocab_size|text_vocab_size": VOCABULARY,
    r"kv_lora_rank|q_lora_rank": 32,
    r"qk_nope_head_dim|v_head_dim": 16,
    r"qk_rope_head_dim": 16,
    r"qk_head_dim": 32,
    r"image_size": 32,
    r"patch_size": 8,
    r"rotary_dim": 16,
    r"partial_rotary_factor|attn_layer_offset": 1,
    r"attn_layer_period": 2,
    r"mamba_n_heads|mamba_num_heads": 8,
    r"mamba_d_head|mamba_head_dim": 16,
    r"first_k_dense_replace|mtp_num_layers|num_nextn_predict_layers": 0,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", help="names of folders, separated by commas; by default all")
    parser.add_argument("--prewarm", action="store_true", help="prewarm first, and forbid compiling")
    parser.add_argument("--markdown", help="write the table of docs/transformers_families.md to this file")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--part", default="0/1", help="the i-th of n parts of the families, as 1/2 (from 0)")
    parser.add_argument("--seconds", type=float, default=90, help="at most so long for a family")
    options = parser.parse_args()
    torch.set_num_threads(1)  # models this small gain nothing from more
    known = {name for mapping in MAPPINGS for name in getattr(modeling_auto, mapping)}
    names = options.families.split(",") if options.families else sorted(known)
    part, parts = map(int, options.part.split("/"))
    names = names[part::parts]
    os.environ.setdefault("AITER_CACHE_DIR", tempfile.mkdtemp())
    results = {}
    for name in names:
        begin = time.monotonic()
        results[name] = in_a_process(name, options.prewarm, options.seconds)
        state, text = results[name]
        print(f"{name:34} {state:12} {time.monotonic() - begin:5.1f} s  {text[:150]}", flush=True)
    states = [state for state, _ in results.values()]
    print({state: states.count(state) for state in sorted(set(states))})
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)
    if options.markdown:
        with open(options.markdown, "w") as file:
            file.write(markdown(results))
    return 1 if {"wrong", "misses", "fails"} & set(states) else 0


REASONS = (
    ("position_bias", "a position bias"),
    ("sinks", "attention sinks"),
    ("indices", "sparse attention: only some keys"),
    ("computes attention itself", "attention of its own, with the mask as a tensor"),
    ("KeyError", "a table of implementations of its own, without 'aiter'"),
    ("gives no mask", "attention of its own in part, which goes by is_causal wrongly"),
    ("another mask", "a mask that is neither causal, bidirectional, a window, padding nor documents"),
    ("the mask was made for (batch", "layers with more keys than their mask"),
    ("which keys are tokens", "a mask that is neither causal, bidirectional, a window, padding nor documents"),
    ("head_dim", "a head_dim above 512"),
)


def markdown(results: dict) -> str:
    """The table of docs/transformers_families.md."""
    rows: dict[str, list[str]] = {}
    for name, (state, text) in sorted(results.items()):
        short = name
        if state == "works":
            row = "works"
            if "padded" not in text:
                short += "¹"
        elif state == "refused":
            reason = next((words for key, words in REASONS if key in text), text.partition(": ")[2])
            row = f"refused: {reason}"
        elif state == "own":
            row = "not asked: no attention, or its own"
        elif state == "not built":
            row = "not tried: this script cannot build it or make its inputs"
        else:
            row = f"{state}: {text}"
        rows.setdefault(row, []).append(short)
    order = ("works", "refused", "not asked", "not tried")
    rank = {row: next((i for i, start in enumerate(order) if row.startswith(start)), -1) for row in rows}
    lines = ["| | number | families |", "| --- | ---: | --- |"]
    lines += [
        f"| {row} | {len(rows[row])} | {', '.join(rows[row])} |" for row in sorted(rows, key=lambda r: (rank[r], r))
    ]
    return "\n".join(lines) + "\n"


def in_a_process(name: str, prewarm: bool, seconds: float) -> tuple[str, str]:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)

    def work():
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            try:
                result = family(name, prewarm)
            except NotHereError as error:
                result = "not built", str(error)
            except Exception as error:
                result = "fails", f"{type(error).__name__}: {first_line(error)}"
        theirs.send(result)

    process = context.Process(target=work)
    process.start()
    theirs.close()
    try:
        result = ours.recv() if ours.poll(seconds) else ("not built", f"took more than {seconds:.0f} s")
    except EOFError:
        process.join()
        result = "fails", f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    return result


class NotHereError(Exception):
    """A model that this script cannot build or run, with eager either."""


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def family(name: str, prewarm: bool = False) -> tuple[str, str]:
    """The state of a family, and what there is to say about it."""
    calls = count_calls()
    config, cls, inputs, right = smallest_that_runs(name)
    if prewarm:
        prewarm_model(config, cls)
    try:
        model = build(cls, config, "aiter")
        ours = results_of(model, inputs)
    except (KeyError, ValueError, TypeError, RuntimeError, NotImplementedError, IndexError) as error:
        text = first_line(error)
        return ("refused" if refused_by_name(error) else "fails"), f"{cls.__name__}: {type(error).__name__}: {text}"
    except Exception as error:
        state = "misses" if type(error).__name__ == "CompilationDisabledError" else "fails"
        return state, f"{cls.__name__}: {type(error).__name__}: {first_line(error)}"
    if not calls:
        return "own", f"{cls.__name__}: computes attention itself, or has none; aiter is not asked"
    errors = {}
    for title, (expected, valid) in right.items():
        got, _ = ours[title]
        if isinstance(got, str) or isinstance(expected, str):
            if got != expected:
                errors[title] = f"{got} where eager gives {expected}"
            continue
        scale = expected[valid].abs().max().item() or 1.0
        error = (got - expected)[valid].abs().max().item() / scale
        if not error < TOLERANCE:
            errors[title] = f"{error:.0e}"
    checked = ", ".join(title for title, (expected, _) in right.items() if not isinstance(expected, str))
    if errors:
        return "wrong", f"{cls.__name__}: {errors}"
    return "works", f"{cls.__name__}: {checked}"


def refused_by_name(error: Exception) -> bool:
    text = str(error)
    if isinstance(error, KeyError) and text == "'aiter'":
        return True  # the family has a table of implementations of its own
    return "attn_implementation='aiter'" in text or "query has head_dim" in text


def count_calls() -> list:
    from transformers import AttentionInterface

    from aiter.transformers import attention

    calls: list = []

    def counted(*args, **kwargs):
        calls.append(None)
        return attention(*args, **kwargs)

    AttentionInterface.register("aiter", counted)
    return calls


def prewarm_model(config, cls) -> None:
    """Builds what `aiter prewarm --model` does, in the cache that all families share, and forbids anything else."""
    import aiter.cli

    folder = tempfile.mkdtemp()
    config.architectures = [cls.__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    shared = os.environ["AITER_CACHE_DIR"]
    command = ["prewarm", "--arch", "native", "--model", f"{folder}/config.json", "--cache-dir", shared, "--json"]
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = aiter.cli.main(command)
    output.seek(0)
    text = output.read()
    os.environ["AITER_NO_COMPILE"] = "1"
    if code:  # it says that there is nothing to build: then the model must not ask for anything
        return restrict_to(set(), text.strip().splitlines()[-1])
    kernels = json.loads(text[text.index("{") :])["kernels"]
    restrict_to({kernel["name"].rsplit("-", 1)[0] for kernel in kernels})


def restrict_to(names: set[str], why: str = "") -> None:
    """Kernels outside of `names` count as missing, though the shared cache has them from another family."""
    from aiter import jit
    from aiter.errors import CompilationDisabledError
    from aiter.jit.spec import Spec

    get = jit.get_kernel

    def get_kernel(spec: Spec):
        if spec.name not in names:
            raise CompilationDisabledError(f"{spec.name} was not prewarmed; {why or ', '.join(sorted(names))}")
        return get(spec)

    jit.get_kernel = get_kernel


# --- building ---------------------------------------------------------------------------------------------------------


def smallest_that_runs(name: str):
    """A configuration of the family, its class, inputs, and eager's results; the smallest of a few tries."""
    try:
        config_class = configuration_auto.CONFIG_MAPPING[name]
    except Exception as error:
        raise NotHereError(f"no configuration: {first_line(error)}") from None
    classes = [cls for mapping in MAPPINGS for cls in classes_of(mapping, name)]
    if not classes:
        raise NotHereError("no model class in transformers' automatic mappings")
    reasons = []
    for how in ("small", "layers"):
        for cls in dict.fromkeys(classes):
            try:
                config = shrink(config_class, everything=how == "small")
                model = build(cls, config, "eager")
            except Exception as error:
                reasons.append(f"{cls.__name__}: {type(error).__name__}: {first_line(error)}")
                continue
            for kinds in ("text", "text and images", "images"):
                try:
                    inputs = inputs_for(model, config, kinds)
                    return config, cls, inputs, results_of(model, inputs)
                except Exception as error:
                    reasons.append(f"{cls.__name__}: {type(error).__name__}: {first_line(error)}")
    raise NotHereError(reasons[0])


def classes_of(mapping: str, name: str) -> list:
    names = getattr(modeling_auto, mapping).get(name, ())
    found = []
    for cls_name in (names,) if isinstance(names, str) else names:
        cls = getattr(transformers, cls_name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            found.append(cls)
    return found


def shrink(config_class, everything: bool):
    raw = config_class().to_dict()
    small = shrunk(raw, everything)
    for key in ("transformers_version", "architectures", "dtype", "_attn_implementation"):
        small.pop(key, None)
    return config_class(**small)


WINDOW = re.compile(r"sliding_window(_size)?|local_attention")
LAYERS = re.compile(r"(num_|n_|encoder_|decoder_)*(hidden_layers|layers|layer|blocks)|depth")


def shrunk(raw: dict, everything: bool) -> dict:
    small = copy.deepcopy(raw)
    for key, value in raw.items():
        if key in ("out_features", "out_indices", "stage_names"):
            del small[key]  # they speak of layers that are gone
        elif key == "per_layer_config":
            small[key] = {}
        elif isinstance(value, dict) and ("model_type" in value or key.endswith("config")):
            small[key] = shrunk(value, everything)
        elif value is None and key == "head_dim" and everything:
            small[key] = 16
        elif isinstance(value, bool) or value is None:
            continue
        elif isinstance(value, int):
            if WINDOW.fullmatch(key):
                small[key] = min(value, TOKENS // 2)  # so that it hides keys
            if not everything:
                if LAYERS.fullmatch(key):
                    small[key] = min(value, 2)
                continue
            for pattern, size in SMALL.items():
                if re.fullmatch(pattern, key):
                    small[key] = min(value, size) if size else size
            if key.endswith(("token_id", "token_index", "_id")) and value >= VOCABULARY:
                small[key] = VOCABULARY - 1 - sum(map(ord, key)) % 40
            if re.search(r"dropout", key):
                small[key] = 0
        elif isinstance(value, float) and re.search(r"dropout|drop_rate|drop_path|layerdrop", key):
            small[key] = 0.0
    if everything and "kv_lora_rank" in small:  # latent attention has as many KV heads as heads
        small.update({key: 4 for key in ("num_key_value_heads", "num_attention_heads") if small.get(key)})
    layers = next(
        (small[k] for k in ("num_hidden_layers", "num_layers", "n_layer") if isinstance(small.get(k), int)), 2
    )
    for key in ("layer_types", "mlp_layer_types", "layers_block_type", "attention_types", "no_rope_layers"):
        if isinstance(small.get(key), list):
            kinds = small[key]
            # One layer of each kind, where there are two kinds.
            small[key] = (
                (list(dict.fromkeys(map(str, kinds))) * layers)[:layers]
                if all(isinstance(kind, str) for kind in kinds)
                else kinds[:layers]
            )
    number = raw.get("num_hidden_layers")
    for key, value in small.items():
        if isinstance(value, list) and len(value) == number:
            small[key] = value[:layers]
    if everything and isinstance(small.get("rope_parameters"), dict):
        small["rope_parameters"] = rope(small["rope_parameters"])
    return small


def rope(parameters: dict) -> dict:
    """Sections of the rotary dimensions in the proportions of a head of 16."""
    changed = {key: rope(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    if "rope_type" in changed:
        changed["mrope_section"] = [2, 3, 3]
        if "partial_rotary_factor" in changed:
            changed["partial_rotary_factor"] = 1.0
    return changed


def build(cls, config, implementation: str):
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    with torch.device("meta"):
        count = sum(
            p.numel() for p in cls._from_config(copy.deepcopy(config), attn_implementation="eager").parameters()
        )
    if count > TOO_LARGE:
        raise NotHereError(f"{count / 1e6:.0f} million parameters")
    model = cls._from_config(config, attn_implementation=implementation).eval().float()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # large enough that scores differ
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return model


# --- running ----------------------------------------------------------------------------------------------------------

TOKENS = 12
MELS = ("num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels")


def inputs_for(model, config, kinds: str) -> dict:
    torch.manual_seed(2)
    names = inspect.signature(model.forward).parameters
    text = config.get_text_config()
    vocabulary = min(getattr(text, "vocab_size", None) or VOCABULARY, VOCABULARY)
    inputs = {}
    if "input_ids" in names and "text" in kinds:
        inputs["input_ids"] = torch.randint(4, min(150, vocabulary), (3, TOKENS))
    if "images" in kinds or "input_ids" not in names:
        main = model.main_input_name if model.main_input_name in names else next(iter(names))
        main = "pixel_values" if main == "input_ids" else main
        sizes = next((c for c in (config, *subconfigs(config)) if hasattr(c, "image_size")), config)
        image = getattr(sizes, "image_size", 32) or 32
        height, width = image if isinstance(image, (list, tuple)) else (image, image)
        channels = getattr(sizes, "num_channels", 3)
        sounds = (getattr(c, name, None) for c in (config, *subconfigs(config)) for name in MELS)
        mels = next((number for number in sounds if number), 80)
        shape = {
            "pixel_values": (3, channels, height, width),
            "pixel_values_videos": (2, getattr(config, "num_frames", 4), channels, height, width),
            "input_values": (2, 8000),
            "input_features": (2, mels, 2 * (getattr(config, "max_source_positions", None) or 40)),
            "inputs_embeds": (2, TOKENS, getattr(config, "hidden_size", 64)),
        }.get(main)
        if shape is None:
            raise NotHereError(f"no inputs for {main}")
        inputs[main] = torch.randn(shape).cumsum(-1).sin() if main == "input_values" else torch.randn(shape)
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.randint(4, min(150, vocabulary), (len(next(iter(inputs.values()))), 5))
    return inputs


def subconfigs(config) -> list:
    return [
        getattr(config, name) for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is not None
    ]


def output_of(result) -> torch.Tensor:
    for name in ("logits", "last_hidden_state", "prediction_logits", "pooler_output"):
        if isinstance(getattr(result, name, None), torch.Tensor):
            return getattr(result, name).float()
    for value in result.values() if hasattr(result, "values") else result:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.float()
    raise NotHereError("no tensor in the output")


def results_of(model, inputs: dict) -> dict:
    """title: (output, which of its positions count). What eager cannot do either is given by the kind of its error."""
    names = inspect.signature(model.forward).parameters
    everything = slice(None)
    results = {}
    torch.manual_seed(3)  # some models draw numbers
    with torch.no_grad():
        results["plain"] = output_of(model(**inputs)), everything
        tokens = inputs.get("input_ids")
        if tokens is None:
            return results
        if "attention_mask" in names:
            for side in ("right", "left"):
                mask = torch.ones_like(tokens)
                mask[1, slice(7, None) if side == "right" else slice(0, 5)] = 0
                valid = everything if "decoder_input_ids" in inputs else mask.bool()
                results[f"padded {side}"] = tolerated(lambda m=mask: model(**inputs, attention_mask=m)), valid
                got = results[f"padded {side}"][0]
                if isinstance(got, torch.Tensor) and valid is not everything and got.shape[:2] != mask.shape:
                    del results[f"padded {side}"]  # made of one token of each row, which may be one of padding
        if {"use_cache", "cache", "past_key_values"} & set(names) or "kwargs" in names:
            results["cache"] = tolerated(lambda: with_cache(model, inputs)), everything
    return results


def with_cache(model, inputs: dict):
    ids = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    tokens = torch.cat((inputs[ids], inputs[ids].flip(1)), 1)[:, :9]
    fixed = {name: value for name, value in inputs.items() if name != ids}
    outputs, cache, done = [], None, 0
    for count in (5, 1, 3):
        cached = {} if cache is None else {"past_key_values": cache}
        result = model(**{ids: tokens[:, done : done + count]}, **fixed, **cached, use_cache=True)
        cache = getattr(result, "past_key_values", None)
        if cache is None:
            cache = getattr(result, "cache", None)
        if cache is None:
            return "no cache"
        outputs.append(output_of(result))
        done += count
    return torch.cat(outputs, 1)


def tolerated(run):
    """What runs, or the kind of error, which must be eager's too; aiter's own refusals pass on."""
    try:
        result = run()
        return result if isinstance(result, (str, torch.Tensor)) else output_of(result)
    except Exception as error:
        if refused_by_name(error) or type(error).__name__ == "CompilationDisabledError":
            raise
        return f"{type(error).__name__}"


if __name__ == "__main__":
    sys.exit(main())
