"""The quick choice: what `make test` runs of a list of cases."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def some(cases: Sequence[Any], quick: Iterable[int]) -> list[Any]:
    """All cases, as `pytest.mark.parametrize` takes them; those not at `quick` are `slow`."""
    chosen = set(quick)
    assert chosen <= set(range(len(cases))), f"{max(chosen)} is not one of {len(cases)} cases"
    return [
        case if i in chosen else pytest.param(*_values(case), marks=pytest.mark.slow)
        for i, case in enumerate(cases)
    ]


def _values(case: Any) -> Sequence[Any]:
    # A named tuple is one value.
    return case if type(case) is tuple else (case,)
