"""The ring: spec and manager of the cache group of current blocks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import CircularBufferManager
from vllm.v1.kv_cache_interface import CircularBufferSpec, KVCacheSpec

from kivi_vllm.attention.groups.admission import Forecast, PageGroup
from kivi_vllm.attention.groups.base import SparseManager, raw_fields
from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.residual import ring_entry, ring_start

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


@dataclass(frozen=True, kw_only=True)
class RingSpec(CircularBufferSpec):
    """The ring of one layer: the pages of a request's current block.

    `block_size` is nominal, that of the pages, so that the least common multiple
    over the groups, to which prefix hits are aligned, stays there.

    Attributes:
        page_tokens: tokens of a page.
        num_drafts: draft tokens that one step may store for a request.
        token_bytes: of a token of one kv head.
        page_groups: the groups of quantized pages, for admission.
        num_others: pages that a request claims in other groups with its first whole
            block, and keeps.

    """

    page_tokens: int
    num_drafts: int
    token_bytes: int
    page_groups: tuple[PageGroup, ...] = (PageGroup(),)
    num_others: int = 0

    @cached_property
    def num_pages(self) -> int:
        """Most pages that a request holds."""
        return max(len(self.needed_after(n)) for n in self.lengths)

    @property
    def lengths(self) -> range:
        """A block's worth of lengths, from a multiple of it on that is beyond the drafts."""
        first = (1 + cdiv(2 * self.num_drafts, BLOCK_SIZE)) * BLOCK_SIZE
        return range(first, first + BLOCK_SIZE)

    def needed_after(self, num_tokens: int) -> range:
        """Entries of the table that the steps after a step that ends at `num_tokens` need.

        Of these tokens, the step's drafts may be rejected, and as many are what a draft model
        stores after it. Where vLLM schedules asynchronously, the drafts of the step before
        are counted as accepted too; pages that moved on too early are not written until then.
        """
        first = ring_start(num_tokens, 1 + 2 * self.num_drafts)
        last = self.entry(num_tokens - 1) + 1 if first < num_tokens else self.entry(first)
        return range(self.entry(first), last)

    def entry(self, position: int) -> int:
        """Entry of the table for a position."""
        return ring_entry(position, self.page_tokens)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request can take."""
        return self.num_pages * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Length of a block table row: an entry for all pages that there ever were."""
        return self.entry(cdiv(max_len, BLOCK_SIZE) * BLOCK_SIZE)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Rings group with rings of as many tokens a page."""
        return all(
            isinstance(spec, RingSpec) and spec.page_tokens == self.page_tokens
            for spec in kv_cache_specs.values()
        )


class RingManager(SparseManager, CircularBufferManager):
    """Ring pages come as a block grows and go when it is complete.

    A row of the block table has an entry for every page that the sequence ever had, as many
    for each block; those of blocks that one step takes from its own tokens are null. A page
    that only this step still reads moves on to a new entry: the step writes it after
    it has read it, so that no request ever holds more than one block needs.
    """

    kv_cache_spec: RingSpec

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_tokens: dict[str, int] = {}  # of the requests that have blocks
        self._longest: dict[str, int] = {}  # of all requests that were tried, at their end

    def observe(self, request: Any) -> None:
        """Note how long the request can become."""
        self._longest[request.request_id] = request.num_prompt_tokens + request.max_tokens

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Free the pages of blocks that have been completed and read for the last time."""
        first = ring_start(processed_computed_tokens, 1)
        self._free_below(request_id, self.kv_cache_spec.entry(first))

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
        blocks, held = self.req_to_blocks[request_id], self._held.get(request_id, [])
        moved = leaving[: len(wanting)]
        pages = [blocks[entry] for entry in moved]
        for entry in moved:
            blocks[entry] = self._null_block
        del held[: len(moved)]
        pages += self.block_pool.get_new_blocks(len(wanting) - len(moved))
        self._num_tokens[request_id] = num_tokens
        length = wanting[-1] + 1 if wanting else len(blocks)
        return self._append(request_id, wanting, pages, length)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request; returns its blocks."""
        self._num_tokens.pop(request_id, None)
        self._longest.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Pages to take from the pool for `num_tokens` tokens.

        For a new request also the pages that all running requests will need during the
        next block, so that nobody is preempted soon (see `admission`).
        """
        lacking = self._missing(request_id, num_tokens)
        if request_id in self._num_tokens or not self._num_tokens:
            return lacking
        tokens = self._num_tokens | {request_id: num_tokens}
        ends = [self._longest.get(name, sys.maxsize) for name in tokens]
        held = sum(map(len, self._held.values()))
        return max(lacking, self._forecast.most_pages([*tokens.values()], ends) - held)

    @cached_property
    def _forecast(self) -> Forecast:
        spec = self.kv_cache_spec
        # Those of two steps before, too, which move on to new entries before they are free: with
        # asynchronous scheduling the result of the last step is not there yet.
        rings = [max(len(spec.needed_after(m)) for m in (n - 2, n - 1, n)) for n in spec.lengths]
        return Forecast(rings, spec.page_groups, spec.num_others)


def ring_spec(
    num_kv_heads: int,
    fmt: PageFormat,
    num_drafts: int,
    num_others: int = 0,
    window: int = 0,
    chunk: int = 0,
) -> RingSpec:
    """The ring of a layer, with a window or attention chunks of so many tokens; 0: none.

    It holds the current block and the draft tokens of the steps in flight: those
    are stored before it is known whether they are accepted, while the next step
    still reads the block's tokens from before them.
    """
    fields = raw_fields(num_kv_heads, fmt)
    return RingSpec(
        **fields,
        page_tokens=fmt.raw_tokens,
        num_drafts=num_drafts,
        token_bytes=fmt.raw_token_bytes,
        page_groups=(PageGroup(1, window, chunk),),
        num_others=num_others,
    )
