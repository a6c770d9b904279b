"""What the tests of the native kernels share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kivi_vllm.ops.cpu import library, operators
from tests.unit.simulator import Case, Simulator

# Of the largest output of a head: products with scales have 16 bits.
TOLERANCE = 5e-3
INSTRUCTION_SETS = library.load().available
ROOT = Path(__file__).resolve().parents[2]


def simulator(case: Case, *, tolerance: float = TOLERANCE, **options: Any) -> Simulator:
    return Simulator(case, ops=operators, tolerance=tolerance, **options)
