"""What the process does that measures on a GPU; it reports as `children.Tell` says."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.attention.cases import SHAPES, Case
from benchmarks.attention.gpu.device import Gpu, brief
from benchmarks.attention.gpu.sections import Bench
from benchmarks.common.child import report
from kivi_vllm.cli.errors import UserError


def measure_all(cases: Sequence[Case], settings: dict[str, Any], without: dict[str, str]) -> None:
    """Check and time all cases, without the contenders that broke before."""

    def say(kind: str, what: Any) -> None:
        report((kind, what))

    if settings["smoke"]:
        from tests.triton.interpreted import repair

        repair()
    elif not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU", "run this where `nvidia-smi` shows one", status=1)
    gpu = Gpu(settings["smoke"])
    bandwidth = gpu.bandwidth()
    header = gpu.header() | {
        "bandwidth_bytes_per_s": bandwidth,
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
    }
    say("header", header)
    bench = Bench(gpu, say, settings["budget"], settings["memory"], bandwidth, dict(without))
    for case in cases:
        if time.time() > settings["deadline"]:
            why = {"device": "cuda", "skipped": "the time of --seconds was over"}
            say("row", case.fields | why)
            continue
        say("now", str(case))
        start = time.monotonic()
        try:
            row = bench.measure(case)
        except Exception as error:
            gpu.finish()  # if the GPU itself failed this process is of no more use
            row = case.fields | {"skipped": brief(error)}
        say("row", row | {"device": "cuda", "took_s": round(time.monotonic() - start, 2)})
