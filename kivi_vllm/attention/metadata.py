"""What the cache groups of a step tell the operators."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from kivi_vllm.attention.groups.of_a_layer import num_draft_tokens
from kivi_vllm.attention.versions import device_kind
from kivi_vllm.config import KiviConfig
from kivi_vllm.ops import dispatch
from kivi_vllm.ops.images import last_visible
from kivi_vllm.ops.step import Batch


@dataclass
class KiviMetadata:
    """What the layers get of a step.

    Attributes:
        step: what the operators must know of it; None for the caches of full-precision tokens.

    """

    step: Any

    @property
    def mm_prefix_range(self) -> torch.Tensor | None:
        """What each token sees after itself, see `ops.images`."""
        return None if self.step is None else self.step.last_visible

    @mm_prefix_range.setter
    def mm_prefix_range(self, none: None) -> None:
        """Forget it: vLLM's Gemma-4 asks for this, by this name, for layers without a window."""
        if self.mm_prefix_range is not None:
            self.step = replace(self.step, last_visible=none)


def mark_generated(rows: torch.Tensor, is_prefilling: torch.Tensor) -> torch.Tensor:
    """Which of the rows generate: `rows` themselves, which graphs that were captured read.

    They are more than the requests of which vLLM knows it where a graph has rows of padding.
    """
    known = ~is_prefilling[: len(rows)]
    rows[: len(known)].copy_(known, non_blocking=True)
    rows[len(known) :] = False
    return rows


class KiviMetadataBuilder(AttentionMetadataBuilder[KiviMetadata]):
    """Builds `KiviMetadata` of quantized pages (see `with_options`)."""

    config: ClassVar[KiviConfig]

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
        self.per_position = self.config.prefill == "cached"
        self.decode_len = 1 + num_draft_tokens(vllm_config)
        self.operators = dispatch.operators(device_kind())
        rows = vllm_config.scheduler_config.max_num_seqs
        # On GPUs graphs that were captured read it.
        self._generated = torch.zeros(rows, dtype=torch.bool, device=device)
        # Of a draft, several steps with one metadata (vLLM 0.33): where it refers to tensors.
        self.supports_draft_decode_metadata_update = self.operators.limits.decodes_first
        if self.operators.limits.decodes_first:
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    def update_draft_decode_metadata(self, metadata: KiviMetadata) -> None:
        """Nothing: what changes from a draft's step to the next are tensors that it refers to."""

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: AttentionSpec
    ) -> AttentionCGSupport:
        """Of decodes; of one token each, where several might be the end of an image."""
        if vllm_config.model_config.is_mm_prefix_lm:
            return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        return cls._cudagraph_support

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
        generated = None
        if self.config.token_budget and m.is_prefilling is not None:
            generated = mark_generated(self._generated[: m.num_reqs], m.is_prefilling)
        starts, ends = m.query_start_loc_cpu[: m.num_reqs + 1], m.seq_lens_cpu_upper_bound
        seen = None
        if m.mm_req_doc_ranges:
            exact = m.seq_lens.cpu() if ends is None else ends
            seen = last_visible(m.mm_req_doc_ranges, starts, exact)
        batch = Batch(
            query_start_loc=m.query_start_loc[: m.num_reqs + 1],
            query_start_loc_cpu=starts,
            seq_lens=m.seq_lens[: m.num_reqs],
            seq_lens_cpu=None if ends is None else ends[: m.num_reqs],
            block_table=m.block_table_tensor,
            num_tokens=m.num_actual_tokens,
            max_query_len=m.max_query_len,
            per_position=self.per_position,
            decode_len=self.decode_len,
            last_visible=seen,
            generated=generated,
        )
        return KiviMetadata(self.operators.step(batch))
