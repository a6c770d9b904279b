"""Layers that read the caches of earlier ones (Gemma-3n, Gemma-4), through the engine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.choice import some
from tests.engine import engine, gemma3n, gemma4, generate, on_worker
from tests.models.harness import (
    LOSSLESS,
    PROMPTS,
    attention_layers,
    backends,
    change_attention,
    own_attention,
    prompt_logprobs,
    worst,
)

# In `exact` mode the last token of a chunk, whose answer counts, still reads the ring.
EXACT: dict[str, Any] = dict(kivi={"prefill": "exact"}, max_num_batched_tokens=200)


# With the tokens that a second time are found: blocks are 384 tokens long, and 128.
@pytest.mark.parametrize(
    ("build", "cached"), some([(gemma3n, [0, 0, 0, 384]), (gemma4, [256, 0, 0, 512])], [1])
)
def test_chunks_and_prefix_hits_equal_vllms_own_attention(
    build: Callable[[], str], cached: list[int]
) -> None:
    expected = own_attention(build())
    with engine(build(), "kivi_raw", **EXACT) as llm:
        assert backends(llm) == {"KIVI"}
        assert _owners(llm) == 4  # of 7 or 6 layers
        assert worst(generate(llm, PROMPTS, 20), expected) < LOSSLESS
        again = generate(llm, PROMPTS, 20)
        assert [answer.num_cached_tokens for answer in again] == cached
        assert worst(again, expected) < LOSSLESS

        # The same comparison must see a mistake.
        change_attention(llm, sliding_window=0)
        assert worst(generate(llm, PROMPTS[:1], 20), expected[:1]) > 1e-2


def test_a_ring_stored_before_all_have_read_it() -> None:
    """Negative control: after the owner is too early for what the last reader does."""
    expected = own_attention(gemma3n())

    def hurry(runner: Any) -> None:
        for layer in attention_layers(runner):
            if layer.impl.owner is layer.impl:
                layer.impl.operators = _early(layer.impl.operators)

    with engine(gemma3n(), "kivi_raw", **EXACT) as llm:
        on_worker(llm, hurry)
        assert worst(generate(llm, PROMPTS, 20), expected) > 10 * LOSSLESS


@pytest.mark.slow
def test_every_position_with_tails_and_sinks() -> None:
    with engine(gemma3n(), "auto") as llm:
        expected = prompt_logprobs(llm, PROMPTS)
    options = dict(prefill="cached", residual_length=64, sink_tokens=8)
    with engine(gemma3n(), "kivi_raw", kivi=options, max_num_batched_tokens=200) as llm:
        found = prompt_logprobs(llm, PROMPTS)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < LOSSLESS


def _early(operators: Any) -> SimpleNamespace:
    def attend(step: Any, cache: Any, query: Any, key: Any, value: Any, *args: Any) -> None:
        operators.attend(step, cache, query, key, value, *args)
        operators.store_ring(step, cache, key, value)

    return SimpleNamespace(
        store_blocks=operators.store_blocks, attend=attend, store_ring=operators.store_ring
    )


def _owners(llm: Any) -> int:
    """Layers that have caches."""
    return on_worker(
        llm, lambda runner: sum(x.impl.owner is x.impl for x in attention_layers(runner))
    )
