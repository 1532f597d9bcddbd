"""SGLang: an attention backend of the name "aiter_jit" (its own "aiter" is ROCm's library).

    python -m sglang.launch_server --attention-backend aiter_jit ...

    SGLang, in every process ── entry point sglang.srt.plugins ──> register
           ── a runner is made ──────────────────────────────────> backend.AiterJitBackend

`register` is light; the backend is imported when a runner asks for it.
"""

from __future__ import annotations

from typing import Any

NAME = "aiter_jit"


def register() -> None:
    """Adds the backend to SGLang's choices; for the entry point `sglang.srt.plugins`."""
    from sglang.srt.arg_groups.choices import ATTENTION_BACKEND_CHOICES, add_attention_backend_choices
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    if NAME not in ATTENTION_BACKEND_CHOICES:
        add_attention_backend_choices([NAME])
    register_attention_backend(NAME)(_make)


def _make(runner: Any) -> Any:
    from aiter.integrations.sglang.backend import AiterJitBackend

    return AiterJitBackend(runner)
