"""What the process does that measures on the processor; it reports as `children.Tell` says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import vllm  # noqa: F401  (loads the plugins)

from benchmarks.attention import baseline
from benchmarks.attention.cases import KIVI_DTYPES, SHAPES, Case, Shape
from benchmarks.attention.check import Variant, check, kivi
from benchmarks.attention.floor import library
from benchmarks.attention.kivi import CPU
from benchmarks.attention.sections import Settings, measure
from benchmarks.common.child import report


def measure_all(threads: int, cases: Sequence[Case], settings: dict[str, Any]) -> None:
    """Check and time all cases with so many threads."""
    torch.set_num_threads(threads)
    baseline.load()
    report(("header", _header(threads)))
    errors: dict[str, dict[str, float]] = {}
    for case in cases:
        if case.shape not in errors:
            report(("now", f"checking {case.shape} against float64"))
            errors[case.shape] = _errors(SHAPES[case.shape])
        report(("now", str(case)))
        found = errors[case.shape]
        more = {"threads": threads, "rel_error": found["kivi2"], "rel_errors": found}
        report(("row", measure(case, Settings(**settings)) | more))


def _errors(shape: Shape) -> dict[str, float]:
    """The relative errors of both sides, by cache."""
    variants: dict[str, Variant] = {
        name: partial(baseline.checked, shape, name) for name in baseline.names()
    }
    variants |= {dtype: partial(kivi, shape, dtype) for dtype in KIVI_DTYPES}
    return check(shape, variants, CPU.device)


def _header(threads: int) -> dict[str, Any]:
    native = library()
    names = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
    shape = next(iter(SHAPES.values()))
    return {
        "operators": CPU.operators.__name__,
        "isa": native.isa if native is not None else "none (PyTorch)",
        "vllm_isa": {
            name: baseline.VllmPool(shape, name, 1, 1, 1).isa for name in baseline.names()
        },
        "binding": {str(threads): {name: os.environ[name] for name in names if name in os.environ}},
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
    }
