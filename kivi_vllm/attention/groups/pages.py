"""Quantized pages: specs and managers of their cache groups.

A pool block holds one page of each of the group's layers, or `k` of them one after the other
(a group of few layers in a pool whose blocks are larger; `plan` decides). `block_size`
is 128 k tokens then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, SlidingWindowSpec

from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops.format import PageFormat

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(frozen=True, kw_only=True)
class PageSpec(FullAttentionSpec):
    """The quantized pages of one layer: one for each whole 128 tokens of a sequence."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request can take."""
        tokens = whole_blocks(vllm_config.model_config.max_model_len, self.block_size)
        return tokens // self.block_size * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class WindowPageSpec(SlidingWindowSpec):
    """The quantized pages of one layer with a sliding window; those that leave it are freed."""

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Pages group with pages of the same window."""
        return all(
            isinstance(spec, WindowPageSpec) and spec.sliding_window == self.sliding_window
            for spec in kv_cache_specs.values()
        )


def whole_blocks(num_tokens: int, block_size: int) -> int:
    """Tokens of the blocks that `num_tokens` tokens take: a block comes with its first page."""
    return cdiv(num_tokens // BLOCK_SIZE * BLOCK_SIZE, block_size) * block_size


class _WithTheStepThatCompletes(SingleTypeKVCacheManager):
    """Gives a request a page with the step that completes its 128 tokens: none is read before."""

    # A hit within a block of several pages would share it with who writes the rest.
    supports_fine_grained_hash_lookup: ClassVar[bool] = False

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> int:
        """Blocks that `num_tokens` tokens still lack."""
        whole = whole_blocks(num_tokens, self.block_size)
        return super().get_num_blocks_to_allocate(request_id, whole, *args, **kwargs)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> list[KVCacheBlock]:
        """Claim them."""
        whole = whole_blocks(num_tokens, self.block_size)
        return super().allocate_new_blocks(request_id, whole, *args, **kwargs)


class PageManager(_WithTheStepThatCompletes, FullAttentionManager):
    """Pages of layers that see everything: a request keeps them."""


class WindowPageManager(_WithTheStepThatCompletes, SlidingWindowManager):
    """Pages of layers with a window: vLLM frees what no later token can see."""


def page_spec(
    num_kv_heads: int, fmt: PageFormat, window: int | None = None
) -> PageSpec | WindowPageSpec:
    """The quantized pages of a layer; `window`: how many tokens it sees, if not all."""
    fields: dict[str, Any] = dict(
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_size=fmt.head_size,
        # Bytes, so that vLLM neither zeroes nor rescales them.
        dtype=torch.uint8,
        state_content_bytes=fmt.bytes_per_token,
    )
    if window is None:
        return PageSpec(**fields)
    return WindowPageSpec(**fields, sliding_window=window)
