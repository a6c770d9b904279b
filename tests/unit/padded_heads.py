"""Operators as a layer calls them whose heads are smaller than those of the pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from kivi_vllm.ops.step import AttentionParams, LayerCache, Step


class ThroughTheLayer:
    """All three calls in `attend`, by `KiviAttentionImpl.forward`, which fills heads up."""

    def __init__(self, ops: Any) -> None:
        self.ops = ops

    def store_blocks(self, *args: Any) -> None:
        """Nothing yet."""

    store_ring = store_blocks

    def attend(
        self,
        step: Step,
        cache: LayerCache,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        params: AttentionParams,
        output: torch.Tensor,
    ) -> None:
        """As `kivi_vllm.ops.reference.attend`, but for heads of any size."""
        from kivi_vllm.attention.impl import KiviAttentionImpl

        def calls(step: Step, _: Any, q: Any, k: Any, v: Any, output: torch.Tensor) -> None:
            assert q.shape[-1] == cache.fmt.head_size
            self.ops.store_blocks(step, cache, k, v)
            self.ops.attend(step, cache, q, k, v, params, output)
            self.ops.store_ring(step, cache, k, v)

        layer: Any = object.__new__(KiviAttentionImpl)
        layer.head_size, layer.page_head_size = q.shape[-1], cache.fmt.head_size
        layer.owner, layer._attend, layer._filled = layer, calls, True
        n = max(row.q1 for row in step.rows)
        args = (x[:n] for x in (q, k, v))
        layer.forward(None, *args, cache.pages, SimpleNamespace(step=step), output[:n])
