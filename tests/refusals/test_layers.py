"""What a layer knows: refused while the model is built, should the check at start miss it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kivi_vllm.attention import support
from kivi_vllm.config import KiviConfigError
from tests.engine import engine
from tests.refusals.configs import gemma3n, gpt_oss


@pytest.fixture(autouse=True)
def _layers_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the check at start; and what an engine that fails half way leaves behind."""
    monkeypatch.setattr(support, "_model", lambda vllm_config: iter(()))
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
    assert _refusal(gpt_oss()) == (
        "--kv-cache-dtype kivi2 cannot serve this model: attention sinks not supported; "
        "use --kv-cache-dtype auto or fp8"
    )


def test_kv_cache_shared_between_layers() -> None:
    message = _refusal(gemma3n())
    assert "KV cache sharing between layers" in message
    assert message.endswith("use --kv-cache-dtype auto or fp8")
