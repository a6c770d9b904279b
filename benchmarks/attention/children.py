"""The measuring processes: started, watched, and on a GPU started again without what broke."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.attention.cases import Case
from benchmarks.common import machine
from benchmarks.common.child import Child, ChildError

Tell = Callable[[str, Any], object]
"""Is told what happens: `header`, `now` (a case begins) and `row`; on a GPU also `doing`: the
contender that runs, so that it is known who is to blame if the process ends or hangs."""

SILENCE_S, INTERPRETED_SILENCE_S = 120.0, 1200.0
"""A process on a GPU that reports nothing for so long hangs."""

NAME = "the measuring process"


def on_cpu(
    cases: Sequence[Case], counts: Sequence[int], settings: dict[str, Any], tell: Tell
) -> None:
    """Measure with each number of threads.

    OpenMP reads its environment once, at its start: hence a process per thread count.
    """
    for count in counts:
        try:
            with Child(NAME, _environment(machine.binding(count))) as child:
                child.call(_cpu, count, cases, settings, on_report=lambda event: tell(*event))
        except ChildError as error:
            if "status -9" in str(error):
                error.remedy = "the system was out of memory: lower --memory"
            raise


def on_gpu(cases: Sequence[Case], settings: dict[str, Any], tell: Tell) -> None:
    """Measure on a GPU.

    A kernel that reads where it must not ends its process. The contender that ran is then
    left out, and another process goes on; where there was none, the case is left out.
    """
    left, without = list(cases), dict[str, str]()
    silence = INTERPRETED_SILENCE_S if settings["smoke"] else SILENCE_S
    case: str | None = None
    doing: str | None = None
    last = time.monotonic()

    def heard(event: tuple[str, Any]) -> None:
        nonlocal last, case, doing
        last, (kind, what) = time.monotonic(), event
        if kind == "doing":
            doing = what
            return
        if kind == "now":
            doing, case = None, what
        if kind == "row":
            left.pop(0)
        tell(kind, what)

    def still_there(_: str) -> None:
        if time.monotonic() - last > silence:
            raise ChildError(f"no news for {silence:.0f} s", "see what ran last", status=1)

    while left:
        last, case, doing = time.monotonic(), None, None
        more = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if settings["smoke"] else {}
        try:
            with Child(NAME, _environment(more)) as child:
                work = (list(left), settings, without)
                child.call(_gpu, *work, on_report=heard, update=still_there)
        except ChildError as error:
            if case is None:
                raise  # it did not come as far as a case
            tell("now", f"{case}: the process ended ({doing or 'nothing in particular'})")
            reason = _cause(str(error))
            if doing is not None and doing not in without:
                without[doing] = f"its process ended: {reason}"
            elif left:
                tell("row", left.pop(0).fields | {"device": "cuda", "skipped": reason})


def _cause(text: str) -> str:
    """The last error that a log names, else how the process ended."""
    lines = text.rstrip().splitlines()
    return next((line for line in reversed(lines) if "Error: " in line), lines[0])[:300]


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", **os.environ, **more}


def _cpu(*work: Any) -> None:
    """In the child: only there are PyTorch and vLLM imported."""
    from benchmarks.attention.sections import measure_all

    measure_all(*work)


def _gpu(*work: Any) -> None:
    from benchmarks.attention.gpu.sections import measure_all

    measure_all(*work)
