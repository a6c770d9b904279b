"""The Llama family over head shapes, residual lengths and dtypes, with the lossless codec."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.choice import some
from tests.engine import engine, generate, random_prompt, tiny_model
from tests.models.harness import (
    LOSSLESS,
    PROMPTS,
    change_attention,
    own_attention,
    prompt_logprobs,
    worst,
)

_PROMPTS = tuple(tuple(random_prompt(n, seed=n)) for n in (120, 290))


class Case(NamedTuple):
    head_size: int
    num_heads: int
    num_kv_heads: int
    residual_length: int
    prefill: str

    def __str__(self) -> str:
        heads = f"{self.num_heads}/{self.num_kv_heads}"
        return f"D={self.head_size} heads={heads} R={self.residual_length} {self.prefill}"


# Every head size and residual length; multi-head, grouped-query and multi-query attention.
CASES = [
    Case(32, 4, 4, 0, "cached"),
    Case(64, 8, 4, 32, "exact"),
    Case(96, 4, 1, 64, "cached"),
    Case(128, 8, 2, 128, "cached"),
    Case(160, 2, 2, 128, "exact"),
    Case(192, 2, 1, 32, "cached"),
    Case(256, 4, 2, 64, "exact"),
    Case(512, 4, 1, 32, "cached"),
    # Filled up to 96 and 128.
    Case(80, 4, 2, 64, "exact"),
    Case(112, 4, 4, 0, "cached"),
]


@pytest.mark.parametrize("case", some(CASES, [3, 6, 8]), ids=str)
def test_lossless_codec_equals_vllms_own_attention(case: Case) -> None:
    model = tiny_model(
        head_dim=case.head_size,
        num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_kv_heads,
    )
    options = dict(residual_length=case.residual_length, prefill=case.prefill)
    with engine(model, "kivi_raw", kivi=options, max_num_batched_tokens=200) as llm:
        answers = generate(llm, _PROMPTS, 12)  # 120 + 12 tokens end in the second block
    assert worst(answers, own_attention(model, _PROMPTS, 12)) < LOSSLESS


# Both attentions round the 16-bit activations of every layer, at different places (vLLM's
# also rounds probabilities), so that they agree to some units of the dtype's last place
# (bf16: 2**-8, fp16: 2**-11) of logits of about 10. Given tokens, they do not drift apart.
@pytest.mark.parametrize(
    ("dtype", "mean", "maximum"), some([("bfloat16", 0.02, 0.2), ("float16", 0.003, 0.03)], [0])
)
def test_16_bit_models_agree_with_vllms_own_attention(
    dtype: str, mean: float, maximum: float
) -> None:
    model = tiny_model()
    settings: dict[str, Any] = dict(dtype=dtype, max_num_batched_tokens=200)
    with engine(model, "auto", **settings) as llm:
        expected = prompt_logprobs(llm, PROMPTS)
        first = [a.tokens[0] for a in generate(llm, PROMPTS, 1)]

    def differences() -> list[float]:
        found = prompt_logprobs(llm, PROMPTS)
        return [abs(a - b) for a, b in zip(found, expected, strict=True)]

    with engine(model, "kivi_raw", kivi={"prefill": "cached"}, **settings) as llm:
        d = differences()
        assert sum(d) / len(d) < mean
        assert max(d) < maximum
        assert [a.tokens[0] for a in generate(llm, PROMPTS, 1)] == first

        change_attention(llm, scale=0.1)
        d = differences()
        assert sum(d) / len(d) > 2 * mean
        assert max(d) > 2 * maximum
