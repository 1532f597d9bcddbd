"""Drives kernels below the operations: problem and tensors are filled in here, straight through the launch ABI.

A target is what runs them: the arch of a CPU, that of an emulated AMD GPU, or "cuda". Instructions that this CPU lacks
are stood in for. On an emulated GPU the kernel sees nothing but its arguments, each between guards: any access beside
them is an error that names the instruction.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import emulator
import problems
import pytest
import torch
from emulator import hipcc

from aiter import abi, dropout
from aiter.checks import FP8_NAMES
from aiter.jit import Kernel, get_kernel, settings
from aiter.jit.arch import arch_of, cpu_arch, runs_here
from aiter.jit.spec import Spec
from aiter.kernels import IN_TURN_ROWS, has_form
from aiter.options import strides_per_kv_head

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GPU_DTYPES = ("fp16", "bf16")
EMULATED = emulator.ARCHS
GPUS = (*EMULATED, "cuda")
# A compiler that builds for any arch what runs on AVX2, or None.
STAND_IN = Path(__file__).parent / "stand_in" / "g++" if runs_here("x86-64-v3") and shutil.which("g++") else None
# No kernel twice: an arch is listed where it changes the code for a dtype.
_CODE_PATHS = (
    ("fp32", "x86-64-v2"),
    ("fp16", "x86-64-v2"),
    ("bf16", "x86-64-v3"),
    ("fp32", "x86-64-v3"),
    ("fp16", "x86-64-v3"),
    ("fp32", "x86-64-v4"),
    ("fp16", "x86-64-v4"),
    ("bf16", "x86-64-v4"),
    ("bf16", "x86-64-v4+avx512bf16"),
    ("bf16", "x86-64-v4+avx512bf16+amxbf16"),
    ("fp16", "x86-64-v4+avx512bf16+amxbf16+amxfp16"),
)
NATIVE = [(dtype, arch) for dtype, arch in _CODE_PATHS if runs_here(arch)] or [(dtype, cpu_arch()) for dtype in DTYPES]
STOOD_IN = [path for path in _CODE_PATHS if STAND_IN and path not in NATIVE]
CPUS = NATIVE + STOOD_IN
# The ablest code for each dtype with each mask; the rest with one, as compiling for the other adds little but time.
_BOTH = dict(NATIVE).items()  # the last of each
CPUS_AND_MASKS = [(*path, causal) for path in CPUS for causal in (False, True) if causal or path in _BOTH]
_GRADIENTS = ("grad_query", "grad_key", "grad_value")
GOMP_PARALLEL = ctypes.cast(getattr(ctypes.CDLL(None), "GOMP_parallel", None), ctypes.c_void_p).value


def require(target: str) -> None:
    """Skips the test where the target, or the compiler for it, is not to be had."""
    if target == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if target in EMULATED and (reason := hipcc.missing(target)):
        pytest.skip(reason)


# pytest then runs a module's tests of one kernel one after the other. Else one process goes through the first test of
# all kernels and one through the second, and each waits for the other's compiler.
SCOPE = "module"


def on_targets(cases: list[tuple]) -> pytest.MarkDecorator:
    """Runs a test for each (target, dtype, head_dim, causal[, paged])."""
    names = ("target", "dtype", "head_dim", "causal", "paged")[: len(cases[0])]
    return pytest.mark.parametrize(names, cases, ids=[_name(names, case) for case in cases], scope=SCOPE)


def on_cpus(cases: list[tuple]) -> pytest.MarkDecorator:
    """Runs a test for each (dtype, arch[, causal])."""
    names = ("dtype", "arch", "causal")[: len(cases[0])]
    ids = [_name(names, case) + "-stand-in" * (case[:2] in STOOD_IN) for case in cases]
    return pytest.mark.parametrize(names, cases, ids=ids, scope=SCOPE)


def _name(names: tuple[str, ...], case: tuple) -> str:
    words = (name if word is True else str(word) for name, word in zip(names, case, strict=True) if word is not False)
    return "-".join(words)


def randn(*shape: int, dtype: str) -> torch.Tensor:
    return torch.randn(shape).to(DTYPES[dtype])


def strided(shape: tuple[int, ...], dtype: str, how: str) -> torch.Tensor:
    """See `problems.strided`. Where the target reads: the device under test may be another."""
    return problems.strided(shape, DTYPES[dtype], how, torch.get_default_device())


def ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Options:
    """What a call takes beside queries, keys and values; what each means stands in aiter_abi.h."""

    causal: bool = False
    scale: float | None = None
    seqlens_q: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None
    page_table: torch.Tensor | None = None  # (batch, pages), or with page_indptr a flat list
    max_seqlen: tuple[int, int] | None = None  # packed: rows and keys of the longest sequence
    starts_q: torch.Tensor | None = None
    starts_k: torch.Tensor | None = None
    page_indptr: torch.Tensor | None = None
    last_page_len: torch.Tensor | None = None
    query_offsets: torch.Tensor | None = None
    window: tuple[int, int] | None = None
    softcap: float = 0.0
    alibi_slopes: torch.Tensor | None = None  # (heads_q,) or (batch, heads_q)
    sinks: torch.Tensor | None = None
    chunk: int = 0
    dropout_p: float = 0.0
    rng_state: torch.Tensor | None = None
    batch_invariant: bool = False
    cut: bool = False  # the form of the kernel that may cut keys; batch_invariant: in any case
    clear_rest: bool = True
    key_descale: torch.Tensor | None = None  # as `aiter.options` takes them
    value_descale: torch.Tensor | None = None

    def problem(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor, lse: torch.Tensor
    ) -> abi.AttentionProblem:
        packed_q, packed_k, paged = query.dim() == 3, key.dim() == 3, self.page_table is not None
        ends = self.seqlens_q if self.seqlens_q is not None else self.starts_q[1:] if packed_q else None
        left, right = self.window or (-1, -1)
        return abi.AttentionProblem(
            batch=len(ends) if packed_q else query.shape[0],
            heads_q=query.shape[-2],
            heads_kv=key.shape[-2],
            seqlen_q=self.max_seqlen[0] if packed_q else query.shape[1],
            seqlen_k=self._most_keys(key),
            packed_q=packed_q,
            packed_k=packed_k,
            page_size=key.shape[1] if paged else 0,
            total_q=query.shape[0] if packed_q else 0,
            total_k=key.shape[0] if packed_k else 0,
            num_pages=key.shape[0] if paged else 0,
            page_table_stride=self.page_table.stride(0) if paged and self.page_indptr is None else 0,
            listed_pages=0 if self.page_indptr is None else len(self.page_table),
            query_strides=_strides(query),
            key_strides=_strides(key),
            value_strides=_strides(value),
            output_strides=_strides(output),
            lse_strides=(0, query.shape[0]) if packed_q else lse.stride()[:2],
            key_descale_strides=strides_per_kv_head(self.key_descale),
            value_descale_strides=strides_per_kv_head(self.value_descale),
            alibi_stride=0 if self.alibi_slopes is None or self.alibi_slopes.dim() == 1 else query.shape[-2],
            softmax_scale=1 / math.sqrt(query.shape[-1]) if self.scale is None else self.scale,
            softcap=self.softcap,
            window_left=left,
            window_right=0 if self.causal and self._ranges else right,
            clear_rest=self.clear_rest,
            batch_invariant=self.batch_invariant,
            attention_chunk=self.chunk,
            dropout_threshold=dropout.threshold(self.dropout_p),
        )

    @property
    def _ranges(self) -> bool:
        """Whether rows see ranges of keys with two ends."""
        return self.window is not None or self.chunk > 0

    def _most_keys(self, key: torch.Tensor) -> int:
        if self.page_indptr is not None:
            return len(self.page_table) * key.shape[1]
        if self.page_table is not None:
            return self.page_table.shape[1] * key.shape[1]
        return self.max_seqlen[1] if key.dim() == 3 else key.shape[1]

    def spec(self, target: str, name: str, query: torch.Tensor, value: torch.Tensor) -> Spec:
        arch = arch_of(torch.device("cuda")) if target == "cuda" else target
        switched_on = {
            "alibi": self.alibi_slopes is not None,
            "batch_invariant": self.batch_invariant and name == "attention_forward" and target not in GPUS,
            "chunk": self.chunk > 0,
            "dropout": self.dropout_p > 0,
            "paged": self.page_table is not None and target in GPUS,
            "softcap": self.softcap != 0.0,
            "window": self._ranges,
        }
        options = [(word, 1) for word, on in switched_on.items() if on]
        if value.dtype in FP8_NAMES:
            options.append((FP8_NAMES[value.dtype], 1))
        if value.shape[-1] != query.shape[-1]:
            options.append(("value_dim", value.shape[-1]))
        tokens = 1 if self.batch_invariant else query.shape[1] if query.dim() == 4 else self.max_seqlen[0]
        many_rows = tokens * query.shape[-2] > IN_TURN_ROWS  # in latent attention, which has one KV head
        for form, wanted in (("cut", self.cut or self.batch_invariant), ("rounds", many_rows)):
            if wanted and has_form(form, name, arch, query.shape[-1], value.shape[-1], dict(options)):
                options.append((form, 1))
        dtype = next(word for word, known in DTYPES.items() if known == query.dtype)
        causal = self.causal and not self._ranges
        return Spec(name, dtype, query.shape[-1], causal, arch, tuple(sorted(options)))

    def reads(self, *names: str) -> dict[str, torch.Tensor | None]:
        """These tensors, under the names that they have in the call."""
        return {name: getattr(self, name) for name in names}


_LAYOUT = ("seqlens_q", "seqlens_k", "starts_q", "starts_k", "query_offsets", "alibi_slopes", "rng_state")
_FORWARD_ALONE = ("page_table", "page_indptr", "last_page_len", "sinks", "key_descale", "value_descale")


def attend(
    target: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *options: object,
    name: str = "attention_forward",
    threads: int = 2,
    parallel: int | None = GOMP_PARALLEL,
    stats: dict | None = None,
    compute_units: int = 0,
    **more: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp. Tensors are (batch, seq, heads, head_dim), or packed (total, heads, head_dim) with
    `max_seqlen`; with a page table key and value are (pages, position, heads, head_dim). `options` and `more` make
    `Options`; the others see `_run`."""
    call = Options(*options, **more)
    output = _unwritten(query, value.shape[-1])
    packed, heads_q = query.dim() == 3, query.shape[-2]
    lse_shape = (heads_q, query.shape[0]) if packed else (query.shape[0], heads_q, query.shape[1])
    lse = torch.full(lse_shape, math.nan, device=query.device)
    reads = {"query": query, "key": key, "value": value, **call.reads(*_LAYOUT, *_FORWARD_ALONE)}
    built = _kernel(target, call.spec(target, name, query, value))
    problem = call.problem(query, key, value, output, lse)
    _run(target, built, problem, reads, {"output": output, "lse": lse}, threads, parallel, stats, compute_units)
    return output, lse


def gradients(
    target: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None = None,
    *options: object,
    lse_is_given: bool = False,
    threads: int = 2,
    parallel: int | None = GOMP_PARALLEL,
    stats: dict | None = None,
    **more: object,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dQ, dK and dV, from what `attend` returned. Tensors are dense, or packed with `max_seqlen`."""
    call = Options(*options, **more)
    results = tuple(_unwritten(tensor) for tensor in (query, key, value))
    tensors = zip(("grad_output", *_GRADIENTS), (grad_output, *results), strict=True)
    problem = abi.AttentionGradProblem(
        forward=call.problem(query, key, value, output, lse),
        **{f"{name}_strides": _strides(tensor) for name, tensor in tensors},
        lse_is_given=lse_is_given,
    )
    reads = {"query": query, "key": key, "value": value, "output": output, "lse": lse}
    reads |= {"grad_output": grad_output, "grad_lse": grad_lse, **call.reads(*_LAYOUT)}
    built = _kernel(target, call.spec(target, "attention_backward", query, value))
    _run(target, built, problem, reads, dict(zip(_GRADIENTS, results, strict=True)), threads, parallel, stats)
    return results


def _unwritten(like: torch.Tensor, head_dim: int | None = None) -> torch.Tensor:
    """Whatever the kernel does not write shows up as NaN."""
    shape = (*like.shape[:-1], head_dim or like.shape[-1])
    return torch.full(shape, math.nan, dtype=like.dtype, device=like.device)


def _strides(tensor: torch.Tensor) -> tuple[int, int, int]:
    return (0, *tensor.stride()[:2]) if tensor.dim() == 3 else tensor.stride()[:3]


@functools.cache
def _kernel(target: str, spec: Spec) -> Kernel:
    if target in EMULATED:
        emulator.load_runtime()
    if (spec.dtype, spec.arch) not in STOOD_IN:
        return get_kernel(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AITER_CXX", str(STAND_IN))
        patch.setenv("AITER_CACHE_DIR", str(_stand_in_cache()))
        patch.delenv("AITER_PREBUILT_DIRS", raising=False)
        return get_kernel(spec)


def _stand_in_cache() -> Path:
    """A cache of its own, as these kernels have the keys of real ones; and one for each content of the stand-in, which
    no key knows of."""
    digest = hashlib.sha256()
    for path in sorted(path for path in STAND_IN.parent.rglob("*") if path.is_file()):
        digest.update(path.read_bytes())
    return settings.cache_dir() / f"stand-in-{digest.hexdigest()[:16]}"


def _run(
    target: str,
    built: Kernel,
    problem: ctypes.Structure,
    reads: dict[str, torch.Tensor | None],
    writes: dict[str, torch.Tensor],
    threads: int,
    parallel: int | None,
    stats: dict | None,
    compute_units: int = 0,
) -> None:
    """Launches on a workspace that holds garbage. `reads` and `writes` are fields of the call's tensors. `threads` and
    `parallel` make a CPU's executor; `stats` receives what the emulator has counted; `compute_units`: see
    `emulator.session`."""
    call = abi.call_struct(built.spec.kernel)(problem=problem)
    device = next(iter(writes.values())).device
    tensors = {name: tensor for name, tensor in (reads | writes).items() if tensor is not None}

    def launch(queue: int) -> None:
        built.check(built.launch_raw(bytes(call), queue))

    def place() -> None:
        tensors["workspace"] = torch.full((built.workspace_raw(bytes(call)),), 0x7F, dtype=torch.uint8, device=device)
        for name, tensor in tensors.items():
            setattr(call.tensors, name, tensor.data_ptr())

    if target in EMULATED:
        with emulator.session(target, threads=2, compute_units=compute_units) as gpu:
            place()  # in the session: how much workspace it takes depends on the GPU
            for name, tensor in tensors.items():
                gpu.allow(tensor, writable=name not in reads)
            launch(0)
            gpu.check()
            if stats is not None:
                stats.update(gpu.stats())
        return
    place()
    if target == "cuda":
        launch(torch.cuda.current_stream().cuda_stream)
    else:
        executor = abi.CpuExecutor(parallel, threads, 0)  # must outlive the launch
        launch(ctypes.addressof(executor))
