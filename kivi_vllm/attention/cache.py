"""Where the cache lives in vLLM: page, ring, tail and sink groups of one block pool.

Every attention layer has, besides its quantized **pages** (a `FullAttentionSpec`
whose bytes a token are ours), caches of full-precision tokens, made of pages of
the same byte size, drawn from the same pool, admitted and freed by vLLM:

- the **ring**, the tokens of a running request's current block: a handful of
  pages a request, claimed as it grows, never shared;
- with `residual_length` R > 0, the **tails**, the last R tokens of each completed
  block: to vLLM a sliding window of one block, so that only the newest is held
  by a request, while prefix caching finds the older ones;
- with `sink_tokens` S > 0, the **sinks**, the first S tokens of a sequence: one
  page, from its first whole block on, which prefix caching finds with that block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    CircularBufferManager,
    SingleTypeKVCacheManager,
)
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    CircularBufferSpec,
    FullAttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    SlidingWindowSpec,
)

from kivi_vllm.config import BLOCK_SIZE, KiviConfig, KiviConfigError
from kivi_vllm.ops.format import PageFormat

if TYPE_CHECKING:
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.core.kv_cache_utils import KVCacheBlock

LAYOUTS = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
"""Layouts in which the bytes of one (block, kv head) are contiguous."""


@dataclass(frozen=True, kw_only=True)
class RingSpec(CircularBufferSpec):
    """The ring of one layer: at most `num_pages` pages a request.

    `block_size` is nominal, that of the pages, so that the least common multiple
    over the groups, to which prefix hits are aligned, stays there; a page holds
    `block_size / tokens_per_state` tokens.
    """

    num_pages: int

    def __post_init__(self) -> None:
        super().__post_init__()
        # vLLM makes layers of different page sizes fit by changing their block sizes:
        # the ring would have other slots than `LayerCache` counts.
        if self.block_size != BLOCK_SIZE or self.page_size_padded is not None:
            raise KiviConfigError(
                "the KIVI cache needs the same number and size of kv heads in all layers; "
                "use --kv-cache-dtype auto or fp8 for this model"
            )

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request can take."""
        return self.num_pages * self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Length of a block table row.

        The model runner (V1) computes a slot mapping, unused here, from
        `position // block_size` for every group: that read must stay in the row.
        """
        return max(self.num_pages, cdiv(max_len, self.block_size))

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Rings group with rings of the same size only."""
        return all(spec == self for spec in kv_cache_specs.values())


class RingManager(CircularBufferManager):
    """Gives a request ring pages as its tokens come, up to `num_pages`."""

    kv_cache_spec: RingSpec

    def _missing(self, request_id: str, num_tokens: int) -> int:
        wanted = min(self.kv_cache_spec.num_pages, cdiv(num_tokens, self.kv_cache_spec.num_states))
        return max(0, wanted - len(self.req_to_blocks.get(request_id, ())))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Pages that `num_tokens` tokens still lack."""
        return self._missing(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Claim them."""
        new = self.block_pool.get_new_blocks(self._missing(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(new)
        return new

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `allocate_new_blocks` follows in the same call."""


@dataclass(frozen=True, kw_only=True)
class SinkSpec(AttentionSpec):
    """The first tokens of a sequence, of one layer: one page, shared like its first block."""

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """What one request can take."""
        return self.page_size_bytes

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Length of a block table row; see `RingSpec`."""
        return cdiv(max_len, self.block_size)

    @property
    def uses_slot_mapping(self) -> bool:
        """Whether the model runner need compute where tokens go."""
        return False

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Sinks group with sinks of the same size only."""
        return all(spec == self for spec in kv_cache_specs.values())


class SinkManager(SingleTypeKVCacheManager):
    """Gives a request one page with its first whole block, and finds that of a prefix."""

    def _missing(self, request_id: str, num_tokens: int) -> int:
        return int(num_tokens >= self.block_size and not self.req_to_blocks.get(request_id))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Pages that `num_tokens` tokens still lack, or take out of the free ones by a hit."""
        if new_computed_blocks:
            return self._get_num_evictable_blocks(new_computed_blocks)
        return self._missing(request_id, num_tokens)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Claim them."""
        new = self.block_pool.get_new_blocks(self._missing(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(new)
        return new

    def allocate_external_computed_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: there are no connectors (`support`)."""

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Make the page findable by the hash of the request's first block."""
        super().cache_blocks(request, min(num_tokens, self.block_size), *args, **kwargs)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The page of the first block, which serves a prefix of any length; else nothing."""
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        found = max_length >= size and block_pool.get_cached_block(hashes[0], kv_cache_group_ids)
        if not found:
            return tuple([] for _ in kv_cache_group_ids), 0
        return tuple([block] for block in found), max_length // size * size


def page_spec(num_kv_heads: int, fmt: PageFormat) -> FullAttentionSpec:
    """The quantized pages of a layer.

    Windowed layers too: their pages are kept for the whole sequence, and the
    window is a mask.
    """
    return FullAttentionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=num_kv_heads,
        head_size=fmt.head_size,
        # Bytes, so that vLLM neither zeroes nor rescales them.
        dtype=torch.uint8,
        state_content_bytes=fmt.bytes_per_token,
    )


def ring_spec(num_kv_heads: int, fmt: PageFormat, num_drafts: int) -> RingSpec:
    """The ring of a layer.

    It holds the current block and the draft tokens of one step: those are stored
    before it is known whether they are accepted, while the next step still
    reads the block's tokens from before them.
    """
    num_pages = cdiv(BLOCK_SIZE + num_drafts, fmt.raw_tokens)
    return RingSpec(**_raw_fields(num_kv_heads, fmt), num_pages=num_pages)


def tail_spec(num_kv_heads: int, fmt: PageFormat) -> SlidingWindowSpec:
    """One page of the last tokens of each block; that of the newest block is read."""
    # A window of B + 1 keeps exactly one whole block before the current one.
    return SlidingWindowSpec(**_raw_fields(num_kv_heads, fmt), sliding_window=BLOCK_SIZE + 1)


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
    num_kv_heads: int, fmt: PageFormat, config: KiviConfig, num_drafts: int
) -> dict[str, AttentionSpec]:
    """The full-precision caches of one layer by name: the ring, the tails, the sinks."""
    num_tails = cdiv(config.residual_length, fmt.raw_tokens)
    return {
        "kivi_ring": ring_spec(num_kv_heads, fmt, num_drafts),
        **{f"kivi_tail{i}": tail_spec(num_kv_heads, fmt) for i in range(num_tails)},
        **({"kivi_sinks": sink_spec(num_kv_heads, fmt)} if fmt.sink_tokens else {}),
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
    num_drafts = num_draft_tokens(vllm_config)
    context = vllm_config.compilation_config.static_forward_context
    caches = {}
    for suffix, spec in residual_specs(attn.num_kv_heads, fmt, config, num_drafts).items():
        cache = RawCache(f"{attn.layer_name}.{suffix}", spec)
        if cache.name in context:
            raise ValueError(f"Duplicate layer name: {cache.name}")
        context[cache.name] = caches[suffix] = cache
    ring, sinks = caches.pop("kivi_ring"), caches.pop("kivi_sinks", None)
    attn.impl.bind_residual(fmt=fmt, ring=ring, tails=[*caches.values()], sinks=sinks)
