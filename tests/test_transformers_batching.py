"""transformers' continuous batching on our kernels: the tokens of plain generation, whatever else is in the batch."""

import pytest
import torch
from accuracy import assert_greedy
from tiny_models import TINY
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")
pytest.importorskip("transformers.generation.continuous_batching", reason="this version has no continuous batching")

import aiter.transformers  # noqa: E402
from aiter import flash_attn  # noqa: E402
from aiter.integrations import masks  # noqa: E402
from aiter.integrations.transformers import continuous_batching  # noqa: E402
from aiter.integrations.transformers.continuous_batching import FLASH_NAME  # noqa: E402

SIZES = dict(
    **TINY,
    max_position_embeddings=128,
    eos_token_id=None,
    bos_token_id=None,
    pad_token_id=0,
)
WINDOW = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=8),
    "gemma2": dict(query_pre_attn_scalar=16, attn_logit_softcapping=5.0, **WINDOW),
    "gpt_oss": dict(num_local_experts=2, num_experts_per_tok=2, **WINDOW),
}
# Once pages were blocks.
PAGE_SIZE = "page_size" if hasattr(transformers.ContinuousBatchingConfig, "page_size") else "block_size"


class NoValueIsLookedAt(TorchDispatchMode):
    """What a CUDA graph could not capture is an error."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in NEED_VALUES, f"{function} looks at values"
        return function(*args, **kwargs or {})


NEED_VALUES = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal}


def model_of(family):
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=FLASH_NAME).eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(std=0.2)  # logits far enough apart, and sinks that are not 0
    model.generation_config.eos_token_id = None
    return model


def prompts_of(count, longest):
    generator = torch.Generator().manual_seed(7)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(1, 97, (length,), generator=generator).tolist() for length in lengths]


def batched(model, prompts, **scheduling):
    if model.device.type == "cpu":
        scheduling.setdefault("use_cuda_graph", False)  # which transformers makes wherever there is a GPU
    generation = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    scheduling = {"num_blocks": 64, PAGE_SIZE: 16, "max_batch_tokens": 64, "use_async_batching": False, **scheduling}
    results = model.generate_batch(
        prompts,
        generation_config=generation,
        continuous_batching_config=transformers.ContinuousBatchingConfig(**scheduling),
        progress_bar=False,
    )
    assert len(results) == len(prompts)
    errors = {result.error for result in results.values()}
    assert errors == {None}, errors
    return [results[f"req_{i}"].generated_tokens for i in range(len(prompts))]


def one_by_one(model, prompts, implementation):
    model.set_attn_implementation(implementation)
    tokens = []
    for prompt in prompts:
        inputs = torch.tensor([prompt])
        output = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        tokens.append(output[0, len(prompt) :].tolist())
    return tokens


@pytest.mark.parametrize("family, count", [("llama", 50), ("mistral", 12), ("gemma2", 12), ("gpt_oss", 12)])
def test_tokens_are_those_of_plain_generation(family, count, monkeypatch):
    """With prompts cut into pieces, as 64 tokens go into a step."""
    calls = []
    varlen = flash_attn.flash_attn_varlen_func
    monkeypatch.setattr(
        flash_attn, "flash_attn_varlen_func", lambda *args, **kwargs: calls.append(args) or varlen(*args, **kwargs)
    )
    model, prompts = model_of(family), prompts_of(count, 70)
    ours = batched(model, prompts)
    assert calls and model.config._attn_implementation == FLASH_NAME
    assert ours == one_by_one(model, prompts, "eager")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_can_be_captured(family, monkeypatch):
    """On a GPU transformers captures its steps in CUDA graphs: no layer and no mask may look at values."""
    model, prompts, steps = model_of(family), prompts_of(5, 30), []
    forward = model.forward

    def watched(*arguments, **keywords):
        steps.append(1)
        with pytest.MonkeyPatch.context() as patch, NoValueIsLookedAt():
            for question in ("is_initialized", "is_current_stream_capturing"):
                patch.setattr(torch.cuda, question, lambda: True)
            return forward(*arguments, **keywords)

    monkeypatch.setattr(model, "forward", watched)
    monkeypatch.setattr(continuous_batching, "is_capturing", lambda: False)  # what it says of a model on the CPU
    ours = batched(model, prompts)
    assert steps
    monkeypatch.undo()
    assert ours == one_by_one(model, prompts, "eager")


@pytest.mark.parametrize("padding", [0, 3])
def test_plain_models_can_be_captured(padding, monkeypatch):
    """Masks too look at no value then, and say the same."""
    model = model_of("llama")
    tokens, mask = torch.randint(1, 97, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, position_ids=positions).logits
        monkeypatch.setattr(masks, "is_capturing", lambda: True)
        with NoValueIsLookedAt():
            captured = model(tokens, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(captured[mask.bool()], expected[mask.bool()])


def test_a_graph_of_a_model_on_the_cpu_is_refused(monkeypatch):
    """transformers captures one wherever a GPU is; replayed, it would compute nothing."""
    monkeypatch.setattr(continuous_batching, "is_capturing", lambda: True)
    with pytest.raises(AssertionError, match=r"ContinuousBatchingConfig\(use_cuda_graph=False\)"):
        batched(model_of("llama"), prompts_of(1, 5))


def test_decoding_over_pages(monkeypatch):
    """What transformers does where there is a GPU: pages and new tokens go to the kernels, nothing is gathered."""
    from transformers.generation.continuous_batching import initialization

    monkeypatch.setattr(initialization, "ensure_decode_fast_path_is_available", lambda *arguments: None)
    calls = []
    with_cache = flash_attn.flash_attn_with_kvcache
    monkeypatch.setattr(
        flash_attn, "flash_attn_with_kvcache", lambda *args, **kwargs: calls.append(1) or with_cache(*args, **kwargs)
    )
    model, prompts = model_of("llama"), prompts_of(12, 30)
    ours = batched(model, prompts, max_blocks_per_request=4)
    assert calls
    assert ours == one_by_one(model, prompts, "eager")


@pytest.mark.parametrize(
    "family, count, pages", [("llama", 20, False), ("llama", 20, True), ("gemma2", 12, False), ("gpt_oss", 12, False)]
)
def test_in_bfloat16(family, count, pages, device):
    """On a GPU as transformers does it there by itself: in CUDA graphs, two steps at a time."""
    if pages and device == "cpu":
        pytest.skip("transformers gives the pages themselves on GPUs alone")
    model, prompts = model_of(family).bfloat16().to(device), prompts_of(count, 70)
    scheduling = {} if device == "cpu" else {"use_async_batching": None}
    made = batched(model, prompts, max_blocks_per_request=8 if pages else 0, **scheduling)
    model.set_attn_implementation("eager")
    exact = model_of(family).bfloat16().float()
    exact.set_attn_implementation("eager")
    for prompt, tokens in zip(prompts, made, strict=True):
        row = torch.tensor([prompt + tokens[:-1]])
        with torch.no_grad():
            logits = [one(row.to(one.device)).logits[0, -len(tokens) :].cpu() for one in (exact, model)]
        assert_greedy(torch.tensor(tokens), *logits)


def test_decoding_over_pages_is_offered_to_transformers():
    """It asks for the functions by the implementation's name."""
    from transformers.modeling_flash_attention_utils import lazy_import_flash_attention
    from transformers.utils.generic import is_flash_attention_requested

    assert is_flash_attention_requested(requested_attention_implementation=FLASH_NAME, version=[2, 3])
    functions, _ = lazy_import_flash_attention(FLASH_NAME)
    assert functions[1] is flash_attn.flash_attn_varlen_func
    assert "flash_attn_with_kvcache" in functions[2].__name__


@pytest.mark.parametrize("padding", ["left", "none"])
def test_plain_generation_under_this_name(padding):
    model = model_of("gemma2")
    tokens = torch.randint(1, 97, (3, 12))
    mask = torch.ones_like(tokens)
    if padding == "left":
        mask[1, :5] = 0
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ours = model.generate(tokens, **options)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(tokens, **options))


def test_registering_twice_changes_nothing():
    adjust = transformers.PreTrainedModel._check_and_adjust_attn_implementation
    continuous_batching.admit()
    assert transformers.PreTrainedModel._check_and_adjust_attn_implementation is adjust
    with pytest.raises(ValueError, match="not_there"):
        model_of("llama").set_attn_implementation("not_there")


def test_what_has_no_form_is_refused_by_name():
    tensor, starts = torch.randn(1, 4, 3, 16), torch.tensor([0, 3], dtype=torch.int32)
    for given in ({"dropout": 0.1}, {"position_bias": tensor}):
        with pytest.raises(ValueError, match=next(iter(given))):
            continuous_batching.batched_attention(
                *(None, tensor, tensor, tensor, None),
                **dict(cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=3, max_length_k=3, read_index=[]),
                **given,
            )


def test_the_public_name_registers_it():
    assert aiter.transformers.FLASH_NAME == FLASH_NAME
    assert FLASH_NAME in transformers.AttentionInterface().valid_keys()
