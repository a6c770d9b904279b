"""The quantized dtypes through `LLM(...)`: exact while nothing is quantized, then close."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest

from tests.choice import some
from tests.engine import engine, generate, random_prompt, tiny_model
from tests.models.harness import LOSSLESS, own_attention, prompt_logprobs, worst

_SHORT = tuple(tuple(random_prompt(n, seed=n)) for n in (100, 7))
_LONG = tuple(tuple(random_prompt(300, seed=seed)) for seed in (1, 2))


def _model() -> str:
    return tiny_model(head_dim=128)


class Codec(NamedTuple):
    """A dtype with its group size, and bounds of its mean error in log-probability."""

    dtype: str
    group_size: int
    error: tuple[float, float]
    recipe: str = "paper"

    def __str__(self) -> str:
        return f"{self.dtype} G={self.group_size} {self.recipe}"


CODECS = [
    Codec("kivi2", 32, (1.0, 1.8)),
    Codec("kivi2", 64, (1.0, 1.8)),
    Codec("kivi2", 128, (1.0, 1.8)),
    Codec("kivi4", 32, (0.25, 0.5)),
    Codec("kivi2", 16, (0.7, 1.4), "best"),
    Codec("kivi_k3v2", 32, (0.5, 1.1), "best"),
    Codec("kivi3", 32, (0.45, 0.95), "best"),
    Codec("kivi_k4v3", 32, (0.35, 0.7), "best"),
    Codec("kivi4", 32, (0.25, 0.5), "best"),
]


@pytest.fixture(scope="module")
def unquantized() -> list[float]:
    with engine(_model(), "auto") as llm:
        return prompt_logprobs(llm, _LONG)


@pytest.mark.parametrize("codec", some(CODECS, [0, 3, 5]), ids=str)
def test_codec(codec: Codec, unquantized: list[float]) -> None:
    expected = own_attention(_model(), _SHORT)
    options = dict(group_size=codec.group_size, prefill="cached", recipe=codec.recipe)
    with engine(_model(), codec.dtype, kivi=options) as llm:
        # 100 + 20 tokens: the first block is never completed.
        assert worst(generate(llm, _SHORT, 20), expected) < LOSSLESS

        logprobs = prompt_logprobs(llm, _LONG)
        errors = [abs(a - b) for a, b in zip(logprobs, unquantized, strict=True)]
        own_block = [e for i, e in enumerate(errors) if i % 299 < 127]
        quantized = [e for i, e in enumerate(errors) if i % 299 >= 127]
        assert max(own_block) < LOSSLESS
        low, high = codec.error
        mean = sum(quantized) / len(quantized)
        assert low < mean < high
        assert all(map(math.isfinite, logprobs))
