"""What two rows say of the same tokens, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class TokenFigures:
    """Figures of each of T positions, all arrays [T].

    Attributes:
        nll_reference, nll: negative log-probability of the next token, in nats, by the reference
            and by the row.
        kl: KL(reference || row) over the whole vocabulary, in nats.
        agree: whether both have the same most probable next token.

    """

    nll_reference: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    agree: np.ndarray

    def __len__(self) -> int:
        return len(self.nll)

    def __getitem__(self, which: slice) -> TokenFigures:
        return TokenFigures(**{name: array[which] for name, array in self.arrays().items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def joined(parts: Sequence[TokenFigures]) -> TokenFigures:
    """The positions of all parts, in their order."""
    return TokenFigures(
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in TokenFigures.__dataclass_fields__
        }
    )


def compare_logits(reference: torch.Tensor, row: torch.Tensor, targets: np.ndarray) -> TokenFigures:
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
    return TokenFigures(
        nll_reference=-a.gather(-1, at)[:, 0].double().cpu().numpy(),
        nll=-b.gather(-1, at)[:, 0].double().cpu().numpy(),
        kl=terms.sum(-1, dtype=torch.float64).cpu().numpy(),
        agree=(a.argmax(-1) == b.argmax(-1)).cpu().numpy(),
    )


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


def summary(parts: Sequence[TokenFigures], seed: int = 0) -> Summary:
    """Figures over stretches of consecutive positions, with intervals over blocks of them.

    Args:
        parts: one for each stretch; blocks do not reach over their ends.
        seed: of the bootstrap.

    """
    blocks = [part[at : at + BLOCK] for part in parts for at in range(0, len(part), BLOCK)]
    if not blocks:
        raise ValueError("no positions")
    sizes = np.array([len(block) for block in blocks], np.float64)
    sums = {
        "ratio": np.array([(b.nll - b.nll_reference).sum() for b in blocks]),
        "kl": np.array([b.kl.sum() for b in blocks]),
        "top1": np.array([b.agree.sum() for b in blocks], np.float64),
    }
    drawn = np.random.default_rng(seed).integers(0, len(blocks), (RESAMPLES, len(blocks)))

    def estimate(name: str) -> Estimate:
        mean = sums[name].sum() / sizes.sum()
        means = sums[name][drawn].sum(1) / sizes[drawn].sum(1)
        low, high = np.quantile(means, (0.025, 0.975))
        if name == "ratio":
            mean, low, high = np.exp((mean, low, high))
        return Estimate(float(mean), float(low), float(high))

    everything = joined(parts)
    return Summary(
        tokens=len(everything),
        perplexity_reference=float(np.exp(everything.nll_reference.mean())),
        perplexity=float(np.exp(everything.nll.mean())),
        ratio=estimate("ratio"),
        kl=estimate("kl"),
        top1=estimate("top1"),
    )
