"""FULL CUDA graphs, emulated on `fake_device`.

A replay runs the captured forward again, with the metadata of its capture. So, as on a
GPU, what the forward read on the host is frozen, and only tensors at the addresses of the
capture are seen anew. Reading a tensor's values on the host inside a graph raises, as a
capture would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from tests.cuda.fake_device import OnTheCpu

T = torch.Tensor
READS = {T.item, T.tolist, T.cpu, T.numpy, T.nonzero, torch.nonzero, T.unique}
READS |= {T.__bool__, T.__int__, T.__float__, T.__index__, T.__iter__}


class Graphs:
    """How many were `captured`, and how often any was `replayed`."""

    def __init__(self) -> None:
        self.captured = 0
        self.replayed = 0
        self._inside = 0

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """A graph is captured or replayed."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    @contextlib.contextmanager
    def in_a_kernel(self) -> Iterator[None]:
        """Triton's interpreter reads what it likes."""
        before, self._inside = self._inside, 0
        try:
            yield
        finally:
            self._inside = before

    def check(self, function: Any) -> None:
        """Refuse what a capture cannot do."""
        if self._inside and function in READS:
            name = getattr(function, "__name__", function)
            raise RuntimeError(f"{name} reads a tensor on the host inside a CUDA graph")


def emulate() -> Graphs:
    """Replace PyTorch's graphs; once, after `fake_device.install`."""
    import vllm.v1.worker.gpu.cudagraph_utils as cudagraph_utils
    from triton.runtime.interpreter import InterpretedFunction
    from vllm.config import CUDAGraphMode

    graphs = Graphs()

    class CUDAGraph:
        forward: Any

        def replay(self) -> None:
            graphs.replayed += 1
            with graphs.inside():
                self.forward(CUDAGraphMode.NONE)

    @contextlib.contextmanager
    def graph(*args: Any, **kwargs: Any) -> Iterator[None]:
        graphs.captured += 1
        with graphs.inside():
            yield

    torch.cuda.CUDAGraph, torch.cuda.graph = CUDAGraph, graph
    torch.cuda.graph_pool_handle = lambda *a: (0, 0)

    capture = cudagraph_utils.CudaGraphManager.capture

    def capture_and_keep(self: Any, create_forward_fn: Any, *args: Any, **kwargs: Any) -> None:
        kept = {}

        def create(desc: Any, warmup: bool) -> Any:
            kept[desc] = create_forward_fn(desc, warmup)
            return kept[desc]

        capture(self, create, *args, **kwargs)
        for desc, made in self.graphs.items():
            made.forward = kept[desc]

    cudagraph_utils.CudaGraphManager.capture = capture_and_keep

    run = InterpretedFunction.run

    def run_unchecked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with graphs.in_a_kernel():
            return run(self, *args, **kwargs)

    InterpretedFunction.run = run_unchecked
    OnTheCpu.before_each = graphs.check
    return graphs
