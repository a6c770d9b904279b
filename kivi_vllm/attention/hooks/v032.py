"""vLLM 0.32: a closed list of cache dtypes, which is extended."""

from __future__ import annotations

import sys
from typing import Any, get_args

import torch

from kivi_vllm.config import ACCEPTED_DTYPES


def register_dtypes() -> None:
    """Make vLLM accept our names for `--kv-cache-dtype`, as bytes."""
    import vllm.config.cache as cache_config
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(ACCEPTED_DTYPES, torch.uint8))
    literal: Any = cache_config.CacheDType
    missing = [name for name in ACCEPTED_DTYPES if name not in get_args(literal)]
    if not missing:
        return
    # argparse's choices, the selector and pydantic all read this one object.
    literal.__args__ = (*literal.__args__, *missing)
    rebuild_dataclass(cache_config.CacheConfig, force=True)
    config = sys.modules.get("vllm.config.vllm")
    if config is not None:
        rebuild_dataclass(config.VllmConfig, force=True)
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is not None:
        arg_utils._compute_kwargs.cache_clear()


def grouping_module() -> Any:
    """The module whose `get_kv_cache_groups` vLLM calls."""
    from vllm.v1.core import kv_cache_utils

    return kv_cache_utils


def get_kv_cache_configs(vllm_config: Any, specs: list, memory: list[int]) -> list:
    """Cache configurations of workers that have these layers and so many bytes."""
    from vllm.v1.core import kv_cache_utils

    return kv_cache_utils.get_kv_cache_configs(vllm_config, specs, memory)
