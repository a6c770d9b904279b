"""How much fits: vLLM's own accounting, run on a model's config without its weights.

The model is built on torch's meta device, its layers report their cache specs, and
vLLM's functions turn those and a memory size into the figures that it logs at
start ("KV cache size: ... tokens"). Nothing here repeats that arithmetic.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivi_vllm.attention import hooks

if TYPE_CHECKING:
    from kivi_vllm.attention.groups.shown import Part


@dataclass(frozen=True)
class Capacity:
    """What vLLM reports at start for one cache dtype.

    Attributes:
        cache_dtype: as given to `--kv-cache-dtype`.
        raw_dtype: the model's own dtype, which `auto` stores.
        max_model_len: longest sequence.
        tokens: "KV cache size", in tokens.
        sequences: "Maximum concurrency" at `max_model_len`.
        hits_at: tokens on whose multiples prefix hits land; None without prefix caching.
        parts: how the layers share the memory.

    """

    cache_dtype: str
    raw_dtype: str
    max_model_len: int
    tokens: int
    sequences: float
    hits_at: int | None
    parts: list[Part]


def capacity(
    model: str, cache_dtype: str, memory_bytes: int, max_model_len: int | None = None, **engine: Any
) -> Capacity:
    """What vLLM would report for `model` with this cache dtype and memory.

    Args:
        model: folder or name, as for `vllm serve`; only its config is read.
        cache_dtype: as for `--kv-cache-dtype`.
        memory_bytes: as for `--kv-cache-memory-bytes`.
        max_model_len: as for `--max-model-len`; None: the model's own.
        engine: further vLLM engine arguments.

    Raises:
        ValueError: what vLLM, or this project, says of a configuration that it
            cannot serve.

    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins
    from vllm.v1.core.kv_cache_utils import (
        generate_scheduler_kv_cache_config,
        get_kv_cache_capacity,
    )

    from kivi_vllm.attention.groups import shown

    load_general_plugins()
    args = EngineArgs(
        model=model,
        kv_cache_dtype=cache_dtype,
        kv_cache_memory_bytes=memory_bytes,
        max_model_len=max_model_len,
        skip_tokenizer_init=True,
        enforce_eager=True,
        load_format="dummy",
        **engine,
    )
    config = args.create_engine_config()
    with _one_worker(config):
        specs = _cache_specs(config)
    configs = hooks.of_this_version().get_kv_cache_configs(config, [specs], [memory_bytes])
    pool = generate_scheduler_kv_cache_config(configs)
    tokens, sequences = get_kv_cache_capacity(config, pool)
    return Capacity(
        cache_dtype=cache_dtype,
        raw_dtype=str(config.model_config.dtype).removeprefix("torch."),
        max_model_len=config.model_config.max_model_len,
        tokens=tokens,
        sequences=sequences,
        hits_at=shown.hits_at(pool.kv_cache_groups, config),
        parts=shown.parts(pool.kv_cache_groups, config),
    )


def _cache_specs(config: Any) -> dict[str, Any]:
    """Every layer's cache spec, as vLLM's worker collects them, without weights."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.utils import (
        get_supported_kv_cache_layouts,
        resolve_kv_cache_layout,
    )

    from kivi_vllm.attention.layer import cache_specs

    try:
        with _without_weights(config.model_config.dtype):
            initialize_model(config)
    except NotImplementedError as error:
        if "meta tensor" not in str(error):
            raise
        raise ValueError(
            "the model needs numbers while it is built, as of ALiBi slopes, which a plan has not; "
            "`vllm serve` logs what the cache holds, with --load-format dummy at once"
        ) from error
    current_platform.update_block_size_for_backend(config)
    specs = cache_specs(config)
    layers = get_layers_from_vllm_config(config, AttentionLayerBase)
    backends = list({layer.get_attn_backend(): None for layer in layers.values()})
    layouts = [layout.name for layout in get_supported_kv_cache_layouts(backends)]
    resolve_kv_cache_layout(config, [layouts], list(specs.values()))
    return specs


@contextmanager
def _without_weights(dtype: Any) -> Iterator[None]:
    """Models made inside have no weights, and leave nothing behind."""
    import torch
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.utils.torch_utils import set_default_torch_dtype

    # vLLM gives a rotary embedding that it has made once to every later model of this process.
    ropes = dict(_ROPE_DICT)
    try:
        with set_default_torch_dtype(dtype), torch.device("meta"):
            yield
    finally:
        _ROPE_DICT.clear()
        _ROPE_DICT.update(ropes)


@contextmanager
def _one_worker(config: Any) -> Iterator[None]:
    """The process groups of a single worker, which vLLM's layers ask for as they are made."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.distributed.parallel_state import (
        init_distributed_environment,
        initialize_model_parallel,
    )

    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(config):
        store = (Path(folder) / "store").as_uri()
        init_distributed_environment(1, 0, store, local_rank=0, backend="gloo")
        try:
            initialize_model_parallel()
            yield
        finally:
            cleanup_dist_env_and_memory()
