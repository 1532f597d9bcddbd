"""Attention kernels of others, for benchmarks/amd_validation.py: where their code is, how each is built and launched,
and what was published of its speed. Nothing of theirs is in this repository: a folder of checkouts is given.

A peer is launched on the emulator as its own host code launches it; `rows` of a workgroup's output are compared.
"""

from __future__ import annotations

import math
import shlex
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Problem:
    """Tensors (1, seq, heads, head_dim), each of whose memory begins with a cache line."""

    seq: int
    heads: int
    head_dim: int
    causal: bool
    query: torch.Tensor = field(init=False)
    key: torch.Tensor = field(init=False)
    value: torch.Tensor = field(init=False)
    output: torch.Tensor = field(init=False)
    lse: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.query, self.key, self.value = (aligned(self.seq, self.heads, self.head_dim) for _ in range(3))
        self.output = aligned(self.seq, self.heads, self.head_dim).fill_(math.nan)
        self.lse = aligned(self.seq, self.heads, 2).view(torch.float32).view(1, self.heads, self.seq).fill_(math.nan)

    def error(self, rows: range, head: int = 0) -> float:
        """The largest difference of these rows from attention in float32."""
        query, key, value = (x[0, :, head].float() for x in (self.query, self.key, self.value))
        scores = query[rows.start : rows.stop] @ key.T / math.sqrt(self.head_dim)
        if self.causal:
            scores.masked_fill_(torch.arange(self.seq) > torch.tensor(rows)[:, None], -math.inf)
        exact = scores.softmax(-1) @ value
        return (self.output[0, rows.start : rows.stop, head].float() - exact).abs().nan_to_num(math.inf).max().item()


def aligned(tokens: int, heads: int, head_dim: int) -> torch.Tensor:
    memory = torch.randn(tokens * heads * head_dim + 256).to(torch.bfloat16)
    begin = -memory.data_ptr() % 256 // 2
    return memory[begin : begin + tokens * heads * head_dim].view(1, tokens, heads, head_dim)


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    block: int
    arguments: bytes
    group: int  # the workgroup to time: the one that sees most keys
    rows: range  # what it computes, of head 0
    lds_bytes: int = 0
    prepare: Callable | None = None  # launches what the kernel needs before it: prepare(gpu, code)


@dataclass(frozen=True)
class Peer:
    name: str
    arch: str
    repository: str
    head_dim: int
    causal: bool
    source: str  # a code object, or what is compiled
    rows: int  # of a workgroup
    sizes: tuple[int, int]  # sequence lengths that it is run with; longer ones are extrapolated
    launch: Callable[[Problem], Launch]
    published: tuple[tuple, ...]  # (batch, heads, seq, what, value, where)
    flags: str = ""
    constants: str = ""  # compiled in, for one sequence length {seq} and number of {heads}
    heads: int = 1
    order: str = "heads together"  # of workgroups: see amd_predict.workgroups
    variants: tuple[str, ...] = ("",)  # of the constants: an autotuner's choices, each of which was measured
    other_code: str = ""  # why the object built here is not what was measured
    equal: bool = False  # whether every workgroup of a causal call takes the same time (a late tile and an early one)

    def code(
        self, checkouts: Path, objects: Path, compiler: str, seq: int, variant: str = "", triton: str = ""
    ) -> bytes:
        """The code object, built where it is not one and not there. triton: an interpreter that has it."""
        source = checkouts / self.repository.split("/")[1] / self.source
        if source.suffix == ".co":
            return source.read_bytes()
        if source.suffix == ".py":
            target = objects / f"triton-{self.head_dim}-{seq}-{variant}.co".replace(" ", "_")
            if not target.exists():
                objects.mkdir(parents=True, exist_ok=True)
                script = Path(__file__).with_name("amd_peers_triton.py")
                line = [triton, script, source, target, self.arch, self.head_dim, seq, *variant.split()]
                subprocess.run(list(map(str, line)), check=True)
            return target.read_bytes()
        constants = self.constants.format(seq=seq, heads=self.heads)
        target = objects / f"{self.name}-{seq if constants else 0}.co".replace(" ", "_")
        if not target.exists():
            flags = self.flags.format(checkouts=checkouts)
            objects.mkdir(parents=True, exist_ok=True)
            line = f"{compiler} -x hip --cuda-device-only --no-gpu-bundle-output --offload-arch={self.arch} -O3 -w"
            subprocess.run([*shlex.split(f"{line} {flags} {constants}"), str(source), "-o", str(target)], check=True)
        return target.read_bytes()


def _pointer(tensor: torch.Tensor | None) -> bytes:
    return struct.pack("<QQ", tensor.data_ptr() if tensor is not None else 0, 0)


def _padded(*numbers: int) -> bytes:
    return b"".join(struct.pack("<I12x", number) for number in numbers)


def _aiter(kernel: str, causal: bool) -> Callable[[Problem], Launch]:
    """csrc/cpp_itfs/mha_fwd.cu: 256 rows a workgroup; with a mask a late tile and an early one."""

    def launch(p: Problem) -> Launch:
        def strides(tensor: torch.Tensor, order: str) -> list[int]:
            return [2 * tensor.stride("bsh".index(axis)) for axis in order]

        options = 5 if not causal or (p.heads % 8 == 0 and p.seq <= 16384) else 3
        row = 2 * p.query.stride(1)
        arguments = b"".join(map(_pointer, (p.output, p.query, p.key, p.value, p.lse)))
        arguments += struct.pack("<f12x", 1 / math.sqrt(p.head_dim)) + _padded(p.seq, row, 256 * row)
        arguments += _padded(*strides(p.query, "hb"), 1, *strides(p.key, "shb"), options, 1, p.seq)
        arguments += _padded(p.head_dim, p.head_dim, p.heads, *strides(p.value, "shb"), *strides(p.output, "shb"))
        arguments += _pointer(None) * 2 + _padded(4 * p.seq) + _pointer(None) * 5 + _padded(*[0] * 6)
        tiles = p.seq // 256
        return Launch(kernel, ((tiles + 1) // 2 if causal else tiles, p.heads, 1), 512, arguments, 0, range(256))

    return launch


def _moonmath(p: Problem) -> Launch:
    """csrc/attention_kernel.hip, launch_attention_forward without a tail: 384 rows a workgroup, V transposed before."""
    name = "_ZN12_GLOBAL__N_1{}vPK14__hip_bfloat16"
    forward = name.format("17attention_forwardILb1ELb0ELb0EEE") + "S3_S3_PS1_iifiPKsPsS6_fiPfiiPKi"
    transposed = aligned(-(-p.seq // 64) * 64 + 2, p.heads, 128)

    def prepare(gpu, code: bytes) -> None:
        gpu.allow(transposed, writable=True)
        arguments = struct.pack("<QQii", p.value.data_ptr(), transposed.data_ptr(), p.seq, p.heads)
        kernel = name.format("24v_transpose_kernel_16x16ILb1EEE") + "PS1_ii"
        gpu.launch(code, kernel, (-(-p.seq // 64) * p.heads, 1, 1), (256,), arguments)

    scale = math.log2(math.e) / math.sqrt(p.head_dim)
    pointers = (p.query.data_ptr(), p.key.data_ptr(), transposed.data_ptr(), p.output.data_ptr())
    arguments = struct.pack("<QQQQiifiQQQfiQiiQ", *pointers, p.seq, p.seq, scale, p.heads, 0, 0, 0, 0.0, 0, 0, 0, 0, 0)
    return Launch(forward, (-(-p.seq // 384), p.heads, 1), 512, arguments, 0, range(384), prepare=prepare)


def _hipkittens(p: Problem) -> Launch:
    """analysis/attn/fwd/benchmark/attn_fwd_*.cpp: eight waves of 32 rows."""

    def tensor(x: torch.Tensor, *shape: int) -> bytes:
        return struct.pack("<Q4q8x", x.data_ptr(), *shape)

    operands = (p.query, p.key, p.value, p.output)
    arguments = b"".join(tensor(x, 1, p.seq, p.heads, p.head_dim) for x in operands)
    arguments += tensor(p.lse, 1, p.heads, 1, p.seq) + struct.pack("<Q", 0)
    tiles = p.seq // 256
    last = (tiles - 1) * p.heads if p.causal else 0
    rows = range(p.seq - 256, p.seq) if p.causal else range(256)
    kernel = f"_Z10attend_kerILi{p.head_dim}EEv12attn_globalsIXT_EE"
    return Launch(kernel, (p.heads, tiles, 1), 512, arguments, last, rows, 160000)


def _opus(p: Problem) -> Launch:
    """opus_attn/gqa_gfx950_host.cc: eight waves of 32 rows."""
    pointers = (p.query.data_ptr(), p.key.data_ptr(), p.value.data_ptr(), p.output.data_ptr())
    strides = (p.query.stride(0), p.query.stride(1), p.query.stride(2))
    arguments = struct.pack("<QQQQ5i6i4x", *pointers, 1, p.seq, p.heads, p.heads, 128, *strides, *strides)
    tiles = p.seq // 256
    kernel = f"_Z10gqa_kernelI15opus_gqa_traitsILi32ELi64ELi128ELi8ELb{int(p.causal)}EEEv14opus_gqa_kargs"
    last = (tiles - 1) * p.heads if p.causal else 0
    rows = range(p.seq - 256, p.seq) if p.causal else range(256)
    return Launch(kernel, (p.heads, tiles, 1), 512, arguments, last, rows)


def _triton(p: Problem) -> Launch:
    """analysis/baselines/attn/triton_baseline_v02.py: four waves, 128 rows a workgroup."""
    operands = (p.query, p.key, p.value, p.lse, p.output)
    strides = (p.query.stride(0), p.query.stride(2), p.query.stride(1))
    arguments = struct.pack("<5Q", *(x.data_ptr() for x in operands)) + struct.pack("<12i6i", *strides * 4, *[0] * 6)
    arguments += struct.pack("<fii4xQQ", 0.0, 0, 0, 0, 0)
    tiles = p.seq // 128
    rows = range(p.seq - 128, p.seq)
    return Launch("attn_fwd", (tiles, p.heads, 1), 256, arguments, tiles - 1, rows, 256 * p.head_dim)


_COUNTERS = "attn-dsl-bench results/raw/counters_v1.csv, MI300X"
_HK = "HipKittens analysis/attn/fwd/benchmark/*.json, MI355X"
_OPUS = "gcnasm opus_attn, MI355X"
_LENGTHS = (1024, 2048, 4096, 8192, 16384)


def _series(batch: int, heads: int, what: str, values: tuple, where: str, lengths: tuple = _LENGTHS) -> tuple:
    return tuple((batch, heads, seq, what, value, where) for seq, value in zip(lengths, values, strict=True))


_KITTENS = "-std=c++20 -ffast-math -DKITTENS_CDNA4 -Wno-error=invalid-constexpr -I{checkouts}/HipKittens/include"
_KITTENS_SIZES = "-DATTN_B=1 -DATTN_H={heads} -DATTN_H_KV={heads} -DATTN_N={seq}"


def _kittens(head_dim: int, causal: bool, published: tuple) -> Peer:
    name = ("attn_fwd_causal" if causal else "attn_fwd_non_causal") + ("_d64" if head_dim == 64 else "")
    return Peer(
        f"HipKittens {name}", "gfx950", "HazyResearch/HipKittens", head_dim, causal,
        f"analysis/attn/fwd/benchmark/{name}.cpp", 256, (2048, 4096), _hipkittens, published, _KITTENS,
        f"{_KITTENS_SIZES} -DATTN_D={head_dim}",
    )  # fmt: skip


def _opus_peer(causal: bool, published: tuple) -> Peer:
    flags = "-std=c++20 -ffast-math -D__HIPCC_RTC__ -I{checkouts}/gcnasm/opus_attn -I{checkouts}/aiter/csrc/include"
    source = f"opus_attn/gqa_gfx950_kernel_{'' if causal else 'non'}causal.cc"
    return Peer(
        f"opus_attn {'causal' if causal else 'full'}", "gfx950", "carlushuang/gcnasm", 128, causal, source, 256,
        (2048, 4096), _opus, published, flags,
        other_code="clang 20 to 22 add s_waitcnt vmcnt(0) before the LDS reads of the main loop; the source has none",
    )  # fmt: skip


def _aiter_peer(arch: str, source: str, kernel: str, causal: bool, published: tuple) -> Peer:
    return Peer(
        f"AITER {Path(source).stem}", arch, "ROCm/aiter", 128, causal, f"hsa/{arch}/fmha_v3_fwd/{source}",
        512 if causal else 256, (2048, 4096), _aiter(kernel, causal), published, order="early tiles first",
        equal=causal,
    )  # fmt: skip


_TUNED = ("128 2", "64 2", "64 3", "64 1", "32 2")  # keys of a tile, waves_per_eu: its five choices for this GPU


def _triton_peer(head_dim: int, published: tuple[float, ...]) -> Peer:
    return Peer(
        f"Triton v02 D{head_dim}", "gfx942", "HazyResearch/HipKittens", head_dim, True,
        "analysis/baselines/attn/triton_baseline_v02.py", 128, (2048, 4096), _triton,
        _series(16, 16, "MfmaUtil", published, _COUNTERS), order="early tiles first", variants=_TUNED,
    )  # fmt: skip


PEERS = (
    _aiter_peer(
        "gfx942", "MI300/fwd_hd128_bf16_causal_rtna.co", "_ZN5aiter31fmha_fwd_hd128_bf16_causal_rtnaE", True,
        _series(16, 16, "MfmaUtil", (42.16, 50.13, 64.54, 67.65, 72.09), _COUNTERS),
    ),
    _aiter_peer(
        "gfx942", "MI300/fwd_hd128_bf16_rtz.co", "_ZN5aiter23fmha_fwd_hd128_bf16_rtzE", False,
        ((2, 24, 16384, "TFLOP/s", 543, "moonmath README, MI300X"),),
    ),
    _triton_peer(128, (14.20, 18.07, 22.59, 30.49, 33.96)),
    _triton_peer(64, (13.00, 16.23, 21.51, 27.46, 31.85)),
    Peer(
        "moonmath attention_rtz", "gfx942", "moonmath-ai/amd-kernels", 128, False, "csrc/attention_rtz.hip", 384,
        (3072, 6144), _moonmath,
        (
            (2, 24, 16384, "TFLOP/s", 579, "moonmath README, MI300X"),
            (1, 32, 16384, "TFLOP/s", 569, "moonmath README, MI300X"),
            (2, 24, 32768, "TFLOP/s", 599, "moonmath README, MI300X"),
        ),
        "-std=c++17 -ffast-math -fno-math-errno -mllvm -amdgpu-early-inline-all=true", order="early tiles first",
    ),
    _aiter_peer(
        "gfx950", "fwd_hd128_bf16.co", "_ZN5aiter19fmha_fwd_hd128_bf16E", False,
        ((1, 64, 16384, "TFLOP/s", 1438, "AITER op_tests/cpp/mha/README.md, MI355X"),
         *_series(16, 64, "TFLOP/s", (828, 1085, 1211, 1259, 1283), _HK)),
    ),
    _aiter_peer(
        "gfx950", "fwd_hd128_bf16_causal.co", "_ZN5aiter26fmha_fwd_hd128_bf16_causalE", True,
        ((1, 64, 16384, "TFLOP/s", 1398, "AITER op_tests/cpp/mha/README.md, MI355X"),
         (16, 64, 16384, "TFLOP/s", 1247, _HK)),
    ),
    _kittens(128, False, _series(16, 64, "TFLOP/s", (953, 1148, 1228, 1283, 1304), _HK)),
    _kittens(128, True, _series(16, 64, "TFLOP/s", (634, 861, 1048, 1146, 1188), _HK)),
    _kittens(64, False, ((16, 64, 16384, "TFLOP/s", 969, _HK),)),
    _kittens(64, True, ((16, 64, 16384, "TFLOP/s", 862, _HK),)),
    _opus_peer(False, _series(16, 64, "TFLOP/s", (1020, 1178, 1227, 1265, 1275), _OPUS)),
    _opus_peer(True, _series(16, 64, "TFLOP/s", (721, 930, 1118, 1207, 1252), _OPUS)),
)  # fmt: skip
