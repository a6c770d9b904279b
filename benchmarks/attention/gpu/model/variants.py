"""Compiled decode kernels, and the row that the model makes of each."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton

from benchmarks.attention.cases import Shape
from benchmarks.attention.gpu.model import sass
from benchmarks.attention.gpu.model.gpus import GPUS, Gpu
from benchmarks.attention.gpu.model.timing import Loop, cycles_per_page
from kivi_vllm.config import KiviConfig, Recipe
from kivi_vllm.ops.cuda import kernels as cuda
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.triton import operators


@dataclass(frozen=True)
class Variant:
    """A compiled kernel.

    Attributes:
        compiler: what made it.
        cache: our name of what it reads.
        cubin: the code.
        warps: of a program.
        shared: bytes of shared memory that a program asks for.
        page_bytes: of a page.

    """

    compiler: str
    cache: str
    cubin: bytes
    warps: int
    shared: int
    page_bytes: int

    def modelled(self, gpus: dict[str, Gpu]) -> dict[str, Any]:
        """A row: what the compiler says, and what the model does, of each GPU."""
        code = sass.disassemble(self.cubin)
        loop, registers = sass.page_loop(code), _registers(self.cubin)
        row = {
            "compiler": self.compiler,
            "cache": self.cache,
            "page_bytes": self.page_bytes,
            "warps": self.warps,
            "instructions_a_page": len(loop) * self.warps,
            "registers": registers,
            "shared_bytes": self.shared,
            "spills": sass.spills(code),
        }
        for name, gpu in gpus.items():
            programs = gpu.programs(registers, self.warps, self.shared)
            cycles, why = cycles_per_page(Loop(loop, self.warps, programs, self.page_bytes), gpu)
            seconds = cycles / (gpu.clock * 1e9 * gpu.processors)
            row |= {
                f"{name}_programs": programs,
                f"{name}_modelled_cycles_a_page": round(cycles),
                f"{name}_modelled_share": round(self.page_bytes / seconds / gpu.bandwidth, 3),
                f"{name}_idle": {reason: round(share, 2) for reason, share in why.items()},
            }
        return row


def variants(
    caches: dict[str, tuple[str, Recipe]], shape: Shape, capability: int
) -> Iterator[Variant]:
    """The kernels of each of `caches`, which are dtypes and recipes by our names."""
    from tests.unit.ahead import compiled  # of the checkout
    from tests.unit.test_compile import Layer

    for name, (dtype, recipe) in caches.items():
        heads = (shape.num_heads, shape.num_kv_heads)
        layer = Layer(dtype, recipe, heads=heads, head_size=shape.head_size, rows=32)
        config = KiviConfig.from_options(dtype, {"recipe": recipe})
        nbytes = PageFormat.of(config, shape.head_size, torch.bfloat16).page_bytes
        in_cuda: list[bytes] = []

        def refuse(
            variant: cuda.Variant, _: torch.device, into: list[bytes] = in_cuda
        ) -> None:  # so that Triton's takes its place
            into.append(cuda.compiled(variant, cuda.ENTRIES["decode"][0], f"sm_{capability}"))

        with mock.patch.object(cuda, "kernel", refuse), compiled(capability) as kernels:
            operators.attend(*layer.arguments(decode=True))
        for cubin in in_cuda:
            yield Variant("CUDA", name, cubin, 1, nbytes, nbytes)
        kernel = next(kernel for kernel in kernels if kernel.metadata.name == "_decode")
        made = (kernel.asm["cubin"], kernel.metadata.num_warps, kernel.metadata.shared)
        yield Variant(f"Triton {triton.__version__}", name, *made, nbytes)


def gpus_of(names: list[str]) -> tuple[int, dict[str, Gpu]]:
    """The GPUs, and the capability that they share.

    Raises:
        ValueError: they share none.

    """
    found = {name: GPUS[name] for name in names}
    capabilities = {gpu.capability for gpu in found.values()}
    if len(capabilities) != 1:
        raise ValueError(f"{', '.join(names)} take code for {sorted(capabilities)}; name one kind")
    return capabilities.pop(), found


def _registers(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        [registers] = re.findall(r"REG:(\d+)", sass.tool("cuobjdump", "-res-usage", file.name))
    return int(registers)
