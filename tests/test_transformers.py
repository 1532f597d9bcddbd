"""aiter as transformers' attention: a small random Llama generates and trains as with its own eager attention."""

import pytest
import torch
from accuracy import assert_as_accurate, assert_greedy
from tiny_models import TINY

transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")

import aiter.plan  # noqa: E402
import aiter.transformers  # noqa: E402
from aiter.cli.model_config import read_model  # noqa: E402
from aiter.integrations.transformers import layers  # noqa: E402


def llama(implementation, **changes):
    options = dict(max_position_embeddings=128, attn_implementation=implementation)
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, **options, **changes})).eval()


def small_llama(implementation):
    return llama(implementation, num_hidden_layers=1)


def compiled(model, inputs):
    torch._dynamo.reset()  # or the tests before it count as recompilations
    return torch.compile(model, backend="eager", fullgraph=True)


def exported(model, inputs):
    return torch.export.export(model, (), inputs).module()


def batch(padding_side):
    tokens = torch.randint(1, 97, (3, 12))
    mask = torch.ones_like(tokens)
    for row, length in enumerate((12, 7, 1)):
        if padding_side == "left":
            mask[row, : 12 - length] = 0
        elif padding_side == "right":
            mask[row, length:] = 0
    return tokens, mask


@pytest.mark.parametrize("padding_side", ("none", "left", "right"))
def test_logits(padding_side):
    tokens, mask = batch(padding_side)
    with torch.no_grad():
        ours, eager = (llama(name)(tokens, attention_mask=mask).logits for name in ("aiter", "eager"))
    valid = mask.bool()
    torch.testing.assert_close(ours[valid], eager[valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding_side", ("none", "left"))
@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_generation(padding_side, cache):
    tokens, mask = batch(padding_side)
    options = dict(attention_mask=mask, max_new_tokens=10, do_sample=False, pad_token_id=0, cache_implementation=cache)
    ours, eager = (llama(name).generate(tokens, **options) for name in ("aiter", "eager"))
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("padding_side", ("none", "left", "right"))
def test_training_follows_the_same_loss_curve(padding_side):
    curves = {}
    for name in ("aiter", "eager"):
        model = llama(name).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        torch.manual_seed(5)
        tokens, mask = batch(padding_side)
        # A token is predicted from the one before it: where that is padding, attention has nothing to say.
        before = torch.nn.functional.pad(mask[:, :-1], (1, 0))
        labels = tokens.masked_fill((mask == 0) | (before == 0), -100)
        losses = []
        for _ in range(20):
            loss = model(tokens, attention_mask=mask, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        curves[name] = losses
    assert curves["aiter"][-1] < 0.7 * curves["aiter"][0]
    torch.testing.assert_close(torch.tensor(curves["aiter"]), torch.tensor(curves["eager"]), rtol=2e-3, atol=2e-3)


def test_bidirectional():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
    )
    tokens, mask = batch("right")
    results = []
    for name in ("aiter", "eager"):
        torch.manual_seed(3)
        config._attn_implementation = name
        model = transformers.BertModel(config).eval()
        with torch.no_grad():
            results.append(model(tokens, attention_mask=mask).last_hidden_state[mask.bool()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def run(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


def both(make, call):
    """What `call` gives for a model on aiter and for the same one with eager attention."""
    return [call(make(name)) for name in ("aiter", "eager")]


def same(ours, eager):
    torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)


def bart(implementation):
    config = transformers.BartConfig(
        vocab_size=97,
        d_model=64,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=64,
        init_std=0.3,
        attn_implementation=implementation,
    )
    torch.manual_seed(3)
    return transformers.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("padding_side", ("none", "left", "right"))
@pytest.mark.parametrize("length", (1, 6, 12, 15))
def test_cross_attention(padding_side, length):
    tokens, mask = batch(padding_side)
    decoder = torch.randint(1, 97, (3, length))
    mask = None if padding_side == "none" else mask
    same(*both(bart, lambda m: run(m, input_ids=tokens, attention_mask=mask, decoder_input_ids=decoder).logits))


@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_cross_attention_in_generation(cache):
    tokens, mask = batch("right")
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=1, cache_implementation=cache)
    ours, eager = both(bart, lambda m: m.generate(tokens, attention_mask=mask, **options))
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("padding_side", ("none", "left", "right"))
def test_several_tokens_on_a_cache(padding_side):
    """A prompt in pieces, as prefix caching, chunks and assisted generation give it."""
    tokens, mask = batch(padding_side)

    def pieces(model):
        cache, logits = transformers.DynamicCache(config=model.config), []
        for begin, end in ((0, 5), (5, 6), (6, 9), (9, 12)):
            seen = mask[:, :end]
            logits.append(run(model, input_ids=tokens[:, begin:end], attention_mask=seen, past_key_values=cache).logits)
        return torch.cat(logits, 1)[mask.bool()]

    same(*both(llama, pieces))


SMALL = dict(TINY, max_position_embeddings=64, initializer_range=0.2, eos_token_id=None)
ALTERNATING = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
LATENT = dict(
    head_dim=None,
    num_key_value_heads=4,
    moe_intermediate_size=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    first_k_dense_replace=1,
)
# Family: model, configuration, what it has of its own. Windows are far shorter than the tests' rows.
FAMILIES = {
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", dict(ALTERNATING, attn_logit_softcapping=2.0)),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", ALTERNATING),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", dict(ALTERNATING, num_local_experts=4, num_experts_per_tok=2)),
    "mistral": ("MistralForCausalLM", "MistralConfig", dict(sliding_window=5)),
    "olmo3": ("Olmo3ForCausalLM", "Olmo3Config", ALTERNATING),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "modernbert": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        dict(
            head_dim=None,
            num_key_value_heads=None,
            local_attention=6,
            layer_types=ALTERNATING["layer_types"],
            **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id", "bos_token_id"), 0),
        ),
    ),
}


def family(name, implementation, **changes):
    model, config, own = FAMILIES[name]
    options = {key: value for key, value in {**SMALL, **own, **changes}.items() if value is not None}
    torch.manual_seed(3)
    config = getattr(transformers, config)(**options, attn_implementation=implementation)
    model = getattr(transformers, model)(config).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    return model


def mistral(implementation, window=8):
    return family("mistral", implementation, sliding_window=window)


@pytest.mark.parametrize("padding_side", ("none", "left", "right"))
@pytest.mark.parametrize("name", FAMILIES)
def test_families_give_logits_and_gradients_of_eager(name, padding_side):
    tokens, mask = batch(padding_side)
    valid = mask.bool()

    def logits_and_gradients(model):
        logits = model(input_ids=tokens, attention_mask=mask).logits[valid]
        logits.log_softmax(-1)[:, :48].mean().backward()
        gradients = {
            key: p.grad / p.grad.abs().max().clamp(min=1e-6)
            for key, p in model.named_parameters()
            if p.grad is not None
        }
        return logits.detach(), gradients

    (ours, gradients), (eager, expected) = both(
        lambda implementation: family(name, implementation), logits_and_gradients
    )
    same(ours, eager)
    same(gradients, expected)
    assert name != "gpt_oss" or any(key.endswith("sinks") for key in gradients)


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"modernbert"}))
@pytest.mark.parametrize("padding_side, cache", (("none", "dynamic"), ("left", "dynamic"), ("left", "static")))
def test_families_generate_past_their_windows(name, padding_side, cache):
    tokens, mask = batch(padding_side)
    options = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, cache_implementation=cache)
    ours, eager = both(
        lambda implementation: family(name, implementation),
        lambda model: model.generate(tokens, attention_mask=mask, **options),
    )
    assert torch.equal(ours, eager)


@pytest.mark.parametrize("name", FAMILIES)
def test_prewarm_of_a_model_builds_what_it_calls(name, monkeypatch, tmp_path):
    called = {}
    monkeypatch.setattr(aiter.plan, "plans", called)
    model = family(name, "aiter")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    for length in (12, 3):  # past the window and within it
        run(model, input_ids=torch.randint(1, 97, (2, length)))
    built = read_model(tmp_path / "config.json").kernels
    needed = {(head_dim, causal, value_dim, own) for _, _, _, head_dim, value_dim, causal, _, own in called}
    assert needed and needed <= set(built)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("padding_side", ("none", "left", "right"))
def test_several_tokens_in_a_window_on_a_cache(padding_side, cache):
    tokens, mask = batch(padding_side)

    def pieces(model):
        made = dict(config=model.config, max_cache_len=16) if cache == "static" else dict(config=model.config)
        held, logits = (transformers.StaticCache if cache == "static" else transformers.DynamicCache)(**made), []
        for begin, end in ((0, 3), (3, 4), (4, 7), (7, 12)):
            seen = mask[:, :end]
            logits.append(run(model, input_ids=tokens[:, begin:end], attention_mask=seen, past_key_values=held).logits)
        return torch.cat(logits, 1)[mask.bool()]

    same(*both(lambda implementation: family("gemma2", implementation), pieces))


@pytest.mark.parametrize("padding_side", ("none", "left"))
@pytest.mark.parametrize("name", ("gemma2", "modernbert"))
def test_windows_compiled(name, padding_side):
    """One graph for lengths within the window and past it."""
    tokens, mask = batch(padding_side)
    mask = None if padding_side == "none" else mask
    seen = slice(None) if mask is None else mask.bool()
    ours, eager = family(name, "aiter"), family(name, "eager")
    step = compiled(ours, {})
    inputs = dict(input_ids=tokens, attention_mask=mask, **({} if name == "modernbert" else {"use_cache": False}))
    same(run(step, **inputs).logits[seen], run(eager, **inputs).logits[seen])


def test_windows_compile_once_for_all_lengths():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    ours, eager = mistral("aiter"), mistral("eager")
    step = torch.compile(ours, backend=backend, fullgraph=True, dynamic=True)
    for length in (12, 6, 20, 9):
        tokens = torch.randint(1, 97, (2, length))
        inputs = dict(input_ids=tokens, use_cache=False)
        same(run(step, **inputs).logits, run(eager, **inputs).logits)
    assert len(graphs) == 1


@pytest.mark.parametrize("cache", ("dynamic", "static"))
def test_a_window_that_hides_nothing_is_none(cache):
    """One token on a sliding cache sees all that the cache holds, long after the window is full."""
    tokens = torch.randint(1, 97, (2, 6))
    options = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, cache_implementation=cache)
    ours, eager = both(mistral, lambda m: m.generate(tokens, **options))
    assert torch.equal(ours, eager)


def test_a_model_may_be_told_not_to_be_causal():
    tokens, mask = batch("right")
    for given in (None, mask):
        ours, eager = both(
            lambda name: llama(name, is_causal=False),
            lambda m, given=given: run(m, input_ids=tokens, attention_mask=given).logits[mask.bool()],
        )
        same(ours, eager)
    same(*both(llama, lambda m: run(m, input_ids=tokens, is_causal=False).logits))


DOCUMENTS = (5, 7, 1, 4)


def packed(make=small_llama, **options):
    documents = [torch.randint(1, 97, (length,)).tolist() for length in DOCUMENTS]
    inputs = transformers.DataCollatorWithFlattening(**options)([{"input_ids": d} for d in documents])
    del inputs["labels"]
    model = make("eager")
    alone = torch.cat([run(model, input_ids=torch.tensor([document])).logits[0] for document in documents])
    return inputs, alone


@pytest.mark.parametrize("use_cache", (True, False))
@pytest.mark.parametrize("told", ("cu_seq_lens", "position_ids"))
def test_packed_documents_do_not_see_each_other(told, use_cache):
    inputs, alone = packed(return_flash_attn_kwargs=told == "cu_seq_lens")
    same(run(small_llama("aiter"), **inputs, use_cache=use_cache).logits[0], alone)


@pytest.mark.parametrize("told", ("cu_seq_lens", "position_ids"))
def test_packed_documents_have_windows_of_their_own(told):
    def windowed(implementation):
        return family("gemma2", implementation)

    inputs, alone = packed(windowed, return_flash_attn_kwargs=told == "cu_seq_lens")
    same(run(windowed("aiter"), **inputs, use_cache=False).logits[0], alone)


# ---- in bfloat16, on a GPU too where there is one ----

MODELS = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss", "bart")


def in_bfloat16(name, device):
    """A model with our attention, with eager attention, and with that in float32 on the CPU: what is right."""

    def made(implementation):
        if name == "bart":
            return bart(implementation)
        if name == "llama":
            return llama(implementation, initializer_range=0.2, eos_token_id=None)
        # Of all experts, as which of them are chosen is a matter of rounding.
        return family(name, implementation, **({"num_experts_per_tok": 4} if name == "gpt_oss" else {}))

    ours, eager, exact = (made(implementation).bfloat16() for implementation in ("aiter", "eager", "eager"))
    return ours.to(device), eager.to(device), exact.float()


def inputs_of(model, tokens, mask):
    inputs = dict(input_ids=tokens, attention_mask=mask)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :9]
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


@pytest.mark.parametrize("padding_side", ("none", "left"))
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_accurate_as_eager(name, padding_side, device):
    tokens, mask = batch(padding_side)
    results = []
    for model in in_bfloat16(name, device):
        logits = model(**inputs_of(model, tokens, mask)).logits
        logits = logits.flatten(0, 1) if model.config.is_encoder_decoder else logits[mask.bool().to(logits.device)]
        logits.log_softmax(-1)[:, :48].mean().backward()
        results.append(
            (logits.detach().cpu(), {key: p.grad.cpu() for key, p in model.named_parameters() if p.grad is not None})
        )
    (ours, gradients), (eager, eagers), (exact, exacts) = results
    assert_as_accurate(ours, exact, eager)

    def error(of):
        """Over all parameters, each by its own size; by no less than a hundredth of the largest one's, as some
        gradients are 0 but for rounding (a key's bias changes no weight)."""
        sizes = {key: right.square().sum() for key, right in exacts.items()}
        least = 1e-4 * max(sizes.values())
        return sum((of[key] - right).square().sum() / sizes[key].clamp(min=least) for key, right in exacts.items())

    assert gradients.keys() == exacts.keys()
    assert error(gradients) <= 2 * error(eagers)


@pytest.mark.parametrize("cache", ("dynamic", "static"))
@pytest.mark.parametrize("name", MODELS)
def test_generation_in_bfloat16(name, cache, device):
    tokens, mask = batch("left" if name != "bart" else "right")
    ours, eager, exact = in_bfloat16(name, device)
    ours.generation_config.eos_token_id = ours.generation_config.forced_eos_token_id = None
    options = dict(max_new_tokens=8, do_sample=False, num_beams=1, pad_token_id=0, disable_compile=True)
    made = ours.generate(tokens.to(device), attention_mask=mask.to(device), cache_implementation=cache, **options).cpu()

    def logits(model):
        """Of the tokens that were made."""
        if model.config.is_encoder_decoder:
            inputs, first = {**inputs_of(model, tokens, mask), "decoder_input_ids": made[:, :-1]}, 0
        else:
            seen = torch.cat((mask, torch.ones_like(made[:, tokens.shape[1] :])), 1)
            inputs, first = dict(input_ids=made[:, :-1], attention_mask=seen[:, :-1]), tokens.shape[1] - 1
        return run(model, **{key: given.to(model.device) for key, given in inputs.items()}).logits[:, first:].cpu()

    assert_greedy(made[:, -8:], logits(exact), logits(eager))


@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_packed_documents_in_bfloat16(name, device):
    ours, eager, exact = in_bfloat16(name, device)
    documents = [torch.randint(1, 97, (length,)) for length in DOCUMENTS]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    inputs = collator([{"input_ids": document.tolist()} for document in documents])
    inputs = {key: given.to(device) if torch.is_tensor(given) else given for key, given in inputs.items()}
    del inputs["labels"]
    alone = [
        torch.cat([run(model, input_ids=document[None].to(model.device)).logits[0].cpu() for document in documents])
        for model in (exact, eager)
    ]
    assert_as_accurate(run(ours, **inputs, use_cache=False).logits[0].cpu(), *alone)


def test_packed_documents_compiled():
    inputs, alone = packed(return_flash_attn_kwargs=True)
    model = compiled(small_llama("aiter"), inputs)
    same(run(model, **inputs, use_cache=False).logits[0], alone)
    inputs, _ = packed()
    with pytest.raises(RuntimeError, match="a row one document"):
        run(model, **inputs, use_cache=False)


def test_chunks_are_documents():
    def llama4(implementation):
        torch.manual_seed(3)
        config = transformers.Llama4TextConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            intermediate_size_mlp=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            num_local_experts=2,
            attention_chunk_size=4,
            no_rope_layers=[1, 0],
            attn_implementation=implementation,
        )
        return transformers.Llama4ForCausalLM(config).eval()

    tokens = torch.randint(1, 97, (2, 11))
    same(*both(llama4, lambda m: run(m, input_ids=tokens).logits))


@pytest.mark.parametrize(
    "make, through, padded",
    (
        (small_llama, compiled, False),
        (small_llama, compiled, True),
        (small_llama, exported, False),
        (bart, exported, True),
    ),
)
def test_compiled_and_exported(make, through, padded):
    tokens, mask = batch("left")
    inputs = dict(input_ids=tokens, attention_mask=mask if padded else None, use_cache=False)
    if make is bart:
        inputs["decoder_input_ids"] = tokens[:, :5]
    seen = mask.bool() if padded and make is not bart else slice(None)
    ours, eager = make("aiter"), make("eager")
    same(run(through(ours, inputs), **inputs).logits[seen], run(eager, **inputs).logits[seen])


@pytest.mark.parametrize("padding_side", ("none", "left"))
def test_compiled_with_a_static_cache(padding_side):
    """As `generate` compiles a step on GPUs: one graph, masks made ahead of it or inside it."""
    tokens, mask = batch(padding_side)
    mask = None if padding_side == "none" else mask

    def steps(model, step):
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        logits = []
        for begin, end in ((0, 9), (9, 10), (10, 11), (11, 12)):
            seen = None if mask is None else mask[:, :end]
            call = step if end - begin == 1 else model
            logits.append(run(call, input_ids=tokens[:, begin:end], attention_mask=seen, past_key_values=cache).logits)
        valid = slice(None) if mask is None else mask[:, 9:].bool()
        return torch.cat(logits[1:], 1)[valid]

    ours, eager = small_llama("aiter"), small_llama("eager")
    same(steps(ours, compiled(ours, {})), steps(eager, eager))


class Layer(torch.nn.Module):
    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal


def call(mask=None, head_dim=16, value_dim=16, **options):
    torch.manual_seed(1)
    query, key, value = (torch.randn(2, 4, 6, dim) for dim in (head_dim, head_dim, value_dim))
    output, weights = aiter.transformers.attention(Layer(True), query, key, value, mask, **options)
    assert weights is None
    return output, (query, key, value)


TRIANGLE = torch.ones(6, 6, dtype=torch.bool).tril()
PADDING = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
BLOCKS = torch.block_diag(torch.ones(2, 2), torch.ones(4, 4)).bool()


@pytest.mark.parametrize(
    "mask",
    (
        PADDING[:, None, None],
        PADDING[:, None, None].expand(2, 1, 6, 6),
        (PADDING[:, None] & TRIANGLE)[:, None],
        BLOCKS[None, None].expand(2, 1, 6, 6),
        (BLOCKS & TRIANGLE)[None, None].expand(2, 1, 6, 6),
    ),
)
@pytest.mark.parametrize("additive", (False, True))
def test_masks_that_a_model_makes_itself(mask, additive):
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if additive else mask
    output, tensors = call(given)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask).transpose(1, 2)
    seen = torch.ones(2, 6, dtype=torch.bool) if mask.shape[2] == 1 else mask.any(3)[:, 0] & PADDING
    same(output[seen], expected[seen])


@pytest.mark.parametrize("head_dim, value_dim", ((24, 16), (16, 24), (12, 12), (15, 7)))
@pytest.mark.parametrize("mask", (None, PADDING))
def test_dims_are_padded(head_dim, value_dim, mask):
    output, tensors = call(mask, is_causal=False, head_dim=head_dim, value_dim=value_dim)
    given = None if mask is None else mask[:, None, None]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=given)
    same(output, expected.transpose(1, 2))


def test_dims_that_differ_are_not_padded(monkeypatch):
    called = []
    flash_attn_func = layers.flash_attn_func

    def remember(*tensors, **options):
        called.append([tensor.shape[-1] for tensor in tensors[:3]])
        return flash_attn_func(*tensors, **options)

    monkeypatch.setattr(layers, "flash_attn_func", remember)
    call(head_dim=24, value_dim=16)
    assert called == [[24, 24, 16]]


BAND = torch.ones(6, 6, dtype=torch.bool).tril(2).triu(-2)


@pytest.mark.parametrize("mask", (None, PADDING, "matrix"))
@pytest.mark.parametrize("is_causal", (True, False))
def test_the_layer_says_the_window_where_no_mask_does(mask, is_causal):
    seen = BAND & TRIANGLE if is_causal else BAND
    tokens = PADDING if mask is not None else torch.ones_like(PADDING)
    expected_mask = (tokens[:, None] & seen)[:, None]
    output, tensors = call(expected_mask if isinstance(mask, str) else mask, is_causal=is_causal, sliding_window=3)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=expected_mask).transpose(1, 2)
    same(output[tokens], expected[tokens])


GAPS = torch.tensor([[True, False, True, True, True, True]] * 2)


def window_mask(length=6, window=3, **options):
    sees = transformers.masking_utils.sliding_window_causal_mask_function(window)
    return aiter.transformers.padding_mask(2, length, length, mask_function=sees, local_size=window, **options)


HALF = torch.ones(2, 1, 6, 6, dtype=torch.bool)
HALF[:, :, 2, 4] = False


@pytest.mark.parametrize(
    "options, words",
    (
        (dict(s_aux=torch.zeros(2, 4, 6, 1)), "s_aux"),
        (dict(sinks=torch.zeros(2, 4, 6, 1)), "sinks"),
        (dict(position_bias=torch.zeros(1, 4, 6, 6)), "position_bias"),
        (dict(mask=aiter.transformers.padding_mask(2, 6, 6), sliding_window=5), "made without a window"),
        (dict(mask=PADDING[:, None, None], sliding_window=5), "made without a window"),
        (dict(mask=window_mask(), sliding_window=5), "sliding_window is 5, but the mask was made for a window of"),
        (dict(mask=window_mask(attention_mask=GAPS)), "not between them"),
        (dict(mask=(BAND & TRIANGLE)[None, None], sliding_window=4), "another mask"),
        (dict(output_attentions=True), "output_attentions"),
        (dict(something_new=1), "something_new"),
        (dict(max_length_q=6), "give all four"),
        (dict(mask=HALF), "another mask"),
        (dict(mask=0.5 * HALF), "another mask"),
        (dict(mask=PADDING[:, :5]), "which keys are tokens"),
        (dict(mask=aiter.transformers.padding_mask(2, 6, 7, 1)), r"made for \(batch, keys\) \(2, 7\)"),
    ),
)
def test_what_has_no_form_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        call(**options)


def test_a_mask_says_whether_it_is_causal():
    """Some models hand over is_causal=False because they have a causal mask."""
    mask = aiter.transformers.padding_mask(2, 6, 6)
    assert torch.equal(call(mask, is_causal=False)[0], call(is_causal=True)[0])
    assert not torch.equal(call(is_causal=False)[0], call(is_causal=True)[0])


@pytest.mark.parametrize("sliding_window", (None, 2, 3))
def test_a_two_sided_window_is_named_with_or_without_its_own_key(sliding_window):
    sees = transformers.masking_utils.sliding_window_bidirectional_mask_function(2)
    mask = aiter.transformers.padding_mask(
        2, 6, 6, mask_function=sees, local_size=2, allow_is_bidirectional_skip=True, attention_mask=PADDING
    )
    output, tensors = call(mask, sliding_window=sliding_window)
    expected_mask = (PADDING[:, None] & BAND)[:, None]
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=expected_mask).transpose(1, 2)
    same(output[PADDING], expected[PADDING])


def test_what_says_nothing_is_taken():
    expected, _ = call()
    options = dict(sliding_window=6, softcap=None, output_attentions=False, use_cache=True, position_ids=None)
    assert torch.equal(call(**options)[0], expected)


def test_a_model_with_a_position_bias_is_refused():
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, attn_implementation="aiter"
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    tokens = torch.randint(1, 97, (2, 8))
    with pytest.raises(ValueError, match="position_bias"):
        run(model, input_ids=tokens, decoder_input_ids=tokens)


def test_a_model_with_attention_of_its_own_is_refused():
    config = transformers.BloomConfig(vocab_size=97, hidden_size=64, n_layer=1, n_head=4, attn_implementation="aiter")
    model = transformers.BloomForCausalLM(config)
    for mask in (None, torch.tensor([[1] * 8, [0] * 3 + [1] * 5])):
        with pytest.raises(ValueError, match="computes attention itself"):
            model(torch.randint(1, 97, (2, 8)), attention_mask=mask)


def test_a_mask_is_no_tensor():
    mask = aiter.transformers.padding_mask(1, 4, 4)
    uses = (lambda: torch.zeros(4, 4) + mask, lambda: mask[:, None], lambda: mask.size(), lambda: torch.where(mask))
    for use in uses:
        with pytest.raises(ValueError, match="computes attention itself"):
            use()


def test_dropout_in_training():
    """The seed decides, gradients flow, and what is evaluated is as without."""
    tokens = torch.randint(1, 97, (1, 8))
    models = llama("aiter", attention_dropout=0.5), llama("aiter")
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        logits = models[0].train()(tokens).logits
        results.append(logits.detach())
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in models[0].parameters() if p.grad is not None)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
    assert torch.equal(models[0].eval()(tokens).logits, models[1].eval()(tokens).logits)
