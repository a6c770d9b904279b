"""The operators of the Triton kernels, compiled for a GPU and run here."""

from __future__ import annotations

from typing import Any

import torch

from kivi_vllm.ops import reference
from kivi_vllm.ops.step import LayerCache, Step
from tests.ptx.launches import device
from tests.triton.device import Triton
from tests.unit.simulator import Case, Simulator

BF16, FP16 = torch.bfloat16, torch.float16


class Compiled:
    """The operators for a `capability`; what they store must be the reference's bytes."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def store_blocks(self, step: Step, cache: LayerCache, *tokens: torch.Tensor) -> None:
        self._store("store_blocks", step, cache, *tokens)

    def store_ring(self, step: Step, cache: LayerCache, *tokens: torch.Tensor) -> None:
        self._store("store_ring", step, cache, *tokens)

    def attend(self, step: Step, cache: LayerCache, *args: Any) -> None:
        with device(self.capability, _reachable(cache)):
            Triton.attend(step, cache, *args)

    def _store(self, name: str, step: Step, cache: LayerCache, *tokens: torch.Tensor) -> None:
        pool = torch.empty(0, dtype=torch.uint8).set_(cache.pages.untyped_storage())
        before = pool.clone()
        getattr(reference, name)(step, cache, *tokens)
        wanted = pool.clone()
        pool.copy_(before)
        with device(self.capability, _reachable(cache)):
            getattr(Triton, name)(step, cache, *tokens)
        assert torch.equal(pool, wanted), f"{name} stores other bytes than the reference"


def _reachable(cache: LayerCache) -> list[torch.Tensor]:
    """Tails are found by addresses in memory."""
    return [x for tail in cache.tails for x in (tail.cache, tail.table)]


def simulator(case: Case) -> Simulator:
    """Whose steps are the reference's until its `ops` are changed; errors as `tests/triton`'s."""
    return Simulator(case, tolerance=1e-2, num_blocks=48)
