"""A compiler that keeps in memory what should be in registers is named, once a kernel."""

from __future__ import annotations

import ctypes
import logging
from typing import Any

import triton
from packaging.version import Version
from triton import knobs

BETTER = "3.8"
"""The oldest version of Triton that keeps all but a few registers of our kernels where they
should be, in all cases of `tests/unit/test_compile.py`."""

_OURS = "_store_blocks", "_store_ring", "_decode", "_combine", "_prefill"
_LOCAL_BYTES = 3  # CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
_said: set[str] = set()


def watch() -> None:
    """From now on, look at every kernel that Triton loads, if there is a better one."""
    if Version(triton.__version__) < Version(BETTER):
        knobs.runtime.kernel_load_end_hook.add(_loaded)


def _loaded(module: Any, function: int, name: str, metadata: Any, key: str) -> None:
    if name not in _OURS or name in _said:
        return
    if nbytes := _local_bytes(function):
        _said.add(name)
        logging.getLogger("vllm.kivi_vllm").warning(
            "Triton %s keeps %d bytes a thread of %s in memory instead of registers, which makes "
            "it slower; Triton %s does not: pip install 'triton>=%s'",
            triton.__version__,
            nbytes,
            name,
            BETTER,
            BETTER,
        )


def _local_bytes(function: int) -> int:
    """Bytes of local memory of a thread, as the driver has it; 0 without a driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    value = ctypes.c_int()
    cuda.cuFuncGetAttribute(ctypes.byref(value), _LOCAL_BYTES, ctypes.c_void_p(function))
    return value.value
