"""Compiling kernels for GPUs that are not here, by the launches that would run on them.

`compiled(capability)` gives Triton a driver that knows only its target, and makes every
launch a compilation. What a launch passes decides how its kernel is specialized, so it
is the product's own launchers that are called, with tensors on the CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Binary:
    """A compiled kernel and what it takes on the device."""

    name: str
    registers: int
    spills: int
    shared: int
    instructions: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.registers} registers, {self.spills} spills, "
            f"{self.shared} bytes shared, {self.instructions} instructions"
        )


class _Driver:
    """A GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> str:
        return "cpu"


def _tool(name: str) -> str:
    """One of the CUDA tools that Triton brings."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inspect(kernel: Any) -> Binary:
    """What `cuobjdump` and `nvdisasm` say of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        code = _run(_tool("nvdisasm"), "-c", file.name)
    [registers] = re.findall(r"REG:(\d+)", usage)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*);", code, re.MULTILINE)
    spills = sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in instructions)
    shared = kernel.metadata.shared
    return Binary(kernel.metadata.name, int(registers), spills, shared, len(instructions))


@contextmanager
def compiled(capability: int) -> Iterator[list[Any]]:
    """Compile what is launched, for `capability` (80, 90, 100); gives the kernels, in order."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    kernels: list[Any] = []
    seen: set[JITFunction] = set()
    original = JITFunction.run

    def run(self: Any, *args: Any, warmup: bool = False, **kwargs: Any) -> Any:
        if self not in seen:  # what it keeps is for another target
            seen.add(self)
            self.device_caches.clear()
        kernels.append(original(self, *args, warmup=True, **kwargs))
        return kernels[-1]

    before = driver._active
    driver.set_active(_Driver(capability))
    try:
        with mock.patch.object(JITFunction, "run", run):
            yield kernels
    finally:
        driver._active = before
