"""aiter as transformers' attention: a small random Llama generates and trains as with its own eager attention."""

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="Hugging Face transformers is not installed")

import aiter.transformers  # noqa: E402, F401


def llama(implementation, **changes):
    options = dict(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        attn_implementation=implementation,
    )
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**options, **changes})).eval()


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


def test_what_has_no_kernel_is_an_error():
    model = llama("aiter", attention_dropout=0.1).train()
    with pytest.raises(ValueError, match="dropout"):
        model(torch.randint(1, 97, (1, 8)))
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=4,
            attn_implementation="aiter",
        )
    )
    with pytest.raises(ValueError, match="another mask"):
        mistral(torch.randint(1, 97, (1, 12)))
