"""The options of an engine, out of vLLM's configuration."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from vllm.config import VllmConfig
from vllm.platforms import current_platform

from kivi_vllm.config import KiviConfig, is_kivi

T = TypeVar("T")


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


def layer_config(vllm_config: VllmConfig | None, cache_dtype: str) -> KiviConfig | None:
    """The configuration of a layer with this cache dtype; None: its cache is not ours.

    Layers that `--kv-cache-dtype-skip-layers` leaves out have vLLM's backend on GPUs. On CPUs
    that wants another layout of the pool than ours; there they keep tokens as they are in ours.
    """
    if vllm_config is None or not is_kivi(engine := vllm_config.cache_config.cache_dtype):
        return None
    config = kivi_config(vllm_config)
    if cache_dtype == engine:
        return config
    skipped = cache_dtype == "auto" and vllm_config.cache_config.kv_cache_dtype_skip_layers
    if not (skipped and current_platform.is_cpu()):
        return None
    return KiviConfig.from_options("kivi_raw", {"prefill": config.prefill})


@functools.cache
def with_options(cls: type[T], **attributes: Any) -> type[T]:
    """`cls` for one engine, with its options as attributes: vLLM takes classes, not instances."""
    return type(cls.__name__, (cls,), attributes)
