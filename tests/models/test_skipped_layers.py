"""`--kv-cache-dtype-skip-layers`: layers whose tokens stay as they are, in the same pool."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import engine, gemma3, generate, random_prompt, tiny_model
from tests.models.harness import LOSSLESS, PROMPTS, backends, own_attention, prompt_logprobs, worst

PATH: dict[str, Any] = dict(num_hidden_layers=4)


def test_all_layers_skipped_equal_vllms_own_attention() -> None:
    model = tiny_model(**PATH)
    expected = own_attention(model)
    skipped = [str(i) for i in range(4)]
    with engine(model, "kivi2", kv_cache_dtype_skip_layers=skipped) as llm:
        assert backends(llm) == {"KIVI"}
        assert worst(generate(llm, PROMPTS, 20), expected) < LOSSLESS


@pytest.mark.slow
def test_each_skipped_layer_makes_the_rest_better() -> None:
    """By the prompts' log-probabilities; prefix hits and chunks change nothing."""
    model = tiny_model(**PATH)
    prompts = [random_prompt(n, seed=n) for n in (700, 300)]
    options: dict[str, Any] = dict(kivi={"prefill": "cached"}, max_num_batched_tokens=200)
    with engine(model, "auto") as llm:
        truth = prompt_logprobs(llm, prompts)
    errors = []
    for skipped in ([], ["0"], ["0", "3"], ["0", "1", "3"]):
        with engine(model, "kivi2", kv_cache_dtype_skip_layers=skipped, **options) as llm:
            first, again = (generate(llm, prompts, 20) for _ in range(2))
            assert [a.num_cached_tokens for a in again] == [640, 256]
            assert worst(again, first) < 2e-3  # another order of sums now and then flips a code
            found = prompt_logprobs(llm, prompts)
        errors.append(sum(abs(a - b) for a, b in zip(found, truth, strict=True)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.8 * errors[0]


@pytest.mark.slow
def test_layers_with_a_window() -> None:
    model = gemma3("wwwf")
    expected = own_attention(model)
    with engine(model, "kivi_raw", kv_cache_dtype_skip_layers=["sliding_window"]) as llm:
        assert worst(generate(llm, PROMPTS, 20), expected) < LOSSLESS
