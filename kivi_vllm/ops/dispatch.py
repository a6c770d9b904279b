"""Which implementation of the operators runs on a device, said once in the log."""

from __future__ import annotations

import functools
from types import ModuleType

import torch


def describe(device: str = "cpu") -> str:
    """One line on the operators that `device` would use, for people."""
    if device == "cpu":
        return "reference (PyTorch)"
    return f"none for {device}"


@functools.cache
def operators(device: torch.device) -> ModuleType:
    """The module with `store_blocks`, `attend` and `store_ring` for `device`.

    Raises:
        NotImplementedError: there are none for this kind of device.

    """
    from vllm.logger import init_logger

    if device.type != "cpu":
        raise NotImplementedError(
            f"the KIVI cache has no operators for {device.type} devices; it runs on CPUs"
        )
    from kivi_vllm.ops import reference

    init_logger("vllm.kivi_vllm").info("KIVI operators on %s: %s", device, describe(device.type))
    return reference
