"""Pipeline parallelism changes nothing: stages of unequal depth, each with its layers' caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import engine, gemma3, generate, tiny_model
from tests.models.child import WORKERS, assert_same, results_in_child
from tests.models.harness import PROMPTS, capacity, own_attention

# vLLM's CPU workers serve no eager pipeline: traced by Dynamo and run as it is.
COMPILED: dict[str, Any] = dict(
    enforce_eager=False, compilation_config={"mode": 2, "backend": "eager"}
)
ENVIRONMENT = dict(WORKERS, TORCH_COMPILE_DISABLE="0", VLLM_USE_AOT_COMPILE="0")


@pytest.mark.slow
def test_two_stages_equal_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    model = tiny_model(num_hidden_layers=3)  # stages of 2 and 1
    settings = dict(
        kivi={"prefill": "cached"},  # whatever the chunks of a prompt are
        max_num_batched_tokens=200,
        **COMPILED,
    )
    expected = own_attention(model, max_tokens=12)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "0")
    with torch._dynamo.config.patch(disable=False), engine(model, "kivi2", **settings) as llm:
        quantized = generate(llm, PROMPTS, 12)
        tokens = capacity(llm)
    assert [a.tokens for a in quantized] != [a.tokens for a in expected]

    stages = dict(pipeline_parallel_size=2, distributed_executor_backend="mp", **settings)
    run = dict(kv_cache_dtype="kivi2", **stages)
    [found] = results_in_child(tmp_path, model, [run], **ENVIRONMENT)
    assert_same(found, quantized)
    # The deepest stage decides: 2 layers in the memory that one worker has for 3.
    assert found["capacity"] == pytest.approx(tokens * 3 / 2, rel=0.01)


@pytest.mark.slow
def test_windows_in_stages(tmp_path: Path) -> None:
    """Lossless, in planned groups; the second stage has windowed layers alone."""
    model = gemma3("wwfww")
    expected = own_attention(model, max_tokens=12)
    stages = dict(
        pipeline_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=200,
        **COMPILED,
    )
    [found] = results_in_child(
        tmp_path, model, [dict(kv_cache_dtype="kivi_raw", **stages)], **ENVIRONMENT
    )
    assert_same(found, expected)
