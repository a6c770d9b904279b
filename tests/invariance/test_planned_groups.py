"""The same of models whose layers differ: windows whose pages are freed, pages several to a block.

On `planner`'s groups, with the pages of every kind poisoned whenever they change hands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kivi_vllm.attention.groups.admission import Forecast
from kivi_vllm.attention.groups.pages import ChunkPageManager, WindowPageManager
from tests.choice import some
from tests.engine import engine, gemma3, gemma3n, gemma4, generate, random_prompt
from tests.invariance.conftest import check_preemption, free_blocks, same, scheduler
from tests.models.test_families import FAMILIES
from tests.models.test_hybrids import HYBRIDS

PROMPTS = [random_prompt(n, seed=n) for n in (900, 129, 40, 384, 255)]
MAX_TOKENS = 20


def _windowed() -> str:
    """Three layers with a window and one without, whose pages come three to a block."""
    return gemma3("wwwf")


MODELS: dict[str, Callable[[], str]] = {
    "windows": _windowed,
    "hybrid": lambda: HYBRIDS["granite-4"].path,
    "gpt-oss": lambda: FAMILIES["gpt-oss"].path,
    "llama4": lambda: FAMILIES["llama4"].path,
    "shared caches": gemma3n,
    "two head sizes": gemma4,
}
SEVERAL_PAGES_A_BLOCK = ("windows", "hybrid", "shared caches")
BLOCKS = {("two head sizes", 32): 26}
"""Of a pool that is too small for all requests, where one of them wants more."""
NO_HITS = ("hybrid",)
"""vLLM's Mamba-2 fails on the CPU where prefix caching is on."""

# Tails are pages of a group's own: what they do beside windows and states, they do beside the rest.
CASES = [(name, 0) for name in MODELS]
CASES += [(name, 32) for name in ("windows", "hybrid", "two head sizes")]
cases = pytest.mark.parametrize(("name", "residual"), some(CASES, [0, 6]))


def _options(residual: int) -> dict[str, Any]:
    sinks = 8 if residual else 4
    return {"prefill": "cached", "residual_length": residual, "sink_tokens": sinks}


def _alone(llm: Any) -> list:
    return [generate(llm, [prompt], MAX_TOKENS)[0] for prompt in PROMPTS]


@cases
def test_chunks_batch_and_hits(name: str, residual: int, smooth_codec: None, poison: Any) -> None:
    options = _options(residual)
    path = MODELS[name]()
    with engine(path, "kivi_raw", kivi=options, enable_prefix_caching=False) as llm:
        poison(llm)
        free = free_blocks(llm)
        truth = _alone(llm)
        for chunk in (48, 100, 128, 2048):
            scheduler(llm).max_num_scheduled_tokens = chunk
            same(_alone(llm), truth)
            same(generate(llm, PROMPTS, MAX_TOKENS), truth)
        assert free_blocks(llm) == free
    if name in NO_HITS:
        return
    with engine(path, "kivi_raw", kivi=options, enable_prefix_caching=True) as llm:
        poison(llm)
        free = free_blocks(llm)
        # Found again as soon as it is there.
        stride = scheduler(llm).block_size
        together = generate(llm, [PROMPTS[0]] * 3, MAX_TOKENS)
        same(together, [truth[0]] * 3)
        long = (len(PROMPTS[0]) - 1) // stride * stride
        assert [a.num_cached_tokens for a in together] == [0, long, long]
        for _ in range(2):
            again = _alone(llm)
            same(again, truth)
        assert (stride > 128) == (name in SEVERAL_PAGES_A_BLOCK)
        assert [a.num_cached_tokens for a in again] == [
            (len(prompt) - 1) // stride * stride for prompt in PROMPTS
        ]
        assert free_blocks(llm) == free


@cases
def test_preemption(
    name: str,
    residual: int,
    smooth_codec: None,
    poison: Any,
    preempted: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Forecast, "most_pages", lambda *_: 0)  # admits too many
    for caching in (False,) if name in NO_HITS else (False, True):
        with engine(
            MODELS[name](),
            "kivi_raw",
            kivi=_options(residual),
            enable_prefix_caching=caching,
            num_gpu_blocks_override=BLOCKS.get((name, residual), 22 if residual else 16),
            max_num_batched_tokens=256,
            max_model_len=512,
        ) as llm:
            poison(llm)
            check_preemption(llm, preempted)


@pytest.mark.parametrize(
    ("name", "manager", "most"),
    [("windows", WindowPageManager, 2), ("llama4", ChunkPageManager, 1)],
)
def test_pages_that_nothing_sees_any_more_are_free(name: str, manager: type, most: int) -> None:
    """A request of 900 tokens holds what a window of 200, or a chunk of 256, needs."""
    options = _options(0)
    with engine(MODELS[name](), "kivi_raw", kivi=options, enable_prefix_caching=False) as llm:
        managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
        (pages,) = [m for m in managers if isinstance(m, manager)]
        held = []
        free = pages.remove_skipped_blocks

        def watched(request_id: str, *args: Any) -> None:
            free(request_id, *args)
            held.append(sum(not block.is_null for block in pages.req_to_blocks[request_id]))

        pages.remove_skipped_blocks = watched
        scheduler(llm).max_num_scheduled_tokens = 128
        generate(llm, [PROMPTS[0]], MAX_TOKENS)
    assert max(held) == most < 900 // 128
