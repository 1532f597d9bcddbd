"""What the ranks of a group do in tests: each has its rows of a sequence that every rank knows whole, and compares with
what one process computes."""

import functools
import os
import re
import time
import weakref
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import aiter
from aiter.distributed import (
    context_parallel_attention,
    context_parallel_decode,
    positions_of,
    shard,
    unshard,
)

SCHEMES = ("allgather", "alltoall", "ring")


def whole(shape, dtype, packed=False):
    """query, key, value and gradients of output and log-sum-exp: (batch, tokens, heads_q, heads_kv, dim, value_dim)."""
    batch, tokens, heads_q, heads_kv, dim, value_dim = shape
    outer = (tokens,) if packed else (batch, tokens)
    sizes = ((heads_q, dim), (heads_kv, dim), (heads_kv, value_dim), (heads_q, value_dim))
    query, key, value, grad = (torch.randn(*outer, *size).to(dtype) for size in sizes)
    grad_lse = torch.randn(*outer[:-1], heads_q, tokens)
    return query, key, value, grad, grad_lse


def alone(query, key, value, causal, cu_seqlens=None, **options):
    """The operation of one process, with return_lse."""
    if cu_seqlens is None:
        if query.dim() == 4:
            return aiter.flash_attn_func(query, key, value, causal, return_lse=True, **options)
        output, lse = aiter.flash_attn_func(query[None], key[None], value[None], causal, return_lse=True, **options)
        return output[0], lse[0]
    lengths, total = torch.tensor(cu_seqlens).diff().int(), cu_seqlens[-1]
    output, lse = aiter.variable_length_attention(
        *(t[:total] for t in (query, key, value)), lengths, int(lengths.max()), causal, return_lse=True, **options
    )
    behind = query.shape[0] - total
    return pad(output, (0, 0, 0, 0, 0, behind)), pad(lse, (0, behind), value=-torch.inf)


def compare(name, got, expected, units, largest=None):
    """Within `units` roundings of the largest value."""
    largest = expected.float().abs().max() if largest is None else largest
    allowed = units * torch.finfo(got.dtype).eps * float(largest)
    error = (got.float() - expected.float()).abs().max().item() if got.numel() else 0.0
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
    return error / allowed if allowed else 0.0


def attention(
    shape,
    dtype,
    scheme,
    layout,
    causal=False,
    cu_seqlens=None,
    group=None,
    sinks=False,
    alibi=False,
    with_lse=True,
    **options,
):
    """Forward and backward of one call, against one process."""
    packed = cu_seqlens is not None
    *leaves, grad, grad_lse = whole(shape, dtype, packed)
    heads_q, dim = shape[2], 0 if packed else 1
    if sinks:
        options["sinks"] = torch.randn(heads_q)
    if alibi:
        options["alibi_slopes"] = torch.rand(heads_q)
    expected_in = [t.clone().requires_grad_() for t in leaves]
    expected_options = dict(options)
    if sinks:
        expected_options["sinks"] = options["sinks"].clone().requires_grad_()
        options["sinks"] = options["sinks"].clone().requires_grad_()
    expected, expected_lse = alone(*expected_in, causal, cu_seqlens, **expected_options)
    torch.autograd.backward([expected, expected_lse][: 1 + with_lse], [grad, grad_lse][: 1 + with_lse])

    if layout == "zigzag of documents":
        layout = positions_of(shape[1], "zigzag", group, cu_seqlens=cu_seqlens)
    if isinstance(layout, list):
        layout = torch.tensor(layout[dist.get_rank()], dtype=torch.int64)

    def part(tensor, where):
        return shard(tensor, where, layout)

    own = [part(t, dim).clone().requires_grad_() for t in leaves]
    result = context_parallel_attention(
        *own, group, causal=causal, layout=layout, scheme=scheme, cu_seqlens=cu_seqlens, return_lse=True, **options
    )
    output, lse = result
    assert output.dtype == dtype and lse.dtype == torch.float32
    torch.autograd.backward(
        [output, lse][: 1 + with_lse], [part(grad, dim), part(grad_lse, grad_lse.dim() - 1)][: 1 + with_lse]
    )
    if sinks:
        of_sinks = options["sinks"].grad.clone()
        dist.all_reduce(of_sinks)
    # A part is rounded once, and so is a result: by half a unit of values that are means of `value`. In float32 a few
    # sums count, too.
    units, own_lse = 8 if dtype == torch.float32 else 1.5, part(expected_lse.detach(), expected_lse.dim() - 1)
    worst = {
        "output": compare("output", output.detach(), part(expected.detach(), dim), units, leaves[2].abs().max()),
        "lse": float((lse - own_lse).detach().nan_to_num(0.0, 0.0, 0.0).abs().amax()) if lse.numel() else 0.0,
    }
    assert torch.equal(lse == -torch.inf, own_lse == -torch.inf)
    assert worst["lse"] < 1e-4
    for name, got, single in zip(("query", "key", "value"), own, expected_in, strict=True):
        whole_ = single.grad
        worst[name] = compare(
            # A row with one key has a gradient of zero, the difference of two numbers as large as others' gradients.
            f"gradient of {name}",
            *(got.grad, part(whole_, dim), units, whole_.float().abs().max().clamp(min=1.0)),
        )
    if sinks:
        torch.testing.assert_close(of_sinks, expected_options["sinks"].grad, rtol=1e-4, atol=1e-4)
    return worst


def on_mesh(sizes, *arguments, **keywords):
    mesh = _mesh(sizes)
    assert torch.equal(positions_of(71, "zigzag", mesh), positions_of(71, "zigzag"))
    return attention(*arguments, group=mesh, **keywords)


@functools.lru_cache
def _mesh(sizes):
    return init_device_mesh("cpu", sizes, mesh_dim_names=("ring", "alltoall")[: len(sizes)])


def compiled(scheme, packed):
    """Under torch.compile, without a graph break, results are those of an eager call, bit for bit."""
    documents = {"cu_seqlens": torch.tensor([0, 20, 48], dtype=torch.int32)} if packed else {}
    query, key, value, grad, grad_lse = whole((2, 48, 4, 2, 32, 32), torch.float32, packed)
    sinks, dim = torch.randn(4), 0 if packed else 1

    def call(query, key, value, sinks):
        return context_parallel_attention(
            *(2 * query, key, value), causal=True, scheme=scheme, sinks=sinks, return_lse=True, **documents
        )

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaves = [shard(t, dim).requires_grad_() for t in (query, key, value)] + [sinks.clone().requires_grad_()]
        outputs = function(*leaves)
        torch.autograd.backward(outputs, [shard(grad, dim), shard(grad_lse, grad_lse.dim() - 1)])
        results.append([t.detach() for t in outputs] + [leaf.grad for leaf in leaves])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def disagreement(kind):
    """One rank is asked for something else, after a call that all agreed on; then all agree again. What each raises."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    query, key, value = (torch.randn(1, 8, heads, 32) for heads in (4, 2, 2))
    asked = {"causal": True, "scheme": "ring"}
    good = context_parallel_attention(query, key, value, **asked)
    tensors, options = [query, key, value], dict(asked)
    if rank == last:
        if kind == "option":
            options["window_size"] = (3, 0)
        elif kind == "shape":
            tensors = [t.repeat(2, 1, 1, 1) for t in tensors]
        elif kind == "heads":
            tensors[0] = tensors[0][:, :, :2]
        elif kind == "rows":
            tensors = [t[:, :5] for t in tensors]
        elif kind == "gradient":
            query.requires_grad_()
        elif kind == "scheme":
            options["scheme"] = "allgather"
        elif kind == "lse":
            options["return_lse"] = True
        elif kind == "refused":
            tensors[1] = key.to(torch.float64)
        elif kind == "positions":
            options["layout"] = torch.arange(8)
        elif kind == "documents":
            tensors, options["cu_seqlens"] = [t[0] for t in tensors], [0, 3, 16]
    if kind == "documents" and rank != last:
        tensors, options["cu_seqlens"] = [t[0] for t in tensors], [0, 4, 16]
    try:
        context_parallel_attention(*tensors, **options)
    except (ValueError, TypeError) as error:
        raised = f"{type(error).__name__}: {error}"
    else:
        raised = "nothing"
    assert torch.equal(context_parallel_attention(query.detach(), key, value, **asked), good)
    return raised


def positions_are_told_once():
    """How often ranks tell each other their positions: when any rank's are new, and then all do."""
    from aiter.distributed import agree

    rank, gather, told = dist.get_rank(), agree.gather_objects, []
    agree.gather_objects = lambda groups, value: told.append(value) or gather(groups, value)
    tensors = [torch.randn(1, 8, heads, 32) for heads in (4, 2, 2)]
    halves = [torch.arange(8 * rank, 8 * rank + 8), torch.arange(rank, 16, 2)]
    uneven = [*range(4), *range(8, 12)] if rank == 0 else [*range(4, 8), *range(12, 16)]
    counts, outputs = [], []
    try:
        for layout in (halves[0], halves[1], halves[1].clone(), halves[0].int(), torch.tensor(uneven), halves[0]):
            outputs.append(context_parallel_attention(*tensors, causal=True, layout=layout))
            counts.append(len(told))
    finally:
        agree.gather_objects = gather
    assert torch.equal(outputs[1], outputs[2]) and torch.equal(outputs[0], outputs[3])
    assert torch.equal(outputs[0], outputs[5]) and not torch.equal(outputs[0], outputs[1])
    return counts


def others_have_other_rows(scheme):
    """The same rows on rank 0, which makes ready for what it knows; those of others, and the length, are others."""
    query, key, value, _, _ = whole((1, 71, 4, 2, 32, 32), torch.float32)
    counts = []
    for total in (71, 70, 71, 70):
        parts = [shard(t[:, :total], 1) for t in (query, key, value)]
        counts.append(parts[0].shape[1])
        output = context_parallel_attention(*parts, causal=True, scheme=scheme)
        expected = aiter.flash_attn_func(*(t[:, :total] for t in (query, key, value)), True)
        compare("output", output, shard(expected, 1), 8, value.abs().max())
    return counts


def dies(scheme):
    """The last rank ends while the others wait for its keys: they end with the backend's own error."""
    tensors = [torch.randn(1, 8, 2, 32).requires_grad_() for _ in range(3)]
    output = context_parallel_attention(*tensors, scheme=scheme)
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    try:
        output.sum().backward()
    except RuntimeError as error:
        return type(error).__name__
    return "nothing"


def twice(scheme):
    """The same call gives the same bits."""
    query, key, value, grad, _ = whole(SMALL, torch.bfloat16)
    results = []
    for _ in range(2):
        leaves = [shard(t, 1, "zigzag").requires_grad_() for t in (query, key, value)]
        output = context_parallel_attention(*leaves, causal=True, layout="zigzag", scheme=scheme)
        output.backward(shard(grad, 1, "zigzag"))
        results.append([output.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


SMALL = (1, 64, 4, 2, 32, 32)


def shards(layout):
    """Tensors and positions are cut and put together alike; gradients of the whole reach the parts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole_ = torch.randn(2, 23, 5)
    positions = shard(torch.arange(23), 0, layout)
    if isinstance(layout, str):
        assert torch.equal(positions, positions_of(23, layout))
        assert abs(len(positions) - 23 / world) <= 1
    part = shard(whole_, 1, layout).requires_grad_()
    assert torch.equal(part, whole_[:, positions])
    again = unshard(part, 1, layout)
    assert torch.equal(again, whole_)
    weights = torch.randn(2, 23, 5)
    (again * weights * (rank + 1)).sum().backward()
    torch.testing.assert_close(part.grad, weights[:, positions] * (world * (world + 1) / 2))
    try:
        unshard(part, 1, positions[rank:])  # right on the first rank alone
    except ValueError as error:
        assert "on rank 1 of the group it is not" in str(error)
    else:
        raise AssertionError("positions that are too few raised nothing")


def decoding(heads, seq_q, options):
    """A cache of pages that are dealt out to the ranks, some sequences with none on some rank."""
    rank, world, page, batch = dist.get_rank(), dist.get_world_size(), 4, 3
    per_rank = torch.randint(0, 9, (world, batch))
    per_rank[0, 0], per_rank[-1, :] = 0, per_rank[-1, :].clamp(min=seq_q)
    total = per_rank.sum(0)
    query = torch.randn(batch, seq_q, heads[0], 32)
    keys, values = (torch.randn(batch, int(total.max()), heads[1], 32) for _ in range(2))
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.randn(heads[0])
    expected, expected_lse = aiter.flash_attn_func(
        query,
        keys,
        values,
        seqlens_k=total.int(),
        return_lse=True,
        **options,
        query_offsets=(total - seq_q).int(),
    )
    first = per_rank[:rank].sum(0)
    blocks = 3
    table = torch.randperm(batch * blocks).view(batch, blocks).int()
    caches = [torch.full((batch * blocks, heads[1], page, 32), torch.nan) for _ in range(2)]
    for b in range(batch):
        for i in range(int(per_rank[rank, b])):
            for cache, source in zip(caches, (keys, values), strict=True):
                cache[table[b, i // page], :, i % page] = source[b, first[b] + i]
    if options.get("causal") or "window_size" in options:
        options["query_offsets"] = (total - seq_q - first).int()
    output, lse = context_parallel_decode(
        query, tuple(caches), table, page, cache_seqlens=per_rank[rank].int(), return_lse=True, **options
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=1e-5)
    gathered = [torch.empty_like(output) for _ in range(world)]
    dist.all_gather(gathered, output)
    assert all(torch.equal(output, other) for other in gathered)


class _Peak(TorchDispatchMode):
    """The most bytes that tensors made in its context hold at once, as seen after each operator."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)}
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() in self.alive or storage.data_ptr() not in given:
                    self.alive.setdefault(storage.data_ptr(), [storage.nbytes(), []])[1].append(weakref.ref(tensor))
        for address, (_, tensors) in list(self.alive.items()):
            if all(tensor() is None for tensor in tensors):
                del self.alive[address]
        self.peak = max(self.peak, sum(size for size, _ in self.alive.values()))
        return result


def peak_memory(heads_q, heads_kv):
    """Bytes that an all-gather takes at most beside this rank's query, key and value: forward, of which the output, a
    part of keys and values, a log-sum-exp; backward, of which the gradients."""
    rows = 512
    query = torch.randn(1, rows, heads_q, 32, requires_grad=True)
    key, value = (torch.randn(1, rows, heads_kv, 32, requires_grad=True) for _ in range(2))
    with _Peak() as forward:
        output = context_parallel_attention(query, key, value, causal=True, layout="zigzag", scheme="allgather")
    grad, part = torch.ones_like(output), key.nbytes + value.nbytes
    with _Peak() as backward:
        output.backward(grad)
    return forward.peak, output.nbytes, part, heads_q * rows * 4, backward.peak, query.nbytes + part


def shards_by_positions(positions):
    shards(torch.tensor(positions[dist.get_rank()]))


def training(model_type, steps, scheme, documents=False, **config):
    """The losses of a tiny transformers model, trained by DDP on rows of a split sequence and by one process."""
    import transformers
    from torch.nn.parallel import DistributedDataParallel

    from aiter.distributed.transformers import ContextParallel

    sizes = dict(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        use_cache=False,
        **config,
    )
    configuration = transformers.AutoConfig.for_model(model_type, **sizes)
    tokens = torch.randint(0, 64, (1 if documents else 2, 51))
    given, position_ids = {}, None
    if documents:
        ends = torch.tensor([0, 20, 51], dtype=torch.int32)
        given = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=31, max_length_k=31)
        position_ids = torch.cat([torch.arange(20), torch.arange(31)]).unsqueeze(0)
    labels = tokens.clone()
    labels[0, 5:9] = -100

    def curve(parallel):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(configuration, attn_implementation="eager").train()
        batch = dict(input_ids=tokens, labels=labels)
        if position_ids is not None:
            batch["position_ids"] = position_ids
        if parallel:
            batch = ContextParallel(model, layout="zigzag", scheme=scheme).shard(**batch)
            model = DistributedDataParallel(model)
        else:
            model.set_attn_implementation("aiter")
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        for _ in range(steps):
            loss = model(**batch, **given).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = loss.detach().clone()
            if parallel:
                dist.all_reduce(total)
                total /= dist.get_world_size()
            losses.append(float(total))
        return losses

    import aiter.transformers  # noqa: F401  registers the implementation of one process

    alone_, split = curve(False), curve(True)
    torch.testing.assert_close(torch.tensor(split), torch.tensor(alone_), rtol=2e-4, atol=2e-4)
    assert alone_ == sorted(alone_, reverse=True), alone_
    return alone_, split


def refused_by_transformers():
    """A mask that only one rank sees is refused on all."""
    import transformers

    from aiter.distributed.transformers import ContextParallel

    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=64, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=32
    )
    model = transformers.LlamaForCausalLM(config)
    batch = ContextParallel(model).shard(torch.randint(0, 16, (1, 24)))
    if dist.get_rank() == 0:
        batch["attention_mask"] = torch.tensor([[0, *[1] * (batch["input_ids"].shape[1] - 1)]])
    try:
        model(**batch)
    except ValueError as error:
        return str(error)
    return "nothing"


class Block(torch.nn.Module):
    """Attention as a model has it; `group` None: of one process."""

    def __init__(self, group, heads=4, checkpoint=False):
        super().__init__()
        self.group, self.heads, self.checkpoint = group, heads, checkpoint
        self.qkv = torch.nn.Linear(64, 3 * heads * 32)
        self.out = torch.nn.Linear(heads * 32, 64)

    def attention(self, hidden):
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.heads, 32)).unbind(2)
        if self.group is None:
            return aiter.flash_attn_func(query, key, value, True).flatten(2)
        options = {"causal": True, "layout": "zigzag", "scheme": "allgather"}
        return context_parallel_attention(query, key, value, self.group, **options).flatten(2)

    def forward(self, hidden):
        if self.checkpoint:
            attended = torch.utils.checkpoint.checkpoint(self.attention, hidden, use_reentrant=False)
        else:
            attended = self.attention(hidden)
        return hidden + self.out(attended)


def sharded_model(checkpoint):
    """FSDP2 over all ranks of a mesh of data and context parallelism: gradients are those of one process."""
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "context"))
    hidden, grad = torch.randn(4, 30, 64), torch.randn(4, 30, 64)
    torch.manual_seed(1)
    single = Block(None)
    (single(hidden) * grad).sum().backward()
    torch.manual_seed(1)
    model = Block(mesh["context"], checkpoint=checkpoint)
    fully_shard(model, mesh=mesh["data", "context"]._flatten("all"))
    rows = slice(2 * mesh.get_local_rank("data"), 2 * mesh.get_local_rank("data") + 2)
    own, own_grad = (shard(t[rows], 1, "zigzag", mesh.get_group("context")) for t in (hidden, grad))
    (model(own) * own_grad).sum().backward()
    for name, parameter in single.named_parameters():
        got = model.get_parameter(name).grad.full_tensor() * 4  # FSDP has averaged what is a sum here
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-4)


def beside_tensor_parallelism():
    """Heads over one dimension of a mesh, the sequence over the other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))
    query, key, value, _, _ = whole((1, 40, 4, 4, 32, 32), torch.float32)
    expected = aiter.flash_attn_func(query, key, value, True)
    heads = slice(2 * mesh.get_local_rank("tensor"), 2 * mesh.get_local_rank("tensor") + 2)
    group = mesh.get_group("context")
    own = [shard(t[:, :, heads], 1, "zigzag", mesh["context"]) for t in (query, key, value)]
    output = context_parallel_attention(*own, mesh["context"], causal=True, layout="zigzag")
    torch.testing.assert_close(unshard(output, 1, "zigzag", group), expected[:, :, heads], rtol=0, atol=1e-5)


def page(path):
    """The losses that a page's example prints, run as torchrun would, in the group that there is already."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", Path(path).read_text(), re.DOTALL | re.MULTILINE):
        if "destroy_process_group" not in block:
            exec(compile(block, path, "exec"), names)
    return names["losses"]


def slow_compiler():
    """A first call, in a group whose collectives wait for less time than the last rank's compiler takes."""
    from aiter import jit

    get_kernel, waits = jit.get_kernel, [2.5]

    def slow(spec):
        time.sleep(waits.pop() if waits else 0.0)
        return get_kernel(spec)

    if dist.get_rank() == dist.get_world_size() - 1:
        jit.get_kernel = slow
    query, key, value = (torch.randn(1, 8, 1, 32) for _ in range(3))
    group = dist.new_group(timeout=timedelta(seconds=1), backend="gloo")
    context_parallel_attention(query, key, value, group, scheme="ring")
    return waits


def bad_arguments():
    query, key, value = torch.randn(1, 8, 4, 32), *torch.randn(2, 1, 8, 2, 32)
    for arguments, options, error, told in (
        ((query, key[:, :4], value[:, :4]), {}, ValueError, "differ in rows"),
        ((query, key, value), {"layout": "striped"}, ValueError, "layout is 'striped'"),
        ((query, key, value), {"layout": torch.arange(7)}, ValueError, "one for each row"),
        ((query, key, value), {"layout": torch.arange(1, 9)}, ValueError, "position 0 is held by no rank"),
        ((query, key, value), {"scheme": "star"}, ValueError, "scheme is 'star'"),
        ((query, key, value), {"scheme": "alltoall+ring"}, ValueError, "mesh of two dimensions"),
        ((query, key, value), {"cu_seqlens": [0, 8]}, ValueError, "must be packed"),
        ((query[0], key[0], value[0]), {"cu_seqlens": [0, 5, 3]}, ValueError, "must rise from 0"),
        ((query[0], key[0], value[0]), {"cu_seqlens": [0, 9]}, ValueError, "cu_seqlens ends at 9"),
        ((query, key, value), {"query_offsets": torch.zeros(1).int()}, ValueError, "query_offsets is not offered"),
        ((query, key, value), {"dropout_p": 0.1}, ValueError, "dropout_p is not offered"),
        ((query, key, value), {"attention_chunk": 4}, ValueError, "attention_chunk is not offered"),
        ((query, key, value), {"k_descale": torch.ones(1, 2)}, ValueError, "k_descale is not offered"),
        ((query, key, value), {"sinks": torch.ones(3)}, ValueError, "sinks has shape"),
        ((query, key, value), {"group": "all"}, TypeError, "group must be"),
        ((query, key, value), {"window": 3}, TypeError, "there is no option window"),
        ((query, key.double(), value), {}, TypeError, "key"),
    ):
        try:
            context_parallel_attention(*arguments, **options)
        except error as raised:
            assert told in str(raised), (told, str(raised))
        else:
            raise AssertionError(f"{options} raised nothing")
    try:
        context_parallel_decode(query, key, torch.zeros(1, 1).int(), 8, cache_seqlens=torch.ones(1).int(), causal=True)
    except ValueError as raised:
        assert "query_offsets is missing" in str(raised)
    else:
        raise AssertionError("causal decoding without positions raised nothing")


def operator_checks():
    """What torch.library says of the operator that torch.compile sees: schema, shapes of fakes, autograd."""
    query, key, value = (torch.randn(1, 12, heads, 32, requires_grad=True) for heads in (4, 2, 2))
    asked = (None, None, [dist.group.WORLD.group_name], "zigzag", "ring", True, 0.2, -1, -1, 0.0, False, True)
    tensors = query, key, value, torch.randn(4, requires_grad=True), None
    torch.library.opcheck(torch.ops.aiter.context_parallel_attention, (*tensors, *asked))
