"""What the drivers of vLLM's own benchmarks share: its command, its runs, the header."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.common import machine
from benchmarks.common.command import failures
from kivi_vllm.cli.default_model import cache_folder
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import running, tail
from kivi_vllm.cli.progress import step
from kivi_vllm.cli.server import cause, latest, serve_environment


def vllm_command() -> str:
    """vLLM's command line, the script beside our Python; UserError if there is none."""
    script = Path(sys.executable).with_name("vllm")
    if not script.exists():
        raise UserError(f"there is no {script}", "install vLLM for this Python", status=1)
    return str(script)


def environment(model: str) -> dict[str, str]:
    """Environment of a vLLM process whose log is read."""
    env = serve_environment(cache_folder())
    env["NO_PROXY"] = ",".join(filter(None, (env.get("NO_PROXY"), "127.0.0.1,localhost")))
    if not Path(model).is_dir() and "HF_HUB_OFFLINE" not in os.environ:
        del env["HF_HUB_OFFLINE"]  # the model may have to come from somewhere
    return env


def header(module: str, model: str) -> dict[str, Any]:
    """Command, machine, versions and model of a measurement, for its JSON file."""
    # What of the environment decides how fast a CPU is.
    names = ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "KIVI_VLLM_CPU_ISA")
    found = {name: os.environ[name] for name in names if name in os.environ}
    return machine.header(module) | {"model": Path(model).name, "environment": found}


class Rounds:
    """Cache dtypes measured in turn; those that fail do not stop the others."""

    def __init__(self, dtypes: Sequence[str], header: dict[str, Any]) -> None:
        self.dtypes, self.header = list(dict.fromkeys(dtypes)), header
        self.failed: dict[str, UserError] = {}

    def make(
        self, repeat: int, measure: Callable[[str, str, int], object], save: Callable[[], object]
    ) -> None:
        """Call `measure` with a title, a dtype and the round; `save` after each."""
        for turn, dtype in product(range(repeat), self.dtypes):
            if dtype not in self.failed:
                try:
                    measure(f"{dtype}, round {turn + 1} of {repeat}", dtype, turn)
                except UserError as error:
                    self.failed[dtype] = error
                    self.header["failed"] = {name: str(one) for name, one in self.failed.items()}
                save()

    def end(self) -> None:
        """Say at the end, in a UserError, which dtypes could not be measured."""
        failures(self.failed)


def run_to_end(
    what: str, command: Sequence[str], log: Path, *, model: str, title: str, remedy: str
) -> str:
    """Run one of vLLM's benchmarks in a process of its own, showing where its log is.

    Its output goes into `log` and is returned; `what` it is and a `remedy` are for the error.

    Raises:
        UserError: it failed; with the first error in its log, and the log's end.

    """
    with step(title) as update:
        with running(command, log, environment(model)) as process:
            try:
                while process.poll() is None:
                    time.sleep(0.5)
                    update(latest(tail(log, 5)))
            finally:
                _end_descendants(process.pid)
        text = log.read_text(errors="replace")
        if process.returncode:
            # A server that does not start says why before what waits for it does.
            where = f" The first error in its log: {first}" if (first := cause(text)) else ""
            raise UserError(
                f"{what} ended with status {process.returncode}.{where}\n"
                f"The end of its log:\n{tail(log, 30)}",
                remedy,
                status=1,
            )
    return text


def _end_descendants(pid: int) -> None:
    """A sweep starts its server in a session of its own, so that `running` does not see it."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                child.kill()
