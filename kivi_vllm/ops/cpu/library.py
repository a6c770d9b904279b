"""The compiled kernels: found, loaded and chosen once per process.

The library is plain C and knows nothing of Python or torch. It is linked to OpenMP by
its SONAME, so that torch, which must be imported first, brings the one runtime that both
share; how many threads there are and where they are bound stays torch's and vLLM's affair.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from kivi_vllm.config import KiviConfigError

ENVIRONMENT = "KIVI_VLLM_CPU_ISA"
"""Names the instruction set to use, or `reference` for PyTorch; unset: the best there is."""

REFERENCE = "reference"
PATH = Path(os.environ.get("KIVI_VLLM_CPU_LIBRARY") or Path(__file__).with_name("libkivi_cpu.so"))
"""The library; the variable names another build of it, for instance a sanitizer's."""

I64, PTR = ctypes.c_int64, ctypes.c_void_p
CALL_BYTES = (47 + 12) * 8
"""Size of KiviCall in csrc/abi.h, which `operators` packs."""

OK, NO_MEMORY, BAD_PAGE = range(3)


class Library:
    """The loaded kernels.

    Attributes:
        isa: the instruction set in use.
        parallel: whether calls run on several threads.
        available: those that this build and this machine have, best first.

    """

    def __init__(self, path: Path, isa: str | None = None) -> None:
        """Load `path` and choose an instruction set.

        Raises:
            OSError: the file is missing or cannot be loaded here.
            KiviConfigError: this build or this machine does not have `isa`.

        """
        self._c = ctypes.CDLL(str(path))
        try:
            self._declare()
        except AttributeError:  # a function is missing
            raise OSError(f"{path} was built from other sources") from None
        names = ctypes.create_string_buffer(256)
        self._c.kivi_available(names, I64(256))
        self.parallel = bool(self._c.kivi_parallel())
        self.available = names.value.decode().split()
        self.select(isa)

    def _declare(self) -> None:
        c = self._c
        c.kivi_call_bytes.restype = I64
        if c.kivi_call_bytes() != CALL_BYTES:
            raise AttributeError
        c.kivi_select.restype = ctypes.c_char_p
        c.kivi_read.restype = ctypes.c_uint64
        c.kivi_read.argtypes = [PTR, PTR, I64, I64]
        for function in (c.kivi_store_blocks, c.kivi_attend, c.kivi_store_ring):
            function.argtypes = [ctypes.c_char_p]
        self.store_blocks = c.kivi_store_blocks
        self.attend = c.kivi_attend
        self.store_ring = c.kivi_store_ring

    def select(self, isa: str | None) -> str:
        """Use another instruction set, for all calls from now on; None: the best.

        Raises:
            KiviConfigError: this build or this machine does not have `isa`.

        """
        chosen = self._c.kivi_select(None if isa is None else isa.encode())
        if chosen is None:
            raise KiviConfigError(
                f"{ENVIRONMENT} is {isa!r}, which this machine or this build does not have; "
                f"use one of: {', '.join([*self.available, REFERENCE])}; or unset it"
            )
        self.isa = chosen.decode()
        return self.isa

    def read(self, addresses: torch.Tensor, nbytes: torch.Tensor, threads: int) -> int:
        """Read memory and do nothing else: the least time that these bytes can take.

        Args:
            addresses, nbytes: [n] int64, ranges to read, in this order.
            threads: that share the ranges.

        Returns:
            a sum over the bytes.

        """
        return self._c.kivi_read(
            addresses.data_ptr(), nbytes.data_ptr(), I64(len(addresses)), I64(threads)
        )


@functools.cache
def load() -> Library:
    """The library with the instruction set of the environment, or the best.

    Raises:
        OSError: it was not built, or cannot be loaded here.
        KiviConfigError: the environment names an instruction set that is not there.

    """
    return Library(PATH, os.environ.get(ENVIRONMENT) or None)
