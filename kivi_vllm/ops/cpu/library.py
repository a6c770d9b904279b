"""The compiled kernels: found, loaded and chosen once per process.

The library is plain C and knows nothing of Python or torch. It is linked to OpenMP by
its SONAME, so that torch, which must be imported first, brings the one runtime that both
share. torch and vLLM decide how many threads there are and where they run.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from pathlib import Path

import torch  # noqa: F401 - brings OpenMP

from kivi_vllm.config import KiviConfigError
from kivi_vllm.ops.cpu import abi

ENVIRONMENT = "KIVI_VLLM_CPU_ISA"
"""Names the instruction set to use, or `reference` for PyTorch; unset: the best there is."""

REFERENCE = "reference"
LIBRARY = "KIVI_VLLM_CPU_LIBRARY"
PATH = Path(os.environ.get(LIBRARY) or Path(__file__).with_name("libkivi_cpu.so"))
"""The library; the variable names another build of it, for instance a sanitizer's."""

I64 = ctypes.c_int64

OK, NO_MEMORY, BAD_PAGE, BAD_LIST = range(4)


class _Field(ctypes.Structure):
    """KiviField of csrc/abi.h."""

    _fields_ = (("name", ctypes.c_char_p), ("offset", I64))


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
            OSError: the file is missing, cannot be loaded here, or has other functions or
                structs than `abi`.
            KiviConfigError: this build or this machine does not have `isa`.

        """
        self._c = ctypes.CDLL(str(path))
        try:
            self._declare()
            different = _difference(self._c.kivi_fields())
        except AttributeError as error:  # a function is missing
            different = str(error)
        if different:
            raise OSError(f"{path} was built from other sources: {different}; build it again")
        names = ctypes.create_string_buffer(256)
        self._c.kivi_available(names, I64(256))
        self.parallel = bool(self._c.kivi_parallel())
        self.available = names.value.decode().split()
        self.select(isa)

    def _declare(self) -> None:
        c = self._c
        c.kivi_fields.restype = ctypes.POINTER(_Field)
        c.kivi_select.restype = ctypes.c_char_p
        self.store_blocks = c.kivi_store_blocks
        self.select_pages = c.kivi_select_pages
        self.attend = c.kivi_attend
        self.attend_selected = c.kivi_attend_selected
        self.store_ring = c.kivi_store_ring
        for name in ("store_blocks", "select_pages", "attend", "attend_selected", "store_ring"):
            getattr(self, name).argtypes = [ctypes.c_char_p]

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


def _difference(fields: ctypes._Pointer[_Field]) -> str:
    """The first field of the structs that the library has elsewhere than `abi`, if any."""
    all_fields = (fields[i] for i in itertools.count())
    theirs = itertools.takewhile(lambda field: field.name, all_fields)
    named = ((field.name.decode(), field.offset) for field in theirs)
    for own, other in itertools.zip_longest(abi.offsets(), named, fillvalue=("nothing", 0)):
        if own != other:
            return f"it has {other[0]} at byte {other[1]} where {own[0]} at {own[1]} is expected"
    return ""


@functools.cache
def load() -> Library:
    """The library with the instruction set of the environment, or the best.

    Raises:
        OSError: it was not built, or cannot be loaded here.
        KiviConfigError: the environment names an instruction set that is not there.

    """
    return Library(PATH, os.environ.get(ENVIRONMENT) or None)
