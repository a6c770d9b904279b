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
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Binary:
    """A compiled kernel and what it takes on the device.

    Attributes:
        name: of the kernel.
        warps: of a program.
        registers: of a thread.
        spills: instructions that load or store what registers do not hold.
        shared: bytes of shared memory of a program.
        instructions: of the kernel.
        loop: of them, those of the longest loop: of decode, what a warp does for a page.

    """

    name: str
    warps: int
    registers: int
    spills: int
    shared: int
    instructions: int
    loop: int

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.warps} warps, {self.registers} registers, {self.spills} spills, "
            f"{self.shared} bytes shared, {self.instructions} instructions, {self.loop} in a loop"
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
    """What `cuobjdump` and `nvdisasm` say of a kernel that Triton compiled."""
    of = kernel.metadata
    return inspect_code(kernel.asm["cubin"], of.name, of.num_warps, of.shared)


def inspect_code(cubin: bytes, name: str, warps: int, shared: int = 0) -> Binary:
    """The same of a cubin; `shared` bytes are given by the launch, beside those of the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(_tool("cuobjdump"), "-res-usage", file.name)
        code = _run(_tool("nvdisasm"), "-c", file.name)
    [registers], [own] = re.findall(r"REG:(\d+)", usage), re.findall(r"SHARED:(\d+)", usage)
    instructions, loop = _instructions(code)
    return Binary(
        name=name,
        warps=warps,
        registers=int(registers),
        spills=sum(bool(re.search(r"\b(LDL|STL)\b", x)) for x in instructions),
        shared=int(own) + shared,
        instructions=len(instructions),
        loop=loop,
    )


def _instructions(code: str) -> tuple[list[str], int]:
    """The instructions of what `nvdisasm` prints, and how many the longest loop has."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    longest = 0
    for line in code.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            instructions.append(found[1])
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", found[1])
            if back and back[1] in labels:
                longest = max(longest, len(instructions) - labels[back[1]])
    return instructions, longest


@contextmanager
def _assembled(wanted: bool) -> Iterator[None]:
    """Whether PTX becomes machine code; kernels for which it does not are cached apart."""
    if wanted:
        yield
        return
    hash_of = CUDABackend.hash
    with (
        mock.patch.object(CUDABackend, "make_cubin", lambda *_: b""),
        mock.patch.object(CUDABackend, "hash", lambda self: f"{hash_of(self)}-ptx"),
    ):
        yield


@contextmanager
def compiled(capability: int, *, assembled: bool = True) -> Iterator[list[Any]]:
    """Compile what is launched, for `capability` (80, 90, 100); gives the kernels, in order.

    Not `assembled`: to PTX only, which is faster.
    """
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
        with _assembled(assembled), mock.patch.object(JITFunction, "run", run):
            yield kernels
    finally:
        driver._active = before
