"""SGLang's own registry, pools and layers with our backend, held against its torch_native backend."""

import argparse
import re
import types
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from accuracy import assert_as_accurate
from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from test_documents import ROOT

import aiter
from aiter.integrations.sglang.backend import AiterJitBackend

LAYERS = 2


def runner_of(page_size=1, dtype=torch.float32, window_pool=False, **changes):
    """What a backend is told of a model runner: 96 tokens for requests of at most 40, two layers of 2 heads of 16."""
    sizes = dict(page_size=page_size, dtype=dtype, head_num=2, head_dim=16, device="cpu", enable_memory_saver=False)
    if window_pool:
        pool = SWAKVPool(96, 96, swa_attention_layer_ids=[1], full_attention_layer_ids=[0], **sizes)
        # What SGLang's allocator would say: where a slot of the whole pool lies in the other, here in reverse.
        assert page_size == 1
        pool.full_to_swa_index_mapping = torch.cat((torch.tensor([0]), torch.arange(96, 0, -1), torch.tensor([-1])))
    else:
        pool = MHATokenToKVPool(96, layer_num=LAYERS, **sizes)
    requests = ReqToTokenPool(size=4, max_context_len=40, device="cpu", enable_memory_saver=False)
    slots = (torch.randperm(96 // page_size)[:, None] + 1) * page_size + torch.arange(page_size)
    for row, free in zip((1, 2, 3), slots.flatten().split(32), strict=True):
        requests.req_to_token[row, : len(free)] = free
    values = dict(
        token_to_kv_pool=pool,
        req_to_token_pool=requests,
        page_size=page_size,
        device="cpu",
        use_mla_backend=False,
        model_config=types.SimpleNamespace(context_len=40),
    )
    return types.SimpleNamespace(**{**values, **changes})


def batch_of(runner, mode, lengths, new):
    """Requests in rows 1, 2 and 3 that have `lengths` tokens with the `new` ones."""
    rows = torch.tensor([1, 2, 3])[: len(lengths)]
    slots = [
        runner.req_to_token_pool.req_to_token[row, length - count : length]
        for row, length, count in zip(rows.tolist(), lengths, new, strict=True)
    ]
    lengths, new = torch.tensor(lengths), torch.tensor(new)
    return types.SimpleNamespace(
        forward_mode=mode,
        batch_size=len(rows),
        req_pool_indices=rows,
        seq_lens=lengths,
        seq_lens_cpu=lengths,
        extend_seq_lens=new,
        extend_seq_lens_cpu=new.tolist(),
        extend_prefix_lens=lengths - new,
        out_cache_loc=torch.cat(slots).long(),
        out_cache_loc_is_physical=False,
        encoder_lens=None,
        spec_info=None,
    )


def tensors_of(batch, dtype=torch.float32):
    count = len(batch.out_cache_loc)
    return [torch.randn(count, heads, 16).to(dtype) for heads in (4, 2, 2)]


def layer_of(layer_id=0, **options):
    return RadixAttention(4, 16, 0.25, 2, layer_id, **options)


STEPS = (
    (ForwardMode.EXTEND, [12, 7, 20], [12, 7, 20]),  # prompts
    (ForwardMode.EXTEND, [21, 8, 25], [9, 1, 5]),  # chunks, behind what is cached
    (ForwardMode.DECODE, [22, 9, 26], [1, 1, 1]),
)


def run(backend, runner, layer, dtype=torch.float32, rounded=None):
    """The steps of STEPS, one after the other; all outputs. rounded: the dtype whose values tensors have."""
    torch.manual_seed(7)
    outputs = []
    for mode, lengths, new in STEPS:
        batch = batch_of(runner, mode, lengths, new)
        query, key, value = (tensor.to(dtype) for tensor in tensors_of(batch, rounded or dtype))
        backend.init_forward_metadata(batch)
        outputs.append(backend.forward(query.flatten(1), key, value, layer, batch))
    return torch.cat(outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("window", [-1, 5])
def test_steps_give_what_the_native_backend_gives(page_size, window, dtype):
    outputs = []
    for make, of in (
        (TorchNativeAttnBackend, torch.float64),
        (TorchNativeAttnBackend, dtype),
        (AiterJitBackend, dtype),
    ):
        torch.manual_seed(5)
        runner = runner_of(page_size, of)
        outputs.append(run(make(runner), runner, layer_of(sliding_window_size=window), of, dtype))
    exact, native, ours = outputs
    assert ours.shape == (39 + 15 + 3, 64)
    assert_as_accurate(ours, exact, native)


def test_windows_in_a_pool_of_their_own():
    for layer_id, window in ((0, -1), (1, 5)):
        outputs = []
        for make, window_pool in ((TorchNativeAttnBackend, False), (AiterJitBackend, True)):
            torch.manual_seed(5)
            runner = runner_of(window_pool=window_pool)
            outputs.append(run(make(runner), runner, layer_of(layer_id, sliding_window_size=window)))
        torch.testing.assert_close(*outputs)


def test_caps_and_sinks():
    """Against our own dense operation: the native backend has neither."""
    runner = runner_of()
    batch = batch_of(runner, ForwardMode.EXTEND, [12], [12])
    query, key, value = tensors_of(batch)
    sinks = torch.randn(4)
    backend = AiterJitBackend(runner)
    backend.init_forward_metadata(batch)
    output = backend.forward(query.flatten(1), key, value, layer_of(logit_cap=2.0), batch, sinks=sinks)
    expected = aiter.flash_attn_func(query[None], key[None], value[None], True, 0.25, softcap=2.0, sinks=sinks)
    torch.testing.assert_close(output, expected[0].flatten(1))


def test_encoders_see_all():
    runner = runner_of()
    batch = batch_of(runner, ForwardMode.EXTEND, [12, 5], [12, 5])
    tensors, layer = tensors_of(batch), layer_of(attn_type=AttentionType.ENCODER_ONLY)
    outputs = []
    for make in (TorchNativeAttnBackend, AiterJitBackend):
        backend = make(runner)
        backend.init_forward_metadata(batch)
        outputs.append(backend.forward(tensors[0].flatten(1), *tensors[1:], layer, batch))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("window_pool", [False, True])
def test_what_a_graph_would_replay(window_pool):
    """Decoding from the buffers that a CUDA graph holds: the same addresses each time, filled anew; padded requests,
    which SGLang gives one token, are computed and read by nobody."""
    torch.manual_seed(5)
    runner = runner_of(window_pool=window_pool)
    backend, layer = AiterJitBackend(runner), layer_of(1, sliding_window_size=5)
    backend.init_cuda_graph_state(4, 4)
    addresses = set()
    for lengths in ([3, 9, 2], [20, 1, 31]):
        batch = batch_of(runner, ForwardMode.DECODE, lengths, [1, 1, 1])
        query, key, value = tensors_of(batch)
        backend.init_forward_metadata(batch)
        eager = backend.forward(query.flatten(1), key, value, layer, batch)
        backend.init_forward_metadata_out_graph(batch)
        tensors = (part for part in backend.forward_metadata if isinstance(part, torch.Tensor))
        addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
        torch.testing.assert_close(backend.forward(query.flatten(1), key, value, layer, batch), eager)
    assert len(addresses) == 1 and backend.get_cuda_graph_seq_len_fill_value() == 1


def test_loaded_by_its_entry_point(monkeypatch):
    """As SGLang finds it in an installed package, and by the command line's choices."""
    from sglang.srt import plugins
    from sglang.srt.server_args import ServerArgs

    group = plugins.GENERAL_PLUGINS_GROUP
    name, value = re.search(
        rf'entry-points."{group}"\]\n(\w+) = "(.*)"', (ROOT / "pyproject.toml").read_text()
    ).groups()
    entries = EntryPoints([EntryPoint(name, value, group)])
    monkeypatch.setattr(plugins, "entry_points", lambda group: entries.select(group=group))
    for _ in range(2):
        monkeypatch.setattr(plugins, "_plugins_loaded", False)
        plugins.load_plugins()
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    chosen = parser.parse_args(["--model-path", "-", "--attention-backend", "aiter_jit"]).attention_backend
    assert isinstance(ATTENTION_BACKENDS[chosen](runner_of()), AiterJitBackend)
    assert ATTENTION_BACKEND_CHOICES.count(chosen) == 1
    assert ATTENTION_BACKENDS["aiter"] is not ATTENTION_BACKENDS[chosen]  # SGLang's own stays


def test_what_is_not_served_is_refused_by_name():
    with pytest.raises(NotImplementedError, match="latent attention"):
        AiterJitBackend(runner_of(use_mla_backend=True))
    with pytest.raises(NotImplementedError, match="float8_e4m3fn cache"):
        AiterJitBackend(runner_of(dtype=torch.float8_e4m3fn))
    runner = runner_of()
    backend = AiterJitBackend(runner)
    batch = batch_of(runner, ForwardMode.DECODE, [3], [1])
    for name, words in (("spec_info", "speculative"), ("encoder_lens", "encoders")):
        with pytest.raises(NotImplementedError, match=words):
            backend.init_forward_metadata(types.SimpleNamespace(**{**vars(batch), name: object()}))
    backend.init_forward_metadata(batch)
    query, key, value = tensors_of(batch)
    for options, words in (({"k_rope": key}, "k_rope"), ({"return_lse": True}, "return_lse")):
        with pytest.raises(NotImplementedError, match=words):
            backend.forward(query.flatten(1), key, value, layer_of(), batch, **options)
    with pytest.raises(NotImplementedError, match="cross attention"):
        backend.forward(query.flatten(1), key, value, layer_of(is_cross_attention=True), batch)
