"""aiter: JIT-compiled attention for AMD GPUs, CPUs and NVIDIA GPUs.

    import aiter
    output = aiter.flash_attn_func(query, key, value, causal=True)

The first call of a kind compiles its kernel and keeps it on disk; every later call, in any process, dispatches to it.
"""

import aiter.library  # noqa: F401, registers the operators
from aiter.operations import (
    flash_attn_func,
    flash_attn_with_kvcache,
    grouped_query_attention,
    multi_query_attention,
    variable_length_attention,
)

__version__ = "0.1.0"

__all__ = [
    "flash_attn_func",
    "flash_attn_with_kvcache",
    "grouped_query_attention",
    "multi_query_attention",
    "variable_length_attention",
]
