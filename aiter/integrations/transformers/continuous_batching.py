"""Continuous batching: `model.generate_batch` on our kernels, under the name "aiter_flash2".

transformers batches requests of any lengths into one row, over a paged cache of its own, and lets only implementations
do it whose name has "flash" in it; with a 2 or 3 after it, on a GPU, they are given the pages themselves for decoding.
Such a name it takes for a package to be fetched, though: `admit` tells it that this one is here.

    first tokens, mixed steps ── keys and values gathered into a row ──> flash_attn_varlen_func
    decoding on a GPU         ── pages, and the tokens to append ──────> flash_attn_with_kvcache
    everything else           ────────────────────────────────────────> layers.attention, as for "aiter"
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, modeling_flash_attention_utils

from aiter import flash_attn
from aiter.integrations.masks import is_capturing
from aiter.integrations.transformers.layers import attention, refuse_others
from aiter.integrations.transformers.masks import padding_mask

FLASH_NAME = "aiter_flash2"
PAGED_NAME = f"paged|{FLASH_NAME}"  # what transformers up to 5.18 makes of it while it batches


def batched_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: torch.Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    read_index: Any = None,
    write_index: Any = None,
    block_table: torch.Tensor | None = None,
    k_cache: torch.Tensor | None = None,
    v_cache: torch.Tensor | None = None,
    cache: Any = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """`layers.attention`; for a batch that transformers schedules (it has a read_index), what its flash functions do.

    Then query is (1, heads_q, tokens, head_dim), and cu_seq_lens_q int32 (requests + 1,). key and value are
    (1, heads_kv, tokens_k, head_dim), cached ones included, and cu_seq_lens_k says whose; or, with block_table int32
    (requests, pages), they are one new token of each request, which goes into k_cache and v_cache (pages, page_size,
    heads_kv, head_dim) behind its earlier ones. With cache (5.19 to 5.23 hand theirs over), all of that is asked of
    it first, for this layer.
    """
    if read_index is None:
        return attention(
            *(module, query, key, value, attention_mask, scaling, dropout, is_causal, cu_seq_lens_q, cu_seq_lens_k),
            *(max_length_q, max_length_k, position_ids, sliding_window, softcap, s_aux),
            **others,
        )
    if cache is not None:
        step: dict[str, Any] = {
            "cu_seq_lens_k": cu_seq_lens_k,
            "max_length_k": max_length_k,
            "block_table": block_table,
        }
        step |= {"read_index": read_index, "write_index": write_index}
        key, value = cache.update(key, value, module.layer_idx, step)
        cu_seq_lens_k, max_length_k, block_table = step["cu_seq_lens_k"], step["max_length_k"], step["block_table"]
        k_cache, v_cache = step.get("k_cache"), step.get("v_cache")
        attention_mask = None  # lengths say it
    refuse_others(dropout=dropout or None, attention_mask=attention_mask, **others)
    if query.is_cpu and is_capturing():
        raise ValueError(
            "transformers captures a CUDA graph of a model on the CPU, which would compute nothing when replayed: give "
            "ContinuousBatchingConfig(use_cuda_graph=False), or move the model to the GPU"
        )
    assert cu_seq_lens_q is not None and cu_seq_lens_k is not None
    assert max_length_q is not None and max_length_k is not None
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "causal": True,
        "window_size": (-1, -1) if sliding_window is None else (sliding_window - 1, 0),
        "softcap": softcap or 0.0,
        "sinks": s_aux,
    }
    query, key, value = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    if block_table is None:
        output = flash_attn.flash_attn_varlen_func(
            query, key, value, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, **options
        )
    else:
        assert k_cache is not None and v_cache is not None
        query, key, value = (tensor.unsqueeze(1) for tensor in (query, key, value))
        requests = query.shape[0]
        cached = cu_seq_lens_k[: requests + 1].diff() - 1
        output = flash_attn.flash_attn_with_kvcache(
            query, k_cache, v_cache, key, value, cache_seqlens=cached, block_table=block_table[:requests], **options
        ).squeeze(1)
    return output.unsqueeze(0), None


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    cache: Any,
    cu_seq_lens_k: torch.Tensor | dict[str, torch.Tensor],
    max_seqlen_q: int,
    max_seqlen_k: int | dict[str, int],
    read_index: Any = None,
    write_index: Any = None,
    block_table: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **others,
) -> tuple[torch.Tensor, None]:
    """`batched_attention` as transformers up to 5.18 calls it: the new tokens alone, and the cache that they go to."""
    kind = "full_attention" if sliding_window is None else "sliding_attention"
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k = cu_seq_lens_k[kind]
    if isinstance(max_seqlen_k, dict):
        max_seqlen_k = max_seqlen_k[kind]
    caches: dict[str, Any] = {}
    if block_table is None:
        packed = cache.update(key, value, module.layer_idx, read_index, write_index)
        key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in packed)
    else:
        if hasattr(cache, "get_cache_for_block_table"):  # 5.18
            group, k_cache, v_cache = cache.get_cache_for_block_table(module.layer_idx)
        else:
            group, layer = cache.layer_index_to_group_indices[module.layer_idx]
            k_cache, v_cache = (
                slots[layer].view(-1, cache.block_size, *slots[layer].shape[1:])
                for slots in (cache.key_cache, cache.value_cache)
            )
        caches = {"block_table": block_table[group], "k_cache": k_cache, "v_cache": v_cache}
    return batched_attention(
        module,
        query,
        key,
        value,
        None,  # lengths say it
        cu_seq_lens_k=cu_seq_lens_k,
        max_length_q=max_seqlen_q,
        max_length_k=max_seqlen_k,
        sliding_window=sliding_window,
        read_index=(),
        **caches,
        **others,
    )


def admit() -> None:
    """Registers the names, and sees to it that transformers looks for no package of them."""
    AttentionInterface.register(FLASH_NAME, batched_attention)
    AttentionMaskInterface.register(FLASH_NAME, padding_mask)
    # No mask function: transformers then makes no mask, which nobody would read and a CUDA graph could not hold.
    AttentionInterface.register(PAGED_NAME, paged_attention)
    check = PreTrainedModel._check_and_adjust_attn_implementation
    if hasattr(check, "before_aiter"):
        return

    def adjust(self, attn_implementation, *arguments, **keywords):
        # Some models list the packages that know their sinks; these kernels do, and are in no such list.
        if attn_implementation in (FLASH_NAME, PAGED_NAME):
            return attn_implementation
        return check(self, attn_implementation, *arguments, **keywords)

    imports = modeling_flash_attention_utils._lazy_imports

    def lazy_imports(implementation, *arguments, **keywords):
        if implementation in (FLASH_NAME, PAGED_NAME):
            functions = (
                flash_attn.flash_attn_func,
                flash_attn.flash_attn_varlen_func,
                flash_attn.flash_attn_with_kvcache,
            )
            return *functions, modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input
        return imports(implementation, *arguments, **keywords)

    adjust.before_aiter = check  # type: ignore[attr-defined]
    PreTrainedModel._check_and_adjust_attn_implementation = adjust
    modeling_flash_attention_utils._lazy_imports = lazy_imports
