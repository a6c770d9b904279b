"""What a layer knows: refused while the model is built, should the check at start miss it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kivi_vllm.attention import refusals
from kivi_vllm.config import KiviConfigError
from tests.refusals.configs import engine_config


@pytest.fixture(autouse=True)
def _layers_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the check at start; and what an engine that fails half way leaves behind."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()  # of tests before, too
    monkeypatch.setattr(refusals, "_model", lambda vllm_config: iter(()))
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture
def config() -> Iterator[Any]:
    """A configuration in which single layers can be made."""
    from kivi_vllm.attention.hooks.capacity import _one_worker

    config = engine_config()
    with _one_worker(config):
        yield config


def _layer(config: Any, kind: type | None = None, **kwargs: Any) -> Any:
    from vllm.model_executor.layers.attention import Attention

    make: Any = kind or Attention
    given = {"cache_config": config.cache_config, "prefix": "l.0", **kwargs}
    return make(4, 32, 1.0, num_kv_heads=2, **given)


def test_special_layer(config: Any) -> None:
    from vllm.model_executor.layers.attention import Attention

    class Special(Attention):
        pass

    with pytest.raises(KiviConfigError, match="layers of type Special with backend KIVI"):
        _layer(config, Special)


def test_layer_with_a_backend_of_its_own(config: Any) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    with pytest.raises(KiviConfigError, match="type Attention with backend CPU_ATTN"):
        _layer(config, attn_backend=CPUAttentionBackend)


def test_values_of_another_head_size(config: Any) -> None:
    with pytest.raises(KiviConfigError, match="keys and values of one head size, not 32 and 64"):
        _layer(config, head_size_v=64)


@pytest.mark.parametrize("ours", ["reader", "owner"])
def test_a_shared_cache_of_two_kinds(config: Any, ours: str) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    context = config.compilation_config.static_forward_context
    impl = SimpleNamespace() if ours == "reader" else _layer(config).impl
    context["l.1"] = SimpleNamespace(impl=impl, attn_type="decoder")
    backend = {} if ours == "reader" else {"attn_backend": CPUAttentionBackend}
    context.pop("l.0", None)
    with pytest.raises(KiviConfigError, match=r"l\.0 reads the KV cache of l\.1, but just one"):
        _layer(config, kv_sharing_target_layer_name="l.1", **backend)


def test_a_shared_cache_with_a_smaller_window(config: Any) -> None:
    context = config.compilation_config.static_forward_context
    context["l.1"] = _layer(config, per_layer_sliding_window=100)
    del context["l.0"], context["l.0.kivi_ring"], context["l.0.kivi_sinks"]
    with pytest.raises(KiviConfigError, match=r"KV cache of l\.1, which keeps 100 tokens only"):
        _layer(config, kv_sharing_target_layer_name="l.1")


def test_a_shared_cache_of_an_attention_chunk(config: Any) -> None:
    from vllm.model_executor.layers.attention import ChunkedLocalAttention

    context = config.compilation_config.static_forward_context
    context["l.1"] = _layer(config, ChunkedLocalAttention, attention_chunk_size=256)
    del context["l.0"], context["l.0.kivi_ring"], context["l.0.kivi_sinks"]
    with pytest.raises(KiviConfigError, match=r"KV cache of l\.1, which keeps an attention chunk"):
        _layer(config, kv_sharing_target_layer_name="l.1")


def test_reading_without_writing(config: Any) -> None:
    layer = _layer(config)
    with pytest.raises(NotImplementedError, match="without new keys and values"):
        layer.impl.forward(layer, None, None, None, layer.kv_cache, None, None)


def test_attention_that_is_not_causal(config: Any) -> None:
    from kivi_vllm.attention.metadata import KiviMetadataBuilder

    builder = object.__new__(KiviMetadataBuilder)
    with pytest.raises(NotImplementedError, match="causal attention only"):
        builder.build(0, SimpleNamespace(causal=False))


def test_alibi_under_a_token_budget() -> None:
    from kivi_vllm.attention.hooks.capacity import _one_worker

    options = {"kivi": {"token_budget": 1024, "dense_layers": 1}}
    config = engine_config(additional_config=options)
    with _one_worker(config):
        _layer(config, alibi_slopes=[0.5] * 4)  # one of the first layers, which read all
        with pytest.raises(KiviConfigError, match=r"token_budget 1024 does not .* ALiBi .* out$"):
            _layer(config, prefix="l.1", alibi_slopes=[0.5] * 4)


@pytest.mark.parametrize(
    ("prefix", "window", "budget"),
    [
        ("model.layers.1.self_attn.attn", None, 0),
        ("model.layers.2.self_attn.attn", None, 1024),
        ("model.layers.12.self_attn.attn", 1152, 0),
        ("model.layers.12.self_attn.attn", 1153, 1024),
    ],
)
def test_layers_that_select(prefix: str, window: int | None, budget: int) -> None:
    from kivi_vllm.attention.hooks.capacity import _one_worker

    config = engine_config(additional_config={"kivi": {"token_budget": 1024}})
    with _one_worker(config):
        layer = _layer(config, prefix=prefix, per_layer_sliding_window=window)
    assert layer.impl.params.token_budget == budget
