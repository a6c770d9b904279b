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
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    ChunkedLocalAttentionManager,
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    SlidingWindowSpec,
)

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


@dataclass(frozen=True, kw_only=True)
class ChunkPageSpec(ChunkedLocalAttentionSpec):
    """The quantized pages of one layer with attention chunks; those of earlier chunks are freed."""

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """Most blocks that a request holds: one more than vLLM's, if chunks begin within some."""
        blocks = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        extra = int(self.attention_chunk_size % self.block_size > 0)
        return min(blocks + extra, cdiv(max_model_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Pages group with pages of the same chunks."""
        return all(
            isinstance(spec, ChunkPageSpec)
            and spec.attention_chunk_size == self.attention_chunk_size
            for spec in kv_cache_specs.values()
        )


ANY_PAGES = (PageSpec, WindowPageSpec, ChunkPageSpec)
"""Specs of quantized pages."""


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


class ChunkPageManager(_WithTheStepThatCompletes, ChunkedLocalAttentionManager):
    """Pages of layers with attention chunks: vLLM frees those of chunks that are over."""

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest aligned prefix whose pages from its last chunk's start on are cached.

        (vLLM's search takes no alignment but its block size, and does not look for a hit in
        an earlier chunk.)
        """
        assert not drop_eagle_block, "vLLM itself disables the hybrid manager for chunks and EAGLE"
        size, chunk = kv_cache_spec.block_size, kv_cache_spec.attention_chunk_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        length = max_length // alignment_tokens * alignment_tokens
        while True:
            start = length // chunk * chunk
            first = start // size
            found: list[list[KVCacheBlock]] = []
            for block in range(first, length // size):
                if not (cached := block_pool.get_cached_block(hashes[block], kv_cache_group_ids)):
                    break
                found.append(cached)
            # What begins a chunk needs none of its pages.
            covered = min(length, max(start, (first + len(found)) * size))
            length = covered // alignment_tokens * alignment_tokens
            if length >= start:
                break
        kept = found[: length // size - first]
        return tuple(
            [block_pool.null_block] * first + [cached[group] for cached in kept]
            for group in range(len(kv_cache_group_ids))
        ), length


def page_spec(
    num_kv_heads: int, fmt: PageFormat, window: int | None = None, chunk: int | None = None
) -> PageSpec | WindowPageSpec | ChunkPageSpec:
    """The quantized pages of a layer.

    `window` is how many tokens it sees, `chunk` how many an attention chunk has, if not all.
    """
    fields: dict[str, Any] = dict(
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_size=fmt.head_size,
        # Bytes, so that vLLM neither zeroes nor rescales them.
        dtype=torch.uint8,
        state_content_bytes=fmt.bytes_per_token,
    )
    if chunk is not None:
        return ChunkPageSpec(**fields, attention_chunk_size=chunk)
    if window is None:
        return PageSpec(**fields)
    return WindowPageSpec(**fields, sliding_window=window)
