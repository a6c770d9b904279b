"""vLLM 0.33: a registry for cache dtypes, and cache groups that are made beforehand."""

from __future__ import annotations

from typing import Any

import torch

from kivi_vllm.config import ACCEPTED_DTYPES


def register_dtypes() -> None:
    """Register our names for `--kv-cache-dtype`, as bytes."""
    from vllm.config.cache import get_kv_cache_dtype_handler, register_kv_cache_dtype
    from vllm.v1.kv_cache_interface import KVQuantMode

    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> Any:
            # In 0.33 CUSTOM is also true for `is_octave`; only a spec of an
            # Octave backend asks that. See patches/README.md.
            return KVQuantMode.CUSTOM

    for name in ACCEPTED_DTYPES:
        if get_kv_cache_dtype_handler(name) is None:
            register_kv_cache_dtype(name)(type("KiviDType", (Handler,), {"name": name}))


def grouping_module() -> Any:
    """The module whose `get_kv_cache_groups` vLLM calls."""
    from vllm.v1.core import kv_cache_planning

    return kv_cache_planning


def get_kv_cache_configs(vllm_config: Any, specs: list, memory: list[int]) -> list:
    """Cache configurations of workers that have these layers and so many bytes."""
    from vllm.v1.core import kv_cache_planning

    groups = kv_cache_planning.get_global_kv_cache_groups(vllm_config, specs)
    return kv_cache_planning.get_kv_cache_configs(vllm_config, specs, memory, groups)
