"""The attention backend that vLLM selects for the KIVI dtypes: config and metadata."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout, KVCacheSpec

from kivi_vllm.attention.groups.of_a_layer import num_draft_tokens
from kivi_vllm.attention.groups.pages import page_spec
from kivi_vllm.attention.layer import LAYOUTS
from kivi_vllm.config import (
    BLOCK_SIZE,
    DTYPES,
    HEAD_SIZES,
    MIN_CAPABILITY,
    KiviConfig,
    KiviConfigError,
)
from kivi_vllm.ops.format import RAW_DTYPES, PageFormat
from kivi_vllm.ops.step import DeviceStep, Row, Step


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


@dataclass
class KiviDeviceMetadata:
    """One cache group's view of a step on a GPU: nothing in it is read on the host.

    Attributes:
        step: what the operators must know; its tensors are vLLM's own buffers, which
            stay where they are while their contents change from step to step.
        block_table: [num_reqs, max_blocks], page ids of this group.

    """

    step: DeviceStep
    block_table: torch.Tensor


class KiviMetadataBuilder(AttentionMetadataBuilder[KiviMetadata]):
    """Builds `KiviMetadata` for pages, rings and tails alike."""

    # Graphs of decode steps, draft tokens included; rows of padding have no tokens.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

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
        if current_platform.is_cuda():  # the decodes first, as `DeviceStep` wants them
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> KiviMetadata | KiviDeviceMetadata:
        """Take over what vLLM's model runner has prepared for this group.

        Raises:
            NotImplementedError: the layers do not attend causally.

        """
        m = common_attn_metadata
        if m.causal is not True:
            raise NotImplementedError("the KIVI cache serves causal attention only")
        if current_platform.is_cuda():
            return KiviDeviceMetadata(self._device_step(m), m.block_table_tensor)
        return KiviMetadata(
            query_start_loc=m.query_start_loc_cpu[: m.num_reqs + 1],
            seq_lens=m.seq_lens[: m.num_reqs],
            block_table=m.block_table_tensor,
            per_position=self.per_position,
            decode_len=self.decode_len,
        )

    def _device_step(self, m: CommonAttentionMetadata) -> DeviceStep:
        """The step, from counts that the scheduler knows and from tensors on the device."""
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            m, decode_threshold=self.decode_len
        )
        prefill_lens, nothing_cached = [], False
        if num_prefills:
            lens = m.query_start_loc_cpu[1 : m.num_reqs + 1] - m.query_start_loc_cpu[: m.num_reqs]
            lens = lens[num_decodes:]
            prefill_lens = lens.tolist()
            ends = m.seq_lens_cpu_upper_bound  # exact for those that are no decodes
            nothing_cached = ends is not None and bool(
                (ends[num_decodes : m.num_reqs] == lens).all()
            )
        return DeviceStep(
            query_start_loc=m.query_start_loc[: m.num_reqs + 1],
            seq_lens=m.seq_lens[: m.num_reqs],
            block_table=m.block_table_tensor,
            num_decodes=num_decodes,
            num_decode_tokens=num_decode_tokens,
            num_tokens=m.num_actual_tokens,
            max_query_len=m.max_query_len,
            per_position=self.per_position,
            decode_len=self.decode_len,
            nothing_cached=nothing_cached,
            prefill_lens=prefill_lens,
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
    def supports_compute_capability(cls, capability: Any) -> bool:
        return capability is None or tuple(capability)[:2] >= MIN_CAPABILITY

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # how many programs are launched follows from the lengths on the CPU

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
    capability = current_platform.get_device_capability()
    reasons = backend.validate_configuration(
        device_capability=capability, **selector_config._asdict()
    )
    if reasons:
        raise KiviConfigError(
            f"--kv-cache-dtype {config.dtype} cannot serve this model: {'; '.join(reasons)}; "
            "use --kv-cache-dtype auto or fp8"
        )
    return backend
