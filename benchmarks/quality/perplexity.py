"""Teacher-forced divergence from a reference, by text and context length.

Every row computes the same windows of text. A row's final hidden states are compared with the
reference's through the model's own head (`Engine.compare`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from benchmarks.quality.engine import Done, Engine
from benchmarks.quality.metrics import Summary, summary
from benchmarks.quality.rows import CacheRow
from kivi_vllm.cli.errors import UserError

Windows = Mapping[str, Sequence[Sequence[int]]]
"""Windows of token ids by text, all of the longest length."""

HISTORY_CHUNK = 128
"""Tokens of a step for dtypes other than ours.

vLLM's attention takes the keys and values of earlier steps from the cache; how much of a step's own
tokens it takes from there is each backend's affair. With small steps nearly everything is history.
"""


@dataclass(frozen=True)
class Figure:
    """One row's figures at one text and length: over positions [length / 2, length)."""

    text: str
    length: int
    figures: Summary


def chunk(row: CacheRow) -> int | None:
    """Tokens of a step for a row; None for vLLM's choice.

    The KIVI dtypes run with `prefill=cached`, where the chunks make no difference, nor do they for
    a cache that keeps what it is given, as that of `auto`.
    """
    exact = row.dtype == "auto" or row.is_kivi or row.kind != "vllm"
    return None if exact else HISTORY_CHUNK


def states(engine: Engine, windows: Windows, on_done: Done | None = None) -> list[np.ndarray]:
    """Hidden states [T - 1, hidden] of all windows: the last token is only predicted."""
    inputs = [list(window[:-1]) for mine in windows.values() for window in mine]
    return engine.hidden_states(inputs, on_done)


def compare(
    engine: Engine,
    windows: Windows,
    reference: Sequence[np.ndarray],
    mine: Sequence[np.ndarray],
    lengths: Sequence[int],
    on_done: Done | None = None,
) -> list[Figure]:
    """Figures by text and length.

    Args:
        engine: any row's.
        windows: what was computed.
        reference, mine: `states` of the reference and of the row.
        lengths: the second half of each is measured.
        on_done: called with the number of windows that are done.

    """
    first = min(lengths) // 2
    figures: list[Figure] = []
    index = 0
    for text, ones in windows.items():
        tokens: list[pd.DataFrame] = []
        for window in ones:
            a = reference[index][first:]
            b = a if mine is reference else mine[index][first:]
            tokens.append(engine.compare(a, b, window[first + 1 :]))
            index += 1
            if on_done is not None:
                on_done(index)
        for length in lengths:
            # Position t predicts token t + 1: the last token of a length at length - 2.
            parts = [one[length // 2 - first : length - 1 - first] for one in tokens]
            figures.append(Figure(text, length, summary(parts)))
    return figures


def check_lengths(lengths: Sequence[int], limit: int) -> None:
    """Refuse lengths that cannot be measured.

    Raises:
        UserError: too short to have halves worth measuring, or longer than the model's limit.

    """
    for length in lengths:
        if length < 16:
            raise UserError(f"--lengths {length}: a context has at least 16 tokens", "1024")
        if length > limit:
            raise UserError(
                f"--lengths {length}: the model's limit is {limit} tokens",
                f"lengths up to {limit}, or a model with a longer context",
            )
