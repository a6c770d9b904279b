"""The real codes through the real engine: the same bytes whatever the schedule.

A difference of 1e-7 in a key, from another order of summation in a matrix
product, can move a number across a rounding boundary, and a code, a scale or a
zero with it: a byte in a hundred thousand or so. So bytes are compared with that
in mind, and log-probabilities to 1e-4 where all bytes are equal. (With the smooth
codec of test_invariance.py nothing of the kind happens, and nothing is excused.)
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.choice import some
from tests.engine import Answer, engine, generate, random_prompt, tiny_model
from tests.invariance.conftest import scheduler
from tests.models.test_families import FAMILIES

PROMPT = random_prompt(700, seed=7)
DTYPES = ("kivi_k3v2", "kivi2", "kivi3", "kivi_k4v3", "kivi4")


@pytest.fixture
def pages(operators: Any) -> dict[tuple[tuple[int, int], int, int], torch.Tensor]:
    """Bytes of each block as it is stored, by (layer, request, block)."""
    stored: dict[tuple[tuple[int, int], int, int], torch.Tensor] = {}
    store_blocks = operators.store_blocks

    def recorded(step: Any, cache: Any, key: Any, value: Any) -> None:
        store_blocks(step, cache, key, value)
        for row in step.rows:
            for block in range(row.a // 128, row.b // 128):
                entry, at = divmod(block, cache.pages_per_block)
                page = cache.pages[int(step.block_table[row.index, entry]), at]
                # Layers of two groups lie at the same place, in other blocks.
                layer = cache.pages.data_ptr(), step.block_table.data_ptr()
                stored[layer, row.index, block] = page.clone()

    operators.store_blocks = recorded
    return stored


def _run(llm: Any, prompts: list, pages: dict) -> tuple[Answer, torch.Tensor]:
    """The first prompt's answer and all its pages' bytes."""
    pages.clear()
    first = generate(llm, prompts, 20)[0]
    own = [page for (_, request, _), page in sorted(pages.items()) if request == 0]
    return first, torch.stack(own)


def _same(got: tuple[Answer, torch.Tensor], want: tuple[Answer, torch.Tensor]) -> None:
    changed = (got[1] != want[1]).float().mean().item()
    assert got[1].shape == want[1].shape
    assert changed <= 1e-4
    if changed == 0:
        assert got[0].difference(want[0]) <= 1e-4


@pytest.mark.parametrize("residual", [0, 32], ids=lambda r: f"R{r}")
@pytest.mark.parametrize("dtype", some(DTYPES, [0]))
def test_codes(dtype: str, residual: int, pages: dict) -> None:
    check_codes(tiny_model(), dtype, residual, pages)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt-oss", "llama4"])
def test_codes_with_sink_logits_or_attention_chunks(family: str, pages: dict) -> None:
    check_codes(FAMILIES[family].path, "kivi2", 32, pages)


def check_codes(model: str, dtype: str, residual: int, pages: dict) -> None:
    """The bytes of a prompt's pages, and its answer, whatever the schedule."""
    options = {"prefill": "cached", "residual_length": residual}
    with engine(model, dtype, kivi=options) as llm:
        truth = _run(llm, [PROMPT], pages)
        assert len(truth[1]) == 2 * 5  # layers × whole blocks of 700 tokens
        for chunk in (48, 100, 128):
            assert llm.reset_prefix_cache()
            scheduler(llm).max_num_scheduled_tokens = chunk
            _same(_run(llm, [PROMPT], pages), truth)
        assert llm.reset_prefix_cache()
        scheduler(llm).max_num_scheduled_tokens = 300
        _same(_run(llm, [PROMPT, random_prompt(90, 1), random_prompt(260, 2)], pages), truth)

        # A hit stores nothing again, and reads what is there.
        pages.clear()
        hit = generate(llm, [PROMPT], 20)[0]
        assert not pages or min(block for *_, block in pages) >= 5
        assert hit.num_cached_tokens == 640
        assert hit.difference(truth[0]) <= 1e-4
        # Negative control: other tokens, other bytes.
        other = _run(llm, [PROMPT[:10] + random_prompt(690, seed=8)], pages)
        assert (other[1] != truth[1]).float().mean() > 0.1


def test_exact_differs_from_cached() -> None:
    """The two prefill modes are two: `exact` does not read its own blocks' codes."""
    answers = {}
    for prefill in ("exact", "cached"):
        with engine(tiny_model(), "kivi2", kivi={"prefill": prefill}) as llm:
            answers[prefill] = generate(llm, [PROMPT], 1)[0]
    with engine(tiny_model(), "auto") as llm:
        full = generate(llm, [PROMPT], 1)[0]
    # One chunk, one token: `exact` has not read a single code yet.
    assert answers["exact"].difference(full) <= 1e-4
    assert answers["cached"].difference(full) > 1e-2
