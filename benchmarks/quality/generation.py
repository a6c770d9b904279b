"""Long greedy answers: where a row's first token differs from the reference's, and how many do."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

PROMPT_TOKENS = 512
ANSWER_TOKENS = 512


def compare(reference: Sequence[Sequence[int]], mine: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Compare answers of the same lengths to the same prompts, token by token.

    Returns:
        `prompts`, how many; `tokens` of each answer; by prompt `first_divergence`, the tokens
        before the first that differs (`tokens` if none does), and `agreement`, the share of places
        with the same token; `median_divergence`, `mean_agreement`, and how many are `identical`.

    """
    same = [
        [x == y for x, y in zip(a, b, strict=True)] for a, b in zip(reference, mine, strict=True)
    ]
    tokens = len(reference[0])
    first = [one.index(False) if False in one else tokens for one in same]
    agreement = [statistics.fmean(one) for one in same]
    return dict(
        prompts=len(same),
        tokens=tokens,
        first_divergence=first,
        agreement=agreement,
        median_divergence=statistics.median(first),
        mean_agreement=statistics.fmean(agreement),
        identical=first.count(tokens),
    )
