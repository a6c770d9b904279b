"""Sinks: spec and manager of the cache group of the first tokens of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec

from kivi_vllm.attention.groups.base import raw_fields
from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops.format import PageFormat

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(frozen=True, kw_only=True)
class SinkSpec(AttentionSpec):
    """The first tokens of a sequence, of one layer: one page, shared like its first block.

    It comes with the first 128 tokens; prefix caching finds it from `block_size` tokens on.

    Attributes:
        num_tokens: how many.
        token_bytes: of a token of one kv head.

    """

    num_tokens: int
    token_bytes: int

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request can take."""
        return self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Length of a block table row; see `RingSpec`."""
        return cdiv(max_len, self.block_size)

    @property
    def uses_slot_mapping(self) -> bool:
        """Whether the model runner need compute where tokens go."""
        return False

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Sinks group with sinks."""
        return all(isinstance(spec, SinkSpec) for spec in kv_cache_specs.values())


class SinkManager(SingleTypeKVCacheManager):
    """Gives a request one page with its first whole block, and finds that of a prefix."""

    def _missing(self, request_id: str, num_tokens: int) -> int:
        """Pages that a request of `num_tokens` tokens still lacks."""
        return int(num_tokens >= BLOCK_SIZE and not self.req_to_blocks.get(request_id))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Claim them."""
        new = self.block_pool.get_new_blocks(self._missing(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(new)
        return new

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `allocate_new_blocks` follows in the same call."""

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Pages to take from the pool: the missing ones, and free ones that a prefix hit found."""
        if new_computed_blocks:
            return self._get_num_evictable_blocks(new_computed_blocks)
        return self._missing(request_id, num_tokens)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Make the page findable by the hash of the request's first block."""
        super().cache_blocks(request, min(num_tokens, self.block_size), *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The page of the first block, which serves a prefix of any length; else nothing.

        With `drop_eagle_block`, `max_length` is one block more than it may be.
        """
        size = kv_cache_spec.block_size
        longest = max_length // size * size - size * drop_eagle_block
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        found = longest > 0 and block_pool.get_cached_block(hashes[0], kv_cache_group_ids)
        if not found:
            return tuple([] for _ in kv_cache_group_ids), 0
        return tuple([block] for block in found), longest


def sink_spec(num_kv_heads: int, fmt: PageFormat) -> SinkSpec:
    """One page of the first tokens of a sequence."""
    fields = raw_fields(num_kv_heads, fmt)
    return SinkSpec(**fields, num_tokens=fmt.sink_tokens, token_bytes=fmt.raw_token_bytes)
