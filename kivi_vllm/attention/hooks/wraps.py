"""What vLLM lacks a hook for, and is therefore wrapped.

There is no way to select a backend by cache dtype, to give a layer a second cache, and to let
a cache group's manager see more of a request than its id. `patches/` holds what vLLM would have
to take for this module to shrink. What differs between its versions is in files of their own.

Every function here may run several times in one process.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kivi_vllm.config import KiviConfigError, is_kivi


def register_backend_name() -> None:
    """Give vLLM's backend enumeration a member for us (it looks names up there)."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if "KIVI" not in AttentionBackendEnum.__members__:
        register_backend("KIVI", "kivi_vllm.attention.backend.KiviAttentionBackend")


def register_cache_specs() -> None:
    """Register ours, after vLLM's own specs: it skips those when any are there."""
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST, KVCacheSpecRegistry

    from kivi_vllm.attention.groups import pages, ring, sinks, tails

    if not _REGISTRY_KVCACHESPEC_LIST:
        register_all_kvcache_specs(None)
    for spec, manager, base in (
        (pages.PageSpec, pages.PageManager, FullAttentionSpec),
        (pages.WindowPageSpec, pages.WindowPageManager, pages.WindowPageSpec),
        (pages.ChunkPageSpec, pages.ChunkPageManager, pages.ChunkPageSpec),
        (ring.RingSpec, ring.RingManager, ring.RingSpec),
        (tails.TailSpec, tails.TailManager, tails.TailSpec),
        (sinks.SinkSpec, sinks.SinkManager, sinks.SinkSpec),
    ):
        KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=base)


def select_backend_by_dtype() -> None:
    """Choose our backend for layers with one of our dtypes, vLLM's for all others."""
    from vllm.v1.attention import selector

    def make(original: Callable) -> Callable:
        def choose(backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any) -> Any:
            from vllm.config.vllm import get_current_vllm_config_or_none

            from kivi_vllm.attention.backend import select_backend
            from kivi_vllm.attention.options import layer_config

            cache_dtype = attn_selector_config.kv_cache_dtype
            config = layer_config(get_current_vllm_config_or_none(), cache_dtype)
            if config is None:
                return original(backend, attn_selector_config, *args, **kwargs)
            return select_backend(
                attn_selector_config._replace(kv_cache_dtype=config.dtype), config
            )

        choose.cache_clear = original.cache_clear  # type: ignore[attr-defined]
        return choose

    _wrap(selector, "_cached_get_attn_backend", make)


def attach_residual_to_layers() -> None:
    """Give every layer with one of our dtypes its ring, tails and sinks as it is made.

    The implementation never learns its layer's name, so this is the place.
    """
    from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

    def make(original: Callable) -> Callable:
        signature = inspect.signature(original)

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            from vllm.config import get_current_vllm_config

            # Falcon leaves its layers' cache configuration out: they would take the
            # default dtype, whatever the user chose, without a word.
            given = signature.bind(self, *args, **kwargs).arguments.get("cache_config")
            cache_config = get_current_vllm_config().cache_config
            if given is None and is_kivi(cache_config.cache_dtype):
                kwargs["cache_config"] = cache_config
            original(self, *args, **kwargs)
            if not is_kivi(cache_config.cache_dtype):
                return
            from kivi_vllm.attention.hooks import drafts
            from kivi_vllm.attention.layer import attach, check_shared_cache

            # Not earlier: importing vLLM's drafts imports its models.
            if proposer := drafts.proposer():
                _wrap(proposer, "load_model", drafts.without_residual)
            check_shared_cache(self)
            ours = hasattr(self.impl, "bind_residual")
            if not ours and not is_kivi(self.kv_cache_dtype):
                return
            # Prefix-LM and other special layers put a backend of their own making around
            # the selected one; what it changes would go unnoticed.
            if type(self) not in (Attention, ChunkedLocalAttention) or not ours:
                raise KiviConfigError(
                    f"--kv-cache-dtype {self.kv_cache_dtype}: attention layers of type "
                    f"{type(self).__name__} with backend {self.attn_backend.get_name()} are "
                    "not supported; use --kv-cache-dtype auto or fp8 for this model"
                )
            attach(self, self.impl.config)
            if type(self) is ChunkedLocalAttention:
                self.impl.attend_in_chunks(self.attention_chunk_size)

        return __init__

    _wrap(Attention, "__init__", make)


def keep_batches_of_chunked_layers() -> None:
    """Leave our backend to chunked local layers as it is: its kernels know chunks.

    vLLM puts a backend around the selected one that makes every chunk a request.
    """
    from vllm.model_executor.layers.attention import chunked_local_attention

    def make(original: Callable) -> Callable:
        def create(underlying_attn_backend: Any, *args: Any, **kwargs: Any) -> Any:
            if underlying_attn_backend.get_name() == "KIVI":
                return underlying_attn_backend
            return original(underlying_attn_backend, *args, **kwargs)

        return create

    _wrap(chunked_local_attention, "create_chunked_local_attention_backend", make)


def show_requests_to_managers() -> None:
    """Let our managers see a request before they give it pages: vLLM tells them its id alone."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from kivi_vllm.attention.groups.base import SparseManager

    def make(original: Callable) -> Callable:
        def allocate_slots(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            for manager in self.coordinator.single_type_managers:
                if isinstance(manager, SparseManager):
                    manager.observe(request)
            return original(self, request, *args, **kwargs)

        return allocate_slots

    _wrap(KVCacheManager, "allocate_slots", make)


def plan_cache_groups() -> None:
    """Make the cache groups of models whose layers differ; see `groups.planner`.

    It takes a layout in which a block is outermost, and a block of vLLM's states as long as ours.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends import utils
    from vllm.v1.core.sched.scheduler import Scheduler

    from kivi_vllm.attention import hooks
    from kivi_vllm.attention.hooks import grouping

    _wrap(hooks.of_this_version().grouping_module(), "get_kv_cache_groups", grouping.planned)
    _wrap(Scheduler, "__init__", grouping.steps_end_where_states_are_kept)
    _wrap(utils, "resolve_kv_cache_layout", grouping.block_outermost)
    core = sys.modules.get("vllm.v1.engine.core")
    if core is not None:  # it has imported the name
        core.resolve_kv_cache_layout = utils.resolve_kv_cache_layout  # type: ignore[attr-defined]
    _wrap(type(current_platform), "_align_hybrid_block_size", grouping.keep_block_size)
    _wrap(type(current_platform), "_align_heterogeneous_kv_block_size", grouping.keep_block_size)


def keep_images_whole() -> None:
    """Let no step of the scheduler end within an image whose tokens see each other."""
    from vllm.v1.core.sched.scheduler import Scheduler

    from kivi_vllm.attention.hooks.images import whole_images

    _wrap(Scheduler, "_try_schedule_encoder_inputs", whole_images)


def check_engine_config() -> None:
    """Refuse what cannot be served as soon as vLLM has put its configuration together."""
    from vllm.engine.arg_utils import EngineArgs

    def make(original: Callable) -> Callable:
        def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
            vllm_config = original(self, *args, **kwargs)
            from kivi_vllm.attention.connectors import use_ours
            from kivi_vllm.attention.hooks.images import ask_for_whole
            from kivi_vllm.attention.refusals import check

            ask_for_whole(vllm_config)

            try:
                check(vllm_config)
            except KiviConfigError as error:
                if _is_vllm_command_line():
                    sys.exit(f"error: {error}")
                raise
            if is_kivi(vllm_config.cache_config.cache_dtype):
                use_ours(vllm_config)
            return vllm_config

        return create_engine_config

    _wrap(EngineArgs, "create_engine_config", make)


def _is_vllm_command_line() -> bool:
    """Whether this process is `vllm ...`: there, a message is better than a traceback."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name == "vllm" or bool(spec and spec.name.startswith("vllm."))


def publish_counts() -> None:
    """Let the server's metrics say what generated tokens have read of pages."""
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.loggers import StatLoggerManager
    from vllm.v1.outputs import ModelRunnerOutput

    from kivi_vllm.attention.hooks import counts

    _wrap(ModelRunnerOutput, "__init__", counts.answer)
    _wrap(Scheduler, "update_from_output", counts.keep)
    _wrap(Scheduler, "make_stats", counts.send)
    _wrap(StatLoggerManager, "record", counts.receive)


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace `owner.name` by `make(owner.name)`, once."""
    original = getattr(owner, name)
    if getattr(original, "_kivi_wrapped", False):
        return
    wrapper: Any = functools.wraps(original)(make(original))
    wrapper._kivi_wrapped = True
    setattr(owner, name, wrapper)
