from __future__ import annotations

from collections.abc import Iterator

import pytest

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from tests.quick import quick_engines


@pytest.fixture(scope="package", autouse=True)
def _vllm_with_plugin() -> Iterator[None]:
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    with quick_engines():
        yield
