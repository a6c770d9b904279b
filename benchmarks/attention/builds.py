"""Checkouts of this project against each other, in turn: see README.md here.

Each measures in a process of its own, with its own kernels and page formats, and waits while
another does.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.attention.cases import DEFAULTS, SHAPES, B
from benchmarks.common import machine
from benchmarks.common.command import Json, among, start
from benchmarks.common.files import check_folder, write_json
from benchmarks.common.tables import show
from kivi_vllm.cli.errors import UserError

OPERATORS = ("attend", "store_blocks", "store_ring")

TURN_S = 0.03
"""Of a checkout's turn, at least: short beside what disturbs a machine, long beside a call."""


def builds(
    contenders: Annotated[
        list[str],
        typer.Argument(metavar="CHECKOUT:CACHE", help="Two or more; ratios are to the first."),
    ],
    operator: Annotated[str, typer.Option(help=f"{', '.join(OPERATORS)}.")] = "attend",
    shape: Annotated[list[str] | None, typer.Option(help=", ".join(SHAPES))] = None,
    context: Annotated[list[int] | None, typer.Option(min=B, help="Cached tokens; 4096.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    isa: Annotated[str | None, typer.Option(help="Instruction set; default: the best.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of timing a row.")] = 10.0,
    json_path: Json = None,
) -> None:
    """Time one layer's decode by several checkouts, each with a built library."""
    check_folder("--json", json_path)
    among("--operator", [operator], OPERATORS)
    shapes = among("--shape", shape or DEFAULTS["cpu"].shapes, SHAPES)
    if len(contenders) < 2:
        raise UserError("one checkout has nothing to be compared with", "name another")
    places = {name: _place(name) for name in contenders}
    if len({*places.values()}) < len(contenders):
        raise UserError("two of the contenders are the same", "name each once")
    header = machine.header("attention.builds") | {"threads": threads, "operator": operator}
    rows: list[dict[str, Any]] = []
    for name in shapes:
        for tokens in context or [4096]:
            what = {"shape": name, "context": tokens - tokens % B, "batch": batch}
            settings = what | {"operator": operator, "threads": threads}
            with ExitStack() as stack:
                children = {
                    contender: stack.enter_context(_child(folder, settings | {"cache": cache}, isa))
                    for contender, (folder, cache) in places.items()
                }
                header["isa"], *_ = [_answer(child) for child in children.values()]
                rows.append(what | _in_turn(children, seconds))
            write_json(json_path, {"header": header, "rows": rows})
    forms = {f"{i}_ms": ".4g" for i in range(len(contenders))}
    forms |= {f"{i}_ratio": ".3f" for i in range(1, len(contenders))}
    table = pd.DataFrame(rows)[["shape", "context", "batch", *forms]]
    names = "; ".join(f"{i}: {name}" for i, name in enumerate(contenders))
    show(table, f"{operator}, one layer (median, ms; ratio of times to 0). {names}", forms)


def _place(name: str) -> tuple[Path, str]:
    """The folder and the cache of `CHECKOUT:CACHE`."""
    folder, _, cache = name.rpartition(":")
    path = Path(folder or ".").resolve()
    if not (path / "benchmarks/attention/kivi.py").is_file():
        raise UserError(f"{name}: {path} is no checkout", "write CHECKOUT:CACHE, as .:kivi2")
    if not (path / "kivi_vllm/ops/cpu/libkivi_cpu.so").is_file():
        raise UserError(f"{name}: its kernels are not built", "there: setup.py build_ext --inplace")
    return path, cache


@contextmanager
def _child(folder: Path, what: dict[str, Any], isa: str | None) -> Iterator[subprocess.Popen[str]]:
    environment = os.environ | machine.binding(what["threads"]) | {"PYTHONPATH": str(folder)}
    environment |= {"KIVI_VLLM_CPU_ISA": isa} if isa else {}
    script = Path(__file__).with_name("checkout_child.py")
    command = [sys.executable, str(script), json.dumps(what)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, text=True
    ) as child:
        try:
            yield child
        finally:
            child.kill()


def _answer(child: subprocess.Popen[str]) -> str:
    if line := child.stdout.readline().strip():  # type: ignore[union-attr]
        return line
    raise UserError("a checkout's process ended", "see its error above", status=1)


def _timed(child: subprocess.Popen[str], calls: int) -> float:
    """Median seconds of so many calls."""
    child.stdin.write(f"{calls}\n")  # type: ignore[union-attr]
    child.stdin.flush()  # type: ignore[union-attr]
    return float(_answer(child))


def _in_turn(children: dict[str, subprocess.Popen[str]], seconds: float) -> dict[str, Any]:
    """A row: `I_ms` and quartiles of each, `I_ratio` the median of a round's ratio to the first."""
    calls = max(3, int(TURN_S / min(_timed(child, 9) for child in children.values())))
    rounds: list[dict[str, float]] = []
    shuffle = random.Random(0).shuffle
    end = time.monotonic() + seconds
    while len(rounds) < 9 or time.monotonic() < end:
        order = list(children)
        shuffle(order)
        rounds.append({name: _timed(children[name], calls) for name in order})
    row: dict[str, Any] = {}
    for i, name in enumerate(children):
        quartiles = statistics.quantiles([one[name] * 1e3 for one in rounds], n=4)
        ratios = [one[name] / one[next(iter(children))] for one in rounds]
        row |= {
            f"{i}_{key}": round(x, 5) for key, x in zip(("q1", "ms", "q3"), quartiles, strict=True)
        }
        row |= {f"{i}_name": name, f"{i}_ratio": round(statistics.median(ratios), 4)}
    return row | {"rounds": len(rounds)}


if __name__ == "__main__":
    start(builds)
