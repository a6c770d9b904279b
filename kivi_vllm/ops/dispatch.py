"""Which implementation of the operators runs on a device, said once in the log."""

from __future__ import annotations

import functools
import os
from types import ModuleType

REBUILD = "with g++ on PATH, install kivi_vllm again (in a checkout: make setup)"


@functools.cache
def _cpu() -> tuple[ModuleType, str, bool]:
    """The CPU's operators, a line on them, and whether they are what they should be.

    Raises:
        KiviConfigError: the environment names an instruction set that is not there.

    """
    from kivi_vllm.ops import reference
    from kivi_vllm.ops.cpu import library, operators

    if os.environ.get(library.ENVIRONMENT) == library.REFERENCE:
        return reference, f"reference (PyTorch), as {library.ENVIRONMENT} says", True
    try:
        native = library.load()
    except OSError as error:
        return reference, f"reference (PyTorch, slow): no native kernels ({error})", False
    more = [name for name in native.available if name != native.isa]
    line = f"native, {native.isa}" + (f" (also: {', '.join(more)})" if more else "")
    if not native.parallel:
        return operators, f"{line}; one thread only: not built by GCC", False
    return operators, line, True


@functools.cache
def _cuda() -> tuple[ModuleType, str, bool]:
    """The same for NVIDIA GPUs.

    Raises:
        ImportError: Triton is not installed.

    """
    import triton

    from kivi_vllm.ops.triton import operators

    return operators, f"Triton {triton.__version__}", True


_IMPLEMENTATIONS = {"cpu": _cpu, "cuda": _cuda}


def describe(device: str = "cpu") -> tuple[str, str]:
    """One line on the operators that `device` would use, and what to do about it, if anything."""
    if device not in _IMPLEMENTATIONS:
        return f"none for {device}", "serve on a CPU or an NVIDIA GPU"
    try:
        _, line, good = _IMPLEMENTATIONS[device]()
    except ImportError as error:
        return f"none ({error})", "pip install 'kivi-vllm[cuda]'"
    return line, "" if good else REBUILD


@functools.cache
def operators(device: str) -> ModuleType:
    """The module with `store_blocks`, `attend` and `store_ring` for a type of device.

    Raises:
        NotImplementedError: there are none for it.
        KiviConfigError: the environment names an instruction set that is not there.

    """
    from vllm.logger import init_logger

    if device not in _IMPLEMENTATIONS:
        raise NotImplementedError(
            f"the KIVI cache has no operators for {device} devices; it runs on CPUs and NVIDIA GPUs"
        )
    module, line, good = _IMPLEMENTATIONS[device]()
    logger = init_logger("vllm.kivi_vllm")
    if good:
        logger.info("KIVI operators on %s: %s", device, line)
    else:
        logger.warning("KIVI operators on %s: %s; %s", device, line, REBUILD)
    return module
