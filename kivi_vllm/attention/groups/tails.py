"""Tails: spec and manager of the cache groups of the last tokens of completed blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import replay_boundaries
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from kivi_vllm.attention.groups.base import SparseManager, raw_fields
from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.residual import ring_start

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(frozen=True, kw_only=True)
class TailSpec(SlidingWindowSpec):
    """One page of the last tokens of a block; to vLLM a window of one whole block.

    Attributes:
        num_drafts: draft tokens that one step may store for a request.
        interval: vLLM's `prefix_cache_retention_interval`: tails are kept for prefix
            hits every so many tokens; 0: only where a request is likely to come
            again; None: of every block.
        two_ends: whether hits end one block before what is in the cache (EAGLE and MTP).

    """

    num_drafts: int
    interval: int | None = 0
    two_ends: bool = False

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Tails group with tails."""
        return all(isinstance(spec, TailSpec) for spec in kv_cache_specs.values())

    def max_admission_blocks_per_request(
        self, max_in_flight_tokens: int, max_model_len: int
    ) -> int:
        """Most pages that a request holds in one group.

        In a step: that of the block before, those of the last ones, and, if they are in
        it, of the prompt's end, of a shared prefix's end, and of each interval.
        """
        last = 1 + cdiv(2 * self.num_drafts, self.block_size)
        interval = self.block_size if self.interval is None else self.interval
        kept = cdiv(max_in_flight_tokens, interval) if interval else 0
        # For EAGLE, prompts have two ends, and prefixes end with two blocks.
        ends = 2 * (3 + kept) if self.two_ends else 2 + kept
        return min(1 + last + ends, max_model_len // self.block_size)


class TailManager(SparseManager, SlidingWindowManager):
    """Gives a request the page of a block's tail, if anyone may read it.

    That is the request's next step, of the newest block, or a later request that finds
    the prefix which ends with the block. Of the many blocks that a step of prefill
    completes, the others have none.
    """

    kv_cache_spec: TailSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._boundaries: dict[str, tuple[int, ...]] = {}

    def observe(self, request: Any) -> None:
        """Note where later requests may find a prefix of this one, before it gets its pages.

        The same that `SlidingWindowManager.cache_blocks` takes: where the same prompt could
        go on, and the longest prefix that another request has had before.
        """
        again = replay_boundaries(
            request.num_prompt_tokens, self.cache_hit_alignment_tokens, self.use_eagle
        )
        self._boundaries[request.request_id] = (*again, request.shared_prefix_boundary)

    def _wanted(self, request_id: str, num_tokens: int, known: int) -> list[int]:
        """New entries that get a page, in a row that has `known`."""
        size, interval = BLOCK_SIZE, self.kv_cache_spec.interval
        newest = ring_start(num_tokens, 1 + 2 * self.kv_cache_spec.num_drafts) // size - 1
        if not self.enable_caching:
            return list(range(max(known, newest), num_tokens // size))
        stride = self.cache_hit_alignment_tokens  # hits land on its multiples
        boundaries = self._boundaries.get(request_id, ())
        # Where a block is dropped, a hit needs its tail too.
        ends = {b // stride * stride + i * size for b in boundaries for i in self._ends}
        return [
            block
            for block in range(known, num_tokens // size)
            if block >= newest
            or (block + 1) * size in ends
            or interval is None
            or (interval and any((block + 1 - i) * size % interval == 0 for i in self._ends))
        ]

    @property
    def _ends(self) -> range:
        """Which blocks at the end of a prefix must be there: the last one, and one that is dropped.

        The latter is for EAGLE and MTP (see `hooks.drafts`).
        """
        return range(1 + self.use_eagle)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        *args: Any,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Pages that `num_tokens` tokens still lack, or take out of the free ones by a hit.

        With `apply_admission_cap`, `num_tokens` is a whole prompt. It never holds more tails
        together than were checked at start, so the count is capped by that.
        """
        known = len(self.req_to_blocks.get(request_id, ())) or len(new_computed_blocks)
        loaded = total_computed_tokens > num_local_computed_tokens
        if loaded:
            known = total_computed_tokens // BLOCK_SIZE
        lacking = loaded + len(self._wanted(request_id, num_tokens, known))
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            lacking = min(lacking, self.max_admission_blocks_per_request)
        return self._get_num_evictable_blocks(new_computed_blocks) + lacking

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        """Hold the tail that a prefix hit found."""
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        found = enumerate(self.req_to_blocks[request_id])
        self._held[request_id] = [entry for entry, block in found if not block.is_null]

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Claim the page of the last tail: a connector loads no other."""
        end = (num_local_computed_tokens + num_external_computed_tokens) // BLOCK_SIZE
        self._append(request_id, [end - 1], self.block_pool.get_new_blocks(1), end)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Claim them; returns all new entries, null ones too."""
        known = len(self.req_to_blocks[request_id])
        wanted = self._wanted(request_id, num_tokens, known)
        pages = self.block_pool.get_new_blocks(len(wanted))
        return self._append(request_id, wanted, pages, max(known, num_tokens // BLOCK_SIZE))

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Free the tails before that of the newest block; prefix hits may still find them."""
        self._free_below(request_id, processed_computed_tokens // BLOCK_SIZE - 1)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; returns its blocks."""
        self._boundaries.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


def tail_spec(
    num_kv_heads: int,
    fmt: PageFormat,
    num_drafts: int,
    interval: int | None,
    two_ends: bool = False,
) -> TailSpec:
    """One page of the last tokens of a block; that of the newest block is read."""
    return TailSpec(
        **raw_fields(num_kv_heads, fmt),
        sliding_window=BLOCK_SIZE + 1,  # exactly one whole block before the current one
        num_drafts=num_drafts,
        interval=interval,
        two_ends=two_ends,
    )
