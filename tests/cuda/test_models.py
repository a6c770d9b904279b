"""Models whose layers differ on vLLM 0.33's CUDA code path: see `test_engine`.

What is beside our attention layers is vLLM's own, or stands in for it (`stand_ins`).
"""

from __future__ import annotations

from collections.abc import Callable
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
from tests.engine import MAMBA2, gemma3, gemma3n, tiny_model
from tests.models import pictures
from tests.models.test_families import FAMILIES
from tests.models.test_images import CACHED, SETTINGS, by_transformers, seeing_prompts

_LARGE_HEADS = dict(num_attention_heads=2, num_key_value_heads=1)
"""Of 64 channels, which the operators for GPUs serve."""

MODELS: dict[str, Callable[[], str]] = {
    # Two layers with a window and one without, whose pages come two to a block.
    "windows": lambda: gemma3("wwf", window=100),
    "shared caches": lambda: gemma3n(5, 2),
    "skipped layers": lambda: tiny_model(head_dim=64),
    "sink logits": lambda: FAMILIES["gpt-oss"].path,
    "Mamba-2": lambda: tiny_model(
        "granitemoehybrid",
        num_hidden_layers=4,
        layer_types=("mamba", "attention") * 2,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=64,
        **_LARGE_HEADS,
        **MAMBA2,
    ),
    "Mamba-1": lambda: tiny_model(
        "jamba",
        num_hidden_layers=2,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=1,
        num_experts_per_tok=1,
        mamba_d_state=16,
        mamba_dt_rank=16,
        **_LARGE_HEADS,
    ),
}

TASKS: dict[str, dict[str, Any]] = {
    "windows": dict(engine_args=GRAPHS, batches=[PROMPTS, [LONG]]),
    "shared caches": dict(operators="reference"),
    "skipped layers": dict(
        engine_args={
            "kv_cache_dtype_skip_layers": ["0"],
            "attention_config": {"backend": "TRITON_ATTN"},
            "kv_cache_memory_bytes": 64 << 20,
        },
        operators="reference",
    ),
    # The last prompt goes beyond the window.
    "sink logits": dict(engine_args=GRAPHS, batches=[[*PROMPTS[:2], PROMPTS[2][:140]]]),
    # Again, for the states that are cached: one at 256 tokens.
    "Mamba-2": dict(engine_args=GRAPHS, batches=[PROMPTS, PROMPTS[2:]]),
    "Mamba-1": dict(batches=[PROMPTS, PROMPTS[2:]], operators="reference"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All engines in one process, which must import vLLM first."""
    sources = sources_or_skip()
    tasks = {}
    for name, task in TASKS.items():
        engine_args = dict(model=MODELS[name](), kv_cache_dtype="kivi_raw")
        task = {"batches": [PROMPTS], "max_tokens": TOKENS, **task}
        tasks[name] = task | {"engine_args": engine_args | task.get("engine_args", {})}
    with pictures.image_processors():
        prompts, other = seeing_prompts()
        tasks["images"] = dict(
            engine_args=dict(
                model=pictures.gemma3().path,
                kv_cache_dtype="kivi_raw",
                additional_config={"kivi": CACHED},
                **SETTINGS,
            ),
            batches=[[p.tokens for p in prompts], [other.tokens, prompts[0].tokens]],
            images=[[p.images for p in prompts], [other.images, prompts[0].images]],
            max_tokens=TOKENS,
            operators="reference",  # the interpreter would take minutes for it
        )
    return results_in_child(sources, tmp_path_factory.mktemp("cuda"), tasks)


def check(results: dict[str, Any], name: str) -> dict[str, Any]:
    """Assert that one engine answered as transformers does; returns what it did."""
    found = result(results, name)
    prompts = [p for batch in TASKS[name].get("batches", [PROMPTS]) for p in batch]
    path = MODELS[name]()
    assert_same(answers(found), [greedy(path, prompt, TOKENS) for prompt in prompts])
    return found


@pytest.mark.slow
def test_windows(results: dict[str, Any]) -> None:
    found = check(results, "windows")
    assert found["captured"] == 2
    assert found["replayed"] > 0
    # What is beyond one block of two pages is found again.
    assert answers(found)[-1].num_cached_tokens == 256


@pytest.mark.slow
def test_skipped_layers(results: dict[str, Any]) -> None:
    """vLLM's own attention in one layer and ours in the other, in one pool."""
    check(results, "skipped layers")


@pytest.mark.slow
def test_layers_that_share_caches(results: dict[str, Any]) -> None:
    assert check(results, "shared caches")["reference_calls"] > 0


@pytest.mark.slow
def test_sink_logits(results: dict[str, Any]) -> None:
    """gpt-oss, with windows in every other layer."""
    assert check(results, "sink logits")["replayed"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mamba-1", "Mamba-2"])
def test_states_beside_pages(results: dict[str, Any], name: str) -> None:
    found = check(results, name)
    assert [a.num_cached_tokens for a in answers(found)] == [0, 0, 0, 256]
    assert (found["replayed"] > 0) == (name == "Mamba-2")


@pytest.mark.slow
def test_images_whose_tokens_see_each_other(results: dict[str, Any]) -> None:
    found = answers(result(results, "images"))
    prompts, other = seeing_prompts()
    with pictures.image_processors():
        # Causal attention would be off by more than is let pass.
        asked = [*prompts, other, prompts[0]]
        assert_same(found, by_transformers(asked, found))
    assert [a.num_cached_tokens for a in found] == [0, 0, 0, 0, 256]
    # Another image behind the same text is told apart.
    assert found[0].difference(found[3]) > SAME
