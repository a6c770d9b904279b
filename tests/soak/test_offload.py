"""How much more of prefixes is found with an offloaded pool, and what that moves."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from tests.engine import Answer, engine, generate, random_prompt
from tests.invariance.conftest import same, scheduler
from tests.offload import offloaded, settle
from tests.soak.checks import assert_idle
from tests.soak.engines import model
from tests.soak.settings import LONG, SEED

NUM_PROMPTS, NUM_REQUESTS = (40, 500) if LONG else (10, 50)
PROMPTS = [random_prompt(600 + random.Random(n).randrange(300), seed=n) for n in range(NUM_PROMPTS)]
MAX_TOKENS = 4
KIVI = {"prefill": "cached", "residual_length": 0}
RING = 6
"""Pages of a request's ring, about."""


def _answers(blocks: int, order: Sequence[int], **settings: Any) -> tuple[list[Answer], Any]:
    """Answers in this order, three at a time, and the pool's cache groups."""
    with engine(
        model(),
        "kivi2",
        kivi=KIVI,
        num_gpu_blocks_override=blocks,
        max_num_batched_tokens=512,
        **settings,
    ) as llm:
        answers = []
        for start in range(0, len(order), 3):
            prompts = [PROMPTS[i] for i in order[start : start + 3]]
            answers += generate(llm, prompts, MAX_TOKENS)
        if settings:
            settle(llm)
        groups = scheduler(llm).kv_cache_config.kv_cache_groups
        assert_idle(llm, scheduler(llm))
        return answers, groups


@pytest.mark.slow
def test_prefixes_that_are_found(offloading: Any, record_property: Any) -> None:
    """A pool with a fifth of the pages that all prompts have."""
    chance = random.Random(SEED)
    order = [chance.randrange(NUM_PROMPTS) for _ in range(NUM_REQUESTS)]
    blocks = sum(len(prompt) // 128 + 1 for prompt in PROMPTS) // 5 + 3 * RING
    with engine(model(), "kivi2", kivi=KIVI, enable_prefix_caching=False) as llm:
        quiet = [generate(llm, [prompt], MAX_TOKENS)[0] for prompt in PROMPTS]
    without, _ = _answers(blocks, order)
    answers, groups = _answers(blocks, order, **offloaded(1 << 30))
    for found in (without, answers):
        same(found, [quiet[i] for i in order])
    here, offload = (sum(answer.num_cached_tokens for answer in a) for a in (without, answers))
    times = 4 if LONG else 3  # few requests come back often enough to few prompts
    assert offload >= times * here

    spec = next(group.kv_cache_spec for group in groups)
    page = spec.page_size_bytes * 2  # layers
    moved = offloading.counts["bytes loaded"]
    assert moved == offloading.counts["blocks loaded"] * page
    # Every 128 tokens are a page of each layer, and every sequence has its sinks besides.
    assert moved <= (offload / 128 + NUM_REQUESTS) * page
    bf16 = 128 * 2 * 2 * 32 * 2 * 2  # tokens, keys and values, heads, channels, bytes, layers
    assert page < bf16 / 5
    record_property(
        "soak",
        f"seed {SEED}, {NUM_REQUESTS} requests, pool of {blocks} blocks, tokens found: {here} "
        f"without and {offload} with offloading, {offloading.counts}, a page has {page} bytes, "
        f"one of bf16 {bf16}",
    )
