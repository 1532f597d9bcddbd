"""aiter.integrations.pytorch: models that only know PyTorch's attention run on our kernels, what does not says so.

On a GPU as on the CPU, where one is there: in bfloat16, as GPU kernels have no float32."""

import inspect
import warnings
from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate, assert_gradient_as_accurate
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import aiter
from aiter import plan, repeated
from aiter.dropout import draw_rng_state, keep_mask, scale
from aiter.integrations import masks, pytorch
from aiter.integrations.pytorch import activated

HAS_REGISTRY = hasattr(torch.nn.attention, "register_flash_attention_impl")
needs_registry = pytest.mark.skipif(not HAS_REGISTRY, reason=f"torch {torch.__version__} has no registry")


@pytest.fixture
def launches(monkeypatch):
    """Names of our passes that ran: the long way or, after tests with calls like theirs, as calls that are kept."""
    seen = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(plan, name, _recorded(getattr(plan, name), name, seen))
    monkeypatch.setattr(repeated.Kept, "send", _recorded(repeated.Kept.send, "forward", seen))
    return seen


def _recorded(function, name, seen):
    def run(*arguments, **keywords):
        seen.append(name)
        return function(*arguments, **keywords)

    return run


def randn(*shape, device="cpu", dtype=None):
    """The same values on every device; `dtype`: float32, on a GPU bfloat16."""
    return torch.randn(shape).to(device, dtype or (torch.float32 if device == "cpu" else torch.bfloat16))


def qkv(batch=2, heads_q=4, heads_kv=None, seq_q=19, seq_k=None, dim=16, value_dim=None, **where):
    heads_kv, seq_k, value_dim = heads_kv or heads_q, seq_k or seq_q, value_dim or dim
    shapes = (batch, heads_q, seq_q, dim), (batch, heads_kv, seq_k, dim), (batch, heads_kv, seq_k, value_dim)
    return [randn(*shape, **where).requires_grad_() for shape in shapes]


def with_gradients(function, tensors, keywords):
    """Output and gradients of fresh leaves of the same values."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves, **keywords)
    torch.manual_seed(3)
    output.backward(torch.randn(output.shape, dtype=torch.float64).to(output))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def assert_right(got, tensors, keywords):
    own = with_gradients(scaled_dot_product_attention, tensors, keywords)
    exact = with_gradients(scaled_dot_product_attention, [tensor.double() for tensor in tensors], keywords)
    assert_as_accurate(got[0], exact[0], own[0])
    for gradient, right, pytorchs in zip(got[1:], exact[1:], own[1:], strict=True):
        assert_gradient_as_accurate(gradient, right, pytorchs)


CASES = {
    "plain": (qkv, {}),
    "causal bf16": (partial(qkv, dtype=torch.bfloat16), {"is_causal": True}),
    "grouped": (partial(qkv, heads_kv=2), {"enable_gqa": True, "scale": 0.3}),
    "causal, fewer keys": (partial(qkv, seq_k=11), {"is_causal": True}),
    "causal, more keys": (partial(qkv, seq_k=30), {"is_causal": True}),
    "values of another dim": (partial(qkv, value_dim=32), {"is_causal": True}),
    "head_dim 20": (partial(qkv, dim=20), {}),
    "three dimensions": (lambda **where: [tensor[0].detach() for tensor in qkv(**where)], {}),
}


@pytest.mark.parametrize("older", [False, True], ids=["", "as on older PyTorch"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_runs_on_our_kernels(case, older, device, launches, monkeypatch):
    if older:
        monkeypatch.setattr(pytorch, "_REPLACES_KERNELS", False)
    tensors, keywords = case[0](device=device), case[1]
    with activated(), warnings.catch_warnings():
        warnings.simplefilter("error")
        got = with_gradients(scaled_dot_product_attention, tensors, keywords)
    assert launches == ["forward", "backward"]
    assert_right(got, tensors, keywords)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiled(case, device, launches):
    """As inductor would: aot_eager checks what operators promise of shapes, and costs no C++."""
    tensors, keywords = case[0](device=device), case[1]
    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    with activated():
        got = with_gradients(compiled, tensors, keywords)
    assert launches == ["forward", "backward"]
    assert_right(got, tensors, keywords)


@needs_registry
@pytest.mark.parametrize("case", ["plain", "causal bf16"])
def test_strides_are_those_that_compiled_code_was_promised(case):
    """Of outputs as of gradients, for any strides of what is given."""
    operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    tensors, keywords = [tensor.detach() for tensor in CASES[case][0]()], CASES[case][1]
    for given in (tensors, [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]):
        meta = [tensor.to("meta") for tensor in given]
        with activated():
            results = operator(*given, **keywords)
            gradients = backward(results[0], *given, *results, 0.0, False)
        promised = operator(*meta, **keywords)
        for real, fake in zip(results, promised, strict=True):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
        for real, fake in zip(gradients, backward(promised[0], *meta, *promised, 0.0, False), strict=True):
            assert (real.shape, real.stride()) == (fake.shape, fake.stride())


@needs_registry
@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_the_operators_of_gpus_as_they_would_be_called(layout):
    """On the CPU, where nothing else calls them: values, and the shapes and strides that compiled code was promised."""
    tensors = [tensor.detach() for tensor in qkv(heads_kv=2)]
    if layout == "tokens first":
        tensors = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
    meta, aten = [tensor.to("meta") for tensor in tensors], torch.ops.aten
    results = pytorch._gpu_forward(None, *tensors, 0.0, True)
    promised = aten._scaled_dot_product_flash_attention(*meta, 0.0, True)
    for real, fake in zip(results, promised, strict=True):
        if isinstance(real, torch.Tensor):
            assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
        else:
            assert real == fake
    grad = torch.randn_like(results[0])
    rest = results[2:6], (0.0, True), results[6:8]
    gradients = pytorch._gpu_backward(None, grad, *tensors, *results[:2], *rest[0], *rest[1], *rest[2])
    rest = promised[2:6], (0.0, True), promised[6:8]
    fakes = aten._scaled_dot_product_flash_attention_backward(
        grad.to("meta"), *meta, *promised[:2], *rest[0], *rest[1], *rest[2]
    )
    for real, fake in zip(gradients, fakes, strict=True):
        assert (real.shape, real.stride()) == (fake.shape, fake.stride())
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    output = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    output.backward(grad)
    torch.testing.assert_close(results[0], output)
    torch.testing.assert_close(gradients, tuple(leaf.grad for leaf in leaves))


def test_compiled_before_it_was_activated(device, launches):
    if not pytorch._REPLACES_KERNELS:
        pytest.skip("such a graph holds PyTorch's operators, which are replaced only by newer versions")
    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    tensors = [tensor.detach() for tensor in qkv(device=device)]
    # A graph holds the operator that PyTorch chose, which on a GPU need not be FlashAttention's.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        compiled(*tensors)
        assert launches == []
        with activated():
            compiled(*tensors)
            assert launches == ["forward"]
        compiled(*tensors)
    assert launches == ["forward"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode, device, launches):
    with activated(), mode():
        query, key, value = (randn(1, 2, 9, 16, device=device) for _ in range(3))
        output = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert launches == ["forward"]
    torch.testing.assert_close(output, scaled_dot_product_attention(query, key, value, is_causal=True))


def on_device(keywords, query):
    """With masks where the query is, additive ones of its dtype."""
    masks = {name: given for name, given in keywords.items() if isinstance(given, torch.Tensor)}
    return keywords | {
        name: mask.to(query.device, mask.dtype if mask.dtype == torch.bool else query.dtype)
        for name, mask in masks.items()
    }


def additive(mask, hidden):
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


TOKENS = torch.arange(23) < torch.tensor([[23], [9]])  # (batch, seq_k), padded behind the tokens
BEHIND = torch.arange(23) >= torch.tensor([[4], [17]])  # and before them
GAPS = torch.arange(46).view(2, 23) % 3 > 0
NONE = torch.tensor([[True] * 23, [False] * 23])
SEEN = {  # as (batch, heads, seq_q, seq_k), 19 queries and 23 keys
    "all": torch.ones(19, 23, dtype=torch.bool),
    "padding": TOKENS[:, None, None],
    "padding before": BEHIND[:, None, None],
    "gaps": GAPS[:, None, None],
    "no key": NONE[:, None, None],
    "the same for all sequences": GAPS[:1, None, None],
    "a row": GAPS[:1],
    "expanded": GAPS[:, None, None].expand(2, 4, 19, 23),
    "each head's, written out": GAPS[:, None, None].repeat(1, 4, 1, 1),
    "written out": (GAPS[:, None, None] & torch.ones(19, 1, dtype=torch.bool)),
    "additive": additive(GAPS[:, None, None], float("-inf")),
    "additive, the lowest": additive(BEHIND[:, None, None].expand(2, 1, 19, 23), torch.finfo(torch.bfloat16).min),
    "causal": torch.ones(19, 23, dtype=torch.bool).tril(4),
    "causal, from the first key": torch.ones(19, 23, dtype=torch.bool).tril(),
    "causal, additive": additive(torch.ones(19, 23, dtype=torch.bool).tril(4), float("-inf")),
    "causal and padding": TOKENS[:, None, None] & torch.ones(19, 23, dtype=torch.bool).tril(4),
    "causal and padding before": BEHIND[:, None, None] & torch.ones(19, 23, dtype=torch.bool).tril(4),
    "a window": torch.ones(19, 23, dtype=torch.bool).tril(4).triu(0),
    "a window, from the first key": torch.ones(19, 23, dtype=torch.bool).tril().triu(-6),
    "a window and padding": TOKENS[:, None, None] & torch.ones(19, 23, dtype=torch.bool).tril(4).triu(-2),
    "a window and padding before": BEHIND[:, None, None] & torch.ones(19, 23, dtype=torch.bool).tril(4).triu(-2),
    "causal, first key, padding": BEHIND[:, None, None] & torch.ones(19, 23, dtype=torch.bool).tril(),
}


@pytest.mark.parametrize("name", SEEN)
def test_masks_that_are_padding_or_causal_are_ours(name, device, launches):
    tensors = qkv(seq_k=23, device=device)
    keywords = on_device({"attn_mask": SEEN[name]}, tensors[0])
    with activated():
        got = with_gradients(scaled_dot_product_attention, tensors, keywords)
    assert launches == ["forward", "backward"]
    exact = with_gradients(
        scaled_dot_product_attention, [tensor.double() for tensor in tensors], on_device(keywords, tensors[0].double())
    )
    own = with_gradients(scaled_dot_product_attention, tensors, keywords)
    for ours, right, theirs in zip(got, exact, own, strict=True):
        assert_gradient_as_accurate(ours, right, theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_multi_head_attention_with_padding(causal, device, launches):
    """It writes its masks out for every head, to be added."""
    module = torch.nn.MultiheadAttention(64, 4, batch_first=True).to(device, randn(1, device=device).dtype)
    tokens = randn(2, 10, 64, device=device)
    padding = torch.arange(10, device=device) >= torch.tensor([[10], [7]], device=device)
    triangle = torch.ones(10, 10, dtype=torch.bool, device=device).triu(1) if causal else None
    given = {"key_padding_mask": padding, "attn_mask": triangle, "need_weights": False}
    with activated():
        ours = module(tokens, tokens, tokens, **given)[0]
    assert launches == ["forward"]
    torch.testing.assert_close(ours, module(tokens, tokens, tokens, **given)[0])


def test_a_mask_is_looked_at_once_and_again_when_it_changes(device, launches):
    query, key, value = (tensor.detach() for tensor in qkv(device=device))
    mask = torch.ones(19, 19, dtype=torch.bool, device=device)
    looks = []
    with activated(), pytest.MonkeyPatch.context() as patch:
        look_at = masks._look_at
        patch.setattr(masks, "_look_at", lambda *arguments: looks.append(1) or look_at(*arguments))
        for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with mode():
                scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert len(looks) == 1
        mask.tril_()
        changed = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        assert len(looks) == 2
    torch.testing.assert_close(changed, scaled_dot_product_attention(query, key, value, is_causal=True))
    assert launches == ["forward"] * 4


def test_a_padding_mask_compiled(device, launches):
    torch._dynamo.reset()
    query, key, value = qkv(seq_k=23, device=device)
    mask = GAPS[:, None, None].to(device)
    compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    with activated():
        compiled(query, key, value, attn_mask=mask).sum().backward()
    assert launches == ["forward", "backward"]
    gradient = query.grad
    query.grad = None
    scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    torch.testing.assert_close(gradient, query.grad)


NOT_READ = "attn_mask is neither padding nor causal"
REFUSED = {
    "a window to both sides": (qkv, {"attn_mask": torch.ones(19, 19, dtype=torch.bool).tril(3).triu(-5)}, NOT_READ),
    "gaps under a triangle": (
        qkv,
        {"attn_mask": (torch.arange(19) % 3 > 0) & torch.ones(19, 19).tril().bool()},
        NOT_READ,
    ),
    "a bias": (qkv, {"attn_mask": torch.linspace(-1, 0, 19)[None]}, NOT_READ),
    "heads of their own": (qkv, {"attn_mask": torch.arange(19) < torch.arange(3, 7).view(4, 1, 1)}, NOT_READ),
    "dropout of all": (qkv, {"dropout_p": 1.0}, "dropout_p is 1.0"),
    "float64": (partial(qkv, dtype=torch.float64), {}, "float64"),
    "float32": (partial(qkv, dtype=torch.float32), {}, "float32 on cuda"),
    "head_dim": (partial(qkv, dim=520), {}, "head_dim is 520"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_ours_goes_to_pytorch_and_says_so_once(name, device, launches):
    if name == "float32" and device == "cpu":
        pytest.skip("float32 is ours on the CPU")
    if name == "dropout of all" and device == "cuda":
        pytest.skip("PyTorch's own GPU kernels refuse it")
    make, keywords, reason = REFUSED[name]
    tensors = make(device=device)
    keywords = on_device(keywords, tensors[0])
    own = with_gradients(scaled_dot_product_attention, tensors, keywords)
    with activated(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            got = with_gradients(scaled_dot_product_attention, tensors, keywords)
    ours = [str(warning.message) for warning in said if "aiter" in str(warning.message)]
    assert launches == [] and len(ours) == 1 and reason in ours[0]
    torch.testing.assert_close(got, own, rtol=0, atol=0)


def test_dropout(device, launches):
    """By our own mask, from PyTorch's generator; compiled, it is another draw."""
    tensors = qkv(device=device)
    torch.manual_seed(11)
    state = draw_rng_state(device)
    kept = keep_mask(state, 0.3, 2, 4, 19, 19)
    with activated():
        torch.manual_seed(11)
        got = with_gradients(scaled_dot_product_attention, tensors, {"dropout_p": 0.3, "is_causal": True})
        torch._dynamo.reset()
        compiled = torch.compile(scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
        drawn = [compiled(*(tensor.detach() for tensor in tensors), dropout_p=0.3, is_causal=True) for _ in range(2)]
    assert launches == ["forward", "backward", "forward", "forward"] and not torch.equal(*drawn)

    def written_out(query, key, value):
        hidden = torch.ones(19, 19, device=device).triu(1).bool()
        scores = (query @ key.transpose(2, 3) / 16**0.5).masked_fill(hidden, -torch.inf)
        return (scores.softmax(-1) * kept * scale(0.3)) @ value

    exact = with_gradients(written_out, [tensor.double() for tensor in tensors], {})
    for ours, right, own in zip(got, exact, with_gradients(written_out, tensors, {}), strict=True):
        assert_gradient_as_accurate(ours, right, own)


@needs_registry
def test_dropout_of_pytorchs_operators_is_theirs(launches):
    query = torch.randn(1, 2, 9, 16)
    said = []
    pytorch._gpu_forward(said.append, query, query, query, 0.1)
    pytorch._gpu_backward(said.append, *[query] * 6, None, None, 9, 9, 0.1, False)
    assert len(said) == 2 and all("dropout_p is 0.1" in reason for reason in said) and not launches


def test_pytorchs_own_errors_and_choices_stay(launches):
    query, key, _ = qkv()
    with activated(), warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match=r"same dtype|Expected query"):
            scaled_dot_product_attention(query, key.double(), key)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            scaled_dot_product_attention(query, key, key)
        scaled_dot_product_attention(query, key[:1], key[:1])  # broadcast
        empty = torch.empty(2, 4, 0, 16)
        assert scaled_dot_product_attention(query, empty, empty).shape == query.shape
    assert launches == []


def test_a_model_under_autocast(device, launches):
    layer = torch.nn.TransformerEncoderLayer(64, 4, 64, dropout=0.0, batch_first=True).to(device)
    x = torch.randn(2, 7, 64).to(device)

    def step():
        layer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            output = layer(x)
        output.float().square().sum().backward()
        return output.detach(), layer.self_attn.in_proj_weight.grad.clone()

    own = step()
    with activated():
        got = step()
    assert launches == ["forward", "backward"]
    torch.testing.assert_close(got, own, rtol=0.05, atol=0.05)


def test_deactivated_is_as_if_it_never_was(launches):
    tensors = qkv()
    pytorch.activate()
    pytorch.activate()
    assert pytorch.is_active()
    pytorch.deactivate()
    pytorch.deactivate()
    assert not pytorch.is_active()
    with_gradients(scaled_dot_product_attention, tensors, {})
    assert launches == []
    with pytest.raises(NotImplementedError, match="CPU"):
        torch.ops.aten._flash_attention_forward(*tensors, None, None, 19, 19, 0.0, False, False)


@needs_registry
def test_pytorchs_registry():
    attention = torch.nn.attention
    assert "aiter" in attention.list_flash_attention_impls()
    attention.activate_flash_attention_impl("aiter")
    assert pytorch.is_active()
    attention.restore_flash_attention_impl()
    assert not pytorch.is_active()

    class Other:
        def remove(self):
            pass

    attention.register_flash_attention_impl("another", register_fn=Other)
    attention.activate_flash_attention_impl("another")
    with activated(), activated():
        assert attention.current_flash_attention_impl() == "aiter"
    assert attention.current_flash_attention_impl() == "another"
    pytorch.deactivate()  # not ours to end
    assert attention.current_flash_attention_impl() == "another"
    attention.restore_flash_attention_impl()


@needs_registry
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (4, 0), (3, 2)])
def test_varlen_attn(window, device, launches):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    grouped = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
    starts_q, starts_k = (torch.tensor(ends, dtype=torch.int32) for ends in ([0, 3, 10, 10, 20], [0, 5, 12, 15, 29]))
    heads_kv = 2 if grouped else 4
    tensors = [randn(total, heads, 16, device=device) for total, heads in ((20, 4), (29, heads_kv), (29, heads_kv))]

    def ours(*tensors):
        starts = starts_q.to(device), starts_k.to(device)
        options = {"enable_gqa": True} if grouped else {}
        return varlen.varlen_attn(*tensors, *starts, 10, 14, window_size=window, **options)

    def by_mask(*tensors):
        outputs = []
        for q0, q1, k0, k1 in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            rows, keys = slice(q0, q1), slice(k0, k1)
            q, k, v = (t[part].transpose(0, 1)[None] for t, part in zip(tensors, (rows, keys, keys), strict=True))
            at = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
            distance = torch.arange(k1 - k0) - at
            seen = (window[0] < 0) | (distance >= -window[0])
            seen = seen & ((window[1] < 0) | (distance <= window[1]))
            outputs.append(scaled_dot_product_attention(q, k, v, seen.to(device), enable_gqa=True)[0].transpose(0, 1))
        return torch.cat(outputs)

    torch._dynamo.reset()
    with activated():
        eager = with_gradients(ours, tensors, {})
        compiled = with_gradients(torch.compile(ours, backend="aot_eager"), tensors, {})
    assert launches == ["forward", "backward"] * 2
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        exact = with_gradients(by_mask, [tensor.double() for tensor in tensors], {})
        own = with_gradients(by_mask, tensors, {})
    for got in (eager, compiled):
        for result, right, pytorchs in zip(got, exact, own, strict=True):
            assert_gradient_as_accurate(result, right, pytorchs)


@needs_registry
def test_varlen_attn_over_pages_and_into_a_tensor():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not hasattr(varlen, "varlen_attn_out"):
        pytest.skip("an older varlen_attn")
    starts = torch.tensor([0, 1, 4], dtype=torch.int32)
    query, cache_k, cache_v = torch.randn(4, 4, 16), torch.randn(5, 8, 2, 16), torch.randn(5, 8, 2, 16)
    table, used = torch.tensor([[4, 1], [0, 3]], dtype=torch.int32), torch.tensor([7, 12], dtype=torch.int32)
    expected = aiter.variable_length_attention(
        query,
        *(cache.transpose(1, 2) for cache in (cache_k, cache_v)),
        *(starts.diff(), 3, True),
        seqlens_k=used,
        page_table=table,
        block_size=8,
    )
    keywords = dict(window_size=(-1, 0), enable_gqa=True, seqused_k=used, block_table=table, num_splits=1)
    out = torch.empty_like(query)
    with activated():
        output = varlen.varlen_attn(query, cache_k, cache_v, starts, None, 3, 16, **keywords)
        varlen.varlen_attn_out(out, query, cache_k, cache_v, starts, None, 3, 16, **keywords)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(out, expected)


def test_flops(device):
    """Two products of matrices forward, five backward, as PyTorch counts."""
    tensors = qkv(heads_kv=2, seq_k=30, value_dim=32, device=device)
    query, key, value = (tensor.detach().transpose(1, 2).requires_grad_() for tensor in tensors)
    with FlopCounterMode(display=False) as counter:
        aiter.flash_attn_func(query, key, value).sum().backward()
    pairs = 2 * 4 * 19 * 30
    assert counter.get_total_flops() == 2 * pairs * (16 + 32) + 2 * pairs * (3 * 16 + 2 * 32)


def test_flops_of_lengths():
    packed = torch.randn(12, 4, 16)
    lengths, keys = torch.tensor([3, 9], dtype=torch.int32), torch.tensor([5, 2], dtype=torch.int32)
    cache, table = torch.randn(4, 4, 8, 16), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    calls = {
        3 * 3 + 9 * 9: lambda: aiter.variable_length_attention(packed, packed, packed, lengths, 9),
        3 * 5 + 9 * 2: lambda: aiter.variable_length_attention(
            packed, cache, cache, lengths, 9, seqlens_k=keys, page_table=table, block_size=8
        ),
        2 * 6 * 16: lambda: aiter.flash_attn_with_kvcache(packed.view(2, 6, 4, 16), cache, table, 8),
        6 * (8 + 3) + 6 * 5: lambda: aiter.flash_attn_with_kvcache(
            packed.view(2, 6, 4, 16),
            cache,
            None,
            8,
            page_indptr=torch.tensor([0, 2, 3], dtype=torch.int32),
            page_indices=torch.tensor([3, 1, 0], dtype=torch.int32),
            last_page_len=torch.tensor([3, 5], dtype=torch.int32),
            max_seqlen_k=16,
        ),
    }
    for pairs, call in calls.items():
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == pairs * 4 * 2 * (16 + 16)


def test_flops_of_rocms_operators():
    query, pool, scale = torch.randn(2, 4, 16), torch.randn(2, 6, 8, 2, 16), torch.ones(1)
    rest = None, "auto", "NHD", 0.0, scale, scale
    table, lengths = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), torch.tensor([12, 5], dtype=torch.int32)
    starts, pages = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([3, 1, 0], dtype=torch.int32)
    first = torch.empty_like(query), query.new_empty(0), query, *pool, 0.25
    with FlopCounterMode(display=False) as counter:
        torch.ops.aiter.paged_attention_v1(*first, table, None, lengths, 16, *rest)
    assert counter.get_total_flops() == (12 + 5) * 4 * 2 * (16 + 16)
    with FlopCounterMode(display=False) as counter:
        torch.ops.aiter.paged_attention_ragged(*first, starts, pages, lengths % 8 + 1, 8, 1, *rest)
    assert counter.get_total_flops() == (8 + 5 + 6) * 4 * 2 * (16 + 16)


def test_flops_of_every_operator():
    """Those without a formula multiply no matrices."""
    pytest.importorskip("torch.distributed.device_mesh")
    import aiter.distributed.attention  # noqa: F401 - it has operators of its own

    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aiter::")}
    counted = {operator._qualified_op_name for operator in flop_registry if hasattr(operator, "_qualified_op_name")}
    assert names - counted == {"aiter::append_to_cache", "aiter::reshape_and_cache"}


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch was built without torch.distributed")
@pytest.mark.parametrize("documents", [None, [0, 7, 12]])
def test_flops_of_context_parallelism_compiled(documents):
    """Eager calls are made of the operations; compiled, they are one operator."""
    from aiter.distributed import context_parallel_attention

    shape = (12, 4, 16) if documents else (2, 12, 4, 16)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    documents = documents and torch.tensor(documents, dtype=torch.int32)
    torch._dynamo.reset()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        compiled = torch.compile(context_parallel_attention, backend="aot_eager")
        with FlopCounterMode(display=False) as counter:
            compiled(query, key, value, cu_seqlens=documents).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    pairs = 7 * 7 + 5 * 5 if documents is not None else 2 * 12 * 12
    assert counter.get_total_flops() == pairs * 4 * 2 * 16 * 7


def test_flops_of_pytorchs_operator_are_its_own(device, launches):
    with FlopCounterMode(display=False) as counter, activated():
        with_gradients(scaled_dot_product_attention, qkv(device=device), {})
    forward = 2 * 2 * 4 * 19 * 19 * (16 + 16)
    # PyTorch has no formula for its CPU operators.
    assert launches and counter.get_total_flops() in (
        (0, forward, forward * 7 // 2) if device == "cpu" else (forward * 7 // 2,)
    )
