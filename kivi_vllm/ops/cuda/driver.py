"""The CUDA driver: code to a kernel of the device that is current, and launches of it."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A kernel of the device that was current, for programs of `warps`.

    `handle` is the driver's CUfunction.
    """

    handle: ctypes.c_void_p
    registers: int
    shared_bytes: int
    spilled_bytes: int
    warps: int


class DriverError(RuntimeError):
    """The driver refuses."""


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int) -> None:
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(text))
        raise DriverError((text.value or b"unknown error").decode())


def load(code: bytes, name: str, threads: int) -> Kernel:
    """The kernel `name` of a cubin; it stays for the life of the process."""
    cuda = _library()
    module, handle = ctypes.c_void_p(), ctypes.c_void_p()
    _check(cuda.cuModuleLoadData(ctypes.byref(module), code))
    _check(cuda.cuModuleGetFunction(ctypes.byref(handle), module, name.encode()))
    shared, local, registers = (_attribute(handle, which) for which in (1, 3, 4))
    return Kernel(handle, registers, shared, local, threads // 32)


def _attribute(handle: ctypes.c_void_p, which: int) -> int:
    value = ctypes.c_int()
    _check(_library().cuFuncGetAttribute(ctypes.byref(value), which, handle))
    return value.value


def launch(
    kernel: Kernel,
    grid: tuple[int, int, int],
    argument: ctypes.Structure,
    stream: int,
) -> None:
    """Put a launch with one argument, a struct, on a stream of the current device."""
    arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
    _check(_library().cuLaunchKernel(
        kernel.handle, *grid, 32 * kernel.warps, 1, 1, 0, ctypes.c_void_p(stream), arguments, None
    ))  # fmt: skip
