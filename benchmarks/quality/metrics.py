"""What two rows say of the same tokens, and how sure that is.

The figures of T positions are a frame of T rows: `nll_reference` and `nll`, the negative
log-probability of the next token by the reference and by the row, in nats; `kl`, KL(reference ||
row) over the whole vocabulary, in nats; `agree`, whether both have the same most probable token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    import torch


def compare_logits(reference: torch.Tensor, row: torch.Tensor, targets: np.ndarray) -> pd.DataFrame:
    """Compare the logits [T, vocabulary] of the reference and of a row at the same positions.

    Args:
        reference, row: fp32; the same tensor if the reference itself is measured.
        targets: [T] the next tokens.

    """
    import torch

    a = reference.log_softmax(-1)
    b = a if row is reference else row.log_softmax(-1)
    at = torch.from_numpy(np.asarray(targets, np.int64)).to(a.device)[:, None]
    # Terms of both signs nearly cancel where the rows are close: summed in float64. A token that
    # the model rules out (-inf) adds nothing.
    terms = torch.where(a == -torch.inf, 0.0, a.exp() * (a - b))
    figures = {
        "nll_reference": -a.gather(-1, at)[:, 0].double(),
        "nll": -b.gather(-1, at)[:, 0].double(),
        "kl": terms.sum(-1, dtype=torch.float64),
        "agree": a.argmax(-1) == b.argmax(-1),
    }
    return pd.DataFrame({name: values.cpu().numpy() for name, values in figures.items()})


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The figures of a set of positions.

    Attributes:
        tokens: positions.
        perplexity_reference, perplexity: exp of the mean negative log-probability.
        ratio: perplexity / perplexity_reference.
        kl: mean KL(reference || row), in nats.
        top1: share of positions where both name the same token.

    """

    tokens: int
    perplexity_reference: float
    perplexity: float
    ratio: Estimate
    kl: Estimate
    top1: Estimate


RESAMPLES = 2000
BLOCK = 64
"""Consecutive tokens that are drawn together: neighbours are not independent."""


def summary(parts: Sequence[pd.DataFrame], seed: int = 0) -> Summary:
    """Figures over stretches of consecutive positions, with intervals over blocks of them.

    Args:
        parts: one for each stretch; blocks do not reach over their ends.
        seed: of the bootstrap.

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

    def estimate(name: str) -> tuple[float, float, float]:
        sums = blocks[name].to_numpy()
        means = sums[drawn].sum(1) / sizes[drawn].sum(1)
        low, high = np.quantile(means, (0.025, 0.975))
        return float(sums.sum() / sizes.sum()), float(low), float(high)

    return Summary(
        tokens=len(everything),
        perplexity_reference=float(np.exp(everything["nll_reference"].mean())),
        perplexity=float(np.exp(everything["nll"].mean())),
        ratio=Estimate(*map(float, np.exp(estimate("more")))),
        kl=Estimate(*estimate("kl")),
        top1=Estimate(*estimate("agree")),
    )
