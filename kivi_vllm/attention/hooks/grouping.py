"""What vLLM is told of the cache groups that `groups.planner` makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kivi_vllm.config import BLOCK_SIZE, KiviConfigError, is_kivi


def planned(original: Callable) -> Callable:
    """`get_kv_cache_groups`, for models whose layers differ."""

    def get_kv_cache_groups(vllm_config: Any, kv_cache_spec: Any) -> Any:
        from kivi_vllm.attention.groups import planner
        from kivi_vllm.attention.hooks import drafts

        cache_config = vllm_config.cache_config
        if planner.is_needed(kv_cache_spec.values()):
            plan = planner.plan_for(vllm_config, kv_cache_spec)
            groups = plan.groups
            if cache_config.mamba_cache_mode == "align":
                cache_config.mamba_block_size = plan.hit_stride
        else:
            groups = original(vllm_config, kv_cache_spec)
        if is_kivi(cache_config.cache_dtype):
            drafts.flag_groups(vllm_config, groups)
        return groups

    return get_kv_cache_groups


def steps_end_where_states_are_kept(original: Callable) -> Callable:
    """Let a hybrid's prompts be cut at multiples of what a block of states stands for.

    vLLM cuts them by the smallest block size of all groups, which it takes to be that of the
    states. Where some group of ours has a smaller one, a state would be cached as another's.
    """

    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        cache_config = vllm_config.cache_config
        if is_kivi(cache_config.cache_dtype) and cache_config.mamba_cache_mode == "align":
            cache_config.block_size = cache_config.mamba_block_size
        original(self, vllm_config, *args, **kwargs)

    return __init__


def block_outermost(original: Callable) -> Callable:
    """`resolve_kv_cache_layout`: a block holds whatever its group puts in."""

    def resolve_kv_cache_layout(
        vllm_config: Any, supported_layouts: list[list[str]], kv_cache_specs: Any = None
    ) -> Any:
        from vllm.v1.kv_cache_interface import KVCacheLayout

        from kivi_vllm.attention.groups import planner

        specs = tuple(kv_cache_specs or ())
        if planner.is_needed(specs):
            given = supported_layouts
            supported_layouts = [
                [name for name in names if KVCacheLayout[name].is_block_outermost]
                for names in given
            ]
            if not all(supported_layouts):
                raise KiviConfigError(
                    "the layers of this model differ, and so need a KV cache layout with the "
                    f"block outermost; its attention backends have {given} in common: leave out "
                    "--kv-cache-dtype-skip-layers, or give those layers another "
                    "--attention-backend"
                )
        return original(vllm_config, supported_layouts, specs)

    return resolve_kv_cache_layout


def keep_block_size(original: Callable) -> Callable:
    """`Platform._align_...`, which would pad pages to the size of what is larger."""

    def align(vllm_config: Any, backend_cls: Any) -> None:
        cache_config = vllm_config.cache_config
        if not is_kivi(cache_config.cache_dtype):
            original(vllm_config, backend_cls)
            return
        from kivi_vllm.attention.groups import planner
        from kivi_vllm.attention.layer import cache_specs

        # vLLM makes pages as large as a state, or as other layers', here; the plan makes blocks
        # that hold all.
        specs = cache_specs(vllm_config)
        if not planner.is_needed(specs.values()):  # no layer is ours
            original(vllm_config, backend_cls)
            return
        cache_config.block_size = BLOCK_SIZE
        if cache_config.mamba_cache_mode == "align":
            # The worker and the engine's core come to the same plan.
            cache_config.mamba_block_size = planner.plan_for(vllm_config, specs).hit_stride

    return align
