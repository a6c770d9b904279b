"""Which backend of the operators serves a kind of device, said once in the log."""

from __future__ import annotations

import functools
import logging
import os
from typing import NamedTuple

from kivi_vllm.ops.contract import Operators

logger = logging.getLogger("vllm.kivi_vllm")
"""Below vLLM's own logger, so that its settings hold."""

REBUILD = "with g++ on PATH, install kivi_vllm again (in a checkout: make setup)"


class Backend(NamedTuple):
    """The operators of a device, one line about them, and what to do about it, if anything."""

    operators: Operators
    line: str
    remedy: str = ""


@functools.cache
def _cpu() -> Backend:
    from kivi_vllm.ops import reference
    from kivi_vllm.ops.cpu import library, operators

    if os.environ.get(library.ENVIRONMENT) == library.REFERENCE:
        return Backend(reference, f"reference (PyTorch), as {library.ENVIRONMENT} says")
    try:
        native = library.load()
    except OSError as error:
        line = f"reference (PyTorch, slow): no native kernels ({error})"
        remedy = REBUILD
        if os.environ.get(library.LIBRARY):
            remedy = f"{library.LIBRARY} names it: unset it, or name another build"
        return Backend(reference, line, remedy)
    more = [name for name in native.available if name != native.isa]
    line = f"native, {native.isa}" + (f" (also: {', '.join(more)})" if more else "")
    if not native.parallel:
        return Backend(operators, f"{line}; one thread only: not built by GCC", REBUILD)
    return Backend(operators, line)


@functools.cache
def _cuda() -> Backend:
    import triton

    from kivi_vllm.ops.triton import operators

    return Backend(operators, f"Triton {triton.__version__}")


_BACKENDS = {"cpu": _cpu, "cuda": _cuda}

DEVICES = tuple(_BACKENDS)
"""Kinds of devices that have operators, as PyTorch calls them."""


def backend(device: str) -> Backend:
    """The backend of a kind of device.

    Raises:
        NotImplementedError: there is none for it.
        ImportError: a package that it needs is not installed.
        KiviConfigError: the environment names an instruction set that is not there.

    """
    if device not in _BACKENDS:
        raise NotImplementedError(
            f"the KIVI cache has no operators for {device} devices; it runs on CPUs and NVIDIA GPUs"
        )
    return _BACKENDS[device]()


def describe(device: str = "cpu") -> tuple[str, str]:
    """One line on the operators that `device` would use, and what to do about it, if anything.

    Raises:
        KiviConfigError: the environment names an instruction set that is not there.

    """
    try:
        found = backend(device)
    except NotImplementedError:
        return f"none for {device}", "serve on a CPU or an NVIDIA GPU"
    except ImportError as error:
        return f"none ({error})", "pip install 'kivi-vllm[cuda]'"
    return found.line, found.remedy


@functools.cache
def operators(device: str) -> Operators:
    """The operators of a kind of device; the first call logs what they are. Raises as `backend`."""
    found = backend(device)
    if found.remedy:
        logger.warning("KIVI operators on %s: %s; %s", device, found.line, found.remedy)
    else:
        logger.info("KIVI operators on %s: %s", device, found.line)
    return found.operators
