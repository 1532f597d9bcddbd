"""Calls read in C are the calls that Python reads, byte by byte; and what C leaves to Python is refused as ever."""

import ctypes
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from problems import STRIDES, strided
from torch.fx.experimental.proxy_tensor import make_fx

import aiter
from aiter import checks, plan, reader
from aiter.layout import NO_INDICES, Indices, Sizes, read_sizes
from aiter.options import NO_OPTIONS, Options
from aiter.plan import Call

INCLUDE = Path(__file__).parent.parent / "kernels_src" / "include"
needs_exchange = pytest.mark.skipif(
    reader.exchange_of_torch() is None, reason="PyTorch before 2.10 cannot tell C what a tensor is"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The reader alone: what it reads with is its own, so that tests may set it."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if not compiler:
        pytest.skip("no C++ compiler (g++, clang++) on PATH")
    folder = tmp_path_factory.mktemp("reader")
    (folder / "reader.cpp").write_text('#include "call_reader.h"\n')
    command = [
        compiler,
        "-std=c++17",
        "-O1",
        "-Wall",
        "-Werror",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{INCLUDE}",
    ]
    subprocess.run([*command, str(folder / "reader.cpp"), "-o", str(folder / "reader.so")], check=True)
    return ctypes.CDLL(str(folder / "reader.so"))


@pytest.fixture
def functions(library):
    return reader.functions_of(library, reader.exchange_of_torch())


DIMS = (8, 64, 512, 576)


class Draw:
    """One call, drawn at random; `broken` is whether a rule may be broken by it."""

    def __init__(self, seed, broken=False):
        self.source = random.Random(seed)
        torch.manual_seed(seed)
        pick = self.source.choice
        self.kind = pick(("dense", "padded", "packed", "packed keys", "paged", "packed and paged"))
        self.dtype = pick((torch.float32, torch.float16, torch.bfloat16))
        self.kept_dtype = pick((self.dtype, self.dtype, *checks.FP8_NAMES))
        self.batch, self.heads_kv = pick((1, 3)), pick((1, 2))
        self.head_dim, self.value_dim = pick(DIMS), pick(DIMS[:3])
        packed_q, paged = self.kind.startswith("packed") and self.kind != "packed keys", "paged" in self.kind
        heads = self.heads_kv * pick((1, 3))
        token = pick((1, 5))
        self.query = self.tensor((token,) if packed_q else (self.batch, token), heads, self.head_dim, self.dtype)
        if paged:
            rows = 4, self.heads_kv
            shape = rows, pick((1, 16))
        elif self.kind in ("packed", "packed keys"):
            shape = (7,), self.heads_kv
        else:
            shape = (self.batch, 7), self.heads_kv
        self.key = self.tensor(*shape, self.head_dim, self.kept_dtype)
        self.value = self.tensor(*shape, self.value_dim, self.kept_dtype)
        starts = pick((True, False))
        lengths, ends = self.index(self.batch), self.index(self.batch + 1)
        self.indices = NO_INDICES
        if self.kind != "dense":
            packed_k = self.kind in ("packed", "packed keys")
            self.indices = Indices(
                seqlens_q=lengths if packed_q and not starts else pick((None, lengths)),
                seqlens_k=lengths if packed_k and not starts else pick((None, lengths)),
                page_table=self.index(self.batch, 3) if paged else None,
                starts_q=ends if packed_q and starts else None,
                starts_k=ends if packed_k and starts else None,
            )
        self.lengths = self.source.randint(0, 9), self.source.randint(0, 9)
        if broken:
            self.break_a_rule()

    def tensor(self, rows, heads, dim, dtype):
        return strided((*rows, heads, dim), torch.float32, self.source.choice(STRIDES[:3]), "cpu").to(dtype)

    def index(self, *shape):
        wide = torch.zeros(*shape[:-1], shape[-1] + self.source.randint(0, 2), dtype=torch.int32)
        return wide[..., : shape[-1]]

    def break_a_rule(self):
        broken = self.source.choice(("query", "key", "value", "key and value", "indices"))
        if broken == "indices":
            fields = {
                field: self.source.choice((None, self.index(self.batch), self.index(self.batch + 1), self.index(2, 2)))
                for field in self.source.sample(Indices._fields, 2)
            }
            self.indices = self.indices._replace(**fields)
            return
        change = self.source.choice(
            (
                lambda t: t.to(torch.float64),
                lambda t: t.to(torch.bfloat16),
                lambda t: t.to(torch.int32),
                lambda t: t[..., :-1],
                lambda t: t[..., :-8],
                lambda t: t[1:],
                lambda t: t[0],
                lambda t: t[0, 0],
                lambda t: t.unsqueeze(0),
                lambda t: torch.cat((t, t), -2),
                lambda t: torch.cat((t, t), -3),
                lambda t: t.to("meta"),
            )
        )
        for name in broken.split(" and "):
            setattr(self, name, change(getattr(self, name)))

    def sizes(self, function):
        return function(self.query, self.key, self.value, self.indices, *self.lengths)

    def options(self):
        """A value of each option, or its default."""
        pick, heads = self.source.choice, self.query.shape[-2]
        scale = pick((None, torch.ones(1), torch.ones(self.heads_kv), torch.ones(self.batch, self.heads_kv)))
        chosen = Options(
            *(pick((-1, 3)), pick((-1, 4)), pick((0.0, 5.5))),
            alibi_slopes=pick((None, torch.ones(heads), torch.ones(self.batch, heads))),
            sinks=pick((None, torch.ones(heads))),
            query_offsets=pick((None, torch.zeros(self.batch, dtype=torch.int32))),
            batch_invariant=pick((False, True)),
            dropout_p=pick((0.0, 0.3)),
            rng_state=pick((None, torch.zeros(2, dtype=torch.int64))),
            attention_chunk=pick((0, 4)),
            k_descale=scale,
            v_descale=scale,
        )
        return pick((NO_OPTIONS, chosen))

    def arguments(self, sizes):
        """What `pack` takes."""
        options, output = self.options(), self.query.new_empty(*self.query.shape[:-1], self.value.shape[-1])
        call = Call(Sizes(*sizes), self.indices, options, False, self.source.random(), checks.Names())
        lse = self.source.choice((None, torch.empty(plan._lse_shape(call.sizes))))
        tensors = self.query, self.key, self.value, output, lse
        given = self.source.choice((False, True))
        return call, *tensors, plan._more_strides(options), plan._options(options, 1, given)


@needs_exchange
def test_calls_are_packed_alike(functions):
    _, sizes_of, pack, *_ = functions
    for seed in range(400):
        draw = Draw(seed)
        sizes = draw.sizes(sizes_of)
        assert sizes == draw.sizes(read_sizes) and len(sizes) == len(Sizes._fields), seed
        arguments = draw.arguments(sizes)
        assert pack(*arguments, False) == plan.pack(*arguments), seed


@needs_exchange
def test_what_breaks_a_rule_is_left_to_python(functions):
    _, sizes_of, *_ = functions
    refused = 0
    for seed in range(600):
        draw = Draw(seed, broken=True)
        expected = draw.sizes(read_sizes)
        refused += expected is None
        # Lists of pages are rare, and always Python's.
        listed = draw.indices.page_indptr is not None or draw.indices.last_page_len is not None
        assert draw.sizes(sizes_of) == (None if listed else expected), seed
    assert refused > 200


@needs_exchange
@pytest.mark.parametrize(
    "change",
    [
        {"query": "no tensor"},
        {"query": torch.zeros(1, 5, 2, 8).to_sparse()},
        {"key": torch.zeros(1, 5, 2, 8, dtype=torch.complex64)},
        {"lengths": (-1, 3)},
        {"lengths": (3, -1)},
        {"lengths": (None, 3)},
        {"lengths": (2**70, 3)},
        {"indices": Indices(page_indptr=torch.zeros(2, dtype=torch.int32))},
    ],
    ids=str,
)
def test_what_is_no_call_is_left_to_python(functions, change):
    _, sizes_of, *_ = functions
    call = {name: torch.zeros(1, 5, 2, 8) for name in ("query", "key", "value")}
    call |= {"indices": NO_INDICES, "lengths": (0, 0)}
    *tensors, lengths = call.values()
    assert sizes_of(*tensors, *lengths) == (1, 2, 2, 5, 5, *[0] * 8)
    *tensors, lengths = (call | change).values()
    assert sizes_of(*tensors, *lengths) is None
    with pytest.raises(TypeError, match="int"):  # no exception is left behind
        int([])


@needs_exchange
def test_what_is_not_packed_as_it_lies(functions):
    """Strides that must be copied, numbers that do not fit, bytes of another struct."""
    _, _, pack, *_ = functions
    draw = Draw(0)
    call, *rest = *draw.arguments(draw.sizes(read_sizes)), False
    assert pack(call, *rest) is not None
    for number in (-1, 2**31, 2**70, None):
        assert pack(call._replace(sizes=call.sizes._replace(seqlen_q=number)), *rest) is None
    for scale in (1e300, float("nan"), None):
        assert pack(call._replace(softmax_scale=scale), *rest) is None
    for place in range(3):
        tensors = list(rest)
        tensors[place] = strided(rest[place].shape, torch.float32, "last", "cpu").to(rest[place].dtype)
        assert pack(call, *tensors) is None
    for place in (5, 6):
        wrong = list(rest)
        wrong[place] += b"\0"
        assert pack(call, *wrong) is None
    assert pack(call, *rest[:-1]) is None


@needs_exchange
@pytest.mark.parametrize(
    ("index", "shape", "is_one"),
    [
        (torch.zeros(3, dtype=torch.int32), (3,), True),
        (torch.zeros(3, dtype=torch.int32), (None,), True),
        (torch.zeros(3, 5, dtype=torch.int32)[:, :2], (3, None), True),
        (torch.zeros(0, dtype=torch.int32), (0,), True),
        (torch.zeros(3, dtype=torch.int32), (4,), None),
        (torch.zeros(3, dtype=torch.int32), (3, None), None),
        (torch.zeros(3, 2, dtype=torch.int32), (3,), None),
        (torch.zeros((), dtype=torch.int32), (), None),
        (torch.zeros(3, dtype=torch.int64), (3,), None),
        (torch.zeros(3, dtype=torch.float32), (3,), None),
        (torch.zeros(6, dtype=torch.int32)[::2], (3,), None),
        (torch.zeros(3, dtype=torch.int32, device="meta"), (3,), None),
        ([1, 2, 3], (3,), None),
        (None, (3,), None),
    ],
    ids=str,
)
def test_indices(functions, index, shape, is_one):
    is_index, *_ = functions
    assert is_index(index, shape, torch.zeros(1)) is is_one
    assert is_index(index, shape, "no tensor") is None


class Exchange(ctypes.Structure):
    """DLPackExchangeAPI, as far as it is used."""

    _fields_ = (
        *(("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("older", ctypes.c_void_p)),
        *((name, ctypes.c_void_p) for name in ("allocate", "to_managed", "from_managed", "read")),
    )


class Head(ctypes.Structure):
    """The first fields of DLTensor."""

    _fields_ = (("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32))


@pytest.fixture
def on_devices(library):
    """A function that gives is_index, sizes_of and pack as they are where tensors are on other devices: device_of says
    (type, index) of each."""
    kept = []
    signature = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)
    torch_reads = signature(Exchange.from_address(reader.exchange_of_torch()).read)

    def functions(device_of, major=1):
        def read(tensor, address):
            code = torch_reads(tensor, address)
            head = Head.from_address(address)
            head.device_type, head.device_id = device_of(tensor)
            return code

        callback = signature(read)
        exchange = Exchange(major, 0, None, None, None, None, ctypes.cast(callback, ctypes.c_void_p))
        kept.extend((exchange, callback))
        return reader.functions_of(library, ctypes.addressof(exchange))

    return functions


@needs_exchange
def test_on_gpus_rows_are_aligned(functions, monkeypatch):
    """Packed as they lie only where `_readable` takes them as they are."""
    _, _, pack, *_ = functions
    monkeypatch.setattr(plan, "on_gpu", lambda tensor: True)
    memory, taken = torch.zeros(4096), 0
    for seed in range(300):
        source = random.Random(seed)
        dtype = source.choice((torch.float32, torch.bfloat16))
        strides = [source.choice((8, 16, 40, 42, 44, 100)) for _ in range(3)]
        query = memory.view(dtype).as_strided((2, 2, 2, 8), (*strides, 1), source.choice((0, 0, 1, 4, 8, 16)))
        sizes = read_sizes(query, query, query, NO_INDICES, 0, 0)
        call = Call(Sizes(*sizes), NO_INDICES, NO_OPTIONS, False, 0.5, checks.Names())
        options = plan._more_strides(NO_OPTIONS), plan._options(NO_OPTIONS, 0, False)
        arguments = call, query, query, query, query.contiguous(), None, *options
        packed = pack(*arguments, True)
        readable = plan._readable("query", query) is query
        assert packed == (plan.pack(*arguments) if readable else None), seed
        taken += readable
    assert 20 < taken < 200


@needs_exchange
def test_tensors_of_two_devices_are_left_to_python(on_devices):
    query, key, value = torch.zeros(3, 1, 5, 2, 8).unbind()
    index = torch.zeros(1, dtype=torch.int32)
    for other in (1, 0), (2, 1), (10, 0):
        for elsewhere in (key, value, query):
            _, sizes_of, *_ = on_devices(lambda tensor, it=elsewhere, device=other: device if tensor is it else (2, 0))
            assert sizes_of(query, key, value, NO_INDICES, 0, 0) is None
        is_index, *_ = on_devices(lambda tensor, device=other: device if tensor is index else (2, 0))
        assert is_index(index, (1,), query) is None
    is_index, sizes_of, *_ = on_devices(lambda tensor: (2, 1))
    assert sizes_of(query, key, value, NO_INDICES, 0, 0) == (1, 2, 2, 5, 5, *[0] * 8)
    assert is_index(index, (1,), query) is True


@needs_exchange
def test_another_version_of_dlpack_is_not_used(on_devices):
    assert on_devices(lambda tensor: (1, 0), major=2) == (None,) * 6


def test_programs_without_python_load_it(library, tmp_path):
    (tmp_path / "main.cpp").write_text(
        """#include <dlfcn.h>
        int main(int, char **arguments) {
            void *library = dlopen(arguments[1], RTLD_NOW);
            void *function = library ? dlsym(library, "aiter_call_reader") : nullptr;
            if (!function) return 1;
            struct { unsigned major; void *older, *others[3], *read; } exchange = {1, nullptr, {}, function};
            return reinterpret_cast<void *(*)(void *, int, int, int)>(function)(&exchange, 8, 512, 576) ? 2 : 0;
        }"""
    )
    compiler = shutil.which("g++") or shutil.which("clang++")
    subprocess.run([compiler, str(tmp_path / "main.cpp"), "-o", str(tmp_path / "main"), "-ldl"], check=True)
    assert subprocess.run([tmp_path / "main", library._name]).returncode == 0


def test_another_capsule_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", object(), raising=False)
    assert reader.exchange_of_torch() is None


def test_what_is_traced_is_not_read(monkeypatch):
    """Fake tensors have no memory, and Dynamo would break the graph."""
    rows, lengths = torch.randn(5, 2, 8), torch.tensor([5], dtype=torch.int32)
    function = lambda rows, lengths: aiter.variable_length_attention(rows, rows, rows, lengths, 5)  # noqa: E731
    expected = function(rows, lengths)
    monkeypatch.setattr(reader, "is_index", lambda *arguments: pytest.fail("read in C"))
    for mode in ("fake", "symbolic"):
        assert torch.equal(make_fx(function, tracing_mode=mode)(rows, lengths)(rows, lengths), expected)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert torch.equal(compiled(rows, lengths), expected)


def test_operations_give_the_same_without(monkeypatch):
    """As on PyTorch before 2.10, and before the first kernel is loaded."""
    rows = torch.randn(2, 5, 2, 8)
    lengths, cache = torch.tensor([3, 5], dtype=torch.int32), torch.randn(2, 4, 2, 4, 8)
    pages = torch.arange(4, dtype=torch.int32).view(2, 2)

    def results():
        yield aiter.flash_attn_func(rows, rows, rows)
        yield aiter.flash_attn_func(rows, rows.transpose(1, 2).contiguous().transpose(1, 2), rows)
        yield aiter.variable_length_attention(rows, rows, rows, lengths, 5)
        yield aiter.variable_length_attention(rows[0], rows[0], rows[0], torch.tensor([5], dtype=torch.int32), 5)
        yield aiter.flash_attn_with_kvcache(rows, cache, pages, 4, cache_seqlens=lengths)

    with_reader = list(results())
    assert reader.exchange_of_torch() is None or reader.pack is not None
    for name in ("is_index", "sizes_of", "pack"):
        monkeypatch.setattr(reader, name, None)
    for first, second in zip(with_reader, results(), strict=True):
        assert torch.equal(first, second)
