"""The bandwidth floor: reading the bytes that an attention must read, and nothing else.

The loop is C, `floor.c`, compiled when it is first wanted; without a compiler there is no floor,
and standard error says so once.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention.memory import Ranges
from kivi_vllm.toolchain import REMEDY, find_compiler

SOURCE = Path(__file__).with_name("floor.c")
PIECE = 8192
LINE = 64
"""Bytes of a piece at the most, and of a cache line."""


def reader(ranges: Ranges) -> Callable[[], object] | None:
    """A call that reads these pieces of memory once; None where there is no compiler."""
    if (read := _compiled()) is None:
        return None
    addresses, nbytes = torch.tensor(list(_cut(ranges)), dtype=torch.int64).T.contiguous()
    threads = torch.get_num_threads()
    return lambda: read(addresses.data_ptr(), nbytes.data_ptr(), len(addresses), threads)


@functools.cache
def _compiled() -> Any:
    """`read_ranges` of `floor.c`, on the threads of torch's OpenMP; None without a compiler."""
    compiler = find_compiler()
    if compiler is None:
        print(f"no floor: there is no C compiler; {REMEDY}", file=sys.stderr)
        return None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    openmp = [] if "clang" in version.stdout else ["-fopenmp"]  # clang's is not torch's
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "floor.so")
        command = [compiler, "-x", "c", "-std=c11", "-O3", "-fPIC", "-shared", *openmp]
        subprocess.run([*command, str(SOURCE), "-o", str(target)], check=True)
        function = ctypes.CDLL(str(target)).read_ranges
    function.restype = ctypes.c_uint64
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    return function


def _cut(ranges: Ranges) -> Iterator[tuple[int, int]]:
    """Cut the ranges into pieces of like size: threads share them by number."""
    for start, nbytes in ranges:
        count = -(-nbytes // PIECE)
        size = -(-nbytes // count // LINE) * LINE
        for at in range(0, nbytes, size):
            yield start + at, min(size, nbytes - at)
