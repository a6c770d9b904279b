"""The attention backend that vLLM selects for the KIVI dtypes: config and metadata."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from kivi_vllm.attention.cache import LAYOUTS, num_draft_tokens, page_spec
from kivi_vllm.config import BLOCK_SIZE, DTYPES, HEAD_SIZES, KiviConfig, KiviConfigError
from kivi_vllm.ops.format import RAW_DTYPES, PageFormat
from kivi_vllm.ops.reference import Row, Step


@dataclass
class KiviMetadata:
    """One cache group's view of a step.

    Attributes:
        query_start_loc: [num_reqs + 1] on the CPU, first token of each request.
        seq_lens: [num_reqs], tokens of each request after the step.
        block_table: [num_reqs, max_blocks], page ids of this group.
        per_position, decode_len: see `Step`.

    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    per_position: bool
    decode_len: int

    @functools.cached_property
    def step(self) -> Step:
        """What the operators must know of this step; made once for all layers."""
        return Step(self._rows(), self.block_table, self.per_position, self.decode_len)

    def _rows(self) -> list[Row]:
        """The requests that have tokens in this step."""
        starts, lens = self.query_start_loc.tolist(), self.seq_lens.tolist()
        return [
            Row(i, q0, q1, end - (q1 - q0), end)
            for i, (q0, q1, end) in enumerate(zip(starts, starts[1:], lens, strict=False))
            if q1 > q0
        ]


class KiviMetadataBuilder(AttentionMetadataBuilder[KiviMetadata]):
    """Builds `KiviMetadata` for pages, rings and tails alike."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.NEVER

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.per_position = KiviConfig.from_vllm(vllm_config).prefill == "cached"
        self.decode_len = 1 + num_draft_tokens(vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KiviMetadata:
        """Take over what vLLM's model runner has prepared for this group.

        Raises:
            NotImplementedError: the layers do not attend causally.

        """
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError("the KIVI cache serves causal attention only")
        return KiviMetadata(
            query_start_loc=m.query_start_loc_cpu[: m.num_reqs + 1],
            seq_lens=m.seq_lens[: m.num_reqs],
            block_table=m.block_table_tensor,
            per_position=self.per_position,
            decode_len=self.decode_len,
        )


class KiviAttentionBackend(AttentionBackend):
    """KIVI attention for one engine's `KiviConfig` (see `backend_for`)."""

    config: ClassVar[KiviConfig]
    raw_dtype: ClassVar[torch.dtype]

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = list(RAW_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list] = list(DTYPES)

    @staticmethod
    def get_name() -> str:
        return "KIVI"

    @staticmethod
    def get_impl_cls() -> Any:
        from kivi_vllm.attention.impl import KiviAttentionImpl

        return KiviAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[KiviMetadataBuilder]:
        return KiviMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list:
        return [MultipleOf(BLOCK_SIZE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return BLOCK_SIZE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_SIZES)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # `KiviMetadata.step` plans from the query lengths on the CPU

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return LAYOUTS

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Size the layer's pages for the packed format."""
        return page_spec(
            spec.num_kv_heads, PageFormat.of(cls.config, spec.head_size, cls.raw_dtype)
        )


@functools.cache
def backend_for(config: KiviConfig, raw_dtype: torch.dtype) -> type[KiviAttentionBackend]:
    """`KiviAttentionBackend` for one configuration: vLLM asks classes, not instances."""
    name = KiviAttentionBackend.__name__
    return type(name, (KiviAttentionBackend,), {"config": config, "raw_dtype": raw_dtype})


def select_backend(selector_config: Any, config: KiviConfig) -> type[KiviAttentionBackend]:
    """The backend for a layer that vLLM's selector describes.

    Args:
        selector_config: vLLM's `AttentionSelectorConfig` of the layer.
        config: the engine's configuration.

    Raises:
        KiviConfigError: naming what the layer needs and the KIVI cache lacks.

    """
    backend = backend_for(config, selector_config.dtype)
    PageFormat.of(config, selector_config.head_size, selector_config.dtype)
    reasons = backend.validate_configuration(device_capability=None, **selector_config._asdict())
    if reasons:
        raise KiviConfigError(
            f"--kv-cache-dtype {config.dtype} cannot serve this model: {'; '.join(reasons)}; "
            "use --kv-cache-dtype auto or fp8"
        )
    return backend
