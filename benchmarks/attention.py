"""Attention of one layer, ours against vLLM's own and against the memory: see README.md here."""

import json
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import typer
from attn import machine
from attn.cases import BATCHES, CHUNKS, CONTEXTS, SECTIONS, SHAPES, B, Case, plan
from attn.report import show, write
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kivi_vllm.cli import main
from kivi_vllm.errors import UserError
from kivi_vllm.process import running, tail
from kivi_vllm.progress import console, note

DEVICES = ("cpu",)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def attention(
    device: Annotated[str, typer.Option(help="cpu.")] = "cpu",
    section: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(SECTIONS)}; default: all.")
    ] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(SHAPES)}; default: all.")
    ] = None,
    context: Annotated[
        list[int] | None, typer.Option(min=B, help="Cached tokens at decode; default: 1k to 64k.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences at decode; default: 1, 8, 32.")
    ] = None,
    prefill: Annotated[
        list[str] | None, typer.Option(help="New and cached tokens, as in 2048+8192.")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Default: 1 and all cores.")
    ] = None,
    budget: Annotated[float, typer.Option(min=0.0, help="Seconds of timing per case.")] = 5.0,
    memory: Annotated[
        float | None, typer.Option(min=0.01, help="GiB for a case's pools; default: what is free.")
    ] = None,
    huge_pages: Annotated[bool, typer.Option(help="Ask for huge pages, for all pools.")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write rows.")] = None,
) -> None:
    """Time one layer's attention in every cache format, on caches larger than the processor's."""
    _among("--device", [device], DEVICES)
    counts = threads or sorted({1, len(machine.cores())})
    cases = plan(
        _among("--section", section or SECTIONS, SECTIONS),
        _among("--shape", shape or list(SHAPES), SHAPES),
        [_blocks(n) for n in context or CONTEXTS],
        batch or BATCHES,
        [_chunk(text) for text in prefill or ()] or CHUNKS,
    )
    for count in counts:
        if count > len(machine.cores()):
            raise UserError(
                f"--threads {count}: this process may use {len(machine.cores())} cores",
                "ask for fewer threads",
            )
    limit = machine.memory_limit() if memory is None else int(memory * machine.GIB)
    settings = {
        "budget": budget,
        "memory": limit,
        "llc": machine.llc_bytes(),
        "huge_pages": huge_pages,
    }
    header: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["benchmarks/attention.py", *sys.argv[1:]]),
        "cpu": machine.cpu_model(),
        "cores": len(machine.cores()),
        "device": device,
        "budget_s": budget,
        "memory_limit_bytes": limit,
        "llc_bytes": settings["llc"],
        "huge_pages_requested": huge_pages,
    }
    if json_path is not None:
        _refuse_unwritable(json_path)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SECTIONS}
    try:
        for kind, what in _run(counts, cases, settings):
            if kind == "header":
                what["binding"] |= header.get("binding", {})
                header |= what
            else:
                rows[what["section"]].append(what)
            if json_path is not None:
                write(json_path, header, rows)
    finally:
        show(rows)


def _among(option: str, given: Sequence[str], known: Iterable[str]) -> Sequence[str]:
    for name in given:
        if name not in known:
            raise UserError(f"{option} {name!r} is not known", f"use one of: {', '.join(known)}")
    return given


def _blocks(tokens: int) -> int:
    if tokens % B:
        raise UserError(f"{tokens} cached tokens are no whole blocks", f"use a multiple of {B}")
    return tokens


def _chunk(text: str) -> tuple[int, int]:
    """Read "2048+8192" as (new, cached)."""
    new, _, cached = text.partition("+")
    if not new.isdigit() or int(new) < 1 or not (cached or "0").isdigit():
        raise UserError(f"--prefill {text!r} names no chunk", "write NEW+CACHED, as in 2048+8192")
    return int(new), _blocks(int(cached or 0))


def _refuse_unwritable(path: Path) -> None:
    if not path.parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.parent}", "create it")


def _run(
    counts: list[int], cases: list[Case], settings: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Measure with each number of threads; yield headers and rows as they come."""
    bar = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # Once a second: drawing takes time from what is measured.
    with Progress(
        *bar,
        console=console,
        transient=True,
        refresh_per_second=1,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("starting", total=len(counts) * len(cases))
        for count in counts:
            request = {
                "threads": count,
                "cases": [case.fields for case in cases],
                "settings": settings,
            }
            for kind, what in _child(request):
                if kind == "error":
                    raise UserError(what[0], what[1], status=1)
                if kind == "now":
                    title = f"{what}, {count} {'thread' if count == 1 else 'threads'}"
                    progress.update(task, description=title)
                    if not console.is_terminal:
                        note(f"  {title} …")
                    continue
                if kind == "row":
                    progress.advance(task)
                yield kind, what


def _child(request: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Run the measuring process and yield its events.

    OpenMP reads its environment once, at its start: hence a process per thread count.
    """
    here = str(Path(__file__).resolve().parent)
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    env = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "PYTHONPATH": path,
        **machine.binding(request["threads"]),
    }
    with tempfile.TemporaryDirectory(prefix="kivi-benchmark-") as folder:
        order, events, log = (Path(folder) / name for name in ("request", "events", "log"))
        order.write_text(json.dumps(request))
        events.touch()
        command = [sys.executable, "-m", "attn.worker", str(order), str(events)]
        with events.open() as file, running(command, log, env) as process:
            line = ""
            while True:
                ended = process.poll() is not None
                while part := file.readline():
                    line += part
                    if line.endswith("\n"):
                        yield from json.loads(line).items()
                        line = ""
                if ended:
                    break
                time.sleep(0.3)
        if process.returncode:
            raise UserError(
                f"the measuring process ended with status {process.returncode}. The end of its "
                f"log:\n{tail(log)}",
                "the system was out of memory: lower --memory"
                if process.returncode == -signal.SIGKILL
                else "see the log above",
                status=1,
            )


if __name__ == "__main__":
    main(app)
