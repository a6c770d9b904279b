"""What tests of engines on a pretended GPU share: what is found, and what should be."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine import Answer, random_prompt
from tests.patches.vllm033 import SourcesUnavailable, vllm_033_sources

PROMPTS = [random_prompt(n, seed=n) for n in (5, 37, 300)]
"""Of the last, a first step computes 256 tokens at most, less what the others take."""

LONG = PROMPTS[2] + random_prompt(150, seed=1)
"""Long enough that pages have left a window of 100 tokens."""

TOKENS = 6

SAME = 1e-3
"""Largest difference of log-probabilities; one sees 2e-6, and 2e-5 for `kivi2`."""


def sources_or_skip() -> Path:
    """vLLM 0.33's, where this machine can use them."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.version.cuda is not None:
        pytest.skip("a PyTorch with CUDA cannot pretend to have another GPU")
    try:
        return vllm_033_sources()
    except SourcesUnavailable as reason:
        pytest.skip(str(reason))


def greedy(model: str, prompt: Sequence[int], max_tokens: int) -> Answer:
    """The answer of transformers, all in float32."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids, logprobs = torch.tensor([prompt]), []
    with torch.inference_mode():
        for _ in range(max_tokens):
            best = network(ids).logits[0, -1].log_softmax(-1).max(-1)
            ids = torch.cat([ids, best.indices.view(1, 1)], 1)
            logprobs.append(best.values.item())
    return Answer(tuple(ids[0, len(prompt) :].tolist()), tuple(logprobs))


def result(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Of one task."""
    assert "error" not in results[name], results[name]["error"]
    return results[name]


def answers(found: dict[str, Any]) -> list[Answer]:
    """Of all batches."""
    return [
        Answer(tuple(a["tokens"]), tuple(a["logprobs"]), a["num_cached_tokens"])
        for batch in found["answers"]
        for a in batch
    ]


def assert_same(found: Sequence[Answer], expected: Sequence[Answer]) -> None:
    """Assert that each answer is the one that is wanted."""
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.difference(other) < SAME
