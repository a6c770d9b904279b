"""Into how many splits decode steps go, and the memory that is kept for them."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from kivi_vllm.ops.triton import workspace
from kivi_vllm.ops.triton.workspace import (
    FULL,
    MAX_SPLITS,
    MOST_PROGRAMS,
    Kernel,
    columns,
    num_splits,
    slots,
)

H100 = mock.Mock(
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    shared_memory_per_multiprocessor=228 << 10,
    max_threads_per_multi_processor=2048,
)
CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def h100():
    for cached in (slots, workspace._num_processors):
        cached.cache_clear()
    with mock.patch("torch.cuda.get_device_properties", return_value=H100):
        yield
    for cached in (slots, workspace._num_processors):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("kernel", "each"),
    [
        (Kernel(237, 18944, warps=2), 4),  # registers
        (Kernel(183, 100 << 10, warps=4), 2),  # shared memory
        (Kernel(166, 10240, warps=1), 12),
        (Kernel(32, 0, warps=1), MOST_PROGRAMS),
        (Kernel(255, 0, warps=16), 1),  # it would not even run
    ],
)
def test_programs_that_run_together(kernel: Kernel, each: int) -> None:
    assert slots(CUDA, kernel) == 132 * each


def test_waves_are_whole_where_they_can_be() -> None:
    together = 132 * 4
    for rows in (1, 4, 32, 60, 66, 100, 128, 1000):
        programs = rows * 8
        splits = num_splits(programs, 1024, together)
        waves = -(-programs * splits // together)
        share = programs * splits / (waves * together)
        others = [
            programs * n / (-(-programs * n // together) * together)
            for n in range(1, max(1, min(MAX_SPLITS, 4 * together // programs)) + 1)
        ]
        assert share >= min(FULL, max(others)), (rows, splits)
    assert num_splits(32 * 8, 1024, together) == 2  # 512 of 528, where 9 were 2,304 of 2,640


def test_short_rows_are_split_into_two_pages_at_least() -> None:
    assert num_splits(8, 3, 2112) == 2
    assert num_splits(8, 1, 2112) == num_splits(8, 0, 2112) == 1


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_what_is_reserved_is_enough(tokens: int) -> None:
    """Of every step of at most so many rows, whatever the kernel takes."""
    sizes = []
    note = mock.Mock(side_effect=lambda numel, _: sizes.append(numel) or mock.Mock())
    with mock.patch.object(workspace, "_buffer", note):
        workspace.reserve(256, 8, 4, tokens, 128, CUDA)
    for rows in (*range(1, 40), 100, 255, 256):
        for few in range(1, tokens + 1):
            tiles, n = columns(4, few)
            programs = rows * 8 * tiles
            for each in range(1, MOST_PROGRAMS + 1):
                splits = num_splits(programs, 2048, 132 * each)
                assert programs * (1 + splits) * n * (128 + 2) <= sizes[0]
