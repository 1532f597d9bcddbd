"""diffusers' models on our backend: what the native one gives, to twice its error against float64."""

import copy

import pytest
import torch
from diffusers import ContextParallelConfig, DiTTransformer2DModel, FluxTransformer2DModel, WanTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from distributed import ranks
from test_documents import ROOT, run_page

import aiter.integrations.diffusers
from aiter import plan


def flux():
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    inputs = dict(
        hidden_states=torch.randn(2, 16, 4),
        encoder_hidden_states=torch.randn(2, 12, 32),
        pooled_projections=torch.randn(2, 32),
        timestep=torch.tensor([1.0, 0.5]),
        img_ids=torch.randn(16, 3),
        txt_ids=torch.randn(12, 3),
    )
    return model, inputs


def wan():
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
    )
    inputs = dict(
        hidden_states=torch.randn(1, 4, 2, 8, 8),
        timestep=torch.tensor([3]),
        encoder_hidden_states=torch.randn(1, 12, 16),
    )
    return model, inputs


MODELS = {"flux": flux, "wan": wan}


def run(model, inputs, dtype=torch.float32):
    cast = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    return model.to(dtype)(**cast).sample


def seeded(make):
    torch.manual_seed(3)
    model, inputs = make()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)  # attention that is no average
    return model.eval(), inputs


@pytest.fixture(autouse=True)
def native_afterwards():
    """A model's set_attention_backend is for all models from then on."""
    with attention_backend("native"):
        yield


@pytest.fixture
def launches(monkeypatch):
    seen, forward = [], plan.forward
    monkeypatch.setattr(plan, "forward", lambda *arguments: seen.append(1) or forward(*arguments))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_models_give_what_the_native_backend_gives(make, dtype, launches):
    model, inputs = seeded(make)
    with torch.no_grad():
        exact, native = (run(copy.deepcopy(model), inputs, of) for of in (torch.float64, dtype))
        assert not launches
        model.set_attention_backend("aiter")
        ours = run(model, inputs, dtype)
    assert len(launches) >= 2
    own = float((native.double() - exact).abs().max())
    assert float((ours.double() - exact).abs().max()) <= 2 * own + torch.finfo(dtype).eps * float(exact.abs().max())


def test_gradients(launches):
    model, inputs = seeded(flux)
    gradients = []
    for backend in ("native", "aiter"):
        model.zero_grad()
        with attention_backend(backend):
            run(model, inputs).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert launches
    for native, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-3, atol=1e-3 * float(native.abs().max()))


def test_a_model_compiled(launches):
    model, inputs = seeded(flux)
    with torch.no_grad(), attention_backend("aiter"):
        eager = model(**inputs).sample
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).sample
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)


def test_the_backend_of_old_processors_is_pytorchs():
    """DiT's blocks call scaled_dot_product_attention themselves: aiter.integrations.pytorch serves those."""
    torch.manual_seed(3)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
    ).eval()
    inputs = dict(
        hidden_states=torch.randn(2, 4, 8, 8), timestep=torch.tensor([1, 2]), class_labels=torch.tensor([3, 4])
    )
    import aiter.integrations.pytorch

    seen, forward = [], plan.forward
    with torch.no_grad():
        native = model(**inputs).sample
        with aiter.integrations.pytorch.activated(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan, "forward", lambda *arguments: seen.append(1) or forward(*arguments))
            ours = model(**inputs).sample
    assert seen
    torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-4)


def qkv(seq_q=9, seq_k=13, heads_kv=4):
    return torch.randn(2, seq_q, 4, 16), *torch.randn(2, 2, seq_k, heads_kv, 16)


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "padding": {"attn_mask": torch.tensor([[True] * 13, [True] * 5 + [False] * 8])},
    "gaps": {"attn_mask": (torch.arange(26) % 3 > 0).view(2, 1, 1, 13)},
    "added to scores": {
        "attn_mask": torch.zeros(2, 1, 1, 13).masked_fill(torch.arange(26).view(2, 1, 1, 13) % 3 == 0, -1e9)
    },
    "a triangle": {"attn_mask": torch.ones(9, 13, dtype=torch.bool).tril(4)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_dispatcher(options):
    tensors = qkv()
    native, ours = (dispatch_attention_fn(*tensors, **options, backend=backend) for backend in ("native", "aiter"))
    torch.testing.assert_close(ours, native)


def test_grouped_heads_and_log_sum_exps():
    query, key, value = qkv(heads_kv=2)
    native, ours = (
        dispatch_attention_fn(query, key, value, enable_gqa=True, backend=backend) for backend in ("native", "aiter")
    )
    torch.testing.assert_close(ours, native)
    output, lse = dispatch_attention_fn(query, key, value, backend="aiter", attention_kwargs={"return_lse": True})
    torch.testing.assert_close(output, ours)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key.repeat_interleave(2, 2)) / 4
    torch.testing.assert_close(lse, scores.logsumexp(-1))


REFUSED = {
    r"torch.float32 \(2, 13\)": {"attn_mask": torch.zeros(2, 13)},
    r"torch.bool \(9, 13\)": {"attn_mask": torch.ones(9, 13, dtype=torch.bool).tril(5).triu(-2)},
    r"torch.bool \(3, 13\)": {"attn_mask": torch.ones(3, 13, dtype=torch.bool)},
    "not both": {"attn_mask": torch.ones(2, 13, dtype=torch.bool), "is_causal": True},
}


def test_dropout():
    """The seed decides, and means are those without."""
    query, key, value = qkv()
    results = []
    for seed in (3, 3, *range(200)):
        torch.manual_seed(seed)
        results.append(dispatch_attention_fn(query, key, value, dropout_p=0.2, backend="aiter"))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    whole = dispatch_attention_fn(query, key, value, backend="aiter")
    torch.testing.assert_close(torch.stack(results[2:]).mean(0), whole, rtol=0, atol=0.15)


@pytest.mark.parametrize("words, options", REFUSED.items(), ids=REFUSED)
def test_what_has_no_form_is_refused_by_name(words, options):
    with pytest.raises(ValueError, match=words):
        dispatch_attention_fn(*qkv(), **options, backend="aiter")


def test_names():
    assert AttentionBackendName("aiter") is AttentionBackendName.AITER
    aiter.integrations.diffusers._register()
    assert [member.value for member in AttentionBackendName].count("aiter") == 1


def test_its_page():
    run_page(ROOT / "docs" / "diffusers.md")


def _weight_gradient(model, inputs):
    model(**inputs, return_dict=False)[0].square().sum().backward()
    return model.single_transformer_blocks[0].attn.to_k.weight.grad.clone()


def _in_parallel(config):
    model, inputs = seeded(flux)
    with torch.no_grad():
        whole = model(**inputs, return_dict=False)[0]
    expected = _weight_gradient(model, inputs)
    model.zero_grad()
    model.set_attention_backend("aiter")
    with pytest.MonkeyPatch.context() as patch:
        # diffusers numbers accelerators, and divides by how many there are
        patch.setattr(torch.accelerator, "device_count", lambda: 2)
        model.enable_parallelism(config=ContextParallelConfig(**config))
    output = model(**inputs, return_dict=False)[0]
    torch.testing.assert_close(output.detach(), whole, rtol=1e-3, atol=1e-3)
    gradient = _weight_gradient(model, inputs)
    torch.distributed.all_reduce(gradient)
    # Each process differentiates the whole output, of which gathering gives it its own rows' part.
    torch.testing.assert_close(gradient, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("config", [{"ulysses_degree": 2}, {"ring_degree": 2}], ids=["ulysses", "ring"])
def test_context_parallelism(config):
    ranks.run(2, _in_parallel, config)
