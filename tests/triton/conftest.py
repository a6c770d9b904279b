"""Settings of the tests of the Triton kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kivi_vllm.ops.triton import operators
from tests.triton.device import DEVICE, INTERPRETED
from tests.triton.interpreted import quicken, repair


@pytest.fixture(scope="session", autouse=True)
def somewhere_to_run() -> Iterator[None]:
    """Skip where kernels cannot run; one thread, for tensors are small."""
    if DEVICE is None:
        pytest.skip("no GPU, and not interpreted: set TRITON_INTERPRET=1")
    if INTERPRETED:
        quicken()
        repair()
    operators.CHECKED = True
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
