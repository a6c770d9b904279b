"""The process that measures on a GPU: `python -m benchmarks.attention.gpu.worker REQUEST EVENTS`.

As `benchmarks.attention.worker`, with one more event, `doing`: the contender that runs, so that
the parent knows who is to blame if the process ends or hangs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention.cases import SHAPES, Case
from benchmarks.attention.events import reporting
from benchmarks.attention.gpu.device import Gpu, brief
from benchmarks.attention.gpu.sections import Bench
from kivi_vllm.cli.errors import UserError


def _measure(request: dict[str, Any], say: Any) -> None:
    settings = request["settings"]
    if settings["smoke"]:
        from tests.triton.interpreted import repair

        repair()
    elif not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU", "run this where `nvidia-smi` shows one", status=1)
    gpu = Gpu(settings["smoke"])
    bandwidth = gpu.bandwidth()
    say(
        "header",
        gpu.header()
        | {
            "bandwidth_bytes_per_s": bandwidth,
            "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
            "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        },
    )
    budget, memory = settings["budget"], settings["memory"]
    bench = Bench(gpu, say, budget, memory, bandwidth, dict(request["without"]))
    for fields in request["cases"]:
        case = Case(**fields)
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


if __name__ == "__main__":
    reporting(_measure, json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
