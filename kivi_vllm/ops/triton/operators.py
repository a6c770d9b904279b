"""The operators of one layer's step on a GPU: `reference`'s, for a `DeviceStep`.

Contract of the tensors, besides the shapes in `reference`: head_size contiguous, and
all other strides and addresses multiples of 16 bytes, as vLLM's are; block tables int32.
"""

from __future__ import annotations

from typing import Any

import torch

from kivi_vllm.ops.reference import AttentionParams, LayerCache
from kivi_vllm.ops.triton.decode import decode
from kivi_vllm.ops.triton.prefill import prefill
from kivi_vllm.ops.triton.step import DeviceStep
from kivi_vllm.ops.triton.store import store_blocks, store_ring

__all__ = ["attend", "store_blocks", "store_ring"]

_compiled: set[tuple] = set()


def attend(
    step: DeviceStep,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
    first_chunk: Any = None,
) -> None:
    """As `reference.attend`, for a `DeviceStep`: decodes first, then the other requests.

    `first_chunk` (`attention.first_chunk.FirstChunk`) does those where nothing is cached.
    """
    if step.num_decodes:
        decode(step, cache, query, key, value, params, output)
    if not step.num_prefills:
        return
    plain = first_chunk is not None and step.nothing_cached and not step.per_position
    # Our kernel runs the first time in any case, so that it is compiled by vLLM's warm-up.
    variant = (cache.fmt, cache.residual_length, params.logits_soft_cap, params.sliding_window)
    if not plain or variant not in _compiled:
        _compiled.add(variant)
        prefill(step, cache, query, key, value, params, output)
    if plain:
        first = step.num_decode_tokens
        own = slice(first, first + sum(step.prefill_lens))
        starts = step.query_start_loc[step.num_decodes :] - first
        tensors = (x[own] for x in (query, key, value, output))
        first_chunk(*tensors, starts, step.prefill_lens, params)
