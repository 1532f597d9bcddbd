"""vLLM's attention backend on our kernels. vLLM imports this; `vllm.py` says when.

    step ── Builder.build ──> Metadata: lengths and block table, once for all layers of a group
    layer ─ Attention.do_kv_cache_update ──> reshape_and_cache
          └ Attention.forward ─────────────> flash_attn_varlen_func: prompts, their chunks and decoding in one call

A layer's cache is (blocks, heads_kv, block_size, 2 * head_dim), each token's key before its value, of any strides. What
cannot be done is refused when the model is loaded, with the words that vLLM has for it: the methods of `Backend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention as AttentionLayer
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from aiter import checks, jit, kernels
from aiter.errors import UnsupportedError
from aiter.flash_attn import flash_attn_varlen_func
from aiter.jit.arch import arch_of
from aiter.kv_cache import reshape_and_cache
from aiter.options import BATCH_INVARIANT, NO_LIMIT, one_mask

_ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
# What a cache's dtype is called where it holds numbers as they are.
_CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


class Backend(AttentionBackend):
    """What the kernels do, in vLLM's questions."""

    forward_includes_kv_cache_update = False
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", *_CACHE_DTYPES]  # 8-bit floats: not yet

    @staticmethod
    def get_impl_cls() -> type[Attention]:
        return Attention

    @staticmethod
    def get_builder_cls() -> type[Builder]:
        return Builder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: object = None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return tuple(KVCacheLayout)  # any strides; a head's block in one piece, the first of these, is read fastest

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size in checks.VALUE_DIMS

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type in (AttentionType.DECODER, AttentionType.ENCODER_DECODER, *_ENCODERS)

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        return BATCH_INVARIANT  # AITER_BATCH_INVARIANT=1 beside VLLM_BATCH_INVARIANT=1

    @classmethod
    def supports_combination(
        cls, head_size: int, dtype: torch.dtype, kv_cache_dtype: str | None, *others: Any, **keywords: Any
    ) -> str | None:
        cache_dtype = _CACHE_DTYPES.get(kv_cache_dtype or "auto", dtype)
        return None if cache_dtype == dtype else f"a cache of {kv_cache_dtype} for a model of {dtype} not supported"


class CpuBackend(Backend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "CPU_ATTN"  # whose place it takes: vLLM looks the name up


class GpuBackend(Backend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def supports_compute_capability(cls, capability: object) -> bool:
        try:
            return bool(arch_of(torch.device("cuda", torch.cuda.current_device())))
        except UnsupportedError:
            return False


@dataclass
class Metadata:
    """One step of the engine, for the layers that share a cache group. Tensors are int32."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor  # (batch + 1,)
    max_query_len: int
    seq_lens: torch.Tensor  # (batch,), of keys: what is in the cache and what is new
    max_seq_len: int
    block_table: torch.Tensor  # (batch, max_blocks)
    slot_mapping: torch.Tensor
    causal: bool


class Builder(AttentionMetadataBuilder[Metadata]):
    # Kernels read lengths and tables from the tensors that a captured graph holds, and block for no GPU. Batches of
    # equal query lengths, because what a graph launches is as large as the longest query that it was captured for.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        for layer in get_layers_from_vllm_config(vllm_config, AttentionLayer, layer_names).values():
            if isinstance(layer.impl, Attention):
                layer.impl.compile(layer, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError("aiter's backend has no causal mask for some sequences of a batch and not others")
        return Metadata(
            common.num_actual_tokens,
            common.query_start_loc,
            common.max_query_len,
            common.seq_lens,
            common.max_seq_len,
            common.block_table_tensor,
            common.slot_mapping,
            common.causal,
        )


class Attention(AttentionImpl[Metadata]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        self.num_heads, self.num_kv_heads, self.head_size = num_heads, num_kv_heads, head_size
        self.scale = float(scale)
        self.softcap = float(logits_soft_cap or 0.0)
        self.attn_type = attn_type
        self.kv_cache_dtype = kv_cache_dtype
        self.sliding_window = sliding_window
        self.window = -1 if sliding_window is None else sliding_window - 1
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sinks = sinks
        self.cache: torch.Tensor | None = None
        self._refuse()

    def _refuse(self) -> None:
        """Raises for what the backend cannot do: on CPUs vLLM does not ask it."""
        config = get_current_vllm_config()
        backend = CpuBackend if current_platform.is_cpu() else GpuBackend
        reasons = backend.validate_configuration(
            head_size=self.head_size,
            dtype=torch.get_default_dtype(),
            kv_cache_dtype=self.kv_cache_dtype,
            block_size=config.cache_config.block_size if config.cache_config.user_specified_block_size else None,
            use_mla=False,
            has_sink=self.sinks is not None,
            use_sparse=False,
            use_mm_prefix=config.model_config is not None and config.model_config.is_mm_prefix_lm,
            use_per_head_quant_scales=False,
            device_capability=current_platform.get_device_capability(),
            attn_type=self.attn_type,
            has_sliding_window=self.sliding_window is not None,
            use_batch_invariant=envs.VLLM_BATCH_INVARIANT,
            use_rswa=config.model_config is not None and config.model_config.rswa_window is not None,
        )
        if reasons:
            raise NotImplementedError(
                f"aiter's attention backend cannot run this model: {', '.join(reasons)} (head size {self.head_size}, "
                f"cache dtype {self.kv_cache_dtype}); AITER_VLLM=0 leaves attention to vLLM"
            )

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        if self.sinks is not None:  # as kernels read them, so that no call converts
            self.sinks = self.sinks.detach().to(torch.float32).contiguous()

    def compile(self, layer: AttentionLayer, device: torch.device) -> None:
        """Has the kernels built, if they are not there yet: no request shall wait for that."""
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes.to(device)
        dtype = checks.DTYPE_NAMES[layer.dtype]
        causal, left, right = one_mask(self.attn_type == AttentionType.DECODER, *self._window_size(True))
        options = {
            "alibi": self.alibi_slopes is not None,
            "softcap": self.softcap > 0,
            "window": (left, right) != (NO_LIMIT, NO_LIMIT),
        }
        chosen = tuple(name for name, asked in options.items() if asked)
        for operation in ("variable_length_attention", "reshape_and_cache"):
            for spec in kernels.specs_for(
                operation, dtype, self.head_size, causal, arch_of(device), False, layer.head_size_v, chosen
            ):
                jit.get_kernel(spec)

    def _window_size(self, causal: bool) -> tuple[int, int]:
        return (self.window, 0) if causal and self.window >= 0 else (self.window, self.window)

    def do_kv_cache_update(
        self,
        layer: torch.nn.Module,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.attn_type in _ENCODERS:
            return  # has no cache
        if kv_cache is not self.cache:
            self._view(kv_cache)
        reshape_and_cache(key, value, self.key_cache, self.value_cache, slot_mapping)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query: (tokens, heads_q, head_dim), key, value: (tokens, heads_kv, dim); what is past the sequences of
        attn_metadata is padding, for which the output, (tokens, heads_q, value_dim), is left alone."""
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("aiter's backend does not quantise its output")
        if attn_metadata is None:  # a run that only measures memory
            return output.fill_(0)
        starts, lengths, table = attn_metadata.query_start_loc, attn_metadata.seq_lens, attn_metadata.block_table
        starts_k = None
        if self.attn_type in _ENCODERS:
            starts_k, lengths, table = starts, None, None
        else:
            if kv_cache is not self.cache:
                self._view(kv_cache)
            key, value = self.key_cache, self.value_cache
        flash_attn_varlen_func(
            query,
            key,
            value,
            starts,
            starts_k,
            attn_metadata.max_query_len,
            attn_metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=attn_metadata.causal,
            window_size=self._window_size(attn_metadata.causal),
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            block_table=table,
            seqused_k=lengths,
            sinks=self.sinks,
            out=output,
        )
        return output

    def _view(self, kv_cache: torch.Tensor) -> None:
        """Keys and values of a cache, (blocks, block_size, heads_kv, dim), kept for as long as it is the layer's."""
        tokens = kv_cache.transpose(1, 2)
        self.key_cache, self.value_cache = tokens[..., : self.head_size], tokens[..., self.head_size :]
        self.cache = kv_cache
