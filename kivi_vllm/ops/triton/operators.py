"""The operators of one layer's step on a GPU: `reference`'s, for a `DeviceStep`."""

from __future__ import annotations

import torch

from kivi_vllm.ops.reference import AttentionParams, LayerCache
from kivi_vllm.ops.triton.decode import decode
from kivi_vllm.ops.triton.prefill import prefill
from kivi_vllm.ops.triton.step import DeviceStep
from kivi_vllm.ops.triton.store import store_blocks, store_ring

__all__ = ["attend", "store_blocks", "store_ring"]


def attend(
    step: DeviceStep,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
) -> None:
    """As `reference.attend`, for a `DeviceStep`: decodes first, then the other requests."""
    if step.num_decodes:
        decode(step, cache, query, key, value, params, output)
    if step.num_prefills:
        prefill(step, cache, query, key, value, params, output)
