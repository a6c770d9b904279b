"""What the tests of this folder ask of an engine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

from tests.engine import Answer, engine, generate, on_worker, random_prompt

LENGTHS = (300, 77, 128, 513)
"""Prompt lengths: inside a block of 128, exactly one, and over several."""

PROMPTS = tuple(tuple(random_prompt(n, seed=n)) for n in LENGTHS)

LOSSLESS = 1e-4
"""Bound of the log-probabilities' difference where K and V are kept verbatim in fp32.

Only the order of the sums differs; 1e-5 is what one sees.
"""


def worst(answers: Sequence[Answer], expected: Sequence[Answer]) -> float:
    """Largest difference of log-probability over all requests; infinite if tokens differ."""
    return max(a.difference(b) for a, b in zip(answers, expected, strict=True))


@functools.cache
def own_attention(
    model: str, prompts: tuple[tuple[int, ...], ...] = PROMPTS, max_tokens: int = 20
) -> tuple[Answer, ...]:
    """Answers of vLLM's own CPU attention with an unquantized cache.

    Call it outside another engine: there is one at a time in a process.
    """
    with engine(model, "auto") as llm:
        assert backends(llm) == {"CPU_ATTN"}
        return tuple(generate(llm, prompts, max_tokens))


def attention_layers(runner: Any) -> Iterator[Any]:
    """The model's attention layers, in their order."""
    context = runner.compilation_config.static_forward_context
    return (layer for layer in context.values() if hasattr(layer, "impl"))


def backends(llm: Any) -> set[str]:
    """Names of the attention backends of the model's layers."""
    return on_worker(
        llm, lambda runner: {layer.attn_backend.get_name() for layer in attention_layers(runner)}
    )


def change_attention(llm: Any, **wrong: Any) -> None:
    """Replace fields of every layer's `AttentionParams`, and forget cached prefixes."""

    def change(runner: Any) -> None:
        for layer in attention_layers(runner):
            layer.impl.params = dataclasses.replace(layer.impl.params, **wrong)

    on_worker(llm, change)
    assert llm.reset_prefix_cache()


def prompt_logprobs(llm: Any, prompts: Sequence[Sequence[int]]) -> list[float]:
    """Log-probability of every prompt token after the first, over all prompts.

    The tokens are given, so a difference early on does not lead elsewhere.
    """
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
    inputs = [{"prompt_token_ids": list(p)} for p in prompts]
    return [
        step[token].logprob
        for output in llm.generate(inputs, params, use_tqdm=False)
        for step, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
        if step is not None
    ]


def capacity(llm: Any) -> int:
    """Tokens that the engine says its KV cache holds."""
    return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
