"""Pools of cache pages that are larger than the processor's caches."""

from __future__ import annotations

import contextlib
import mmap
import re
from pathlib import Path

import torch

Ranges = list[tuple[int, int]]
"""Pieces of memory: address and bytes of each."""

HUGE_PAGE = 2 << 20
COLD = 4
"""A pool is at least this many last-level caches, or as large as what one call reads."""


def allocate(nbytes: int, huge_pages: bool = True) -> torch.Tensor:
    """A zeroed tensor of bytes of its own mapping, which goes back to the system with it."""
    area = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE
    return whole[start : start + nbytes]


def huge_page_bytes() -> int:
    """Bytes of this process that lie on huge pages now."""
    with contextlib.suppress(OSError):
        found = re.search(r"AnonHugePages:\s*(\d+)", Path("/proc/self/smaps_rollup").read_text())
        return int(found[1]) << 10 if found else 0
    return 0


def cold_sets(read_bytes: int, llc: int) -> int:
    """How many calls of `read_bytes` bytes each read a whole pool of `COLD` caches' size."""
    return max(1, -(-COLD * llc // read_bytes))


def replicate(pool: torch.Tensor, template: torch.Tensor) -> None:
    """Fill pool [n, ...] with the entries of template [t, ...] in turn."""
    for i in range(len(template)):
        pool[i :: len(template)] = template[i]


def shuffled(sets: int, rows: int, pages: int, seed: int) -> torch.Tensor:
    """Tables [sets, rows, pages] int32 of page ids: each page of a pool once, in random order."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(sets * rows * pages, generator=generator, dtype=torch.int32)
    return ids.view(sets, rows, pages)
