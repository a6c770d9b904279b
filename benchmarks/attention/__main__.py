"""Attention of one layer, ours against vLLM's own and against the memory: see README.md here."""

import math
import time
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.attention.cases import (
    DEFAULTS,
    SECTIONS,
    SELECTED_CONTEXTS,
    SELECTION,
    SHAPES,
    B,
    plan,
    plan_selection,
)
from benchmarks.attention.children import on_cpu, on_gpu
from benchmarks.attention.report import show
from benchmarks.common import machine
from benchmarks.common.command import Json, among, start
from benchmarks.common.files import check_folder, write_json
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.progress import console, note
from kivi_vllm.config import LEAST_TOKEN_BUDGET, Estimate

Names = list[str] | None
Numbers = list[int] | None


def attention(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    section: Annotated[Names, typer.Option(help=f"{', '.join(SECTIONS)}; default: all.")] = None,
    shape: Annotated[
        Names, typer.Option(help=f"{', '.join(SHAPES)}; default: all of the device.")
    ] = None,
    context: Annotated[
        Numbers, typer.Option(min=B, help="Cached tokens at decode; default: from 1k on.")
    ] = None,
    batch: Annotated[
        Numbers, typer.Option(min=1, help="Sequences at decode; default: 1, 8, 32, cuda: 128.")
    ] = None,
    prefill: Annotated[Names, typer.Option(help="New and cached tokens, as in 2048+8192.")] = None,
    threads: Annotated[
        Numbers, typer.Option(min=1, help="cpu: how many; default: 1 and all cores.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(min=0.0, help="Seconds of timing a case; default: 5, cuda: 1.")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=1.0, help="cuda: begin no case after so long; what matters comes first."),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(min=0.01, help="GiB for a case's pools; default: what is free.")
    ] = None,
    huge_pages: Annotated[bool, typer.Option(help="cpu: huge pages for all pools.")] = True,
    token_budget: Annotated[
        str | None,
        typer.Option(
            help="cpu: only decode with these, dense and selected in turn; as in 1024,2048,4096."
        ),
    ] = None,
    estimate: Annotated[
        Estimate, typer.Option(help="with --token-budget: what pages are chosen by.")
    ] = "keys",
    smoke: Annotated[bool, typer.Option(hidden=True, help="cuda, but interpreted: tiny.")] = False,
    json_path: Json = None,
) -> None:
    """Time one layer's attention in every cache format, on caches larger than the processor's."""
    check_folder("--json", json_path)
    among("--device", [device], ("cpu", "cuda"))
    if device == "cpu" and (smoke or seconds is not None):
        raise UserError("--seconds and --smoke are for --device cuda", "leave them out")
    if device == "cuda" and threads:
        raise UserError("--threads is for --device cpu", "leave it out")
    if token_budget and (device == "cuda" or section or prefill):
        raise UserError(
            "--token-budget is a run of its own on cpu", "leave out --device, --section, --prefill"
        )
    token_budgets = [_budget(text) for text in (token_budget or "").split(",") if text]
    defaults = DEFAULTS["smoke" if smoke else device]
    if token_budgets:
        defaults = defaults._replace(contexts=SELECTED_CONTEXTS, batches=(1,))
    sizes = defaults._replace(
        shapes=among("--shape", shape or defaults.shapes, SHAPES),
        contexts=[_blocks(n) for n in context or defaults.contexts],
        batches=batch or defaults.batches,
        chunks=[_chunk(text) for text in prefill or ()] or defaults.chunks,
    )
    cases = plan(among("--section", section or SECTIONS, SECTIONS), sizes)
    if token_budgets:
        cases = plan_selection(sizes)
    counts = threads or sorted({1, len(machine.cores())})
    if max(counts) > len(machine.cores()):
        free = f"this process may use {len(machine.cores())} cores"
        raise UserError(f"--threads {max(counts)}: {free}", "ask for fewer threads")
    budget = defaults.budget if budget is None else budget
    settings: dict[str, Any] = {"budget": budget, "memory": memory and int(memory * machine.GIB)}
    header = machine.header("attention") | {"device": device, "budget_s": budget}
    if device == "cpu":
        settings["memory"] = settings["memory"] or machine.memory_limit()
        settings |= {"llc": machine.llc_bytes(), "huge_pages": huge_pages}
        settings |= {"token_budgets": token_budgets, "estimate": estimate}
        header |= {"llc_bytes": settings["llc"], "huge_pages_requested": huge_pages}
    else:
        end = math.inf if seconds is None else time.time() + seconds
        settings |= {"deadline": end, "smoke": smoke}
        header["seconds"] = seconds
    header["memory_limit_bytes"] = settings["memory"]
    if token_budgets:
        header["estimate"] = estimate
    sections = (SELECTION,) if token_budgets else SECTIONS
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in sections}
    # Once a second: drawing takes time from what is measured.
    with Progress(
        *(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")),
        console=console, transient=True, refresh_per_second=1, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        times = len(counts) if device == "cpu" else 1
        bar = progress.add_task("starting", total=len(cases) * times)

        def tell(kind: str, what: Any) -> None:
            if kind == "now":
                progress.update(bar, description=what)
                if not console.is_terminal:
                    note(f"  {what} …")
                return
            if kind == "header":
                for name in ("binding", "versions"):
                    what[name] = header.get(name, {}) | what.get(name, {})
                header.update(what)
            else:
                rows[what["section"]].append(what)
                progress.advance(bar)
            write_json(json_path, {"header": header, **rows})

        try:
            if device == "cpu":
                on_cpu(cases, counts, settings, tell)
            else:
                on_gpu(cases, settings, tell)
        finally:
            progress.stop()
            show(rows, header)


def _blocks(tokens: int) -> int:
    if tokens % B:
        raise UserError(f"{tokens} cached tokens are no whole blocks", f"use a multiple of {B}")
    return tokens


def _budget(text: str) -> int:
    if not text.isdigit() or int(text) < LEAST_TOKEN_BUDGET or int(text) % B:
        good = f"multiples of {B} from {LEAST_TOKEN_BUDGET} on"
        raise UserError(f"--token-budget {text!r} is none", f"write {good}, as in 1024,4096")
    return int(text)


def _chunk(text: str) -> tuple[int, int]:
    """Read "2048+8192" as (new, cached)."""
    new, _, cached = text.partition("+")
    if not new.isdigit() or int(new) < 1 or not (cached or "0").isdigit():
        raise UserError(f"--prefill {text!r} names no chunk", "write NEW+CACHED, as in 2048+8192")
    return int(new), _blocks(int(cached or 0))


if __name__ == "__main__":
    start(attention)
