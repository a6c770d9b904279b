"""Quantized pages: spec and manager of their cache group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops.format import PageFormat

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(frozen=True, kw_only=True)
class PageSpec(FullAttentionSpec):
    """The quantized pages of one layer: one for each whole block of a sequence."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request can take."""
        return vllm_config.model_config.max_model_len // self.block_size * self.page_size_bytes


class PageManager(FullAttentionManager):
    """Gives a request the page of a block with the step that completes it: none is read before."""

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Pages that `num_tokens` tokens still lack."""
        whole = num_tokens // self.block_size * self.block_size
        return super().get_num_blocks_to_allocate(request_id, whole, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> list[KVCacheBlock]:
        """Claim them."""
        whole = num_tokens // self.block_size * self.block_size
        return super().allocate_new_blocks(request_id, whole, *args, **kwargs)


def page_spec(num_kv_heads: int, fmt: PageFormat) -> PageSpec:
    """The quantized pages of a layer.

    Windowed layers too: their pages are kept for the whole sequence, and the
    window is a mask.
    """
    return PageSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_size=fmt.head_size,
        # Bytes, so that vLLM neither zeroes nor rescales them.
        dtype=torch.uint8,
        state_content_bytes=fmt.bytes_per_token,
    )
