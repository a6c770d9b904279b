"""Where the kernels of these tests run, and how the simulator calls them."""

from __future__ import annotations

import os
from typing import Any

import torch

from benchmarks.attention.kivi import batch_of
from kivi_vllm.ops import reference
from kivi_vllm.ops.step import DeviceStep, Step
from kivi_vllm.ops.triton import operators
from tests.unit.simulator import Case, Simulator

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda" if torch.cuda.is_available() else None

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Triton:
    """The Triton operators, for steps of the reference."""

    @staticmethod
    def store_blocks(step: Step, *args: Any) -> None:
        operators.store_blocks(DeviceStep.of(batch_of(step)), *args)

    @staticmethod
    def attend(step: Step, *args: Any) -> None:
        operators.attend(DeviceStep.of(batch_of(step)), *args)

    @staticmethod
    def store_ring(step: Step, *args: Any) -> None:
        operators.store_ring(DeviceStep.of(batch_of(step)), *args)


class Decodes(Triton):
    """Triton for steps of decodes only; the reference for those that lead there."""

    store_blocks = staticmethod(reference.store_blocks)
    store_ring = staticmethod(reference.store_ring)

    @staticmethod
    def attend(step: Step, *args: Any) -> None:
        decodes = all(row.b - row.a <= step.decode_len for row in step.rows)
        (Triton if decodes else reference).attend(step, *args)


def simulator(case: Case, ops: Any = Triton, **options: Any) -> Simulator:
    """Errors of the largest output of a head: of 16-bit products, or of fp32's."""
    assert DEVICE is not None
    tolerance = 2e-3 if case.model == FP32 else 1e-2
    return Simulator(case, ops=ops, device=DEVICE, tolerance=tolerance, **options)
