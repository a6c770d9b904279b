"""In place of a GPU's measuring process: contenders that crash, hang or fail."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.attention.cases import Case
from benchmarks.common.child import report
from kivi_vllm.cli.errors import UserError


def measure(cases: Sequence[Case], settings: dict[str, Any], without: dict[str, str]) -> None:
    """As `benchmarks.attention.gpu.sections.measure_all`."""
    if settings.get("no_gpu"):
        raise UserError("PyTorch finds no GPU", "run this where there is one", status=1)
    if settings.get("broken"):
        raise RuntimeError("no driver")
    for case in cases:
        report(("now", str(case)))
        ran = []
        for name in ("good", "crashing", "hanging", "failing"):
            if name in without:
                continue
            report(("doing", name))
            if name == "crashing":
                os.kill(os.getpid(), signal.SIGSEGV)
            if name == "hanging":
                time.sleep(600)
            if name == "failing":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            ran.append(name)
        report(("doing", None))
        if case.batch == 2:
            raise RuntimeError("no contender is to blame")
        report(("row", case.fields | {"device": "cuda", "ran": ran, "without": without}))
