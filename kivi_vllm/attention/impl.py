"""One attention layer's forward pass: quantize what is complete, attend, keep the rest."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from kivi_vllm.attention.groups.of_a_layer import num_draft_tokens
from kivi_vllm.attention.layer import RawCache
from kivi_vllm.attention.metadata import KiviMetadata
from kivi_vllm.attention.selection import report_at_the_end
from kivi_vllm.attention.versions import device_kind
from kivi_vllm.config import BLOCK_SIZE, PADDED_HEAD_SIZES, KiviConfig, KiviConfigError
from kivi_vllm.ops import dispatch
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.step import AttentionParams, Layer, LayerCache, Raw


class KiviAttentionImpl(AttentionImpl[KiviMetadata]):
    """Store and attend over KIVI pages; see `kivi_vllm.ops.reference` for the meaning.

    For one engine's `KiviConfig` (see `with_options`).
    """

    config: ClassVar[KiviConfig]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "kivi2",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unsupported: Any,
    ) -> None:
        given = [name for name, value in unsupported.items() if value is not None]
        if attn_type != AttentionType.DECODER:
            given.append(f"attention type {attn_type}")
        if given:
            raise KiviConfigError(
                f"--kv-cache-dtype {kv_cache_dtype} cannot serve this model: its attention "
                f"needs {', '.join(given)}; use --kv-cache-dtype auto or fp8"
            )
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.page_head_size = PADDED_HEAD_SIZES.get(head_size, head_size)
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self._sink_weights: Any = sinks  # a weight of the model: its numbers come later
        self._filled = sinks is None
        # Not of the model's dtype and device, which are the default while a model is built.
        exact = dict(dtype=torch.float32, device="cpu")
        self._slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, **exact)
        params = AttentionParams(
            scale=self.scale,
            logits_soft_cap=logits_soft_cap or 0.0,
            alibi_slopes=None if self._slopes is None else self._slopes.clone(),
            sliding_window=sliding_window or 0,
            sink_logits=None if sinks is None else torch.full_like(sinks, torch.nan).float(),
        )
        vllm_config = get_current_vllm_config()
        self.operators = dispatch.operators(device_kind())
        self._layer = Layer(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_size=self.page_head_size,
            dtype=vllm_config.model_config.dtype,
            max_rows=vllm_config.scheduler_config.max_num_seqs,
            decode_len=1 + num_draft_tokens(vllm_config),
            max_tokens=vllm_config.model_config.max_model_len,
        )
        self.params = self.operators.prepare(self._layer, params)
        self.owner = self  # of the caches
        self.readers = [self]  # of the caches, in the order in which they run
        self.compiled = vllm_config.compilation_config.mode != CompilationMode.NONE

    def select_pages(self, layer_name: str) -> None:
        """Let generated tokens choose what they read, unless this is one of the first layers.

        Layers whose windows are hardly larger than the budget go without.
        """
        budget, window = self.config.token_budget, self.params.sliding_window
        number = re.search(r"\d+", layer_name)
        dense = number is not None and int(number[0]) < self.config.dense_layers
        if not budget or dense or 0 < window <= budget + BLOCK_SIZE:
            return
        if self.params.alibi_slopes is not None:
            raise KiviConfigError(
                f"kivi.token_budget {budget} does not serve this model: its attention has ALiBi "
                "slopes, of which a page's ranges know nothing; leave kivi.token_budget out"
            )
        estimate = self.operators.limits.estimate(self.config)
        chosen = replace(self.params, token_budget=budget, estimate=estimate)
        self.params = self.operators.prepare(self._layer, chosen)
        report_at_the_end()

    def attend_in_chunks(self, chunk_size: int) -> None:
        """Make the layer's attention local to chunks of so many tokens."""
        self.params = replace(self.params, chunk_size=chunk_size)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Fill what goes with the weights; called again when those are loaded anew.

        Sleep may have lost it, and captured graphs know where it was.
        """
        if self.params.sink_logits is not None:
            self.params.sink_logits.copy_(self._sink_weights.detach())
        if self.params.alibi_slopes is not None:
            self.params.alibi_slopes.copy_(self._slopes)
        self._filled = True

    def bind_residual(
        self, *, fmt: PageFormat, ring: RawCache, tails: list[RawCache], sinks: RawCache | None
    ) -> None:
        """Take the layer's full-precision caches (called once, by `layer.attach`)."""
        self.fmt = fmt
        self.ring = ring
        self.tails = tails
        self.sinks = sinks
        self._bound: torch.Tensor | None = None

    def share(self, owner: KiviAttentionImpl) -> None:
        """Have no caches, and read those of a layer that runs before (see `layer.attach`)."""
        self.owner = owner
        owner.readers.append(self)

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KiviMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend for the step's tokens, and store their keys and values.

        Args:
            layer: the attention layer (unused: nothing is scaled).
            query: [num_tokens, num_heads, head_size].
            key, value: [num_tokens, num_kv_heads, head_size]; None where the layer reads
                the caches of another one, which has stored its own in this step.
            kv_cache: [num_blocks, num_kv_heads, k * 128, bytes_per_token] uint8, k pages of
                every head in a block.
            attn_metadata: None while vLLM profiles or warms up.
            output: [num_tokens, num_heads, head_size], written and returned.
            output_scale, output_block_scale: fused output quantization.

        Raises:
            NotImplementedError: fused output quantization was asked for, or the
                model reads a layer's own cache without new keys and values.

        """
        if self.owner is self and (key is None or value is None):
            raise NotImplementedError(
                "reading a layer's KIVI cache without new keys and values is not supported; "
                "use --kv-cache-dtype auto or fp8 for this model"
            )
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("fused output quantization is not supported by KIVI")
        if attn_metadata is None or kv_cache.numel() == 0:
            return output.zero_()
        if not self._filled:  # not all loaders say when they are done: tensorizer does not
            self.process_weights_after_loading(query.dtype)

        padding = self.page_head_size - self.head_size
        if not padding:
            self._attend(attn_metadata.step, kv_cache, query, key, value, output)
            return output
        q, k, v = (None if x is None else pad(x, (0, padding)) for x in (query, key, value))
        wide = output.new_empty(*output.shape[:-1], self.page_head_size)
        self._attend(attn_metadata.step, kv_cache, q, k, v, wide)
        return output.copy_(wide[..., : self.head_size])

    def _attend(
        self,
        step: Any,
        kv_cache: torch.Tensor,
        query: Any,
        key: Any,
        value: Any,
        output: torch.Tensor,
    ) -> None:
        """`forward`, of heads as large as those of the pages."""
        ops, owner = self.operators, self.owner
        if owner is self:
            if self.compiled and len(self.readers) > 1:
                # Compiled code, and graphs of its pieces, use the memory of keys and values
                # again after this call: no other seems to need them.
                key, value = key.clone(), value.clone()
            self._stored = step, self._layer_cache(kv_cache), key, value
            ops.store_blocks(*self._stored)
        step, cache, key, value = owner._stored
        attend = ops.attend_selected if self.params.token_budget else ops.attend
        attend(step, cache, query, key, value, self.params, output)
        if owner.readers[-1] is self:  # only now: the others need what the ring still holds
            ops.store_ring(step, cache, key, value)
            del owner._stored

    def _layer_cache(self, kv_cache: torch.Tensor) -> LayerCache:
        """The layer's caches as the operators see them, with this step's tables."""
        raws = (self.ring, *self.tails, *([self.sinks] if self.sinks else []))
        if self._bound is not kv_cache:  # views that live as long as what they show
            pages = kv_cache.flatten(2).unflatten(2, (-1, self.fmt.page_bytes))
            self._pages = pages.transpose(1, 2)  # of a head, one lies after the other
            self._raws = [self._tokens(raw.kv_cache) for raw in raws]
            self._bound = kv_cache
        ring, *tails = (Raw(x, raw.table) for x, raw in zip(self._raws, raws, strict=True))
        sinks = tails.pop() if self.sinks else None
        return LayerCache(
            fmt=self.fmt,
            pages=self._pages,
            ring=ring,
            tails=tuple(tails),
            residual_length=self.config.residual_length,
            sinks=sinks,
        )

    def _tokens(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """A cache of full-precision tokens [num_blocks, num_kv_heads, T, 2 * head_size].

        Its pages are of as many bytes as quantized ones, or as `planner` has made them.
        """
        as_pages = kv_cache.shape[2:] == (BLOCK_SIZE, self.fmt.bytes_per_token)
        return self.fmt.as_raw(kv_cache.flatten(2), None if as_pages else kv_cache.shape[2])
