"""The options of an engine, out of vLLM's configuration."""

from __future__ import annotations

from vllm.config import VllmConfig

from kivi_vllm.config import KiviConfig


def kivi_config(vllm_config: VllmConfig) -> KiviConfig:
    """The configuration of an engine whose cache dtype is one of `DTYPES`.

    It is asked for where an engine starts (`refusals`) and where a worker selects the backend
    of a layer (`hooks.wraps`); the classes that vLLM then makes carry it with them.

    Raises:
        KiviConfigError: an unknown option or a value out of range.

    """
    additional = vllm_config.additional_config
    options = additional.get("kivi", {}) if isinstance(additional, dict) else {}
    return KiviConfig.from_options(str(vllm_config.cache_config.cache_dtype), options)
