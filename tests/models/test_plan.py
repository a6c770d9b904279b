"""`kivi-vllm plan` and a real engine give the same figures."""

from __future__ import annotations

from typing import Any

import pytest

from kivi_vllm.cli import plan
from kivi_vllm.cli.errors import UserError
from tests.engine import engine, tiny_model

WINDOWED: dict[str, Any] = dict(
    num_hidden_layers=4,
    head_dim=64,
    sliding_window=256,
    query_pre_attn_scalar=64,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize(
    ("family", "shape", "dtype", "residual"),
    [
        ("llama", {}, "auto", 0),
        ("llama", {}, "kivi2", 0),
        ("llama", {}, "kivi4", 32),
        ("gemma2", WINDOWED, "auto", 0),
        ("gemma2", WINDOWED, "kivi_k4v3", 0),
    ],
    ids=lambda value: str(value) if not isinstance(value, dict) else "",
)
def test_plan_is_what_the_engine_reports(
    family: str, shape: dict[str, Any], dtype: str, residual: int
) -> None:
    model = tiny_model(family, **shape)
    options = {"kivi": {"residual_length": residual}} if residual else {}
    common: dict[str, Any] = dict(additional_config=options, max_num_batched_tokens=512)
    planned = plan.capacity(model, dtype, 24 << 20, 1024, dtype="float32", **common)
    with engine(model, dtype, kv_cache_memory_bytes=24 << 20, **common) as llm:
        reported = llm.llm_engine.vllm_config.cache_config
        assert planned.tokens == reported.kv_cache_size_tokens
        assert planned.sequences == reported.kv_cache_max_concurrency
    assert planned.tokens > 1024


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("20GiB", 20 << 30),
        ("1.5 GB", 1_500_000_000),
        ("512mib", 512 << 20),
        ("268435456", 268435456),
    ],
)
def test_memory(text: str, size: int) -> None:
    assert plan.parse_memory(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "much", "-1GiB", "0", "20 GiX", "1e9", "1,5GB", "1.5.5GB", "8GB or 16GB", "20G", "20Gbit"],
)
def test_no_memory(text: str) -> None:
    with pytest.raises(UserError, match="is not a size") as caught:
        plan.parse_memory(text)
    assert "20GiB" in caught.value.remedy


def test_options_that_are_no_object() -> None:
    with pytest.raises(UserError, match="is no JSON object"):
        plan.plan_table("model", "1GiB", None, "residual_length=32")
