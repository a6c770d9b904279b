"""The bandwidth floor: reading the bytes that an attention must read, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.attention.memory import Ranges

PIECE = 8192
LINE = 64
"""Bytes of a piece at the most, and of a cache line."""


def library() -> Any:
    """The native library with `read` and `isa`; None where only the reference runs."""
    from benchmarks.attention.kivi import operators
    from kivi_vllm.ops import reference

    if operators() is reference:
        return None
    from kivi_vllm.ops.cpu.library import load

    return load()


def reader(ranges: Ranges) -> Callable[[], object] | None:
    """A call that reads these pieces of memory once; None where there is no native library."""
    native = library()
    if native is None:
        return None
    addresses, nbytes = torch.tensor(list(_cut(ranges)), dtype=torch.int64).T.contiguous()
    return partial(native.read, addresses, nbytes, torch.get_num_threads())


def _cut(ranges: Ranges) -> Iterator[tuple[int, int]]:
    """Cut the ranges into pieces of like size: threads share them by number."""
    for start, nbytes in ranges:
        count = -(-nbytes // PIECE)
        size = -(-nbytes // count // LINE) * LINE
        for at in range(0, nbytes, size):
            yield start + at, min(size, nbytes - at)
