"""What runs in the process of an engine: a row's model, and what is asked of it.

`benchmarks.quality.engine.Engine` calls these functions there, `start` first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd

from benchmarks.common.child import report
from benchmarks.quality import metrics
from benchmarks.quality.rows import CacheRow

if TYPE_CHECKING:
    import torch

SLICE_NUMBERS = 1 << 25
"""Logits of one model that are held at a time: 128 MiB in fp32."""


class Model(Protocol):
    """What computes a row."""

    def facts(self) -> dict[str, Any]:
        """See `Engine.facts`."""

    def generate(
        self, prompts: list[list[int]], params: dict[str, Any], done: Callable[[int], None]
    ) -> list[tuple[str, list[int]]]:
        """Texts and token ids of greedy answers."""

    def hidden_states(self, window: Sequence[int]) -> np.ndarray:
        """[T, hidden] fp32."""

    def logits(self, states: np.ndarray) -> torch.Tensor:
        """[n, hidden] fp32 -> [n, vocabulary] fp32."""


_model: Model


def start(row: CacheRow, arguments: dict[str, Any]) -> dict[str, Any]:
    """Make the model of a row; returns what it says of itself.

    Args:
        row: to be computed.
        arguments: of `vllm.LLM`; other rows take `model`, `dtype` and `max_model_len` from them.

    """
    global _model
    if row.kind == "vllm":
        from benchmarks.quality.vllm_model import VllmModel

        _model = VllmModel(arguments)
    elif row.kind == "simulated":
        from benchmarks.quality.simulation import SimulatedModel

        _model = SimulatedModel(row, arguments)
    else:
        from benchmarks.quality.quantized_cache import QuantizedCacheModel

        _model = QuantizedCacheModel(row, arguments)
    return _model.facts()


def generate(prompts: list[list[int]], params: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """See `Model.generate`; reports the number of answers that are done."""
    return _model.generate(prompts, params, report)


def hidden_states(window: Sequence[int]) -> np.ndarray:
    """See `Model.hidden_states`."""
    return _model.hidden_states(window)


def compare(reference: np.ndarray, states: np.ndarray | None, targets: np.ndarray) -> pd.DataFrame:
    """See `Engine.compare`; `states` is None if they are the reference's."""
    parts: list[pd.DataFrame] = []
    at, size = 0, 16
    while at < len(targets):
        mine = slice(at, at + size)
        a = _model.logits(reference[mine])
        b = a if states is None else _model.logits(states[mine])
        parts.append(metrics.compare_logits(a, b, targets[mine]))
        at += size
        size = max(1, SLICE_NUMBERS // a.shape[1])
    return pd.concat(parts, ignore_index=True)
