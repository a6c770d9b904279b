"""The GPU that is measured: its memory, clock, graphs and bandwidth.

Without one (`smoke`) the kernels are interpreted on the processor: the same path through this
code, and times that mean nothing.
"""

from __future__ import annotations

import gc
import os
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.attention.kivi import Place
from benchmarks.attention.timing import Call, wall
from benchmarks.common.machine import GIB, nvidia_smi, version_of

RESERVE = 2 * GIB
"""Bytes of the GPU that pools leave for workspaces, graphs and what checks compute."""

COPY = 2 * GIB
"""Bytes of the buffers that measure the bandwidth."""

ROUNDS = 20

COLUMNS = 16
"""Tables are as wide as a multiple of this: Triton compiles anew for other strides."""


class Gpu:
    """The device and what is done on it; `smoke`: there is none."""

    def __init__(self, smoke: bool) -> None:
        self.smoke = smoke
        self.device = torch.device("cpu" if smoke else "cuda")
        self.place = Place("cuda", self.device, self.allocate, COLUMNS)
        if smoke:
            return
        self.properties: Any = torch.cuda.get_device_properties(0)
        # What is read between two calls: many times the L2 cache, and for so long that the
        # second is on the stream before the GPU is done with it.
        size = max(8 * self.properties.L2_cache_size, GIB // 2)
        self._junk = torch.ones(size // 4, device=self.device)
        self._sum = torch.empty((), device=self.device)
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def allocate(self, nbytes: int) -> torch.Tensor:
        """A tensor of bytes, whatever was there before in it."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def free_bytes(self) -> int:
        """What pools may take now."""
        gc.collect()
        gc.freeze()  # every capture collects again
        if self.smoke:
            return GIB
        torch.cuda.empty_cache()
        return max(0, int(torch.cuda.mem_get_info()[0]) - RESERVE)

    def finish(self) -> None:
        """Wait for the GPU; RuntimeError if something before has failed on it."""
        if not self.smoke:
            torch.cuda.synchronize()

    def stopwatch(self, call: Call) -> float:
        """Seconds of one call on the GPU, its caches cold."""
        if self.smoke:
            return wall(call)
        # Reading leaves nothing in the cache that would have to be written back meanwhile.
        torch.sum(self._junk, 0, out=self._sum)
        self._start.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3

    def captured(self, calls: Sequence[Call]) -> tuple[Call, str]:
        """All calls as one, a CUDA graph; and why it is none, where it cannot be captured.

        The calls are made before, so that nothing is compiled or allocated for the first time
        while capturing.
        """

        def run() -> None:
            for call in calls:
                call()

        if self.smoke:
            run()
            return run, "no GPU"
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        self.finish()
        graph = torch.cuda.CUDAGraph()
        call, why = graph.replay, ""
        try:
            with torch.cuda.graph(graph):
                run()
        except RuntimeError as error:
            self.finish()
            call, why = run, brief(error)
        call()
        self.finish()
        return call, why

    def bandwidth(self) -> dict[str, float]:
        """Bytes a second of a copy, read and written ones, and of a sum, read ones: medians."""
        size = COPY if not self.smoke else 1 << 20
        a, b = (torch.ones(size // 4, device=self.device) for _ in range(2))
        total = torch.empty((), device=self.device)

        def median(call: Call) -> float:
            return statistics.median([self.stopwatch(call) for _ in range(ROUNDS + 3)][3:])

        return {
            "copy": round(2 * a.nbytes / median(lambda: b.copy_(a))),
            "read": round(a.nbytes / median(lambda: torch.sum(a, 0, out=total))),
        }

    def header(self) -> dict[str, Any]:
        """What it is, for the results."""
        flashinfer = version_of("flashinfer-python", "flashinfer")
        header = {"versions": {"triton": version_of("triton"), "flashinfer": flashinfer}}
        if self.smoke:
            return header | {"gpu": "none (interpreted)"}
        found = self.properties
        return header | {
            "gpu": found.name,
            "driver": nvidia_smi("driver_version"),
            "cuda": torch.version.cuda,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "memory_bytes": found.total_memory,
            "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        }


def brief(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]
