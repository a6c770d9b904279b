"""Pages of layers with attention chunks: what is found of them, and what is freed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from kivi_vllm.attention.groups.admission import PageGroup
from kivi_vllm.attention.groups.pages import ChunkPageManager, ChunkPageSpec, page_spec
from kivi_vllm.ops.format import PageFormat

FMT = PageFormat(2, 2, 32, 64, torch.bfloat16, two_level=False)
B = 128


def chunk_spec(chunk: int, pages: int) -> Any:
    return page_spec(2, FMT, chunk=chunk).copy_with_new_block_size(pages * B)


def search(manager: type, cached: set[int], longest: int, spec: Any, alignment: int) -> Any:
    """(found blocks, tokens): block i of the pool is `i + 1`, 0 the null one."""
    pool = SimpleNamespace(
        hash_block_size=spec.block_size,
        null_block=0,
        get_cached_block=lambda block, groups: [block + 1] if block in cached else None,
    )
    hashes = range(longest // spec.block_size)
    found, tokens = manager.find_longest_cache_hit(
        hashes, longest, [0], pool, spec, drop_eagle_block=False, alignment_tokens=alignment
    )
    return found[0], tokens


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("chunk", "pages", "alignment"), [(4, 1, 1), (4, 1, 3), (4, 3, 6), (2, 3, 3)]
)
def test_the_longest_hit_is_found(chunk: int, pages: int, alignment: int, seed: int) -> None:
    """Against its definition, whatever is cached, in units of 128 tokens."""
    spec, rng = chunk_spec(chunk * B, pages), np.random.default_rng(seed)
    lengths = set()
    for share in (0.3, 0.7, 0.9) * 20:
        longest = int(rng.integers(0, 40 * B))
        blocks = longest // spec.block_size
        cached = {i for i in range(blocks) if rng.random() < share}

        def needed(units: int) -> set[int]:
            return set(range(units // chunk * chunk // pages, units // pages))

        fit = range(0, longest // B + 1, alignment)
        best = max(units for units in fit if needed(units) <= cached)
        found, tokens = search(ChunkPageManager, cached, longest, spec, alignment * B)
        assert tokens == best * B
        assert found == [i + 1 if i in needed(best) else 0 for i in range(best // pages)]
        lengths.add(best)
    assert len(lengths) > 3


def test_vllms_own_search_takes_no_other_alignment() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import ChunkedLocalAttentionManager

    with pytest.raises(AssertionError, match="different block sizes"):
        search(ChunkedLocalAttentionManager, set(), 1024, chunk_spec(512, 1), 384)


@pytest.mark.parametrize(("chunk", "pages"), [(512, 1), (512, 3), (256, 3)])
def test_pages_of_chunks_that_are_over_are_freed(chunk: int, pages: int) -> None:
    """A request never holds more than is foreseen of it, or was counted at the start."""
    from vllm.v1.core.block_pool import BlockPool

    spec = chunk_spec(chunk, pages)
    assert isinstance(spec, ChunkPageSpec)
    pool = BlockPool(num_gpu_blocks=100, enable_caching=False, hash_block_size=B)
    manager = ChunkPageManager(
        kv_cache_spec=spec,
        block_pool=pool,
        kv_cache_group_id=0,
        scheduler_block_size=B,
        enable_caching=False,
    )
    limit, done = spec.max_admission_blocks_per_request(700, 1 << 20), 0
    held = []
    for new in (700, 100, 700, 3, *[1] * 1200, 700):
        manager.remove_skipped_blocks("r", done)
        lacking = manager.get_num_blocks_to_allocate("r", done + new, [], 0, 0, done + new)
        assert lacking == len(manager.allocate_new_blocks("r", done + new, done + new))
        blocks = manager.req_to_blocks["r"]
        done += new
        held.append(sum(not block.is_null for block in blocks))
        last = (done - new) // chunk * chunk  # of the chunk that the step's first token sees
        assert all(not blocks[at // spec.block_size].is_null for at in range(last, done - B + 1, B))
        assert held[-1] <= limit
        if new == 1:
            assert held[-1] <= PageGroup(pages, chunk=chunk).held(np.array([done]))[0]
    manager.free("r")
    assert min(held[4:-1]) <= 1 and pool.get_num_free_blocks() == 99
