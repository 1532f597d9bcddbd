"""Names of the chips that code is built for, and which of them is here.

    gfx90a gfx942 gfx950       AMD GPUs (MI200, MI300, MI350 families)
    sm_80 ... sm_90a ...       NVIDIA GPUs
    x86-64-v4+avx512bf16 ...   CPUs: the psABI level, then the further features that kernels use, so that a cache on a
                               shared home folder never hands a machine code that it cannot run

This table is the one place to add a chip.
"""

from __future__ import annotations

import functools
import platform
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiter.errors import SettingError, UnsupportedArchError
from aiter.jit import settings

if TYPE_CHECKING:
    import torch

AMD_ARCHS = ("gfx90a", "gfx942", "gfx950")
# nvcc names these; further ones from sm_80 on are accepted as they come.
NVIDIA_ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")


@dataclass(frozen=True)
class CpuArch:
    """A kind of CPU: the flags in /proc/cpuinfo that it must have, and how to compile for it."""

    name: str
    cpuinfo: frozenset[str]
    flags: tuple[str, ...]

    @property
    def features(self) -> tuple[str, ...]:
        """What comes after the level in the name."""
        return tuple(self.name.split("+")[1:])


def _cpu_archs() -> dict[str, CpuArch]:
    """From the least able to the most able; each needs all that the one before it needs."""
    steps: tuple[tuple[str, str, list[str]], ...] = (
        ("x86-64", "", ["-march=x86-64"]),
        ("x86-64-v2", "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3", ["-march=x86-64-v2"]),
        ("x86-64-v3", "abm avx avx2 bmi1 bmi2 f16c fma movbe xsave", ["-march=x86-64-v3"]),
        (
            "x86-64-v4",
            "avx512f avx512bw avx512cd avx512dq avx512vl",
            ["-march=x86-64-v4", "-mprefer-vector-width=512"],
        ),
        ("+avx512bf16", "avx512_bf16", ["-mavx512bf16"]),
        ("+amxbf16", "amx_tile amx_bf16", ["-mamx-tile", "-mamx-bf16"]),
        # No compiler flag: g++ 12 knows none, so kernels encode this instruction themselves.
        ("+amxfp16", "amx_fp16", []),
    )
    archs: dict[str, CpuArch] = {}
    name, needed, features = "", frozenset[str](), tuple[str, ...]()
    for step, cpuinfo, flags in steps:
        name = name + step if step.startswith("+") else step
        needed = needed | set(cpuinfo.split())
        features = (*features, *flags) if step.startswith("+") else tuple(flags)
        archs[name] = CpuArch(name, needed, features)
    return archs


CPU_ARCHS = _cpu_archs()


def is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


def is_nvidia(arch: str) -> bool:
    return arch.startswith("sm_")


def is_gpu(arch: str) -> bool:
    return is_amd(arch) or is_nvidia(arch)


def check(arch: str) -> str:
    """Returns `arch` if kernels can be built for it, on this machine or for another."""
    if is_nvidia(arch):
        match = re.fullmatch(r"sm_(\d{2,3})([af]?)", arch)
        supported = match is not None and int(match[1]) >= 80
    else:
        supported = arch in AMD_ARCHS or arch in CPU_ARCHS or arch == platform.machine()
    if supported:
        return arch
    raise UnsupportedArchError(f"arch {arch!r} is not supported; supported: {supported_text()}")


def supported_text() -> str:
    """What `check` accepts, for messages."""
    return f"AMD {', '.join(AMD_ARCHS)}; NVIDIA {', '.join(NVIDIA_ARCHS)}; CPU {', '.join(CPU_ARCHS)}"


def arch_of(device: torch.device) -> str:
    """The arch of one of this machine's devices. ROCm devices are of type "cuda" in PyTorch, too."""
    if device.type == "cpu":
        return cpu_arch()
    if device.type == "cuda":
        import torch

        if torch.version.hip:
            # "gfx942:sramecc+:xnack-": the features after the colon do not change what we compile.
            return check(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
        major, minor = torch.cuda.get_device_capability(device)
        # 9.0's matrix instructions are only in the "a" variant of the arch.
        return check(f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else ""))
    raise UnsupportedArchError(
        f"device {str(device)!r} is not supported; supported: CPUs, AMD GPUs and NVIDIA GPUs ({supported_text()})"
    )


def cpu_arch() -> str:
    """The arch that this CPU is fastest with, or AITER_CPU_ARCH."""
    able = detect_cpu()
    wanted = settings.text("AITER_CPU_ARCH")
    if not wanted:
        return "x86-64-v4" if able == "x86-64-v4+avx512bf16" and _slow_dot_products() else able
    if wanted not in CPU_ARCHS and wanted != platform.machine():
        raise SettingError(f"AITER_CPU_ARCH={wanted!r}: expected one of {', '.join(CPU_ARCHS)}")
    if not runs_here(wanted):
        raise SettingError(f"AITER_CPU_ARCH={wanted!r}: this CPU cannot run it; the most that it has is {able}")
    return wanted


@functools.cache
def detect_cpu() -> str:
    """The most able arch that this CPU has."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return platform.machine()
    flags = _cpuinfo_flags()
    return [arch.name for arch in CPU_ARCHS.values() if arch.cpuinfo <= flags][-1]


def runs_here(arch: str) -> bool:
    """Whether this machine's CPU can run code built for the CPU arch `arch`."""
    able = detect_cpu()
    return arch == able or (
        able in CPU_ARCHS and arch in CPU_ARCHS and CPU_ARCHS[arch].cpuinfo <= CPU_ARCHS[able].cpuinfo
    )


@functools.cache
def _slow_dot_products() -> bool:
    """Intel's bf16 dot products take longer than the multiply-adds that they replace: on a Xeon, kernels with them had
    0.55 times the speed of those without (docs/cpu.md). AMX, where it may be used, leaves both behind."""
    return cpuinfo("vendor_id") == "GenuineIntel"


def cpuinfo(field: str) -> str:
    """What /proc/cpuinfo says of the first CPU; nothing where there is no such file or field."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() == field:
                    return value.strip()
    except OSError:
        pass
    return ""


def _cpuinfo_flags() -> set[str]:
    flags = set(cpuinfo("flags").split())  # none: what is left is the plain level
    if "amx_tile" in flags:
        if not _tiles_permitted():
            flags -= {"amx_tile", "amx_bf16", "amx_fp16"}
        elif _torch_says_amx_fp16():
            flags.add("amx_fp16")  # many kernels do not list it in /proc/cpuinfo
    return flags


def _tiles_permitted() -> bool:
    """Asks Linux for the AMX tile registers, which a process must do once before it uses them."""
    import ctypes

    syscall_arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(syscall_arch_prctl, request_permission, tile_data) == 0


def _torch_says_amx_fp16() -> bool:
    import torch

    supported = getattr(torch.cpu, "_is_amx_fp16_supported", None)
    return bool(supported and supported())
