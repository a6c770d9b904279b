"""Settings of the unit tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kivi_vllm.ops.cpu import library
from tests.unit.native import INSTRUCTION_SETS


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """The tensors are small: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels of one instruction set."""
    library.load().select(request.param)
    yield request.param
    library.load().select(None)


@pytest.fixture
def threads() -> Iterator[None]:
    """Three threads: pages of one sequence are split, and the parts put together."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)
