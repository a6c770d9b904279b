"""Whole engines on vLLM 0.33's CUDA code path, with the Triton operators interpreted.

There is no GPU (see `fake_device`): what is tested is what vLLM's GPU worker asks of the
backend, and what the operators make of it. How they compile and how fast they are is not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda.child import GRAPHS, results_in_child
from tests.drafts import eagle, foreseeable
from tests.engine import Answer, gemma3, gemma3n, random_prompt, tiny_model
from tests.patches.vllm033 import SourcesUnavailable, vllm_033_sources

PROMPTS = [random_prompt(n, seed=n) for n in (5, 37, 300)]
"""Of the last, a first step computes 256 tokens at most, less what the others take."""

LONG = PROMPTS[2] + random_prompt(150, seed=1)
"""Long enough that pages have left a window of 100 tokens."""

TOKENS = 6
DRAFTED_TOKENS = 8

RETURNING = (random_prompt(40, seed=1) * 8)[:290]
"""A prompt in which n-grams come again, so that there is something to propose."""

BATCHES = [[RETURNING, PROMPTS[1]], [RETURNING]]
"""The last one finds its first 256 tokens in the prefix cache."""

QUANTIZED: dict[str, Any] = dict(
    kv_cache_dtype="kivi2",
    additional_config={"kivi": {"residual_length": 32}},
    speculative_config=dict(
        method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3
    ),
)

# Multiples of the 4 tokens of a row with drafts; a batch of two is padded to three.
DRAFT_GRAPHS: dict[str, Any] = {
    **GRAPHS,
    "compilation_config": {**GRAPHS["compilation_config"], "cudagraph_capture_sizes": [4, 12]},
}

SAME = 1e-3
"""Largest difference of log-probabilities; one sees 2e-6, and 2e-5 for `kivi2`."""


@pytest.fixture(scope="module")
def model() -> str:
    # Weights at which some drafts come true and some do not, while no token is chosen by
    # less than 0.07 in log-probability over the next best, in any of the cases here.
    return tiny_model(head_dim=64, tie_word_embeddings=True, initializer_range=0.085)


@pytest.fixture(scope="module")
def windowed() -> str:
    """Two layers with a window and one without, whose pages come two to a block."""
    return gemma3("wwf", window=100)


@pytest.fixture(scope="module")
def sources() -> Path:
    """vLLM 0.33's, where this machine can use them."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.version.cuda is not None:
        pytest.skip("a PyTorch with CUDA cannot pretend to have another GPU")
    try:
        return vllm_033_sources()
    except SourcesUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def results(
    sources: Path, model: str, windowed: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """All engines in one process, which must import vLLM first."""
    raw = dict(model=model, kv_cache_dtype="kivi_raw")
    quantized = dict(model=model, **QUANTIZED)
    tasks: dict[str, dict[str, Any]] = {
        "raw": dict(engine_args=raw, batches=[PROMPTS], max_tokens=TOKENS),
        "raw, graphs": dict(engine_args={**raw, **GRAPHS}, batches=[PROMPTS], max_tokens=TOKENS),
        "windows, graphs": dict(
            engine_args={**raw, **GRAPHS, "model": windowed},
            batches=[PROMPTS, [LONG]],
            max_tokens=TOKENS,
        ),
        "skipped layers": dict(
            engine_args={
                **raw,
                "kv_cache_dtype_skip_layers": ["0"],
                "attention_config": {"backend": "TRITON_ATTN"},
                "kv_cache_memory_bytes": 64 << 20,
            },
            batches=[PROMPTS],
            max_tokens=TOKENS,
            operators="reference",
        ),
        "kivi2, graphs": dict(
            engine_args={**quantized, **DRAFT_GRAPHS}, batches=BATCHES, max_tokens=DRAFTED_TOKENS
        ),
        "kivi2, reference": dict(
            engine_args=quantized,
            batches=BATCHES,
            max_tokens=DRAFTED_TOKENS,
            operators="reference",
        ),
        "eagle, graphs": dict(
            engine_args={
                **raw,
                **DRAFT_GRAPHS,
                "model": foreseeable(head_dim=64),
                "speculative_config": dict(
                    method="eagle", model=eagle(foreseeable(head_dim=64)), num_speculative_tokens=3
                ),
            },
            batches=BATCHES,
            max_tokens=DRAFTED_TOKENS,
            operators="reference",  # interpreted, Triton's would take minutes
        ),
        "shared": dict(
            engine_args={**raw, "model": gemma3n(5, 2)},
            batches=[PROMPTS],
            max_tokens=TOKENS,
            operators="reference",
        ),
    }
    return results_in_child(sources, tmp_path_factory.mktemp("cuda"), tasks)


@pytest.fixture(scope="module")
def configured(
    sources: Path, model: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What is refused before an engine is made."""
    kivi2 = dict(model=model, kv_cache_dtype="kivi2")
    tasks: dict[str, dict[str, Any]] = {
        "Turing": dict(engine_args=dict(kivi2, dtype="float16"), capability=[7, 5]),
        "Ampere": dict(engine_args=dict(kivi2, dtype="bfloat16"), capability=[8, 0]),
        "float32": dict(engine_args=kivi2, capability=[9, 0]),
    }
    return results_in_child(sources, tmp_path_factory.mktemp("cuda"), tasks)


@pytest.fixture(scope="module")
def expected(model: str) -> list[Answer]:
    """What transformers answers to `PROMPTS`."""
    return [greedy(model, prompt, TOKENS) for prompt in PROMPTS]


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
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
        assert one.difference(other) < SAME


@pytest.mark.slow
def test_eager(results: dict[str, Any], expected: list[Answer]) -> None:
    found = result(results, "raw")
    assert found["runner"] == "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
    assert found["captured"] == found["replayed"] == 0
    assert_same(answers(found), expected)


@pytest.mark.slow
def test_graphs(results: dict[str, Any], expected: list[Answer]) -> None:
    found = result(results, "raw, graphs")
    assert found["captured"] == 2
    assert found["replayed"] > 0
    assert found["steps"]["padding"] > 0
    assert_same(answers(found), expected)


@pytest.mark.slow
def test_windows(results: dict[str, Any], windowed: str) -> None:
    found = result(results, "windows, graphs")
    assert found["captured"] == 2
    assert found["replayed"] > 0
    assert_same(answers(found), [greedy(windowed, p, TOKENS) for p in (*PROMPTS, LONG)])
    # What is beyond one block of two pages is found again.
    assert answers(found)[-1].num_cached_tokens == 256


@pytest.mark.slow
def test_skipped_layers(results: dict[str, Any], expected: list[Answer]) -> None:
    """vLLM's own attention in one layer and ours in the other, in one pool."""
    assert_same(answers(result(results, "skipped layers")), expected)


@pytest.mark.slow
def test_layers_that_share_caches(results: dict[str, Any]) -> None:
    found = result(results, "shared")
    assert found["reference_calls"] > 0
    assert_same(answers(found), [greedy(gemma3n(5, 2), prompt, TOKENS) for prompt in PROMPTS])


@pytest.mark.slow
def test_quantized_with_drafts(results: dict[str, Any], model: str) -> None:
    found, reference = result(results, "kivi2, graphs"), result(results, "kivi2, reference")
    assert found["captured"] == 2
    assert found["replayed"] > 0
    assert found["steps"]["padding"] > 0
    assert found["reference_calls"] == 0
    assert reference["reference_calls"] > 0
    for steps in (found["steps"], reference["steps"]):
        assert steps["with_drafts"] > 0
        # 4 chunks of prompts and a step for each further token, were no draft accepted;
        # with all accepted, a step for 4 tokens.
        assert 4 + 3 * 2 < steps["rows"] < 4 + 3 * (DRAFTED_TOKENS - 1)
    one, other = answers(found), answers(reference)
    assert [a.num_cached_tokens for a in one] == [0, 0, 256]
    assert [a.num_cached_tokens for a in other] == [0, 0, 256]
    assert_same(one, other)
    # What quantization does is far larger than the tolerance.
    assert one[0].difference(greedy(model, RETURNING, DRAFTED_TOKENS)) > 50 * SAME


@pytest.mark.slow
def test_eagle(results: dict[str, Any]) -> None:
    """On vLLM's second model runner, the steps of a draft in one graph."""
    found = result(results, "eagle, graphs")
    assert found["captured"] >= 4  # decodes of the model, the first and the later steps of a draft
    assert found["replayed"] > 0
    assert found["steps"]["with_drafts"] > 0
    prompts = [prompt for batch in BATCHES for prompt in batch]
    truth = [greedy(foreseeable(head_dim=64), prompt, DRAFTED_TOKENS) for prompt in prompts]
    assert_same(answers(found), truth)
    assert [a.num_cached_tokens for a in answers(found)] == [0, 0, 128]  # a block is dropped


def test_compute_capability(configured: dict[str, Any]) -> None:
    refused = result(configured, "Turing")
    assert refused["type"] == "KiviConfigError"
    assert "compute capability 7.5" in refused["message"]
    assert "8.0 or newer" in refused["message"]
    assert "use --kv-cache-dtype auto or fp8" in refused["message"]
    assert result(configured, "Ampere")["type"] is None


def test_float32(configured: dict[str, Any]) -> None:
    refused = result(configured, "float32")
    assert refused["type"] == "KiviConfigError"
    assert "float32 is not supported on GPUs" in refused["message"]
    assert "use --dtype bfloat16" in refused["message"]
