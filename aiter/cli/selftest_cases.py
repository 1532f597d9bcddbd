"""The families of kernels that `aiter selftest` tries: small for their errors, large for their speed.

A family is one kind of call. Its small form is held against float64 by the rule that the project's tests keep: at most
twice the error of PyTorch's own operator in that dtype, plus the rounding of one output. Its large form is timed, and
stands beside the least time that this device could need: products at the speed of its own matrix multiplication, bytes
at that of its own copies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import aiter
from aiter import kv_cache
from aiter.jit.spec import Spec
from aiter.kernels import ANY_HEAD_DIM, kernel_spec, specs_for
from aiter.options import BATCH_INVARIANT
from aiter.reference import attend_one, gather_pages, pytorch_attend_one, visible_keys

PAGE = 16


@dataclass(frozen=True)
class Size:
    batch: int
    rows: int  # query tokens of a sequence
    keys: int
    heads_kv: int
    group: int  # query heads of a KV head


@dataclass(frozen=True)
class Family:
    """One kind of call; `options` are keywords of the operations, slopes and sinks as bools."""

    name: str
    small: Size
    large: Size
    head_dim: int = 128
    value_dim: int | None = None
    causal: bool = True
    form: str = "dense"  # or packed, paged
    backward: bool = False
    latent: bool = False  # key and value in one memory
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dims(self) -> tuple[int, int]:
        return self.head_dim, self.value_dim or self.head_dim

    def specs(self, dtype: str, arch: str) -> list[Spec]:
        operation = "flash_attn_with_kvcache" if self.form == "paged" else "flash_attn_func"
        keywords = {
            "window_size": "window",
            "softcap": "softcap",
            "alibi_slopes": "alibi",
            "batch_invariant": "batch_invariant",
        }
        always = ["batch_invariant"] if BATCH_INVARIANT else []
        options = tuple(sorted({*always, *(keywords[name] for name in self.options if name in keywords)}))
        return specs_for(operation, dtype, self.head_dim, self.causal, arch, self.backward, self.dims[1], options)

    def products(self, size: Size) -> float:
        """Floating-point operations of the products over the keys that are seen; backward: five products where forward
        has two."""
        window, rows, keys = self.options.get("window_size"), size.rows, size.keys
        if self.causal or window:
            seen = 0
            for row in range(0, rows, 1024):
                count = min(1024, rows - row)
                seen += int(visible_keys(count, keys, self.causal, window, keys - rows + row).sum())
        else:
            seen = rows * keys
        forward = 2.0 * sum(self.dims) * seen * size.batch * size.heads_kv * size.group
        return forward * 2.5 if self.backward else forward

    def bytes(self, size: Size, element: int) -> float:
        """That must be read or written at least once."""
        window = self.options.get("window_size")
        keys = size.keys if window is None else min(size.keys, window[0] + size.rows)
        columns = self.head_dim if self.latent else sum(self.dims)
        cached = size.batch * keys * size.heads_kv * columns
        rows = size.batch * size.rows * size.heads_kv * size.group * sum(self.dims)
        return float((cached + rows) * element * (2 if self.backward else 1))


_PREFILL = Size(2, 150, 200, 1, 2)
_DECODE = Size(3, 1, 300, 2, 4)


def families(on_gpu: bool) -> list[Family]:
    """With large forms that take milliseconds on such a device."""
    long = Size(1, 8192, 8192, 16, 1) if on_gpu else Size(1, 1024, 1024, 2, 1)
    grouped = Size(1, 8192, 8192, 4, 4) if on_gpu else Size(1, 1024, 1024, 1, 4)
    many = Size(4, 2048, 2048, 16, 1) if on_gpu else Size(4, 256, 256, 2, 1)
    token = Size(32, 1, 4096, 8, 4) if on_gpu else Size(2, 1, 4096, 2, 4)
    chunk = Size(1, 128, 16384, 8, 4) if on_gpu else Size(1, 16, 4096, 2, 4)
    latent = Size(32, 1, 4096, 1, 128) if on_gpu else Size(1, 1, 4096, 1, 16)

    def prefill(name: str, large: Size = long, **more) -> Family:
        return Family(name, _PREFILL, large, **more)

    def decode(name: str, **more) -> Family:
        return Family(name, _DECODE, token, **{"causal": False, **more})

    return [
        prefill("forward, D 64", head_dim=64),
        prefill("forward, D 128"),
        prefill("forward, D 128, full", causal=False),
        prefill("forward, D 256", head_dim=256),
        prefill("forward, D 192/128", head_dim=192, value_dim=128),
        prefill("forward, D 512", head_dim=512),
        prefill("forward, grouped heads", grouped),
        prefill("forward, packed", many, form="packed"),
        prefill("forward over pages", form="paged"),
        Family("forward, few rows on many keys", Size(1, 40, 2100, 2, 4), chunk),
        Family("batch_invariant", Size(2, 3, 4200, 2, 4), token, options={"batch_invariant": True}),
        prefill("window of 1024", options={"window_size": (1023, 0)})
        if on_gpu
        else prefill("window of 64", options={"window_size": (63, 0)}),
        prefill("soft cap", options={"softcap": 20.0}),
        prefill("ALiBi", options={"alibi_slopes": True}),
        prefill("sinks", options={"sinks": True}),
        decode("decoding"),
        decode("decoding from pages", form="paged"),
        decode("decoding with a window", form="paged", options={"window_size": (100, 0)}),
        Family("latent decoding, 576/512", Size(2, 1, 200, 1, 16), latent, 576, 512, form="paged", latent=True),
        prefill("backward, D 64", head_dim=64, backward=True),
        prefill("backward, D 128", backward=True),
        prefill("backward, soft cap and window", options={"softcap": 20.0, "window_size": (63, 0)}, backward=True),
    ]


class Problem:
    """The tensors of one call, random and the same in every run."""

    def __init__(self, family: Family, size: Size, dtype: torch.dtype, device: torch.device) -> None:
        self.family, self.size = family, size
        generator = torch.Generator().manual_seed(0)
        head_dim, value_dim = family.dims
        heads = size.heads_kv * size.group

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, dtype)

        self.query = random(size.batch, size.rows, heads, head_dim)
        if family.form == "paged":
            blocks = -(-size.keys // PAGE)
            order = torch.randperm(size.batch * blocks, generator=generator)
            self.table = order.to(torch.int32).view(size.batch, blocks).to(device)
            self.key = random(size.batch * blocks, size.heads_kv, PAGE, head_dim)
            self.value = self.key[..., :value_dim] if family.latent else random(*self.key.shape[:-1], value_dim)
        else:
            self.key = random(size.batch, size.keys, size.heads_kv, head_dim)
            self.value = random(size.batch, size.keys, size.heads_kv, value_dim)
        per_head = {
            "alibi_slopes": torch.linspace(0.01, 0.2, heads, device=device),
            "sinks": torch.linspace(-1, 2, heads, device=device),
        }
        self.keywords: dict[str, Any] = {
            name: per_head.get(name, value) if value is True else value for name, value in family.options.items()
        }
        self.lengths_q, self.lengths_k = (
            torch.full((size.batch,), count, dtype=torch.int32, device=device) for count in (size.rows, size.keys)
        )
        self.grad_output = random(size.batch, size.rows, heads, value_dim) if family.backward else None
        if family.backward:
            for tensor in (self.query, self.key, self.value):
                tensor.requires_grad_()
            self.output = self.forward()

    def forward(self) -> torch.Tensor:
        family, size = self.family, self.size
        if family.form == "packed":
            query, key, value = (tensor.flatten(0, 1) for tensor in (self.query, self.key, self.value))
            output = aiter.variable_length_attention(
                *(query, key, value, self.lengths_q, size.rows, family.causal),
                seqlens_k=self.lengths_k,
                max_seqlen_k=size.keys,
                **self.keywords,
            )
            return output.unflatten(0, (size.batch, size.rows))
        if family.form == "paged":
            return aiter.flash_attn_with_kvcache(
                *(self.query, (self.key, self.value), self.table, PAGE, family.causal),
                cache_seqlens=self.lengths_k,
                **self.keywords,
            )
        return aiter.flash_attn_func(self.query, self.key, self.value, family.causal, **self.keywords)

    def run(self) -> tuple[torch.Tensor, ...]:
        """What is tried and timed: the output, or for the backward pass the gradients."""
        if not self.family.backward:
            return (self.forward(),)
        tensors = self.query, self.key, self.value
        return torch.autograd.grad(self.output, tensors, self.grad_output, retain_graph=True)

    def reference(self, attend: Callable[..., torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The same by `attend` of one sequence, on the CPU."""
        family, results = self.family, []
        keywords = {name: value.cpu() if torch.is_tensor(value) else value for name, value in self.keywords.items()}
        keywords["window"] = keywords.pop("window_size", None)
        keywords.pop("batch_invariant", None)
        for b in range(self.size.batch):
            tensors = [self.query[b], *self._keys_of(b)]
            tensors = [tensor.detach().cpu().to(dtype).requires_grad_(family.backward) for tensor in tensors]
            output = attend(*tensors, family.causal, **keywords)
            if self.grad_output is not None:
                grad_output = self.grad_output[b].cpu().to(dtype)
                results.append([grad.detach() for grad in torch.autograd.grad(output, tensors, grad_output)])
            else:
                results.append([output])
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))

    def _keys_of(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self.family.form != "paged":
            return self.key[b], self.value[b]
        key, value = (gather_pages(cache, self.table[b], self.size.keys) for cache in (self.key, self.value))
        return key, value

    def errors(self) -> tuple[float, float]:
        """The largest error of any element against float64, and how large it may be: each over its own allowance, for
        the tensor where that is worst."""
        dtype = self.query.dtype
        exact = self.reference(lambda *tensors, **keywords: attend_one(*tensors, **keywords)[0], torch.float64)
        pytorch = self.reference(pytorch_attend_one, dtype)
        # Of float32 gradients, and results with options, the largest error is a matter of luck: docs/training.md.
        times = 4 if dtype == torch.float32 else 2
        pairs = []
        for got, truth, theirs in zip(self.run(), exact, pytorch, strict=True):
            error = _distance(got.detach().cpu(), truth)
            pairs.append((error, times * _distance(theirs, truth) + torch.finfo(dtype).eps * float(truth.abs().max())))
        return max(pairs, key=lambda pair: pair[0] / pair[1])


def _distance(tensor: torch.Tensor, exact: torch.Tensor) -> float:
    distance = float((tensor.double() - exact).abs().max())
    return distance if math.isfinite(distance) else math.inf


def check_cache_write(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows that are written by slot lie where they belong, bit by bit, and all else is as before."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn((5, 2, 64), generator=generator).to(device, dtype) for _ in range(2))
    caches = [torch.zeros(4, PAGE, 2, 64, dtype=dtype, device=device) for _ in range(2)]
    slots = [3, -1, 63, 16, 0]
    kv_cache.reshape_and_cache(key, value, caches[0], caches[1], torch.tensor(slots, dtype=torch.int64, device=device))
    expected = [torch.zeros_like(cache).flatten(0, 1) for cache in caches]
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[0][slot], expected[1][slot] = key[row], value[row]
    return all(torch.equal(cache.flatten(0, 1), rows) for cache, rows in zip(caches, expected, strict=True))


def cache_write_spec(dtype: str, arch: str) -> Spec:
    return kernel_spec("cache_write", dtype, ANY_HEAD_DIM, False, arch)
