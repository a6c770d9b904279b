"""The measuring processes: started, watched, and on a GPU started again without what broke."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.attention.cases import Case
from benchmarks.common import machine
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import running, tail

Event = tuple[str, Any]

SILENCE_S, INTERPRETED_SILENCE_S = 120.0, 1200.0
"""A process on a GPU that reports nothing for so long hangs."""


class Broken(UserError):
    """A measuring process did not end well."""


def on_cpu(cases: list[Case], counts: list[int], settings: dict[str, Any]) -> Iterator[Event]:
    """Measure with each number of threads; yield events.

    OpenMP reads its environment once, at its start: hence a process per thread count.
    """
    for count in counts:
        request = {
            "threads": count,
            "cases": [case.fields for case in cases],
            "settings": settings,
        }
        threads = f"{count} {'thread' if count == 1 else 'threads'}"
        for kind, what in _child("benchmarks.attention.worker", request, machine.binding(count)):
            yield kind, f"{what}, {threads}" if kind == "now" else what


def on_gpu(cases: list[Case], settings: dict[str, Any]) -> Iterator[Event]:
    """Measure on a GPU; yield events.

    A kernel that reads where it must not ends its process. The contender that ran is then
    left out, and another process goes on; where there was none, the case is left out.
    """
    left, without = list(cases), dict[str, str]()
    interpreted = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    env = interpreted if settings["smoke"] else {}
    silence = INTERPRETED_SILENCE_S if settings["smoke"] else SILENCE_S
    while left:
        doing, case = None, None
        fields = [one.fields for one in left]
        request = {"cases": fields, "settings": settings, "without": without}
        try:
            for kind, what in _child("benchmarks.attention.gpu.worker", request, env, silence):
                if kind == "doing":
                    doing = what
                    continue
                if kind == "now":
                    doing, case = None, what
                if kind == "row":
                    left.pop(0)
                yield kind, what
        except Broken as error:
            if case is None:
                raise  # it did not come as far as a case
            yield "now", f"{case}: the process ended ({doing or 'nothing in particular'})"
            reason = _cause(str(error))
            if doing is not None and doing not in without:
                without[doing] = f"its process ended: {reason}"
            elif left:
                yield "row", left.pop(0).fields | {"device": "cuda", "skipped": reason}


def _cause(text: str) -> str:
    """The last error that a log names, else its last line."""
    lines = text.rstrip().splitlines()
    return next((line for line in reversed(lines) if "Error: " in line), lines[-1])[:300]


def _child(
    module: str, request: dict[str, Any], more: dict[str, str], silence: float | None = None
) -> Iterator[Event]:
    """Run a measuring process and yield its events.

    Raises:
        UserError: what it reports as such.
        Broken: it ended with another status than 0, or reported nothing for `silence` seconds.

    """
    here = Path(__file__).resolve().parents[1]
    path = [str(here), os.environ.get("PYTHONPATH", ""), str(here.parent)]
    env = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        **more,
    }
    with tempfile.TemporaryDirectory(prefix="kivi-benchmark-") as folder:
        order, events, log = (Path(folder) / name for name in ("request", "events", "log"))
        order.write_text(json.dumps(request))
        events.touch()
        command = [sys.executable, "-m", module, str(order), str(events)]
        with events.open() as file, running(command, log, env) as process:
            line, heard = "", time.monotonic()
            while True:
                ended = process.poll() is not None
                while part := file.readline():
                    line += part
                    if line.endswith("\n"):
                        heard = time.monotonic()
                        [(kind, what)] = json.loads(line).items()
                        line = ""
                        if kind == "error":
                            raise UserError(what[0], what[1], status=1)
                        yield kind, what
                if ended:
                    break
                if silence is not None and time.monotonic() - heard > silence:
                    raise Broken(f"no news for {silence:.0f} s", "see what ran last", status=1)
                time.sleep(0.3)
        if process.returncode:
            raise Broken(
                f"the measuring process ended with status {process.returncode}. The end of its "
                f"log:\n{tail(log)}",
                "the system was out of memory: lower --memory"
                if process.returncode == -signal.SIGKILL
                else "see the log above",
                status=1,
            )
