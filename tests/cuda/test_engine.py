"""Whole engines on vLLM 0.33's CUDA code path, with the Triton operators interpreted.

There is no GPU (see `fake_device`): what is tested is what vLLM's GPU worker asks of the
backend, and what the operators make of it. How they compile and how fast they are is not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cuda.child import GRAPHS, results_in_child
from tests.cuda.harness import (
    LONG,
    PROMPTS,
    SAME,
    TOKENS,
    answers,
    assert_same,
    greedy,
    result,
    sources_or_skip,
)
from tests.drafts import eagle, foreseeable
from tests.engine import Answer, random_prompt, tiny_model
from tests.offload import offloaded

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


@pytest.fixture(scope="module")
def model() -> str:
    # Weights at which some drafts come true and some do not, while no token is chosen by
    # less than 0.07 in log-probability over the next best, in any of the cases here.
    return tiny_model(head_dim=64, tie_word_embeddings=True, initializer_range=0.085)


@pytest.fixture(scope="module")
def sources() -> Path:
    return sources_or_skip()


@pytest.fixture(scope="module")
def results(sources: Path, model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All engines in one process, which must import vLLM first."""
    raw = dict(model=model, kv_cache_dtype="kivi_raw")
    quantized = dict(model=model, **QUANTIZED)
    tasks: dict[str, dict[str, Any]] = {
        "raw": dict(engine_args=raw, batches=[PROMPTS], max_tokens=TOKENS),
        "raw, graphs": dict(engine_args={**raw, **GRAPHS}, batches=[PROMPTS], max_tokens=TOKENS),
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
        "offloaded": dict(
            engine_args={
                **raw,
                "num_gpu_blocks_override": 16,
                **offloaded(64 << 20),
            },
            batches=[[LONG], *([random_prompt(450, seed=seed)] for seed in (2, 3, 4)), [LONG]],
            max_tokens=2,
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
        "graphs": dict(engine_args=dict(kivi2, dtype="bfloat16", **GRAPHS), capability=[8, 0]),
    }
    checked = {"KIVI_VLLM_CHECK_PAGES": "1"}  # the others have no graphs
    return results_in_child(sources, tmp_path_factory.mktemp("cuda"), tasks, **checked)


@pytest.fixture(scope="module")
def expected(model: str) -> list[Answer]:
    """What transformers answers to `PROMPTS`."""
    return [greedy(model, prompt, TOKENS) for prompt in PROMPTS]


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
def test_offloaded(results: dict[str, Any]) -> None:
    """vLLM's own copies, thread and all; the pool has no room for what comes again."""
    found = result(results, "offloaded")
    first, *_, last = answers(found)
    assert_same([last], [first])
    assert (first.num_cached_tokens, last.num_cached_tokens) == (0, 384)


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
    # vLLM 0.33's hashes know the next token: no block is dropped.
    assert [a.num_cached_tokens for a in answers(found)] == [0, 0, 256]


@pytest.mark.slow
def test_eagle_with_the_kernels(sources: Path, tmp_path: Path) -> None:
    """The same with Triton's operators, which are interpreted: one short prompt, quantized."""
    model = foreseeable(head_dim=64)
    task = dict(
        engine_args=dict(
            model=model,
            kv_cache_dtype="kivi2",
            additional_config={"kivi": {"residual_length": 0}},
            speculative_config=dict(method="eagle", model=eagle(model), num_speculative_tokens=3),
            **DRAFT_GRAPHS,
        ),
        batches=[[random_prompt(150, seed=5)]],
        max_tokens=4,
    )
    tasks = {"triton": task, "reference": {**task, "operators": "reference"}}
    results = results_in_child(sources, tmp_path, tasks)
    found, reference = result(results, "triton"), result(results, "reference")
    assert found["reference_calls"] == 0 < reference["reference_calls"]
    assert found["captured"] >= 4
    assert found["replayed"] > 0
    assert found["steps"]["with_drafts"] > 0
    assert_same(answers(found), answers(reference))


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


def test_checked_page_ids_with_graphs(configured: dict[str, Any]) -> None:
    refused = result(configured, "graphs")
    assert refused["type"] == "KiviConfigError"
    assert "KIVI_VLLM_CHECK_PAGES=1 looks at the device in every step" in refused["message"]
    assert "add --enforce-eager" in refused["message"]
