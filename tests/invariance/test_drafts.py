"""Nor does an answer depend on drafts, whoever makes them, accepted or rejected.

Those of n-grams, of EAGLE's head and of a draft model, whose layers have pages of their own.
"""

from __future__ import annotations

from typing import Any

import pytest

from kivi_vllm.attention.groups.admission import Forecast
from tests.choice import some
from tests.drafts import METHODS
from tests.engine import engine, gemma3, generate, random_prompt
from tests.invariance.conftest import check_preemption, free_blocks, same, scheduler

# Prompts that hold most of the vocabulary, so that the n-gram proposer proposes at every step
# and is nearly always wrong, and whose answers cross a block boundary.
PROMPTS = [random_prompt(n, seed=n) for n in (500, 505, 509, 630)]
MAX_TOKENS = 24
DRAFTS = 5


def _windowed() -> str:
    """Three layers with a window and one without, whose pages come three to a block."""
    return gemma3("wwwf")


METHODS_AND_MODELS = {
    **{name: METHODS[name] for name in ("eagle", "draft_model", "ngram")},
    "ngram, windows": (_windowed, METHODS["ngram"][1]),
}
ACCEPTED = ("eagle", "draft_model", "ngram, windows")
HITS = {
    "eagle": [256, 256, 256, 384],  # a block is dropped
    "ngram, windows": [384, 384, 384, 384],
}

CASES = [("eagle", 32), ("eagle", 0), ("draft_model", 32), ("ngram", 0), ("ngram, windows", 32)]


def _options(residual: int) -> dict[str, Any]:
    sinks = 8 if residual else 0
    return {"prefill": "cached", "residual_length": residual, "sink_tokens": sinks}


@pytest.fixture
def drafted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(position of the first draft, drafts, those accepted) of every verified row so far."""
    from vllm.v1.core.sched.scheduler import Scheduler

    found: list[tuple[int, int, int]] = []
    update = Scheduler.update_from_output

    def watched(self: Any, scheduled: Any, output: Any) -> Any:
        for name, drafts in scheduled.scheduled_spec_decode_tokens.items():
            index = output.req_id_to_index[name]
            accepted = len(output.sampled_token_ids[index]) - 1
            start = self.requests[name].num_computed_tokens - len(drafts)
            found.append((start, len(drafts), accepted))
        return update(self, scheduled, output)

    monkeypatch.setattr(Scheduler, "update_from_output", watched)
    return found


@pytest.mark.parametrize(("name", "residual"), some(CASES, [0]))
def test_answers_are_those_without_drafts(
    name: str, residual: int, smooth_codec: None, poison: Any, drafted: list
) -> None:
    make, drafts = METHODS_AND_MODELS[name]
    path, options = make(), _options(residual)
    with engine(path, "kivi_raw", kivi=options, enable_prefix_caching=False) as llm:
        poison(llm)
        truth = generate(llm, PROMPTS, MAX_TOKENS)
    speculation = dict(drafts(path), num_speculative_tokens=DRAFTS)
    with engine(path, "kivi_raw", kivi=options, speculative_config=speculation) as llm:
        poison(llm)
        free = free_blocks(llm)
        same(generate(llm, PROMPTS, MAX_TOKENS), truth)
        again = generate(llm, PROMPTS, MAX_TOKENS)
        same(again, truth)
        assert [a.num_cached_tokens for a in again] == HITS.get(name, [384, 384, 384, 512])
        assert llm.reset_prefix_cache()
        scheduler(llm).max_num_scheduled_tokens = 100
        same([generate(llm, [prompt], MAX_TOKENS)[0] for prompt in PROMPTS], truth)
        assert free_blocks(llm) == free
    rejected = [start for start, n, accepted in drafted if accepted < n]
    assert any(start // 128 != (start + DRAFTS - 1) // 128 for start in rejected)
    assert any(accepted for _, _, accepted in drafted) == (name in ACCEPTED)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "residual"), [("eagle", 32), ("draft_model", 0)])
def test_preemption(
    name: str,
    residual: int,
    smooth_codec: None,
    poison: Any,
    preempted: list[str],
    drafted: list,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Forecast, "most_pages", lambda *_: 0)  # admits too many
    make, drafts = METHODS_AND_MODELS[name]
    path = make()
    with engine(
        path,
        "kivi_raw",
        kivi=_options(residual),
        speculative_config=dict(drafts(path), num_speculative_tokens=DRAFTS),
        num_gpu_blocks_override=22 if residual else 16,
        max_num_batched_tokens=256,
        max_model_len=512,
    ) as llm:
        poison(llm)
        check_preemption(llm, preempted)
    assert {accepted for _, _, accepted in drafted} >= {0, 1, DRAFTS}


@pytest.mark.slow
def test_exact_prefill(poison: Any, drafted: list) -> None:
    """There answers may differ from those without drafts, but no page of another is read."""
    make, drafts = METHODS_AND_MODELS["ngram"]
    path, options = make(), {**_options(32), "prefill": "exact"}
    speculation = dict(drafts(path), num_speculative_tokens=12)
    with engine(path, "kivi_raw", kivi=options, speculative_config=speculation) as llm:
        poison(llm)
        answers = generate(llm, PROMPTS, MAX_TOKENS)
    assert drafted and not any(x != x for a in answers for x in a.logprobs)
