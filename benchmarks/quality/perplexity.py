"""Teacher-forced divergence from a reference, by text and context length.

Every row computes the same windows of text. A row's final hidden states are compared with the
reference's through the model's own head (`Engine.compare`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.quality.engine import Done, Engine

RESAMPLES = 2000
BLOCK = 64
"""Consecutive tokens that are drawn together: neighbours are not independent."""


def measure(
    engine: Engine,
    windows: Mapping[str, Sequence[Sequence[int]]],
    lengths: Sequence[int],
    reference: Sequence[np.ndarray] | None = None,
    on_done: Done = print,
) -> tuple[list[np.ndarray], list[dict[str, Any]]]:
    """Compute all windows, and compare a row with the reference.

    Args:
        engine: the row's.
        windows: token ids by text, T in each: the longest length.
        lengths: contexts, whose positions [length / 2, length) are measured.
        reference: hidden states of the reference's windows; None if the row is the reference.
        on_done: called with the number of windows that are done.

    Returns:
        Hidden states [T - 1, hidden] of the windows, whose last tokens are only predicted; and
        figures by `text` and `length`, see `summary`.

    """
    first = min(lengths) // 2
    states: list[np.ndarray] = []
    records: list[dict[str, Any]] = []
    for text, ones in windows.items():
        tokens: list[pd.DataFrame] = []
        for window in ones:
            states.append(mine := engine.hidden_states(window[:-1]))
            base = mine if reference is None else reference[len(states) - 1]
            other = None if reference is None else mine[first:]
            tokens.append(engine.compare(base[first:], other, window[first + 1 :]))
            on_done(len(states))
        for length in lengths:
            # Position t predicts token t + 1: the last token of a length at length - 2.
            parts = [one[length // 2 - first : length - 1 - first] for one in tokens]
            records.append({"text": text, "length": length, **summary(parts)})
    return states, records


def summary(parts: Sequence[pd.DataFrame], seed: int = 0) -> dict[str, Any]:
    """Figures over stretches of consecutive positions, with intervals over blocks of them.

    Args:
        parts: one for each stretch, see `models.compare_logits`; blocks do not reach over the ends.
        seed: of the bootstrap.

    Returns:
        `tokens`, how many; `perplexity_reference` and `perplexity`, exp of the mean negative
        log-probability; and with the ends of its 95 % interval (`value`, `low`, `high`) each:
        `ratio` of the perplexities; `kl`, mean KL(reference || row) in nats; `top1`, share of
        positions where both name the same token.

    """
    everything = pd.concat(parts) if parts else pd.DataFrame()
    if everything.empty:
        raise ValueError("no positions")
    blocks = pd.concat(
        part.assign(more=part["nll"] - part["nll_reference"], size=1)
        .groupby(np.arange(len(part)) // BLOCK)
        .sum()
        for part in parts
    ).astype(float)
    drawn = np.random.default_rng(seed).integers(0, len(blocks), (RESAMPLES, len(blocks)))
    sizes = blocks["size"].to_numpy()

    def estimate(name: str, scale: np.ufunc = np.positive) -> dict[str, float]:
        sums = blocks[name].to_numpy()
        low, high = np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), (0.025, 0.975))
        figures = zip(("value", "low", "high"), (sums.sum() / sizes.sum(), low, high), strict=True)
        return {end: float(scale(figure)) for end, figure in figures}

    return dict(
        tokens=len(everything),
        perplexity_reference=float(np.exp(everything["nll_reference"].mean())),
        perplexity=float(np.exp(everything["nll"].mean())),
        ratio=estimate("more", np.exp),
        kl=estimate("kl"),
        top1=estimate("agree"),
    )
