"""Builds of the CPU kernels against each other, in turn in one process: see README.md here."""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.attention.cases import DEFAULTS, RESIDUAL, SHAPES, B, Shape, among
from benchmarks.common import machine
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.files import check_folder, write_json
from kivi_vllm.cli.main import main

OPERATORS = ("attend", "store_blocks")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
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
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write rows.")] = None,
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
    context -= context % B
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for i, path in enumerate(libraries):  # a library of the same name is loaded only once
            paths[path.stem] = Path(shutil.copy(path, Path(folder) / f"{i}.so"))
        for name in shapes:
            row, header["isa"] = _compare(
                operator, SHAPES[name], paths, context, batch, new, threads, isa, seconds
            )
            rows.append({"shape": name, "context": context, "batch": batch, "new": new} | row)
            if json_path is not None:
                write_json(json_path, {"header": header, "rows": rows})
    _show(operator, rows, list(paths))


def _compare(
    operator: str,
    shape: Shape,
    paths: dict[str, Path],
    context: int,
    batch: int,
    new: int,
    threads: int,
    isa: str | None,
    seconds: float,
) -> tuple[dict[str, Any], str]:
    """A row of medians and quartiles in ms by build, and `ratio_NAME` to the first."""
    import torch

    from benchmarks.attention.kivi import KiviPool, rows
    from benchmarks.attention.memory import cold_sets
    from benchmarks.attention.timing import Cursor, Timed, columns, interleave
    from benchmarks.attention.tokens import TEMPLATE_BLOCKS, Tokens
    from kivi_vllm.ops.cpu import operators
    from kivi_vllm.ops.cpu.library import Library

    torch.set_num_threads(threads)
    libraries = {name: Library(path, isa) for name, path in paths.items()}
    blocks = context // B
    total = context + (max(RESIDUAL, new) if operator == "attend" else -(-new // B) * B)
    read = KiviPool(shape, "kivi2", 1, batch, 1).read_bytes(blocks, RESIDUAL)
    sets = cold_sets(read, machine.llc_bytes())
    pool = KiviPool(shape, "kivi2", sets, batch, -(-total // B))
    template = Tokens(shape, TEMPLATE_BLOCKS * B)
    pool.allocate(huge_pages=True)
    pool.fill(template.key, template.value)
    own = Tokens(shape, batch * new)
    of = rows(batch, new, total)

    def run(library: Library, call: Callable[[], object]) -> None:
        operators.load = lambda: library
        call()

    if operator == "attend":
        args = (own.query, own.key, own.value, own.output)
        calls = [pool.attention(i, of, *args) for i in range(sets)]
    else:
        calls = [pool.store(operator, i, of, own.key, own.value) for i in range(sets)]
    things, results = {}, []
    cursor = Cursor(sets)
    pages = pool.tables[0].flatten().long()
    for name, library in libraries.items():
        things[name] = Timed([partial(run, library, call) for call in calls], cursor)
        if operator == "attend":
            own.output.fill_(float("nan"))
        else:
            pool.pages[pages] = 0
        things[name].calls[0]()
        result = own.output if operator == "attend" else pool.pages[pages]
        results.append(result.double())
    scale = results[0].abs().max()
    error = float(torch.stack([(x - results[0]).abs().max() / scale for x in results]).max())
    if not error <= (0.02 if operator == "attend" else 0.0):  # NaN too
        raise UserError(f"the builds' results differ by {error:.2g}", "run the tests", status=1)
    times = interleave(things, seconds)
    row = columns(times) | {"difference": error}
    base = times[next(iter(times))].ms
    row |= {f"ratio_{name}": round(base / one.ms, 3) for name, one in times.items()}
    return row, next(iter(libraries.values())).isa


def _show(operator: str, rows: list[dict[str, Any]], names: list[str]) -> None:
    table = Table(title=f"{operator}, one layer (median, ms)", title_justify="left")
    for column in ("shape", "context", "batch", *names, *(f"{n} ×" for n in names[1:])):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for row in rows:
        times = [f"{row[f'{name}_ms']:.4g}" for name in names]
        ratios = [f"{row[f'ratio_{name}']:.3f}" for name in names[1:]]
        table.add_row(row["shape"], str(row["context"]), str(row["batch"]), *times, *ratios)
    console = Console()
    if not console.is_terminal:
        console.width = 180
    console.print(table)


if __name__ == "__main__":
    main(app)
