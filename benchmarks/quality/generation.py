"""Long greedy answers: where a row's first token differs from the reference's, and how many do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

PROMPT_TOKENS = 512
ANSWER_TOKENS = 512


@dataclass(frozen=True)
class Figure:
    """One row's answers against the reference's.

    Attributes:
        text: where the prompts are from.
        prompts: how many.
        tokens: of each answer.
        first_divergence: by prompt, tokens before the first that differs; `tokens` if none does.
        agreement: by prompt, the share of places with the same token in both answers.

    """

    text: str
    prompts: int
    tokens: int
    first_divergence: list[int]
    agreement: list[float]

    @property
    def median_divergence(self) -> float:
        """Median of `first_divergence`."""
        return statistics.median(self.first_divergence)

    @property
    def mean_agreement(self) -> float:
        """Mean of `agreement`."""
        return statistics.fmean(self.agreement)

    @property
    def identical(self) -> int:
        """Answers without any difference."""
        return sum(n == self.tokens for n in self.first_divergence)


def compare(text: str, reference: Sequence[Sequence[int]], mine: Sequence[Sequence[int]]) -> Figure:
    """Compare answers of the same lengths to the same prompts, token by token."""
    first, agreement = [], []
    for a, b in zip(reference, mine, strict=True):
        same = [x == y for x, y in zip(a, b, strict=True)]
        first.append(same.index(False) if False in same else len(same))
        agreement.append(sum(same) / len(same))
    return Figure(text, len(first), len(reference[0]), first, agreement)
