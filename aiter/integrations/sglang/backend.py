"""The backend: SGLang's pools of keys and values, and its batches, for `flash_attn_varlen_func`.

    a batch ── slots of each request's tokens ──> block tables, once for each step
    a layer ── new keys and values ─────────────> the pool, by SGLang itself
            ── query, the pool's pages, table ──> flash_attn_varlen_func: prefill, chunks, decoding alike

Decoding may be recorded in CUDA graphs: table and lengths then live in buffers of their own, which are filled anew
before each replay. What is not served (latent attention, speculative decoding, encoders, quantised caches) raises
NotImplementedError by name, when a runner or a batch asks for it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from aiter.flash_attn import flash_attn_varlen_func

_USE_OTHERS = "use --attention-backend triton or torch_native"


class _Step(NamedTuple):
    """What all layers of a step share."""

    starts_q: torch.Tensor  # int32 (requests + 1,)
    longest_q: int
    lengths: torch.Tensor  # (requests,), with the tokens of this step
    table: torch.Tensor  # int32 (requests, pages)
    # For layers with a window, where those have a pool of their own: table, and where new tokens go.
    window_table: torch.Tensor | None = None
    window_slots: torch.Tensor | None = None


class AiterJitBackend(AttentionBackend):
    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.pool, self.requests = runner.token_to_kv_pool, runner.req_to_token_pool
        self.page_size, self.longest = runner.page_size, runner.model_config.context_len
        self.window_pool: Any = self.pool if isinstance(self.pool, SWAKVPool) else None
        self.forward_metadata: _Step | None = None
        _refuse(getattr(runner, "use_mla_backend", False), "latent attention (MLA)")
        _refuse(self.pool.dtype not in (torch.float16, torch.bfloat16, torch.float32), f"a {self.pool.dtype} cache")

    # ---- once for each step ----

    def init_forward_metadata(self, forward_batch: Any) -> None:
        _refuse_batch(forward_batch)
        lengths = forward_batch.seq_lens
        if forward_batch.forward_mode.is_decode_or_idle():
            starts_q, longest_q = _one_each(lengths), 1
        else:
            starts_q = torch.nn.functional.pad(forward_batch.extend_seq_lens.cumsum(0), (1, 0)).to(torch.int32)
            longest_q = max(forward_batch.extend_seq_lens_cpu, default=0)
        longest = int(forward_batch.seq_lens_cpu.max()) if len(lengths) else 0
        tables = self._tables(forward_batch.req_pool_indices, longest)
        slots = None if self.window_pool is None else self._in_window_pool(forward_batch.out_cache_loc)
        self.forward_metadata = _Step(starts_q, longest_q, lengths, *tables, slots)

    def _tables(self, rows: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Pages of the requests in these rows, wide enough for `longest` tokens, in either pool."""
        slots = self.requests.req_to_token[rows, : max(longest, 1) : self.page_size]
        window_table = None if self.window_pool is None else self._in_window_pool(slots) // self.page_size
        return slots // self.page_size, window_table

    def _in_window_pool(self, slots: torch.Tensor) -> torch.Tensor:
        return self.window_pool.translate_loc_from_full_to_swa(slots).to(slots.dtype)

    # ---- CUDA graphs, of decoding ----

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        pages = -(-self.longest // self.page_size)
        device = self.requests.req_to_token.device

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        lengths, table = zeros(max_bs), zeros(max_bs, pages)
        window: tuple[torch.Tensor, ...] = ()
        if self.window_pool is not None:
            window = (zeros(max_bs, pages), zeros(max_num_tokens, dtype=torch.int64))
        self.graph_step: Any = _Step(_one_each(lengths), 1, lengths, table, *window)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        _refuse_batch(forward_batch)
        _refuse(not forward_batch.forward_mode.is_decode_or_idle(), "a CUDA graph of anything but decoding")
        count = forward_batch.batch_size
        starts_q, _, *buffers = self.graph_step
        cut: list[Any] = [None if buffer is None else buffer[:count] for buffer in buffers]
        lengths, table, window_table, window_slots = cut
        tables = self._tables(forward_batch.req_pool_indices[:count], self.longest)
        lengths.copy_(forward_batch.seq_lens[:count])
        table.copy_(tables[0])
        if window_table is not None:
            window_table.copy_(tables[1])
            window_slots.copy_(self._in_window_pool(forward_batch.out_cache_loc[:count]))
        self.forward_metadata = _Step(starts_q[: count + 1], 1, lengths, table, window_table, window_slots)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    # ---- once for each layer ----

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> torch.Tensor:
        """q (tokens, heads_q * head_dim), k and v (tokens, heads_kv, head_dim) of the new tokens, which go into the
        pool first. Returns (tokens, heads_q * head_dim of v)."""
        for name, value in others.items():
            _refuse(value is not None and value is not False, name)
        _refuse(layer.is_cross_attention, "cross attention")
        _refuse(layer.xai_temperature_len > 0, "xai_temperature_len")
        _refuse(layer.logit_cap > 0 and layer.logit_capping_method != "tanh", f"caps by {layer.logit_capping_method}")
        step = self.forward_metadata
        assert step is not None, "init_forward_metadata comes before the layers"
        if save_kv_cache and k is not None:
            self.pool.set_kv_buffer(layer, KVWriteLoc.for_batch(forward_batch, swa_loc=step.window_slots), k, v)
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        _refuse(keys.dim() != 3, "a cache that is not (tokens, heads, head_dim)")
        keys, values = (pages.unflatten(0, (-1, self.page_size)) for pages in (keys, values))
        causal = layer.attn_type != AttentionType.ENCODER_ONLY
        window = layer.sliding_window_size if layer.sliding_window_size is not None else -1
        _refuse(window > -1 and not causal, "a window without causal attention")
        table = step.window_table if window > -1 and step.window_table is not None else step.table
        output = flash_attn_varlen_func(
            *(q.view(-1, layer.tp_q_head_num, layer.qk_head_dim), keys, values, step.starts_q, None),
            *(step.longest_q, table.shape[1] * self.page_size),
            softmax_scale=layer.scaling,
            causal=causal,
            window_size=(window, 0) if window > -1 else (-1, -1),
            softcap=layer.logit_cap,
            block_table=table,
            seqused_k=step.lengths,
            sinks=sinks,
        )
        return output.flatten(1)

    forward_decode = forward_extend  # a row for each request


def _one_each(lengths: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(lengths) + 1, dtype=torch.int32, device=lengths.device)


def _refuse_batch(forward_batch: Any) -> None:
    _refuse(forward_batch.spec_info is not None, "speculative decoding")
    _refuse(forward_batch.encoder_lens is not None, "encoders with a decoder")


def _refuse(condition: bool, what: str) -> None:
    if condition:
        raise NotImplementedError(f"attention backend 'aiter_jit' has no {what}: {_USE_OTHERS}")
