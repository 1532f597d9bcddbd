"""Latent attention (MLA: DeepSeek's models) in vLLM on CPUs, in the place of its reference backend, CPU_MLA.

vLLM's frame absorbs weights and splits a batch. What is left are three calls: prompts, whose keys and values have been
made from latents and differ in size; decoding, where all heads share one key of latent and position, 576 numbers, whose
first 512 are the value; and the cache of these, (blocks, block_size, 576).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.attention.backends.mla.prefill.cpu_sdpa import CPUSDPAMLAPrefillBackend

from aiter.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from aiter.integrations.vllm.backend import announce
from aiter.kv_cache import reshape_and_cache


class LatentPrefill(CPUSDPAMLAPrefillBackend):
    """Prompts: queries and keys (tokens, heads, head_dim), values (tokens, heads, value_dim), packed sequences."""

    def run_prefill_new_tokens(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        return_softmax_lse: bool,
        out: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
    ) -> Any:
        if output_scale is not None:
            raise NotImplementedError("aiter's backend does not quantise its output")
        starts, longest = self._prefill_metadata.query_start_loc, self._prefill_metadata.max_query_len
        return flash_attn_varlen_func(
            *(q, k, v, starts, starts, longest, longest),
            softmax_scale=self.scale,
            causal=True,
            return_lse=return_softmax_lse,
            out=out,
        )

    def run_prefill_context_chunk(
        self, chunk: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return flash_attn_varlen_func(
            *(q, k, v, chunk.query_start_loc, chunk.cu_seq_lens, q.shape[0], k.shape[0]),
            softmax_scale=self.scale,
            return_lse=True,
            out=out,
        )


class LatentAttention(CPUMLAImpl):
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        announce()

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: Any,
        layer: Any,
    ) -> tuple[torch.Tensor, None]:
        """q: (batch, heads, 576), or its two parts; one token of each sequence. Output: (batch, heads, 512)."""
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        keys = kv_c_and_k_pe_cache.unsqueeze(2)
        output = flash_attn_with_kvcache(
            *(q.unsqueeze(1), keys, keys[..., : self.kv_lora_rank]),
            cache_seqlens=attn_metadata.decode.seq_lens,
            block_table=attn_metadata.decode.block_table,
            softmax_scale=self.scale,
        )
        return output.squeeze(1), None

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        if kv_cache.numel() == 0:
            return
        tokens = kv_cache.unsqueeze(2)
        latents, positions = tokens[..., : self.kv_lora_rank], tokens[..., self.kv_lora_rank :]
        reshape_and_cache(
            kv_c_normed.unsqueeze(1), k_pe.view(-1, 1, positions.shape[-1]), latents, positions, slot_mapping.flatten()
        )


class LatentBackend(CPUMLABackend):
    @staticmethod
    def get_impl_cls() -> type[LatentAttention]:
        return LatentAttention
