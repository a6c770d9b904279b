"""Where the cache lives in vLLM: page, ring, tail and sink groups of one block pool.

Every attention layer has, besides its quantized **pages** (a `FullAttentionSpec`
whose bytes a token are ours), caches of full-precision tokens, made of pages of
the same byte size, drawn from the same pool, admitted and freed by vLLM:

- the **ring**, the tokens of a running request's current block: a handful of
  pages a request, which come as the block grows and go when it is complete, never
  shared;
- with `residual_length` R > 0, the **tails**, the last R tokens of completed blocks:
  of the newest one of each request, and of those that prefix caching may look for;
- with `sink_tokens` S > 0, the **sinks**, the first S tokens of a sequence: one
  page, from its first whole block on, which prefix caching finds with that block.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from kivi_vllm.attention.groups import PageSpec, SinkSpec
from kivi_vllm.attention.ring import RingSpec
from kivi_vllm.attention.tail import TailSpec
from kivi_vllm.config import BLOCK_SIZE, KiviConfig, KiviConfigError
from kivi_vllm.ops.format import PageFormat

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

LAYOUTS = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
"""Layouts in which the bytes of one (block, kv head) are contiguous."""


def page_spec(num_kv_heads: int, fmt: PageFormat) -> PageSpec:
    """The quantized pages of a layer.

    Windowed layers too: their pages are kept for the whole sequence, and the
    window is a mask.
    """
    return PageSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_size=fmt.head_size,
        # Bytes, so that vLLM neither zeroes nor rescales them.
        dtype=torch.uint8,
        state_content_bytes=fmt.bytes_per_token,
    )


def ring_spec(num_kv_heads: int, fmt: PageFormat, num_drafts: int, num_others: int = 0) -> RingSpec:
    """The ring of a layer.

    It holds the current block and the draft tokens of the steps in flight: those
    are stored before it is known whether they are accepted, while the next step
    still reads the block's tokens from before them.
    """
    fields = _raw_fields(num_kv_heads, fmt)
    return RingSpec(**fields, num_drafts=num_drafts, num_others=num_others)


def tail_spec(
    num_kv_heads: int, fmt: PageFormat, num_drafts: int, interval: int | None
) -> TailSpec:
    """One page of the last tokens of a block; that of the newest block is read."""
    return TailSpec(
        **_raw_fields(num_kv_heads, fmt),
        sliding_window=BLOCK_SIZE + 1,  # exactly one whole block before the current one
        num_drafts=num_drafts,
        interval=interval,
    )


def sink_spec(num_kv_heads: int, fmt: PageFormat) -> SinkSpec:
    """One page of the first tokens of a sequence."""
    return SinkSpec(**_raw_fields(num_kv_heads, fmt))


def _raw_fields(num_kv_heads: int, fmt: PageFormat) -> dict[str, Any]:
    """Pages of the same byte size as `page_spec`'s, of `fmt.raw_tokens` tokens each."""
    return dict(
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_size=fmt.head_size,
        dtype=torch.uint8,
        state_content_bytes=fmt.page_bytes // fmt.raw_tokens,
        tokens_per_state=Fraction(BLOCK_SIZE, fmt.raw_tokens),
        dcp_sharded=False,
    )


def residual_specs(
    num_kv_heads: int, fmt: PageFormat, config: KiviConfig, vllm_config: VllmConfig
) -> dict[str, AttentionSpec]:
    """The full-precision caches of one layer by name: the ring, the tails, the sinks."""
    num_tails = cdiv(config.residual_length, fmt.raw_tokens)
    num_sinks = int(fmt.sink_tokens > 0)
    num_drafts = num_draft_tokens(vllm_config)
    interval = vllm_config.cache_config.prefix_cache_retention_interval
    tail = tail_spec(num_kv_heads, fmt, num_drafts, interval)
    return {
        "kivi_ring": ring_spec(num_kv_heads, fmt, num_drafts, num_tails + num_sinks),
        **{f"kivi_tail{i}": tail for i in range(num_tails)},
        **({"kivi_sinks": sink_spec(num_kv_heads, fmt)} if num_sinks else {}),
    }


def num_draft_tokens(vllm_config: VllmConfig) -> int:
    """Draft tokens that one step may store for a sequence."""
    speculative = vllm_config.speculative_config
    return speculative.num_speculative_tokens if speculative else 0


class RawBackend(AttentionBackend):
    """What vLLM must know of the ring, tail and sink groups: their metadata, no kernels."""

    @staticmethod
    def get_name() -> str:
        return "KIVI_RAW"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("rings, tails and sinks are read by the layer's own KIVI backend")

    @staticmethod
    def get_builder_cls() -> Any:
        from kivi_vllm.attention.backend import KiviMetadataBuilder

        return KiviMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return LAYOUTS


class RawCache(AttentionLayerBase):
    """A cache of full-precision tokens beside an attention layer.

    vLLM finds it in the static forward context and binds `kv_cache`:
    [num_blocks, num_kv_heads, raw_tokens, bytes] uint8.
    """

    def __init__(self, name: str, spec: KVCacheSpec) -> None:
        self.name = name
        self.spec = spec
        self.kv_cache = torch.empty(0)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return RawBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.spec


def attach(attn: Attention, config: KiviConfig) -> None:
    """Give an attention layer its ring, tails and sinks, named after it.

    Raises:
        KiviConfigError: values of another head size than keys.

    """
    if attn.head_size_v != attn.head_size:
        raise KiviConfigError(
            f"the KIVI cache needs keys and values of one head size, not {attn.head_size} and "
            f"{attn.head_size_v}; use --kv-cache-dtype auto or fp8 for this model"
        )
    vllm_config = get_current_vllm_config()
    fmt = PageFormat.of(config, attn.head_size, attn.dtype)
    context = vllm_config.compilation_config.static_forward_context
    caches = {}
    for suffix, spec in residual_specs(attn.num_kv_heads, fmt, config, vllm_config).items():
        cache = RawCache(f"{attn.layer_name}.{suffix}", spec)
        if cache.name in context:
            raise ValueError(f"Duplicate layer name: {cache.name}")
        context[cache.name] = caches[suffix] = cache
    ring, sinks = caches.pop("kivi_ring"), caches.pop("kivi_sinks", None)
    attn.impl.bind_residual(fmt=fmt, ring=ring, tails=[*caches.values()], sinks=sinks)
