"""Which implementation of the operators runs on a device, said once in the log."""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

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


def describe(device: str = "cpu") -> tuple[str, str]:
    """One line on the operators that `device` would use, and what to do about it, if anything."""
    if device != "cpu":
        return f"none for {device}", "serve on a CPU: pip install 'kivi-vllm[cpu]'"
    _, line, good = _cpu()
    return line, "" if good else REBUILD


@functools.cache
def operators(device: torch.device) -> ModuleType:
    """The module with `store_blocks`, `attend` and `store_ring` for `device`.

    Raises:
        NotImplementedError: there are none for this kind of device.
        KiviConfigError: the environment names an instruction set that is not there.

    """
    from vllm.logger import init_logger

    if device.type != "cpu":
        raise NotImplementedError(
            f"the KIVI cache has no operators for {device.type} devices; it runs on CPUs"
        )
    module, line, good = _cpu()
    logger = init_logger("vllm.kivi_vllm")
    if good:
        logger.info("KIVI operators on %s: %s", device, line)
    else:
        logger.warning("KIVI operators on %s: %s; %s", device, line, REBUILD)
    return module
