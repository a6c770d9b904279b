"""A fact early in a prompt of 7,000 tokens: `kivi4` answers as the full-precision cache does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import engine
from tests.quick import quick_engines

TOKENS = 7000
# bf16 is emulated on many a CPU.
SETTINGS: dict[str, Any] = dict(
    dtype="float32",
    max_model_len=8192,
    kv_cache_memory_bytes=512 << 20,
    skip_tokenizer_init=False,
)


def answer(model: Path, dtype: str) -> str:
    """What the model says the fact is."""
    from vllm import SamplingParams

    fact = "Remember this: the password of the old lighthouse is 'marigold'. "
    days = (f"On day {n} the keeper wrote down the wind and the tide." for n in range(3000))
    question = " Question: what is the password of the old lighthouse? Answer: the password is '"
    with engine(str(model), dtype, **SETTINGS) as llm:
        tokenizer = llm.get_tokenizer()
        head, tail = tokenizer.encode(fact), tokenizer.encode(question)
        middle = tokenizer.encode(" ".join(days))[: TOKENS - len(head) - len(tail)]
        prompt = head + middle + tail
        assert len(prompt) == TOKENS
        sampling = SamplingParams(max_tokens=12, temperature=0, stop="'")
        [output] = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        return output.outputs[0].text


@pytest.mark.slow
def test_fact_early_on(model: Path) -> None:
    with quick_engines():
        full = answer(model, "auto")
        assert full == "marigold", "the model itself does not know: nothing is tested"
        assert answer(model, "kivi4") == full
