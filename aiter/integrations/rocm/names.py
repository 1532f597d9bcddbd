"""Which of ROCm/aiter's names resolve here, and how; what is said of all the others.

import aiter.mla ──> Python finds no such file ──> Finder: a module with the names below
import aiter.fused_moe ──────────────────────────> Finder: ModuleNotFoundError that says what this package is
aiter.gemm_a4w4 ─────────────────────────────────> AttributeError that says so
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_HERE = "aiter.integrations.rocm"

_MHA = (
    "flash_attn_fp8_pertensor_func",
    "flash_attn_func",
    "flash_attn_varlen_fp8_pertensor_func",
    "flash_attn_varlen_func",
    "mha_batch_prefill_func",
)
_PAGED = (
    "get_mla_metadata_info_v1",
    "get_mla_metadata_v1",
    "get_ps_metadata_info_v1",
    "get_ps_metadata_v1",
    "mla_prefill_ps_asm_fwd",
    "mla_reduce_v1",
    "pa_fwd_asm",
    "paged_attention_common",
    "paged_attention_ragged",
    "paged_attention_rocm",
    "paged_attention_v1",
)
_CACHE = ("concat_and_cache_mla", "reshape_and_cache", "reshape_and_cache_flash")
_MLA = ("mla_decode_fwd", "mla_prefill_fwd")

# What `aiter` itself has of them; flash_attn_func is one function for both packages' keywords.
TOP_LEVEL = frozenset((*_MHA, *_PAGED, *_CACHE)) - {"flash_attn_func"}

_TRITON_MHA = {"flash_attn_func": "mha_flash_attn_func", "flash_attn_varlen_func": "mha_flash_attn_varlen_func"}
_TRITON_MHA_V3 = {
    "flash_attn_func": "v3_flash_attn_func",
    "flash_attn_varlen_func": "v3_flash_attn_varlen_func",
    "flash_attn_with_kvcache": "v3_flash_attn_with_kvcache",
}
_UNIFIED = {"unified_attention": "unified_attention"}


def _same(names: Iterable[str]) -> dict[str, str]:
    return {name: name for name in names}


# module: (file here, {its name: the name there}). Packages have no names of their own.
MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "aiter.jit.core": ("attention", {"ENABLE_CK": "ENABLE_CK"}),
    "aiter.mla": ("attention", _same(_MLA)),
    "aiter.ops": ("attention", {}),
    "aiter.ops.attention": ("attention", _same(_PAGED)),
    "aiter.ops.cache": ("attention", _same(_CACHE)),
    "aiter.ops.mha": ("attention", _same(_MHA)),
    "aiter.ops.triton": ("triton", {}),
    "aiter.ops.triton.attention": ("triton", {}),
    "aiter.ops.triton.attention.mha": ("triton", _TRITON_MHA),
    "aiter.ops.triton.attention.mha_v3": ("triton", _TRITON_MHA_V3),
    "aiter.ops.triton.attention.mla": ("triton", {"mla_decode_fwd": "mla_decode_fwd"}),
    "aiter.ops.triton.attention.unified_attention": ("triton", _UNIFIED),
    "aiter.ops.triton.mha": ("triton", _TRITON_MHA),
    "aiter.ops.triton.mha_v3": ("triton", _TRITON_MHA_V3),
    "aiter.ops.triton.unified_attention": ("triton", _UNIFIED),
}

_WHAT_THIS_IS = (
    "This is aiter-jit, which has attention alone. ROCm's library of the same import name (distribution amd-aiter, "
    "https://github.com/ROCm/aiter) has more; of it, attention functions resolve here: docs/rocm.md. Where a program "
    "needs the rest, install that one instead."
)


def resolve(name: str) -> Any:
    """One of `TOP_LEVEL`."""
    return getattr(importlib.import_module(f"{_HERE}.attention"), name)


def no_attribute(module: str, name: str) -> AttributeError:
    return AttributeError(f"module {module!r} has no attribute {name!r}. {_WHAT_THIS_IS}", name=name)


class Finder:
    """Asked by Python where no file of this package has the name of a module."""

    @classmethod
    def find_spec(cls, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name in MODULES:
            return ModuleSpec(name, cls(), is_package=True)  # type: ignore[arg-type]
        if name.startswith("aiter.") and not _is_a_question():
            raise ModuleNotFoundError(f"No module named {name!r}. {_WHAT_THIS_IS}")
        return None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        file, names = MODULES[module.__name__]
        module.__doc__ = f"What {module.__name__} of ROCm's library has, as far as this package has it: {_HERE}.{file}."
        module.__all__ = sorted(names)  # type: ignore[attr-defined]
        module.__getattr__ = _attributes(module.__name__, file, names)  # type: ignore[method-assign]


def _attributes(module: str, file: str, names: dict[str, str]) -> Callable[[str], Any]:
    def __getattr__(name: str) -> Any:
        if name in names:
            return getattr(importlib.import_module(f"{_HERE}.{file}"), names[name])
        raise no_attribute(module, name)

    return __getattr__


def _is_a_question() -> bool:
    """Whether importlib.util.find_spec asks, which wants an answer and no exception."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("importlib"):
        if frame.f_code.co_name == "find_spec" and frame.f_globals["__name__"] == "importlib.util":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def install(package: str) -> None:
    """Makes the names importable. package: the folder of this package, in which files of the other are looked for."""
    if Finder not in sys.meta_path:
        sys.meta_path.append(Finder)
    if other := _other_distribution(package):
        warnings.warn(
            f"another distribution has the import name aiter too ({other}; ROCm's library, amd-aiter, has it). This is "
            f"aiter-jit, from {package}, where of ROCm's names only attention resolves. Uninstall both, then install "
            "the one that you want: docs/rocm.md says which to choose when.",
            stacklevel=3,
        )


def _other_distribution(package: str) -> str | None:
    """A sign of another package: its files among these, or its metadata in a folder that Python imports from. Looked
    for by name, as importlib.metadata takes longer than the rest of the import."""
    mixed = os.path.join(package, "ops")
    if os.path.isdir(mixed):
        return mixed
    for folder in dict.fromkeys(sys.path):
        try:
            entries = os.listdir(folder or ".")
        except OSError:
            continue
        for entry in entries:
            if entry.startswith(("amd_aiter-", "aiter-")) and entry.endswith((".dist-info", ".egg-info", ".egg-link")):
                return os.path.join(folder, entry)
    return None
