"""torch.compile and tensor parallelism change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import engine, gemma3n, generate, tiny_model
from tests.models.child import results_in_child
from tests.models.harness import LOSSLESS, PROMPTS, own_attention, worst


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["llama", "gemma3n"])
def test_compiled_model_equals_the_eager_one(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, shared keys and values would be overwritten by what comes next, if not kept."""
    import torch._dynamo

    model = gemma3n(4, 1) if shared else tiny_model()
    expected = own_attention(model)
    # `tests.engine` switches compilation off for all others.
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    settings = dict(enforce_eager=False, max_num_batched_tokens=200)
    with torch._dynamo.config.patch(disable=False), engine(model, "kivi_raw", **settings) as llm:
        compilation = llm.llm_engine.vllm_config.compilation_config
        assert compilation.mode.name != "NONE"
        assert compilation.backend == "inductor"
        assert worst(generate(llm, PROMPTS, 20), expected) < LOSSLESS
    assert graphs["unique_graphs"] > before


@pytest.mark.slow
def test_tensor_parallel_over_two_processes_equals_one(tmp_path: Path) -> None:
    model = tiny_model(num_key_value_heads=4)
    expected = own_attention(model, max_tokens=12)
    run = dict(
        kv_cache_dtype="kivi_raw",
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        max_num_batched_tokens=200,
    )
    [parallel] = results_in_child(
        tmp_path,
        model,
        [run],
        VLLM_ENABLE_V1_MULTIPROCESSING="1",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # `backends` sends a function to the workers
    )
    assert parallel["backends"] == ["KIVI"]
    for answer, tokens, logprobs in zip(
        expected, parallel["tokens"], parallel["logprobs"], strict=True
    ):
        assert list(answer.tokens) == tokens
        assert list(answer.logprobs) == pytest.approx(logprobs, abs=LOSSLESS)
