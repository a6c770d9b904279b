"""Quick engines with exact products on poisoned pages, and the report of what a soak did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from tests.invariance.conftest import poison  # noqa: F401  (a fixture)
from tests.offload import offloading  # noqa: F401  (a fixture)
from tests.quick import quick_engines
from tests.soak.exact import exact_products


@pytest.fixture(scope="package", autouse=True)
def _quick() -> Iterator[None]:
    with quick_engines(), exact_products():
        yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each test that recorded what it did."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for name, value in getattr(report, "user_properties", ()):
                if name == "soak":
                    terminalreporter.write_line(f"{report.nodeid}: {value}")
