"""Where the cache lives in vLLM: page, ring, tail and sink groups of one block pool.

Every attention layer has, besides its quantized **pages** (a `FullAttentionSpec`, or a
`SlidingWindowSpec`, whose bytes a token are ours), caches of full-precision tokens, drawn from
the same pool, admitted and freed by vLLM. Where all layers are alike, the pages of all these
caches have as many bytes; else `groups.planner` fills the pool's blocks with them.

- the **ring**, the tokens of a running request's current block: a handful of
  pages a request, which come as the block grows and go when it is complete, never
  shared;
- with `residual_length` R > 0, the **tails**, the last R tokens of completed blocks:
  of the newest one of each request, and of those that prefix caching may look for;
- with `sink_tokens` S > 0, the **sinks**, the first S tokens of a sequence: one
  page, from its first whole block on, which prefix caching finds with that block.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec
from vllm.v1.worker.utils import customize_attention_spec

from kivi_vllm.attention.groups.of_a_layer import residual_specs
from kivi_vllm.attention.metadata import KiviMetadata, KiviMetadataBuilder
from kivi_vllm.attention.options import with_options
from kivi_vllm.config import KiviConfig, KiviConfigError
from kivi_vllm.ops.format import PageFormat

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention

LAYOUTS = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
"""Layouts in which the bytes of one (block, kv head) are contiguous."""


class RawMetadataBuilder(KiviMetadataBuilder):
    """Gives the caches of full-precision tokens their tables."""

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KiviMetadata:
        """Leave the table with the caches: a draft's passes come without metadata of this group.

        With all rows of vLLM's buffer: such a pass may have more rows of padding than the step.
        """
        context = self.vllm_config.compilation_config.static_forward_context
        table = common_attn_metadata.block_table_tensor
        there = table.untyped_storage().nbytes() // table.itemsize - table.storage_offset()
        most = self.vllm_config.scheduler_config.max_num_seqs
        rows = max(len(table), min(most, there // max(1, table.stride(0))))
        whole = table.as_strided((rows, table.shape[1]), table.stride())
        for name in self.layer_names:
            context[name].table = whole
        return KiviMetadata(None)


class RawBackend(AttentionBackend):
    """What vLLM must know of the ring, tail and sink groups: their metadata, no kernels.

    For one engine's `KiviConfig` (see `with_options`).
    """

    config: ClassVar[KiviConfig]

    @staticmethod
    def get_name() -> str:
        return "KIVI_RAW"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("rings, tails and sinks are read by the layer's own KIVI backend")

    @classmethod
    def get_builder_cls(cls) -> type[RawMetadataBuilder]:
        return with_options(RawMetadataBuilder, config=cls.config)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return LAYOUTS


class RawCache(AttentionLayerBase):
    """A cache of full-precision tokens beside an attention layer.

    vLLM finds it in the static forward context and binds `kv_cache`, uint8: where all layers are
    alike [num_blocks, num_kv_heads, 128, bytes_per_token], as quantized pages are; on planned
    groups [num_blocks, num_kv_heads, tokens of a page, bytes of a token]. `table`
    [num_reqs, max_blocks] is that of the step.
    """

    def __init__(self, name: str, spec: KVCacheSpec, config: KiviConfig) -> None:
        self.name = name
        self.spec = spec
        self.config = config
        self.kv_cache = torch.empty(0)
        self.table = torch.empty(0)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return with_options(RawBackend, config=self.config)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self.spec


def check_shared_cache(attn: Attention) -> None:
    """Raise KiviConfigError if a layer would read the caches of another that do not fit.

    That is if just one of them is ours, or if the other's window is the smaller, or if the other
    has attention chunks that this one has not.
    """
    target = attn.kv_sharing_target_layer_name
    if target is None:
        return
    owner = get_current_vllm_config().compilation_config.static_forward_context[target]
    ours, theirs = (getattr(layer.impl, "config", None) for layer in (attn, owner))
    if ours != theirs:
        raise KiviConfigError(
            f"{attn.layer_name} reads the KV cache of {target}, but just one of them is in "
            "--kv-cache-dtype-skip-layers; name both, or neither"
        )
    windows = [layer.sliding_window or sys.maxsize for layer in (attn, owner)]
    if hasattr(attn.impl, "bind_residual") and windows[0] > windows[1]:
        raise KiviConfigError(
            f"{attn.layer_name} reads the KV cache of {target}, which keeps {windows[1]} tokens "
            "only; use --kv-cache-dtype auto or fp8 for this model"
        )
    chunks = [getattr(layer, "attention_chunk_size", 0) for layer in (attn, owner)]
    if hasattr(attn.impl, "bind_residual") and chunks[1] not in (0, chunks[0]):
        raise KiviConfigError(
            f"{attn.layer_name} reads the KV cache of {target}, which keeps an attention chunk of "
            f"{chunks[1]} tokens only; use --kv-cache-dtype auto or fp8 for this model"
        )


def attach(attn: Attention, config: KiviConfig) -> None:
    """Give an attention layer its ring, tails and sinks, named after it.

    A layer that reads the caches of an earlier one has none of its own.

    Raises:
        KiviConfigError: values of another head size than keys.

    """
    if attn.head_size_v != attn.head_size:
        raise KiviConfigError(
            f"the KIVI cache needs keys and values of one head size, not {attn.head_size} and "
            f"{attn.head_size_v}; use --kv-cache-dtype auto or fp8 for this model"
        )
    vllm_config = get_current_vllm_config()
    context = vllm_config.compilation_config.static_forward_context
    attn.impl.select_pages(attn.layer_name)
    target = attn.kv_sharing_target_layer_name
    if target is not None:
        attn.impl.share(context[target].impl)
        return
    fmt = PageFormat.of(config, attn.head_size, attn.dtype)
    window, chunk = attn.sliding_window or 0, getattr(attn, "attention_chunk_size", 0)
    specs = residual_specs(attn.num_kv_heads, fmt, config, vllm_config, window, chunk)
    caches = {}
    for suffix, spec in specs.items():
        cache = RawCache(f"{attn.layer_name}.{suffix}", spec, config)
        if cache.name in context:
            raise ValueError(f"Duplicate layer name: {cache.name}")
        context[cache.name] = caches[suffix] = cache
    ring, sinks = caches.pop("kivi_ring"), caches.pop("kivi_sinks", None)
    attn.impl.bind_residual(fmt=fmt, ring=ring, tails=[*caches.values()], sinks=sinks)


def cache_specs(vllm_config: VllmConfig) -> dict[str, KVCacheSpec]:
    """Cache specs of the layers that have been made here, as vLLM's worker collects them."""
    specs = {}
    for name, layer in get_layers_from_vllm_config(vllm_config, AttentionLayerBase).items():
        if getattr(layer, "kv_sharing_target_layer_name", None):
            continue
        spec = layer.get_kv_cache_spec(vllm_config)
        if isinstance(spec, AttentionSpec):
            spec = customize_attention_spec(layer.get_attn_backend(), spec)
        if spec is not None:
            specs[name] = spec
    return specs
