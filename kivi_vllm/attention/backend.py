"""The attention backend that vLLM selects for the KIVI dtypes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    KVCacheLayout,
    KVCacheSpec,
    SlidingWindowSpec,
)

from kivi_vllm.attention.groups.pages import page_spec
from kivi_vllm.attention.impl import KiviAttentionImpl
from kivi_vllm.attention.layer import LAYOUTS
from kivi_vllm.attention.metadata import KiviMetadataBuilder
from kivi_vllm.attention.options import with_options
from kivi_vllm.attention.versions import device_kind
from kivi_vllm.config import (
    BLOCK_SIZE,
    DTYPES,
    PADDED_HEAD_SIZES,
    KiviConfig,
    KiviConfigError,
)
from kivi_vllm.ops import dispatch
from kivi_vllm.ops.format import RAW_DTYPES, PageFormat


class KiviAttentionBackend(AttentionBackend):
    """KIVI attention for one engine's `KiviConfig` (see `with_options`)."""

    config: ClassVar[KiviConfig]
    raw_dtype: ClassVar[torch.dtype]

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = list(RAW_DTYPES)
    supported_kv_cache_dtypes: ClassVar[list] = list(DTYPES)

    @staticmethod
    def get_name() -> str:
        return "KIVI"

    @classmethod
    def get_impl_cls(cls) -> type[KiviAttentionImpl]:
        return with_options(KiviAttentionImpl, config=cls.config)

    @classmethod
    def get_builder_cls(cls) -> type[KiviMetadataBuilder]:
        return with_options(KiviMetadataBuilder, config=cls.config)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list:
        return [MultipleOf(BLOCK_SIZE)]

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return BLOCK_SIZE

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        sizes = dispatch.backend(device_kind()).operators.limits.head_sizes
        return [*sizes, *(size for size, page in PADDED_HEAD_SIZES.items() if page in sizes)]

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        return dispatch.backend(device_kind()).operators.limits.serves(capability)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True  # a logit of each head, and not the first tokens of a sequence

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        return True  # images whose tokens see each other

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # those that `connectors` lets through

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return False  # how many programs are launched follows from the lengths on the CPU

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return LAYOUTS

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Size the layer's pages for the packed format."""
        fmt = PageFormat.of(cls.config, spec.head_size, cls.raw_dtype)
        window = spec.sliding_window if isinstance(spec, SlidingWindowSpec) else None
        chunked = isinstance(spec, ChunkedLocalAttentionSpec)
        chunk = spec.attention_chunk_size if chunked else None
        made = page_spec(spec.num_kv_heads, fmt, window, chunk)
        # vLLM asks for the bytes of one token so.
        return made if spec.block_size > 1 else made.copy_with_new_block_size(1)


def select_backend(selector_config: Any, config: KiviConfig) -> type[KiviAttentionBackend]:
    """The backend for a layer that vLLM's selector describes.

    Args:
        selector_config: vLLM's `AttentionSelectorConfig` of the layer.
        config: the engine's configuration.

    Raises:
        KiviConfigError: naming what the layer needs and the KIVI cache lacks.

    """
    backend = with_options(KiviAttentionBackend, config=config, raw_dtype=selector_config.dtype)
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
