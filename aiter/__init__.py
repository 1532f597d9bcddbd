"""aiter: JIT-compiled attention for AMD GPUs, CPUs and NVIDIA GPUs.

    import aiter
    output = aiter.flash_attn_func(query, key, value, causal=True)

The first call of a kind compiles its kernel and keeps it on disk; every later call, in any process, dispatches to it.
"""

import os
import sys
from typing import TYPE_CHECKING

from aiter.integrations.rocm import names as _rocm

if TYPE_CHECKING:
    from aiter.operations import (
        flash_attn_func,
        flash_attn_with_kvcache,
        grouped_query_attention,
        multi_query_attention,
        variable_length_attention,
    )
    from aiter.parts import attention_backward, merge_attention_states

__version__ = "0.1.0"

__all__ = [
    "attention_backward",
    "flash_attn_func",
    "flash_attn_with_kvcache",
    "grouped_query_attention",
    "merge_attention_states",
    "multi_query_attention",
    "variable_length_attention",
]


def _load() -> None:
    from aiter import flops, operations, parts  # noqa: F401 - the first tells PyTorch how to count
    from aiter.integrations.rocm.attention import either_flash_attn_func

    for module in (operations, parts):
        globals().update({name: getattr(module, name) for name in __all__ if hasattr(module, name)})
    globals()["flash_attn_func"] = either_flash_attn_func


def __getattr__(name: str) -> object:
    if name in _rocm.TOP_LEVEL:
        return _rocm.resolve(name)
    if name not in __all__:
        raise _rocm.no_attribute("aiter", name)
    _load()
    return globals()[name]


_rocm.install(os.path.dirname(__file__))

# The command line looks after kernels without PyTorch, whose import takes a second. Whoever has imported PyTorch, or
# uses an operation, gets everything.
if "torch" in sys.modules:
    _load()
