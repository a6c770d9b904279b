"""What only a layer knows: refused while the model is built, through `LLM(...)`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kivi_vllm.config import KiviConfigError
from tests.engine import engine
from tests.refusals.configs import config_only


@pytest.fixture(autouse=True)
def _clean_up() -> Iterator[None]:
    """What an engine that fails half way leaves behind."""
    yield
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _refusal(model: str, **kwargs: Any) -> str:
    with (
        pytest.raises(KiviConfigError) as caught,
        engine(model, load_format="dummy", **kwargs),
    ):
        pass
    return str(caught.value)


def test_attention_sinks() -> None:
    model = config_only(
        "gpt_oss", "GptOssForCausalLM", num_local_experts=2, num_experts_per_tok=1, head_dim=64
    )
    assert _refusal(model) == (
        "--kv-cache-dtype kivi2 cannot serve this model: attention sinks not supported; "
        "use --kv-cache-dtype auto or fp8"
    )


def test_kv_cache_shared_between_layers() -> None:
    model = config_only(
        "gemma3n_text",
        "Gemma3nForCausalLM",
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        intermediate_size=[256] * 4,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        head_dim=64,
        vocab_size_per_layer_input=512,
        hidden_size_per_layer_input=32,
        laurel_rank=8,
    )
    message = _refusal(model)
    assert "KV cache sharing between layers" in message
    assert message.endswith("use --kv-cache-dtype auto or fp8")
