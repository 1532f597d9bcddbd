"""What must be compiled: a frozen value that names one kernel and everything that changes its code."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

DTYPES = ("fp16", "bf16", "fp32")

# Specs come from files too (recorded calls, manifests), and end up in paths and on command lines.
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_ARCH = re.compile(r"[a-z0-9][a-z0-9_+-]{0,63}")


@dataclass(frozen=True, slots=True)
class Spec:
    """One kernel: `kernel` names its source; the rest are its compile-time parameters.

    Everything that does not change the generated code is a run-time field of the launch ABI instead. `options` are
    further integer parameters, sorted by name: ("paged", 1) reaches the source as AITER_PAGED=1. head_dim is 0 where
    one kernel serves all.
    """

    kernel: str
    dtype: str
    head_dim: int
    causal: bool
    arch: str
    options: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.kernel, str) and _NAME.fullmatch(self.kernel)):
            raise ValueError(f"Spec.kernel must be a lower-case identifier, not {self.kernel!r}")
        if self.dtype not in DTYPES:
            raise ValueError(f"Spec.dtype must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        if type(self.head_dim) is not int or not 0 <= self.head_dim <= 4096:
            raise ValueError(f"Spec.head_dim must be an int in 0..4096, not {self.head_dim!r}")
        if type(self.causal) is not bool:
            raise ValueError(f"Spec.causal must be a bool, not {self.causal!r}")
        if not (isinstance(self.arch, str) and _ARCH.fullmatch(self.arch)):
            raise ValueError(f"Spec.arch must be an arch name such as gfx942 or x86-64-v3, not {self.arch!r}")
        for option in self.options:
            if not (
                isinstance(option, tuple)
                and len(option) == 2
                and isinstance(option[0], str)
                and _NAME.fullmatch(option[0])
                and type(option[1]) is int
            ):
                raise ValueError(f"Spec.options must be (name, int) pairs, not {option!r}")
        if list(self.options) != sorted(dict(self.options).items()):
            raise ValueError(f"Spec.options must be sorted by name, each once, not {self.options!r}")

    @property
    def name(self) -> str:
        """For people and file names: `attention_forward-fp16-d64-causal-paged-gfx942`."""
        parts = [self.kernel, self.dtype, *([f"d{self.head_dim}"] if self.head_dim else [])]
        parts += ["causal"] if self.causal else []
        parts += [name if value == 1 else f"{name}{value}" for name, value in self.options]
        return "-".join([*parts, self.arch])

    def defines(self) -> dict[str, int]:
        """The macros that the kernel's source sees."""
        return {
            f"AITER_DTYPE_{self.dtype.upper()}": 1,
            "AITER_HEAD_DIM": self.head_dim,
            "AITER_CAUSAL": int(self.causal),
            **{f"AITER_{name.upper()}": value for name, value in self.options},
        }

    def to_json(self) -> dict:
        """As plain JSON values, fields in a fixed order."""
        return {
            "kernel": self.kernel,
            "dtype": self.dtype,
            "head_dim": self.head_dim,
            "causal": self.causal,
            "arch": self.arch,
            "options": dict(self.options),
        }

    @classmethod
    def from_json(cls, value: dict | str) -> Spec:
        """The inverse of to_json, from a dict or its text. Raises ValueError for anything that is not a spec."""
        try:
            fields = json.loads(value) if isinstance(value, str) else dict(value)
            options = tuple(sorted(fields.pop("options", {}).items()))
            return cls(**fields, options=options)
        except (TypeError, AttributeError, KeyError, ValueError) as error:
            raise ValueError(f"not a kernel spec: {value!r} ({error})") from None
