"""Which tests run where: what shares an engine stays together, and what is long begins first."""

from __future__ import annotations

from pathlib import Path

import pytest

# Before anything imports torch, which reads OMP_NUM_THREADS then: with two threads each, the
# engines of two workers spend most of their time waiting for each other's.
import tests.engine  # noqa: F401

ROOT = Path(__file__).parent
# Nothing is shared by the tests of a file that costs more than a moment: workers take them singly.
SINGLY = ("unit", "triton")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups for `--dist loadgroup`.

    Those that are `alone` are one group, and so never beside each other. They come first: the
    other workers do all else meanwhile. What can be taken singly comes last, and fills the end.
    """

    def order(item: pytest.Item) -> tuple[bool, bool]:
        return item.get_closest_marker("alone") is None, folder(item) in SINGLY

    items.sort(key=order)
    for item in items:
        if item.get_closest_marker("alone"):
            item.add_marker(pytest.mark.xdist_group("alone"))
        elif folder(item) not in SINGLY:
            item.add_marker(pytest.mark.xdist_group(str(item.path.relative_to(ROOT))))


def folder(item: pytest.Item) -> str:
    """The folder of tests/ in which its file lies; for files in tests/ itself, their name."""
    return item.path.relative_to(ROOT).parts[0]
