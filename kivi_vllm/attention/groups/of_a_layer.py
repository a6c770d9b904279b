"""Which cache groups a layer has."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec

from kivi_vllm.attention.groups.ring import ring_spec
from kivi_vllm.attention.groups.sinks import sink_spec
from kivi_vllm.attention.groups.tails import tail_spec
from kivi_vllm.config import KiviConfig
from kivi_vllm.ops.format import PageFormat


def residual_specs(
    num_kv_heads: int,
    fmt: PageFormat,
    config: KiviConfig,
    vllm_config: VllmConfig,
    window: int = 0,
    chunk: int = 0,
) -> dict[str, AttentionSpec]:
    """The full-precision caches of one layer by name: the ring, the tails, the sinks.

    `window` is how many tokens the layer sees, `chunk` how many an attention chunk has; 0: all.
    """
    num_tails = cdiv(config.residual_length, fmt.raw_tokens)
    num_sinks = int(fmt.sink_tokens > 0)
    num_drafts = num_draft_tokens(vllm_config)
    interval = vllm_config.cache_config.prefix_cache_retention_interval
    speculative = vllm_config.speculative_config
    dropped = speculative is not None and speculative.use_eagle_block_drop()
    tail = tail_spec(num_kv_heads, fmt, num_drafts, interval, dropped)
    return {
        "kivi_ring": ring_spec(num_kv_heads, fmt, num_drafts, num_tails + num_sinks, window, chunk),
        **{f"kivi_tail{i}": tail for i in range(num_tails)},
        **({"kivi_sinks": sink_spec(num_kv_heads, fmt)} if num_sinks else {}),
    }


def num_draft_tokens(vllm_config: VllmConfig) -> int:
    """Draft tokens that one pass of a model may store for a sequence that decodes."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return 0
    # A draft model's first pass has the token too that the step has just chosen.
    return speculative.num_speculative_tokens + speculative.uses_draft_model()
