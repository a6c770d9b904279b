"""torch.compile and tensor parallelism change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine import engine, gemma3n, generate, random_prompt, tiny_model
from tests.models.child import WORKERS, assert_same, results_in_child
from tests.models.harness import LOSSLESS, PROMPTS, own_attention, worst

TWO = dict(tensor_parallel_size=2, distributed_executor_backend="mp")


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
    run = dict(kv_cache_dtype="kivi_raw", max_num_batched_tokens=200, **TWO)
    [parallel] = results_in_child(tmp_path, model, [run], **WORKERS)
    assert_same(parallel, expected)


@pytest.mark.slow
def test_two_processes_choose_the_pages_that_one_chooses(tmp_path: Path) -> None:
    """Each for its own heads of keys and values."""
    run: dict[str, Any] = dict(
        kv_cache_dtype="kivi_k3v2",
        kivi={"token_budget": 1024, "dense_layers": 0},
        prompts=[random_prompt(n, seed=n) for n in (1500, 1400)],
        max_model_len=1536,
        kv_cache_memory_bytes=64 << 20,
    )
    model = tiny_model(num_key_value_heads=4)
    one, two = results_in_child(tmp_path, model, [run, run | TWO], **WORKERS)
    assert one["tokens"] == two["tokens"]
    # Sums in another order may round a key to another code. Without a budget that alone has made a
    # difference of 0.02; other pages make some of 1.5 and 0.3.
    for alone, together in zip(one["logprobs"], two["logprobs"], strict=True):
        assert alone == pytest.approx(together, abs=0.1)
    [[seen, read]] = one["pages_counted"]
    assert 0 < read < seen
    assert two["pages_counted"] == [[seen // 2, read // 2]] * 2
