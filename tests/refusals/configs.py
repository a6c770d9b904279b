"""Models that are a config and nothing else, and vLLM's engine configuration for them."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kivi_vllm.config import KiviConfigError
from tests.engine import BASE, SETTINGS


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="kivi-configs-"))


def config_only(
    model_type: str = "llama", architecture: str = "LlamaForCausalLM", **overrides: Any
) -> str:
    """Path of a model without weights."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **{**BASE, **overrides})
    config.architectures = [architecture]
    path = Path(tempfile.mkdtemp(dir=_folder()))
    config.save_pretrained(path)
    return str(path)


def engine_config(model: str | None = None, **kwargs: Any) -> Any:
    """vLLM's complete configuration, as `LLM()` and `vllm serve` make it."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {"kv_cache_dtype": "kivi2", **SETTINGS, **kwargs}
    args = EngineArgs(model=model or config_only(), **settings)
    return args.create_engine_config()


def refusal(model: str | None = None, **kwargs: Any) -> str:
    """The message with which our plugin refuses a configuration."""
    with pytest.raises(KiviConfigError) as caught:
        engine_config(model, **kwargs)
    return str(caught.value)


def llama4(chunk_size: int = 256) -> str:
    """A model with chunked local attention."""
    return config_only(
        "llama4_text",
        "Llama4ForCausalLM",
        head_dim=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        attention_chunk_size=chunk_size,
    )
