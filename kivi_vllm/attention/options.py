"""The options of an engine, out of vLLM's configuration."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from vllm.config import VllmConfig

from kivi_vllm.config import KiviConfig

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


@functools.cache
def with_options(cls: type[T], **attributes: Any) -> type[T]:
    """`cls` for one engine, with its options as attributes: vLLM takes classes, not instances."""
    return type(cls.__name__, (cls,), attributes)
