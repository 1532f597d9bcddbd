"""Assembles snippets of gfx9 machine code into kernels, for tests of single instructions."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LANES = 64
OLDEST_LLVM = 19

# A kernel around a snippet: v0 is the lane; 8 words a lane are loaded to v[8:15]; afterwards v[16:23] are stored.
# s[4:5] input, s[6:7] output. The snippet may use v24 and up, a0 and up, s10 and up.
_KERNEL = """
.globl {name}
.p2align 8
.type {name},@function
{name}:
  s_load_dwordx4 s[4:7], s[0:1], 0x0
  v_lshlrev_b32 v1, 5, v0
  s_waitcnt lgkmcnt(0)
  global_load_dwordx4 v[8:11], v1, s[4:5]
  global_load_dwordx4 v[12:15], v1, s[4:5] offset:16
{zero}
  s_waitcnt vmcnt(0)
{body}
  s_nop 15
  s_nop 7
  global_store_dwordx4 v1, v[16:19], s[6:7]
  global_store_dwordx4 v1, v[20:23], s[6:7] offset:16
  s_endpgm
.rodata
.p2align 6
.amdhsa_kernel {name}
  .amdhsa_next_free_vgpr 192
  .amdhsa_next_free_sgpr 96
  .amdhsa_accum_offset 128
  .amdhsa_group_segment_fixed_size {lds}
  .amdhsa_user_sgpr_kernarg_segment_ptr 1
  .amdhsa_kernarg_size 16
  .amdhsa_system_vgpr_workitem_id 0
.end_amdhsa_kernel
.text
"""
_METADATA = """
  - .name: {name}
    .symbol: {name}.kd
    .kernarg_segment_size: 16
    .kernarg_segment_align: 8
    .group_segment_fixed_size: {lds}
    .private_segment_fixed_size: 0
    .wavefront_size: 64
    .sgpr_count: 96
    .vgpr_count: 192
    .max_flat_workgroup_size: 1024
    .args:
      - {{.offset: 0, .size: 8, .value_kind: global_buffer}}
      - {{.offset: 8, .size: 8, .value_kind: global_buffer}}
"""


@dataclass
class Snippet:
    name: str
    body: str
    lds: int = 0
    zero: bool = True  # v[16:23] hold zeros where the snippet does not write them


@functools.cache
def llvm(program: str) -> str | None:
    """A program of LLVM that is new enough: older assemblers lack gfx942, and some of what gfx90a has."""
    names = (f"{program}-{OLDEST_LLVM}", program, *(f"{program}-{release}" for release in range(OLDEST_LLVM + 1, 30)))
    for path in filter(None, map(shutil.which, names)):
        said = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"(?:LLVM version|LLD) (\d+)", said)
        if release and int(release[1]) >= OLDEST_LLVM:
            return path
    return None


def zig() -> str | None:
    """The zig of the package ziglang, here or in another environment on PATH, which calls it python-zig."""
    try:
        import ziglang
    except ImportError:
        return shutil.which("python-zig") or shutil.which("zig")
    return str(Path(ziglang.__file__).parent / "zig")


@functools.cache
def _zig_knows_gfx950() -> bool:
    said = subprocess.run([zig(), "clang", "--version"], capture_output=True, text=True).stdout if zig() else ""
    release = re.search(r"clang version (\d+)", said)
    return bool(release) and int(release[1]) >= 20


def missing(arch: str) -> str | None:
    """What is missing for assembling for the arch, or None."""
    if not llvm("ld.lld") or not llvm("llvm-objcopy"):
        return f"no ld.lld and llvm-objcopy of LLVM {OLDEST_LLVM} or newer on PATH"
    if arch == "gfx950":
        return None if _zig_knows_gfx950() else "no zig whose clang is 20 or newer (the package ziglang)"
    return None if llvm("llvm-mc") else f"no llvm-mc of LLVM {OLDEST_LLVM} or newer on PATH"


def assemble_object(arch: str, source: str, target: Path) -> None:
    text = target.with_suffix(".s")
    text.write_text(source)
    if arch == "gfx950":
        command = [zig(), "clang", "-target", "amdgcn-amd-amdhsa", f"-mcpu={arch}", "-c", str(text), "-o", str(target)]
    else:
        command = [llvm("llvm-mc"), "-triple=amdgcn-amd-amdhsa", f"-mcpu={arch}", "-filetype=obj", str(text)]
        command += ["-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr[:4000])


def machine_code(arch: str, lines: list[str]) -> list[int]:
    """The words that the assembler makes of the lines."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "code.o"
        assemble_object(arch, "\n".join(lines) + "\n", target)
        text = target.with_suffix(".bin")
        copy = [llvm("llvm-objcopy"), "-O", "binary", "--only-section=.text"]
        subprocess.run([*copy, str(target), str(text)], check=True)
        return np.frombuffer(text.read_bytes(), np.uint32).tolist()


def code_object(arch: str, snippets: list[Snippet]) -> bytes:
    """One code object with a kernel for each snippet."""
    zero = "\n".join(f"  v_mov_b32 v{r}, 0" for r in range(16, 24))
    source = f'.amdgcn_target "amdgcn-amd-amdhsa--{arch}"\n.text\n'
    metadata = "amdhsa.version: [1, 2]\namdhsa.kernels:"
    for snippet in snippets:
        before = zero if snippet.zero else ""
        source += _KERNEL.format(name=snippet.name, body=snippet.body, lds=snippet.lds, zero=before)
        metadata += _METADATA.format(name=snippet.name, lds=snippet.lds)
    source += f".amdgpu_metadata\n{metadata}.end_amdgpu_metadata\n"
    with tempfile.TemporaryDirectory() as folder:
        target, linked = Path(folder) / "code.o", Path(folder) / "code.co"
        assemble_object(arch, source, target)
        subprocess.run([llvm("ld.lld"), "-shared", str(target), "-o", str(linked)], check=True, stderr=sys.stderr)
        return linked.read_bytes()


def run(gpu, code: bytes, name: str, inputs: np.ndarray, waves: int = 1) -> np.ndarray:
    """Runs a snippet on inputs (lanes, 8) of words; returns what it left in v[16:23], (lanes, 8)."""
    size = LANES * waves
    memory = np.zeros((2 * size + 512, 8), np.uint32)  # with a gap that belongs to neither
    memory[:size] = inputs.astype(np.uint32).reshape(size, 8)
    inputs, outputs = memory[:size], memory[size + 256 : 2 * size + 256]
    gpu.forbid_all()
    gpu.allow(inputs.ctypes.data, inputs.nbytes)
    gpu.allow(outputs.ctypes.data, outputs.nbytes, writable=True)
    arguments = np.array([inputs.ctypes.data, outputs.ctypes.data], np.uint64).tobytes()
    gpu.launch(code, name, (1,), (LANES * waves,), arguments)
    return outputs.copy()
