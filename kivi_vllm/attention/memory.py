"""Too little memory for one sequence, where that is known before the start.

For models whose layers are alike: of the others vLLM says it, when the layers are there.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv

from kivi_vllm.attention import connectors
from kivi_vllm.attention.groups.of_a_layer import residual_specs
from kivi_vllm.attention.groups.pages import page_spec
from kivi_vllm.config import KiviConfig
from kivi_vllm.ops.format import PageFormat

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig


def problems(vllm_config: VllmConfig, config: KiviConfig, fmt: PageFormat) -> Iterator[str]:
    """What to say if one sequence does not fit, with the longest that does."""
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if model.original_max_model_len == -1:  # vLLM will fit the length to the memory
        return
    if not _layers_are_alike(model) or cache.kv_cache_dtype_skip_layers:
        return
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.uses_draft_kv_cache():  # layers that differ
        return
    heads = model.get_num_kv_heads(vllm_config.parallel_config)
    pages = page_spec(heads, fmt)
    specs = [pages, *residual_specs(heads, fmt, config, vllm_config).values()]
    block_bytes = pages.page_size_bytes * _layers_of_a_worker(vllm_config)
    found_again = [spec for spec in specs if spec.prefix_cacheable]
    offloads = vllm_config.kv_transfer_config is not None
    if offloads and (less := connectors.too_small(vllm_config, found_again, block_bytes)):
        yield f"KV offloading: {less}"
    available = cache.kv_cache_memory_bytes
    if cache.num_gpu_blocks_override is not None:
        available = cache.num_gpu_blocks_override * block_bytes
    if available is None:
        return
    blocks = available // block_bytes

    def needed(length: int) -> int:
        """Blocks for one sequence of this length; one is vLLM's null block."""
        like: Any = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=length),
            max_in_flight_tokens=vllm_config.max_in_flight_tokens,
            parallel_config=vllm_config.parallel_config,
        )
        return 1 + sum(cdiv(s.max_memory_usage_bytes(like), s.page_size_bytes) for s in specs)

    count = needed(model.max_model_len)
    if count <= blocks:
        return
    longest = bisect_right(range(1, model.max_model_len), blocks, key=needed)
    shorter = f", or use --max-model-len {longest}" if longest else ": no length fits"
    mib = 1 << 20
    yield (
        f"one sequence of --max-model-len {model.max_model_len} needs "
        f"{count * block_bytes / mib:.1f} MiB of KV cache ({count} blocks), but there are "
        f"{available / mib:.1f} MiB ({blocks} blocks); raise "
        f"--kv-cache-memory-bytes (or --num-gpu-blocks-override){shorter}"
    )


def _layers_are_alike(model: ModelConfig) -> bool:
    """Whether all layers have the same caches, as far as the configuration tells."""
    text = model.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    shared = getattr(text, "num_kv_shared_layers", 0)
    windowed = model.get_sliding_window()
    each = getattr(text, "block_configs", None)  # of searched architectures: heads by layer
    return not (model.is_hybrid or windowed or shared or each or len(kinds) > 1)


def _layers_of_a_worker(vllm_config: VllmConfig) -> int:
    """Layers of the largest pipeline stage: it has the fewest blocks, and so all stages have."""
    from vllm.distributed.utils import get_pp_indices

    layers = vllm_config.model_config.get_total_num_hidden_layers()
    stages = vllm_config.parallel_config.pipeline_parallel_size
    bounds = (get_pp_indices(layers, stage, stages) for stage in range(stages))
    return max(end - start for start, end in bounds)
