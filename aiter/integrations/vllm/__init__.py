"""vLLM's plugin: tells vLLM of our attention backend, which is in `backend.py`.

vLLM calls `register` (entry point `vllm.general_plugins`) in each of its processes, some of them more than once. On
GPUs the backend has a name of its own, and nothing changes for who does not ask for it: `--attention-backend CUSTOM`.
On CPUs vLLM asks nobody and takes CPU_ATTN, or CPU_MLA for latents, so we go into their places where the user wants it:
AITER_VLLM=1, or VLLM_PLUGINS names this plugin. The backend logs one line where it is used: this is too early for that,
as vLLM reads its settings for logging later.
"""

from __future__ import annotations

import importlib.util
import os

from aiter.jit import settings

PLUGIN = "aiter"  # as pyproject.toml calls the entry point
_GPU_BACKEND = "aiter.integrations.vllm.backend.GpuBackend"
_CPU_BACKEND = "aiter.integrations.vllm.backend.CpuBackend"
_LATENT_BACKEND = "aiter.integrations.vllm.latent.LatentBackend"
_LATENT_PREFILL = "aiter.integrations.vllm.latent.LatentPrefill"


def register() -> None:
    """Registers the backend with the vLLM that is installed."""
    from vllm import __version__
    from vllm.logger import init_logger

    logger = init_logger("vllm.aiter")
    if importlib.util.find_spec("vllm.v1.kv_cache_layout") is None:
        logger.warning("aiter: its backend needs vLLM 0.32 or newer, this is %s: nothing is registered", __version__)
        return
    from vllm.v1.attention.backends.mla.prefill.registry import MLAPrefillBackendEnum, register_mla_prefill_backend
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != _GPU_BACKEND:
        logger.warning("aiter: CUSTOM is another plugin's backend, %s, and remains so", custom.get_path())
    else:
        register_backend(custom, _GPU_BACKEND)
    if wanted():
        register_backend(AttentionBackendEnum.CPU_ATTN, _CPU_BACKEND)
        register_backend(AttentionBackendEnum.CPU_MLA, _LATENT_BACKEND)
        register_mla_prefill_backend(MLAPrefillBackendEnum.CPU, _LATENT_PREFILL)


def wanted() -> bool:
    """Whether the user asks for the backend on CPUs."""
    if settings.text("AITER_VLLM"):
        return settings.flag("AITER_VLLM")
    return PLUGIN in [name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(",")]
