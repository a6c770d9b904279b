"""What must hold during and after a storm: pages, references, memory."""

from __future__ import annotations

import ctypes
import gc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.offload import blocks_on_their_way

MEMORY_BOUND = 2 << 20
"""Growth of the resident memory, in bytes, that counts as none.

Ten times what storms of 2,000 requests showed, 0.2 MiB at the most. Between the two medians lie a
third of a storm's requests: in the long form, 1,000 requests that leave 2 KiB each are too much.
"""


def audit(scheduler: Any) -> None:
    """Every page has as many references as holders, and is free if it has none.

    Raises:
        AssertionError: names the pages.

    """
    pool = scheduler.kv_cache_manager.block_pool
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    held = Counter(
        block.block_id
        for manager in managers
        for blocks in manager.req_to_blocks.values()
        for block in blocks
        if not block.is_null
    )
    if scheduler.connector is not None:
        held.update(blocks_on_their_way(scheduler))
    pages = [block for block in pool.blocks if not block.is_null]
    wrong = {
        block.block_id: (block.ref_cnt, held[block.block_id])
        for block in pages
        if block.ref_cnt != held[block.block_id]
    }
    assert not wrong, f"pages with (references, holders): {wrong}"
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    unheld = {block.block_id for block in pages if not held[block.block_id]}
    assert len(free) == len(set(free)) == pool.get_num_free_blocks(), "a page is free twice"
    assert set(free) == unheld, f"neither free nor held, or both: {set(free) ^ unheld}"


def assert_idle(llm: Any, scheduler: Any) -> int:
    """Nobody holds anything: all pages are free, all books are empty. Returns the pages.

    Raises:
        AssertionError: something was left.

    """
    assert not llm.llm_engine.has_unfinished_requests()
    audit(scheduler)
    assert llm.reset_prefix_cache(), "the prefix cache cannot be reset: a page is held"
    pool = scheduler.kv_cache_manager.block_pool
    pages: int = pool.num_gpu_blocks - 1  # all but the null page
    assert pool.get_num_free_blocks() == pages
    assert not any(block.ref_cnt for block in pool.blocks if not block.is_null)
    assert not len(pool.cached_block_hash_to_block)
    assert not scheduler.requests and not scheduler.running and not scheduler.waiting
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        assert not manager.req_to_blocks, "a manager still knows of a request's pages"
        assert not manager.num_cached_block, "a manager still knows of a request"
    return pages


def resident_bytes() -> int:
    """This process's resident memory after everything that can go has gone."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def assert_flat(rss: Sequence[int]) -> str:
    """Memory did not grow by more than `MEMORY_BOUND` after the warm-up; returns the figures.

    The warm-up is the first third of the samples. From the median of the second third to that
    of the last: one sample may meet a buffer that is about to go.

    Raises:
        AssertionError: it did.

    """
    third = len(rss) // 3
    assert third >= 2, f"too few samples of the memory: {len(rss)}"
    before, after = (
        sorted(part)[third // 2] / 2**20 for part in (rss[third : 2 * third], rss[-third:])
    )
    found = f"RSS {before:.1f} MiB after the warm-up, {after:.1f} MiB at the end"
    assert after - before <= MEMORY_BOUND / 2**20, f"{found}: {[n >> 20 for n in rss]}"
    return found
