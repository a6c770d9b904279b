"""Builds of the CPU kernels against each other, in turn in one process: see README.md here."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.attention.cases import DEFAULTS, RESIDUAL, SHAPES, B, Case
from benchmarks.common import machine
from benchmarks.common.command import Json, among, start
from benchmarks.common.files import check_folder, write_json
from benchmarks.common.tables import show
from kivi_vllm.cli.errors import UserError

OPERATORS = {"attend": 0.02, "store_blocks": 0.0}
"""What can be compared, and how far the results of two builds may be apart."""


def builds(
    libraries: Annotated[
        list[Path], typer.Argument(help="Two or more libkivi_cpu.so; the first is compared with.")
    ],
    operator: Annotated[str, typer.Option(help=f"{' or '.join(OPERATORS)}.")] = "attend",
    shape: Annotated[list[str] | None, typer.Option(help=", ".join(SHAPES))] = None,
    context: Annotated[int, typer.Option(min=B, help="Cached tokens.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    new: Annotated[int, typer.Option(min=1, help="Tokens of each in the step.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="How many.")] = 1,
    isa: Annotated[str | None, typer.Option(help="Instruction set; default: the best.")] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="Of timing per shape.")] = 10.0,
    json_path: Json = None,
) -> None:
    """Time one layer's attention over a kivi2 cache with several builds of the CPU kernels.

    Or its quantizing, where every sequence of the step completes a block.
    """
    check_folder("--json", json_path)
    among("--operator", [operator], OPERATORS)
    shapes = among("--shape", shape or DEFAULTS["cpu"].shapes, SHAPES)
    if missing := [path for path in libraries if not path.is_file()]:
        raise UserError(f"{missing[0]} is not a file", "name libraries that setup.py built")
    if len(libraries) < 2:
        raise UserError("one build has nothing to be compared with", "name another")
    if len({path.stem for path in libraries}) < len(libraries):
        raise UserError("two of the builds have the same name", "copy one to another name")
    os.environ |= machine.binding(threads)  # before OpenMP is loaded, with torch
    header = machine.header("attention.builds") | {"threads": threads, "operator": operator}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for i, path in enumerate(libraries):  # a library of the same name is loaded only once
            paths[path.stem] = Path(shutil.copy(path, Path(folder) / f"{i}.so"))
        for name in shapes:
            case = Case(operator, name, context - context % B, batch, new)
            row, header["isa"] = _compare(case, paths, threads, isa, seconds)
            fields = {key: value for key, value in case.fields.items() if key != "section"}
            rows.append(fields | row)
            write_json(json_path, {"header": header, "rows": rows})
    forms = {f"{name}_ms": ".4g" for name in paths}
    forms |= {f"ratio_{name}": ".3f" for name in list(paths)[1:]}
    table = pd.DataFrame(rows)[["shape", "context", "batch", *forms]]
    show(table, f"{operator}, one layer (median, ms)", forms)


def _compare(
    case: Case, paths: dict[str, Path], threads: int, isa: str | None, seconds: float
) -> tuple[dict[str, Any], str]:
    """A row of medians and quartiles in ms by build, and `ratio_NAME` to the first."""
    import torch

    from benchmarks.attention.kivi import KiviPool
    from benchmarks.attention.memory import cold_sets
    from benchmarks.attention.timing import Timed, columns, interleave
    from benchmarks.attention.work import Work
    from kivi_vllm.ops.cpu import operators
    from kivi_vllm.ops.cpu.library import Library

    torch.set_num_threads(threads)
    libraries = {name: Library(path, isa) for name, path in paths.items()}
    attending, shape, new = case.section == "attend", SHAPES[case.shape], case.new
    total = case.context + (max(RESIDUAL, new) if attending else -(-new // B) * B)
    work = Work(shape, case.batch, new, total)
    read = KiviPool(shape, "kivi2", 1, case.batch, 1).read_bytes(work)
    sets = cold_sets(read, machine.llc_bytes())
    pool = KiviPool(shape, "kivi2", sets, case.batch, -(-total // B))
    pool.prepare()
    pages = pool.tables[0].flatten().long()

    def run(library: Library, call: Callable[[], object]) -> None:
        operators.load = lambda: library  # type: ignore[assignment]
        call()

    def call(i: int) -> Callable[[], object]:
        if attending:
            return pool.attention(i, work)
        return pool.store(case.section, i, work.rows, work.key, work.value)

    calls, cursor = [call(i) for i in range(sets)], cycle(range(sets))
    things, results = {}, []
    for name, library in libraries.items():
        things[name] = Timed([partial(run, library, call) for call in calls], cursor)
        work.output.fill_(float("nan"))
        if not attending:
            pool.pages[pages] = 0
        things[name].calls[0]()
        results.append((work.output if attending else pool.pages[pages]).double())
    scale = results[0].abs().max()
    error = float(torch.stack([(x - results[0]).abs().max() / scale for x in results]).max())
    if not error <= OPERATORS[case.section]:  # NaN too
        raise UserError(f"the builds' results differ by {error:.2g}", "run the tests", status=1)
    times = interleave(things, seconds)
    base = times[next(iter(times))].ms
    row = columns(times) | {"difference": error}
    row |= {f"ratio_{name}": round(base / one.ms, 3) for name, one in times.items()}
    return row, next(iter(libraries.values())).isa


if __name__ == "__main__":
    start(builds)
