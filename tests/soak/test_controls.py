"""Negative controls: each of these faults breaks what the storm asserts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.choice import some
from tests.engine import Answer
from tests.invariance.conftest import scheduler
from tests.soak.checks import assert_flat, assert_idle
from tests.soak.engines import Kind, quiet_answers, small_engine
from tests.soak.storm import AUDIT_EVERY, Storm, make_prompts

KIND = Kind("kivi2", 0)
PROMPTS = make_prompts(12, random.Random(1))


@pytest.fixture(scope="module")
def truth() -> list[Answer]:
    return quiet_answers(KIND, PROMPTS)


def _leaked(llm: Any, storm: Storm) -> Callable[[], None]:
    """Once, a page is not given back."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    free = pool.free_blocks

    def keep_one(blocks: Any) -> None:
        kept = list(blocks)
        free(kept[1:])
        if kept:
            pool.free_blocks = free

    pool.free_blocks = keep_one
    return lambda: None


def _forgotten(llm: Any, storm: Storm) -> Callable[[], None]:
    """Once, a group keeps a finished request's pages, references and all."""
    manager = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[-1]
    free = manager.free

    def keep(request: str) -> None:
        if manager.req_to_blocks.get(request):
            manager.free = free
        else:
            free(request)

    manager.free = keep
    return lambda: None


def _freed_too_early(llm: Any, storm: Storm) -> Callable[[], None]:
    """Once, just before an audit, a page loses a reference while it is held.

    Later vLLM itself would trip over it.
    """
    pool = scheduler(llm).kv_cache_manager.block_pool
    done: list[int] = []

    def drop() -> None:
        held = [block for block in pool.blocks if block.ref_cnt == 1 and not block.is_null]
        if held and not done and storm.counts["steps"] % AUDIT_EVERY == AUDIT_EVERY - 1:
            pool.free_blocks([held[0]])
            done.append(held[0].block_id)

    return drop


def _swapped(llm: Any, storm: Storm) -> Callable[[], None]:
    """Every few steps two requests' first pages change places."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    # The groups' caches are views of the same memory.
    caches = {cache.kv_cache.data_ptr(): cache.kv_cache for cache in context.values()}
    pages = scheduler(llm).kv_cache_manager.coordinator.single_type_managers[0]

    def swap() -> None:
        firsts = {blocks[0].block_id for blocks in pages.req_to_blocks.values() if blocks}
        if len(firsts) >= 2 and storm.counts["steps"] % 8 == 0:
            a, b = sorted(firsts)[:2]
            for cache in caches.values():
                cache[[a, b]] = cache[[b, a]]

    return swap


def _wrong_hit(llm: Any, storm: Storm) -> Callable[[], None]:
    """A prefix is found where another prefix lies."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    find = pool.get_cached_block

    def find_another(block_hash: Any, groups: list[int]) -> Any:
        found = find(block_hash, groups)
        others = [b for b in pool.blocks if b.block_hash is not None and found and b not in found]
        return [others[-1]] * len(groups) if others else found

    pool.get_cached_block = find_another
    return lambda: None


def _hoarded(llm: Any, storm: Storm) -> Callable[[], None]:
    """Every step leaves 64 KiB behind."""
    hoard: list[bytes] = []
    return lambda: hoard.append(random.randbytes(64 << 10))


FAULTS = {
    _leaked: r"pages with \(references, holders\)",
    _forgotten: r"the prefix cache cannot be reset",
    _freed_too_early: r"pages with \(references, holders\)",
    _swapped: r"differs from its quiet answer",
    _wrong_hit: r"differs from its quiet answer",
    _hoarded: r"RSS",
}


@pytest.mark.parametrize(
    "fault", some([None, *FAULTS], [0, 3]), ids=lambda f: f.__name__[1:] if f else "none"
)
def test_a_fault_is_seen(fault: Any, truth: list[Answer], poison: Any) -> None:
    with small_engine(KIND) as llm:
        poison(llm)
        storm = Storm(llm, PROMPTS, truth, seed=1)

        def soak() -> None:
            storm.run(160, 60, fault(llm, storm) if fault else lambda: None)
            assert_idle(llm, scheduler(llm))
            assert_flat(storm.rss)

        if fault is None:
            soak()
        else:
            with pytest.raises(AssertionError, match=FAULTS[fault]):
                soak()
