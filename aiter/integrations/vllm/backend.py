"""vLLM's attention backend on our kernels. vLLM imports this; `register` says when.

    step ── Builder.build ──> Metadata: lengths and block table, once for all layers of a group
    layer ─ Attention.do_kv_cache_update ──> reshape_and_cache
          └ Attention.forward ─────────────> plan.forward: prompts, their chunks and decoding in one call

A layer's cache is (blocks, heads_kv, block_size, 2 * head_dim), each token's key before its value, of any strides. What
cannot be done is refused when the model is loaded, with the words that vLLM has for it: the methods of `Backend`. Calls
that come after that are of one form, so what `aiter.flash_attn` asks of its arguments is not asked again in each layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm import envs
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.logger import init_logger
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

from aiter import __version__, checks, jit, kernels, plan
from aiter.errors import UnsupportedError
from aiter.jit.arch import arch_of
from aiter.kv_cache import reshape_and_cache
from aiter.layout import Indices, check_common, sizes_of
from aiter.options import BATCH_INVARIANT, OptionKeywords, Options, read_options, readable_index

logger = init_logger("vllm.aiter")
_NAMES = checks.Names("query_lens", "seq_lens", "max_query_len", "max_seq_len", starts_q="query_start_loc")
_ENCODERS = (AttentionType.ENCODER, AttentionType.ENCODER_ONLY)
# What a cache's dtype is called where it holds numbers as they are, and where it holds them divided by scales.
_CACHE_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_SCALED = {
    "fp8": current_platform.fp8_dtype(),
    "fp8_e4m3": current_platform.fp8_dtype(),
    "fp8_e5m2": torch.float8_e5m2,
}


def announce() -> None:
    """Says, once in a process, whose attention it is."""
    logger.info_once(
        "Attention is aiter's (%s). To leave it to vLLM: AITER_VLLM=0, or another backend's name", __version__
    )


class Backend(AttentionBackend):
    """What the kernels do, in vLLM's questions."""

    forward_includes_kv_cache_update = False
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", *_CACHE_DTYPES, *_SCALED]

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
    """One step of the engine, for the layers that share a cache group."""

    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    causal: bool
    slot_mapping: torch.Tensor  # where new tokens go; vLLM replaces it for cross attention
    paged: Indices  # of queries among the packed tokens, of keys in the cache
    packed: Indices  # of both among the packed tokens, where there is no cache


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
                layer.impl.prepare(layer, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Metadata:
        common = common_attn_metadata
        if isinstance(common.causal, torch.Tensor):
            raise NotImplementedError("aiter's backend has no causal mask for some sequences of a batch and not others")
        starts, lengths, table = (
            readable_index(index) for index in (common.query_start_loc, common.seq_lens, common.block_table_tensor)
        )
        return Metadata(
            common.num_actual_tokens,
            max(common.max_query_len, 1),
            max(common.max_seq_len, 1),
            common.causal,
            common.slot_mapping,
            Indices(None, lengths, table, starts, None),
            Indices(None, None, None, starts, starts),
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
        self.scaled = None if attn_type in _ENCODERS else _SCALED.get(kv_cache_dtype)
        self.sliding_window = sliding_window
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sinks = sinks
        self.masks: dict[bool, tuple[bool, Options]] = {}  # by what vLLM calls causal
        self.cache: torch.Tensor | None = None
        self._refuse()
        announce()

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
                f"cache dtype {self.kv_cache_dtype}). Leave attention to vLLM: AITER_VLLM=0 on CPUs, another "
                "--attention-backend on GPUs"
            )

    def prepare(self, layer: AttentionLayer, device: torch.device) -> None:
        """Readies what no call changes, and has the kernels built if they are not there: no request waits for that."""
        if self.sinks is not None and self.sinks.shape != (self.num_heads,):
            raise ValueError(
                f"sinks have shape {tuple(self.sinks.shape)}; each of {self.num_heads} heads must have one"
            )
        left = -1 if self.sliding_window is None else self.sliding_window - 1
        for causal in (True, False):
            keywords: OptionKeywords = {
                "window_size": (left, 0 if causal else left),
                "softcap": self.softcap,
                "alibi_slopes": None if self.alibi_slopes is None else self.alibi_slopes.to(device),
                "sinks": self.sinks,
            }
            self.masks[causal] = read_options(causal, keywords)
        causal, options = self.masks[self.attn_type == AttentionType.DECODER]
        for operation in ("variable_length_attention", "reshape_and_cache"):
            for spec in kernels.specs_for(
                operation,
                checks.DTYPE_NAMES[layer.dtype],
                self.head_size,
                causal,
                arch_of(device),
                value_dim=layer.head_size_v,
                options=options.that_select_code,
                cache_dtype=None if self.scaled is None else checks.FP8_NAMES[self.scaled],
            ):
                jit.get_kernel(spec)

    def do_kv_cache_update(
        self,
        layer: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        if self.attn_type in _ENCODERS:
            return  # has no cache
        if kv_cache is not self.cache:
            self._view(kv_cache)
        scales = (None, None) if self.scaled is None else (layer._k_scale, layer._v_scale)
        reshape_and_cache(key, value, self.key_cache, self.value_cache, slot_mapping, *scales)

    def forward(
        self,
        layer: Any,
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
        if self.attn_type in _ENCODERS:
            indices = attn_metadata.packed
        else:
            if kv_cache is not self.cache:
                self._view(kv_cache)
            indices, key, value = attn_metadata.paged, self.pages_of_keys, self.pages_of_values
        longest, longest_k = attn_metadata.max_query_len, attn_metadata.max_seq_len
        sizes = sizes_of(query, key, value, indices, longest, longest_k)
        if sizes is None:
            check_common(query, key, value, indices, _NAMES)
        causal, options = self.masks[attn_metadata.causal]
        if self.sinks is not None:  # as kernels read them; not kept, as a model's weights may be loaded anew
            options = options.readable()
        if self.scaled is not None:
            options = options._replace(k_descale=layer._k_scale, v_descale=layer._v_scale)
        call = plan.Call(sizes, indices, options, causal, self.scale, _NAMES)
        plan.forward(call, query, key, value, False, output)
        return output

    def _view(self, kv_cache: torch.Tensor) -> None:
        """Keys and values of a cache, kept for as long as it is the layer's."""
        numbers = kv_cache if self.scaled is None else kv_cache.view(self.scaled)
        self.pages_of_keys, self.pages_of_values = pages = numbers.split_with_sizes(
            (self.head_size, kv_cache.shape[-1] - self.head_size), -1
        )
        self.key_cache, self.value_cache = (cache.transpose(1, 2) for cache in pages)
        self.cache = kv_cache
