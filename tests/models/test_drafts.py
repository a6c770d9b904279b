"""Draft models and heads of every kind propose what they propose with vLLM's own cache."""

from __future__ import annotations

from typing import Any

import pytest

from tests.choice import some
from tests.drafts import METHODS, foreseeable, similar
from tests.engine import Answer, engine, gemma3, generate, random_prompt
from tests.invariance.conftest import scheduler
from tests.models.harness import LOSSLESS, worst

PROMPTS = [random_prompt(n, seed=n) for n in (300, 77, 512, 630, 124)]
"""The answers of the last three complete a block."""

DRAFTS = 4
MAX_TOKENS = 16


def _answers(
    model: str, dtype: str, drafts: dict[str, Any] | None, **settings: Any
) -> tuple[list[Answer], list[dict[str, list[int]]]]:
    """Answers of two rounds, of which the second finds prefixes, and the drafts of every step."""
    if drafts:
        settings["speculative_config"] = dict(drafts, num_speculative_tokens=DRAFTS)
    proposals: list[dict[str, list[int]]] = []
    with engine(model, dtype, kv_cache_memory_bytes=64 << 20, **settings) as llm:
        core = scheduler(llm)
        update = core.update_draft_token_ids

        def watched(found: Any) -> None:
            names = [name.partition("-")[0] for name in found.req_ids]
            proposals.append(dict(zip(names, found.draft_token_ids, strict=True)))
            update(found)

        core.update_draft_token_ids = watched
        answers = [answer for _ in range(2) for answer in generate(llm, PROMPTS, MAX_TOKENS)]
    return answers, proposals


@pytest.mark.parametrize("name", some([name for name in METHODS if name != "ngram"], [0]))
def test_proposals_are_those_of_vllms_own_cache(name: str) -> None:
    make, drafts = METHODS[name]
    model = make()
    truth, _ = _answers(model, "auto", None)
    _, proposed = _answers(model, "auto", drafts(model))
    options = {"prefill": "cached", "residual_length": 32}
    answers, ours = _answers(model, "kivi_raw", drafts(model), kivi=options)
    assert len(ours) > 2 and ours == proposed
    assert worst(answers, truth) < LOSSLESS
    found = [a.num_cached_tokens for a in answers[len(PROMPTS) :]]
    # EAGLE and MTP compute the last block again.
    assert found == ([256, 0, 384, 512, 0] if name == "draft_model" else [128, 0, 384, 384, 0])


@pytest.mark.slow
def test_quantized() -> None:
    """Beside a windowed model, a draft model's table is not that of the first layers."""
    model = gemma3("wwwf", head_dim=32)
    options = {"prefill": "cached"}
    truth, _ = _answers(model, "kivi2", None, kivi=options)
    drafts = dict(method="draft_model", model=similar(foreseeable()))
    answers, proposals = _answers(model, "kivi2", drafts, kivi=options)
    assert proposals
    assert [a.tokens for a in answers] == [a.tokens for a in truth]
