from __future__ import annotations

from collections.abc import Iterator

import pytest

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from tests.quick import quick_engines


@pytest.fixture(scope="package", autouse=True)
def _quick() -> Iterator[None]:
    with quick_engines():
        yield
