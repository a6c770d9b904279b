"""The kernels in CUDA C++, compiled by NVRTC and run here, as operators."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.attention.kivi import batch_of
from kivi_vllm.ops import reference
from kivi_vllm.ops.cuda import kernels as cuda
from kivi_vllm.ops.select import Selection
from kivi_vllm.ops.step import DeviceStep, LayerCache, Step
from kivi_vllm.ops.triton import decode, operators, select, workspace
from tests.ptx.launches import device
from tests.ptx.machine import run
from tests.ptx.parse import Kernel, parse

Change = Callable[[str], str]
"""Of PTX."""


@dataclass(frozen=True)
class Loaded:
    """In place of `driver.Kernel`."""

    variant: cuda.Variant
    name: str
    registers: int = 168
    shared_bytes: int = 16 << 10

    @property
    def warps(self) -> int:
        return cuda.ENTRIES[self.name][1] // 32


@functools.cache
def text(variant: cuda.Variant, name: str, capability: int) -> str:
    """PTX of the module with one of its kernels."""
    source = cuda.compiled(variant, cuda.ENTRIES[name][0], f"compute_{capability}", ptx=True)
    module = source.rstrip(b"\0").decode()
    head, *entries = module.split(".visible .entry ")
    [own] = [entry for entry in entries if entry.startswith(f"{name}(")]
    return f"{head}.visible .entry {own}"


@functools.cache
def parsed(variant: cuda.Variant, name: str, capability: int) -> Kernel:
    return parse(text(variant, name, capability))


@contextmanager
def on_cuda(
    cache: LayerCache, capability: int, change: Change | None = None
) -> Iterator[list[tuple[cuda.Variant, str]]]:
    """Launches run here; gives the variants and names of what ran."""
    reachable = [x for tail in cache.tails for x in (tail.cache, tail.table)]
    ran: list[tuple[cuda.Variant, str]] = []
    fields = decode.fields

    def found(
        query: torch.Tensor, step: DeviceStep, paged: Any, raw: Any, params: Any
    ) -> dict[str, int | float]:
        given = [query, step.query_start_loc, step.seq_lens, step.generated, params.alibi_slopes]
        given += [*paged, *(raw or ())]
        reachable.extend(x for x in given if isinstance(x, torch.Tensor))
        return fields(query, step, paged, raw, params)

    def launch(kernel: Loaded, grid: Any, given: dict[str, int | float]) -> None:
        ran.append((kernel.variant, kernel.name))
        of = (kernel.variant, kernel.name, capability)
        code = parse(change(text(*of))) if change else parsed(*of)
        tensors = [*reachable, *(x for kept in workspace._buffers.values() for x in kept)]
        block = (32 * kernel.warps,)
        run(code, [bytes(cuda.Call(**given))], grid, block=block, reachable=tensors)

    def kernel(variant: cuda.Variant, _: torch.device, name: str = "decode") -> Loaded:
        return Loaded(variant, name)

    with (
        mock.patch.object(decode, "fields", found),
        mock.patch.object(select, "fields", found),
        mock.patch.object(cuda, "kernel", kernel),
        mock.patch.object(cuda, "launch", launch),
        device(capability, reachable),
    ):
        yield ran


class InCuda:
    """The reference, but for decodes."""

    store_blocks = staticmethod(reference.store_blocks)
    store_ring = staticmethod(reference.store_ring)

    def __init__(self, capability: int, change: Change | None = None) -> None:
        self.capability, self.change = capability, change
        self.ran: list[tuple[cuda.Variant, str]] = []

    def select(self, step: Step, cache: LayerCache, *args: Any) -> Selection | None:
        with self._running(step, cache) as of:
            return (operators if of is not step else reference).select(of, cache, *args)

    def attend(self, step: Step, cache: LayerCache, *args: Any) -> None:
        before = len(self.ran)
        with self._running(step, cache) as of:
            (operators if of is not step else reference).attend(of, cache, *args)
        assert of is step or len(self.ran) > before

    @contextlib.contextmanager
    def _running(self, step: Step, cache: LayerCache) -> Iterator[Step | DeviceStep]:
        """The step as a GPU gets it, or as it is if it has other rows than decodes."""
        if any(row.b - row.a > step.decode_len for row in step.rows):
            yield step
            return
        with on_cuda(cache, self.capability, self.change) as ran:
            yield DeviceStep.of(batch_of(step))
        self.ran += ran
