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
        threads = f"{count} {'thread' if count == 1 else 'threads'}"

        def heard(event: tuple[str, Any], threads: str = threads) -> None:
            kind, what = event
            tell(kind, f"{what}, {threads}" if kind == "now" else what)

        try:
            with Child(NAME, _environment(machine.binding(count))) as child:
                child.call(_cpu, count, cases, settings, on_report=heard)
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
    while left:
        run = _Watched(left, tell, INTERPRETED_SILENCE_S if settings["smoke"] else SILENCE_S)
        more = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if settings["smoke"] else {}
        try:
            with Child(NAME, _environment(more)) as child:
                work = (list(left), settings, without)
                child.call(_gpu, *work, on_report=run.heard, update=run.still_there)
        except ChildError as error:
            if run.case is None:
                raise  # it did not come as far as a case
            tell("now", f"{run.case}: the process ended ({run.doing or 'nothing in particular'})")
            reason = _cause(str(error))
            if run.doing is not None and run.doing not in without:
                without[run.doing] = f"its process ended: {reason}"
            elif left:
                tell("row", left.pop(0).fields | {"device": "cuda", "skipped": reason})


class _Watched:
    """What a process on a GPU was at when it was last heard of."""

    doing: str | None = None
    case: str | None = None

    def __init__(self, left: list[Case], tell: Tell, silence: float) -> None:
        self.left, self.tell, self.silence = left, tell, silence
        self.last = time.monotonic()

    def heard(self, event: tuple[str, Any]) -> None:
        kind, what = event
        self.last = time.monotonic()
        if kind == "doing":
            self.doing = what
            return
        if kind == "now":
            self.doing, self.case = None, what
        if kind == "row":
            self.left.pop(0)
        self.tell(kind, what)

    def still_there(self, _: str) -> None:
        if time.monotonic() - self.last > self.silence:
            raise ChildError(f"no news for {self.silence:.0f} s", "see what ran last", status=1)


def _cause(text: str) -> str:
    """The last error that a log names, else how the process ended."""
    lines = text.rstrip().splitlines()
    return next((line for line in reversed(lines) if "Error: " in line), lines[0])[:300]


def _environment(more: dict[str, str]) -> dict[str, str]:
    return {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", **os.environ, **more}


def _cpu(*work: Any) -> None:
    """In the child: only there are PyTorch and vLLM imported."""
    from benchmarks.attention import worker

    worker.measure_all(*work)


def _gpu(*work: Any) -> None:
    from benchmarks.attention.gpu import worker

    worker.measure_all(*work)
