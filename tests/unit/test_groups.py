"""The managers of pages and rings, driven as vLLM's scheduler does, on a model of the memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from kivi_vllm.attention.groups.pages import PageManager, page_spec
from kivi_vllm.attention.groups.ring import RingManager, RingSpec, ring_spec
from kivi_vllm.attention.groups.tails import TailManager, tail_spec
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.residual import ring_start

B = 128
FORMATS = [
    PageFormat(2, 2, 32, 64, torch.bfloat16, two_level=False),  # 24 tokens a page
    PageFormat(2, 2, 16, 64, torch.float32, two_level=True),  # 10
    PageFormat(3, 2, 32, 64, torch.bfloat16, two_level=True),  # 23: pages are not filled
    PageFormat(4, 4, 32, 96, torch.float16, two_level=True),  # 36
    PageFormat(0, 0, 32, 128, torch.bfloat16, two_level=False),  # 32: blocks begin with a page
]


def pool(num_pages: int) -> Any:
    from vllm.v1.core.block_pool import BlockPool

    return BlockPool(num_gpu_blocks=num_pages, enable_caching=True, hash_block_size=B)


def manager(of: type, spec: Any, block_pool: Any, **options: Any) -> Any:
    settings = dict(kv_cache_group_id=0, scheduler_block_size=B, enable_caching=True) | options
    return of(kv_cache_spec=spec, block_pool=block_pool, **settings)


def lacking(of: Any, name: str, num_tokens: int, **options: Any) -> int:
    return of.get_num_blocks_to_allocate(name, num_tokens, [], 0, 0, num_tokens, **options)


@dataclass
class Running:
    """A request: what the scheduler and what the worker know of it."""

    scheduled: int  # tokens, if all drafts are accepted
    done: int  # tokens that are there, on the worker
    in_flight: list[int] = field(default_factory=list)  # tokens of steps without a result
    rejected: list[int] = field(default_factory=list)  # of those, in their order
    table: list[int] = field(default_factory=list)
    tokens: dict[int, int] = field(default_factory=dict)  # what was computed for a position
    drafted: dict[int, int] = field(default_factory=dict)  # the same in a draft model's layer


class Engine:
    """Steps of ring writes and reads on a memory that remembers what lies where.

    With `ahead` of a draft model too: after each step it adds that many tokens less one.
    """

    def __init__(self, spec: RingSpec, drafts: int, depth: int, seed: int, ahead: int = 0) -> None:
        self.spec, self.drafts, self.depth, self.ahead = spec, drafts, depth, ahead
        self.rng = np.random.default_rng(seed)
        self.pool = pool(200)
        self.ring = manager(RingManager, spec, self.pool)
        self.memory: dict[tuple[int, int], tuple[str, int, int]] = {}
        self.draft_memory: dict[tuple[int, int], tuple[str, int, int]] = {}
        self.requests: dict[str, Running] = {}
        self.count = self.most = 0

    def step(self, chunks: dict[str, int]) -> None:
        """Schedule, read, write, and learn the results of the step `depth` before."""
        rows = []
        for name, new in chunks.items():
            r = self.requests[name]
            self.ring.remove_skipped_blocks(name, r.scheduled - sum(r.in_flight))
            end = r.scheduled + new + self.ahead
            lacks, free = lacking(self.ring, name, end), self._free()
            pages = self.ring.allocate_new_blocks(name, end, r.scheduled + new)
            assert lacks >= free - self._free() >= 0
            r.table += [page.block_id for page in pages]
            r.scheduled += new
            r.in_flight.append(new)
            rows.append((name, r, r.done, r.done + new))
        for name, r, a, b in rows:
            self._pass(name, r, self.memory, r.tokens, a, b)
        for name, r, a, b in rows:
            if self.ahead:
                self._pass(name, r, self.draft_memory, r.drafted, a, b)
            accepted = b if b - a > 1 + self.drafts else int(self.rng.integers(a + 1, b + 1))
            r.rejected.append(b - accepted)
            r.done = accepted
        for i in range(self.ahead - 1):
            for name, r, _, _ in rows:
                at = r.done + i
                self._pass(name, r, self.draft_memory, r.drafted, at, at + 1)
        for _, r, _, _ in rows:
            while len(r.in_flight) > self.depth:
                r.in_flight.pop(0)
                r.scheduled -= r.rejected.pop(0)
        held = self.ring.req_to_blocks.values()
        ids = [block.block_id for blocks in held for block in blocks if not block.is_null]
        assert len(ids) == len(set(ids)) == 199 - self._free(), "a page of two requests, or lost"
        counts = [sum(not block.is_null for block in blocks) for blocks in held]
        self.most = max([self.most, *counts])

    def _pass(
        self, name: str, r: Running, memory: dict, tokens: dict[int, int], a: int, b: int
    ) -> None:
        """What a layer does for positions a..b-1: read the block before them, then write them."""
        for s in range(a // B * B, a):
            assert memory[self._slot(r, s)] == (name, s, tokens[s]), (name, s, a)
        for s in range(a, b):
            self.count += 1
            tokens[s] = self.count
        for s in range(max(a, ring_start(b, 1 + self.drafts)), b):
            memory[self._slot(r, s)] = (name, s, tokens[s])

    def finish(self, name: str) -> None:
        self.ring.free(name)
        del self.requests[name]

    def _slot(self, r: Running, s: int) -> tuple[int, int]:
        per_page = self.spec.page_tokens
        page = r.table[s // B * -(-B // per_page) + s % B // per_page]
        assert page, "vLLM's null page"
        return page, s % B % per_page

    def _free(self) -> int:
        return self.pool.get_num_free_blocks()


@pytest.mark.parametrize("depth", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("drafts", "ahead"), [(0, 0), (3, 0), (30, 0), (1, 1), (12, 12)], ids=lambda n: f"{n}"
)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.raw_tokens}-tokens")
def test_rings_hold_what_every_step_needs(
    fmt: PageFormat, drafts: int, ahead: int, depth: int
) -> None:
    spec = ring_spec(2, fmt, drafts)
    engine = Engine(spec, drafts, depth, seed=drafts + depth, ahead=ahead)
    for i in range(300):
        if len(engine.requests) < 5:
            hit = int(engine.rng.integers(0, 4)) * B  # tokens whose pages a prefix hit found
            engine.requests[f"r{i}"] = Running(hit, hit)
        chunks = {}
        for name, r in engine.requests.items():
            kind, longest = engine.rng.random(), 1 + drafts
            if kind < 0.9:
                chunks[name] = int(engine.rng.integers(1, longest + 1))
            # Prefill is not in flight twice with drafts of unknown fate before it.
            elif kind < 0.95 and not any(r.rejected):
                chunks[name] = int(engine.rng.integers(1, 700)) + longest
        engine.step(chunks)
        if engine.rng.random() < 0.03:
            engine.finish(str(engine.rng.choice(list(engine.requests))))
    assert engine.most <= spec.num_pages
    for name in list(engine.requests):
        engine.finish(name)
    assert engine.pool.get_num_free_blocks() == 199
    assert not engine.ring._held and not engine.ring._num_tokens


def test_a_ring_is_as_large_as_its_block() -> None:
    spec = ring_spec(2, FORMATS[0], num_drafts=0)
    assert (spec.page_tokens, spec.num_pages) == (24, 6)
    assert ring_spec(2, FORMATS[0], num_drafts=4).num_pages == 7
    engine = Engine(spec, 0, 0, seed=0)
    engine.requests["r"] = Running(0, 0)
    held = []
    for new in (2049, *[1] * 200):
        engine.step({"r": new})
        held.append(199 - engine.pool.get_num_free_blocks())
    # 2,049 lies in the page from 2,048 on; six before the block's end at 2,176, one after it.
    assert held[0] == 1
    assert held[2176 - 2049] == 6
    assert held[2177 - 2049] == 1
    assert np.mean(held[:128]) < 4


def test_a_new_request_waits_until_all_can_run_for_a_block() -> None:
    spec = ring_spec(2, FORMATS[0], num_drafts=0)
    ring = manager(RingManager, spec, pool(200))
    assert lacking(ring, "a", 2049) == 1  # alone, it may take what there is
    ring.allocate_new_blocks("a", 2049, 2049)
    # Full together at 2,176: six pages each, one of which is held, and one for the block of each.
    assert lacking(ring, "b", 2049) == 2 * (6 + 1) - 1
    # They take turns: while the one is full, the other is half full.
    assert lacking(ring, "c", 2049 + 64) == 6 + 1 + 3 + 1 - 1
    assert lacking(ring, "a", 2050) == 0


def test_a_request_counts_up_to_its_end() -> None:
    """Two of 20 tokens and 16 more: two pages each, not six and the block's."""
    ring = manager(RingManager, ring_spec(2, FORMATS[0], num_drafts=0), pool(200))
    for name in "ab":
        ring.observe(SimpleNamespace(request_id=name, num_prompt_tokens=20, max_tokens=16))
    ring.allocate_new_blocks("a", 20, 20)
    assert lacking(ring, "b", 20) == 2 * 2 - 1
    ring.free("b")  # given up while it waited; of it nothing is left
    ring.free("a")
    assert not ring._longest
    ring.allocate_new_blocks("a", 20, 20)
    assert lacking(ring, "b", 20) == 2 * (6 + 1) - 1


def test_pages_are_claimed_by_the_step_that_completes_their_block() -> None:
    pages = manager(PageManager, page_spec(2, FORMATS[0]), pool(200))
    counts = []
    for n in (100, 127, 128, 129, 700, 767, 768):
        wanted = lacking(pages, "r", n)
        assert len(pages.allocate_new_blocks("r", n, n)) == wanted
        counts.append(len(pages.req_to_blocks["r"]))
    assert counts == [0, 0, 1, 1, 5, 5, 6]


TAIL_STEPS = (300, 128, 1, 600, 23, 100, 1)  # tokens; ends at 300, 428, 429, 1029, 1052, ...


@pytest.mark.parametrize("dropped", [False, True], ids=["", "a block is dropped"])
@pytest.mark.parametrize("interval", [0, 256, None])
def test_tails_of_the_newest_block_and_of_boundaries(interval: int | None, dropped: bool) -> None:
    """Of a prompt of 900 tokens, of which another request has had 520."""
    spec = tail_spec(2, FORMATS[0], 0, interval, two_ends=dropped)
    block_pool = pool(200)
    tails = manager(TailManager, spec, block_pool)
    tails.use_eagle = dropped
    tails.observe(
        SimpleNamespace(request_id="r", num_prompt_tokens=900, shared_prefix_boundary=520)
    )
    done, most = 0, 0
    table: list[int] = []
    for new in TAIL_STEPS:
        tails.remove_skipped_blocks("r", done)
        wanted, free = lacking(tails, "r", done + new), block_pool.get_num_free_blocks()
        table += [b.block_id for b in tails.allocate_new_blocks("r", done + new, done + new)]
        assert free - block_pool.get_num_free_blocks() == wanted
        most = max(most, 199 - block_pool.get_num_free_blocks())
        if done >= B:
            assert table[done // B - 1], "the tail that this step reads"
        done += new
        assert len(table) == done // B
    # Ends of steps: 300, 428, 429, 1,029, 1,052, 1,152; boundaries: 512, and 896 or 768.
    kept = {2, 3, 8, 9} | ({4, 5} | {6, 7} if dropped else {4, 7})
    every = 128 if dropped else 256  # a hit on a multiple of 256 needs two tails
    kept |= {0: set(), 256: {*range(every // B, 10, every // B)}, None: {*range(1, 10)}}[interval]
    assert {i + 1 for i, page in enumerate(table) if page} == kept
    limit = spec.max_admission_blocks_per_request(600, 4096)
    assert most <= limit
    tails.free("r")
    assert block_pool.get_num_free_blocks() == 199 and not tails._held


@pytest.mark.parametrize("interval", [0, 256, None])
def test_a_long_prompt_asks_for_no_more_tails_than_the_start_counted(interval: int | None) -> None:
    """Else the largest request that was let in would wait for ever."""
    spec = tail_spec(2, FORMATS[0], 0, interval)
    limit = spec.max_admission_blocks_per_request(512, 8192)
    tails = manager(TailManager, spec, pool(200), max_admission_blocks_per_request=limit)
    assert lacking(tails, "r", 8191, apply_admission_cap=True) <= limit < 8191 // B


def test_tails_without_prefix_caching() -> None:
    spec = tail_spec(2, FORMATS[0], 0, None)
    tails = manager(TailManager, spec, pool(200), enable_caching=False)
    tails.observe(SimpleNamespace(request_id="r", num_prompt_tokens=600, shared_prefix_boundary=0))
    assert lacking(tails, "r", 1000) == 1


def test_a_short_request_counts_what_its_first_block_brings() -> None:
    """A tail's and the sinks' page beside the block's own."""
    grown = []
    for others in (0, 2):
        ring = manager(RingManager, ring_spec(2, FORMATS[0], 0, others), pool(200))
        ring.allocate_new_blocks("a", 100, 100)
        grown.append(lacking(ring, "b", 2049))
    assert grown[1] - grown[0] == 2
