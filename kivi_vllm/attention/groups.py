"""Specs and managers of the cache groups that vLLM has no like of: pages, rings and sinks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    CircularBufferManager,
    FullAttentionManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheSpec,
)

from kivi_vllm.config import BLOCK_SIZE, KiviConfigError
from kivi_vllm.ops.reference import ring_start

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


@dataclass(frozen=True, kw_only=True)
class RingSpec(CircularBufferSpec):
    """The ring of one layer: the pages of a request's current block.

    `block_size` is nominal, that of the pages, so that the least common multiple
    over the groups, to which prefix hits are aligned, stays there; a page holds
    `block_size / tokens_per_state` tokens.

    Attributes:
        num_drafts: draft tokens that one step may store for a request.

    """

    num_drafts: int

    def __post_init__(self) -> None:
        super().__post_init__()
        # vLLM makes layers of different page sizes fit by changing their block sizes:
        # the ring would have other slots than `PageFormat.raw_tokens` says.
        if self.block_size != BLOCK_SIZE or self.page_size_padded is not None:
            raise KiviConfigError(
                "the KIVI cache needs the same number and size of kv heads in all layers; "
                "use --kv-cache-dtype auto or fp8 for this model"
            )

    @property
    def num_pages(self) -> int:
        """Most pages that a request holds."""
        return max(len(self.needed_after(n)) for n in self.lengths)

    @property
    def lengths(self) -> range:
        """Lengths of sequences, one of each way in which a block can lie in pages.

        They begin at a multiple of their number, and not where a sequence does.
        """
        period = math.lcm(self.block_size, self.num_states)
        first = (1 + cdiv(2 * self.num_drafts, period)) * period
        return range(first, first + period)

    def needed_after(self, num_tokens: int) -> range:
        """Entries of the table that the steps after one need that ends at `num_tokens`.

        Twice the drafts: with asynchronous scheduling those of two steps are counted
        as accepted before it is known.
        """
        first = ring_start(num_tokens, 1 + 2 * self.num_drafts)
        return range(first // self.num_states, cdiv(num_tokens, self.num_states))

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request can take."""
        return self.num_pages * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Length of a block table row: an entry for all pages that there ever were."""
        return cdiv(max_len, self.num_states)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Rings group with rings of the same size only."""
        return all(spec == self for spec in kv_cache_specs.values())


class RingManager(CircularBufferManager):
    """Ring pages come as a block grows and go when it is complete.

    A row of the block table has an entry for every `num_states` tokens of the whole
    sequence; those of blocks that one step takes from its own tokens are null. A page
    that only this step still reads moves on to a new entry: the step writes it after
    it has read it, so that no request ever holds more than one block needs.
    """

    kv_cache_spec: RingSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, list[int]] = {}  # entries that have a page, in their order
        self._num_tokens: dict[str, int] = {}  # of the requests that have blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Free the pages of blocks that have been completed and read for the last time."""
        first = ring_start(processed_computed_tokens, 1) // self.kv_cache_spec.num_states
        held, blocks = self._held.get(request_id, []), self.req_to_blocks.get(request_id, [])
        gone = [entry for entry in held if entry < first]
        self.block_pool.free_blocks([blocks[entry] for entry in gone])
        for entry in gone:
            blocks[entry] = self._null_block
        del held[: len(gone)]

    def _plan(self, request_id: str, num_tokens: int) -> tuple[list[int], list[int]]:
        """(entries whose page may move on, entries that want one) for `num_tokens` tokens."""
        needed = self.kv_cache_spec.needed_after(num_tokens)
        known = len(self.req_to_blocks.get(request_id, ()))
        leaving = [entry for entry in self._held.get(request_id, ()) if entry < needed.start]
        return leaving, [entry for entry in needed if entry >= known]

    def _missing(self, request_id: str, num_tokens: int) -> int:
        """Pages that a request of `num_tokens` tokens still lacks."""
        leaving, wanting = self._plan(request_id, num_tokens)
        return max(0, len(wanting) - len(leaving))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Claim them; returns all new entries, null ones too."""
        leaving, wanting = self._plan(request_id, num_tokens)
        blocks, held = self.req_to_blocks[request_id], self._held.setdefault(request_id, [])
        known = len(blocks)
        moved = leaving[: len(wanting)]
        pages = [blocks[entry] for entry in moved]
        pages += self.block_pool.get_new_blocks(len(wanting) - len(moved))
        for entry in moved:
            blocks[entry] = self._null_block
        if wanting:
            blocks += [self._null_block] * (wanting[-1] + 1 - known)
        for entry, page in zip(wanting, pages, strict=True):
            blocks[entry] = page
        held[: len(moved)] = []
        held += wanting
        self._num_tokens[request_id] = num_tokens
        return blocks[known:]

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `allocate_new_blocks` follows in the same call."""

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; returns its blocks."""
        self._held.pop(request_id, None)
        self._num_tokens.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Pages that `num_tokens` tokens still lack; for a new request, also what it must leave.

        A block is many tokens here, so that many requests run in few pages. A new one
        that took the last of them would be preempted, or others would, as soon as they
        grow: it waits until all of them can run for a block.
        """
        lacking = self._missing(request_id, num_tokens)
        if request_id in self._num_tokens or not self._num_tokens:
            return lacking
        return max(lacking, self._growth(num_tokens))

    def _growth(self, num_tokens: int) -> int:
        """Most pages that all and a new request will have during a block, beyond those held.

        Every request grows by a token a step, so their rings are not full together,
        unless they began together.
        """
        lengths = np.array([*self._num_tokens.values(), num_tokens])[:, None]
        ahead = lengths + np.arange(BLOCK_SIZE + 1)
        rings = self._pages_at[ahead % len(self._pages_at)]
        pages = ahead // BLOCK_SIZE - lengths // BLOCK_SIZE
        return int((rings + pages).sum(0).max()) - sum(map(len, self._held.values()))

    @cached_property
    def _pages_at(self) -> np.ndarray:
        """Ring pages during a decode step that ends at a length, modulo their number."""
        before, after = (
            [self.kv_cache_spec.needed_after(n - ago) for n in self.kv_cache_spec.lengths]
            for ago in (1, 0)
        )
        return np.array([b.stop - a.start for a, b in zip(before, after, strict=True)])


@dataclass(frozen=True, kw_only=True)
class SinkSpec(AttentionSpec):
    """The first tokens of a sequence, of one layer: one page, shared like its first block."""

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
        """Sinks group with sinks of the same size only."""
        return all(spec == self for spec in kv_cache_specs.values())


class SinkManager(SingleTypeKVCacheManager):
    """Gives a request one page with its first whole block, and finds that of a prefix."""

    def _missing(self, request_id: str, num_tokens: int) -> int:
        """Pages that a request of `num_tokens` tokens still lacks."""
        return int(num_tokens >= self.block_size and not self.req_to_blocks.get(request_id))

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
        """Pages that `num_tokens` tokens still lack, or take out of the free ones by a hit."""
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
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The page of the first block, which serves a prefix of any length; else nothing."""
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        found = max_length >= size and block_pool.get_cached_block(hashes[0], kv_cache_group_ids)
        if not found:
            return tuple([] for _ in kv_cache_group_ids), 0
        return tuple([block] for block in found), max_length // size * size
