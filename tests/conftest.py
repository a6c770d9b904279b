"""Which worker runs what: what shares an engine stays together, and what is long begins first."""

from __future__ import annotations

import logging
from typing import Any

import pytest

# Before anything imports torch, which reads OMP_NUM_THREADS then: with two threads each, the
# engines of two workers spend most of their time waiting for each other's.
import tests.engine  # noqa: F401

# Their processes want all cores: one worker has them all, so that never two run side by side.
CROWDED = (
    "tests/ray/",
    "tests/serving/test_data_parallel.py",
    "tests/serving/test_server.py",
    "tests/soak/test_restart.py",
)
# Nothing is shared in a file that costs more than a moment: their tests are dealt out singly.
SINGLY = ("tests/unit/", "tests/triton/", "tests/ptx/")


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Our records too, where another test has run a command that quiets vLLM's loggers."""
    caplog.set_level(logging.INFO, "vllm")
    return caplog


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker begins with what is crowded; what is dealt out singly fills the end."""
    items.sort(
        key=lambda item: (not item.nodeid.startswith(CROWDED), _group(item.nodeid) == item.nodeid)
    )


@pytest.hookimpl(optionalhook=True)  # xdist's
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Work is dealt out by `_group`, in the order of the collection."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    config.option.loadscopereorder = False
    return ByGroup(config, log)


def _group(nodeid: str) -> str:
    """Tests of one group run on one worker, one after the other."""
    if nodeid.startswith(CROWDED):
        return "crowded"
    return nodeid if nodeid.startswith(SINGLY) else nodeid.partition("::")[0]
