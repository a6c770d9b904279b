"""What the decode kernels of each cache would take on a GPU: modelled, never measured."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.attention.cases import KIVI_DTYPES, SHAPES
from benchmarks.attention.gpu.model.gpus import GPUS
from benchmarks.attention.gpu.model.variants import gpus_of, variants
from benchmarks.common.command import Json, among, start
from benchmarks.common.files import check_folder, write_json
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.progress import console, note

Names = list[str] | None
CACHES: dict[str, Any] = {**KIVI_DTYPES, "kivi4_paper": ("kivi4", "paper")}


def model(
    cache: Annotated[Names, typer.Option(help=f"{', '.join(CACHES)}; default: all.")] = None,
    shape: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}.")] = "llama3-8b",
    gpu: Annotated[
        Names, typer.Option(help=f"{', '.join(GPUS)}, of one kind; default: h100, h200.")
    ] = None,
    json_path: Json = None,
) -> None:
    """Compile the decode kernels ahead of time and play their page loops. No GPU is needed."""
    check_folder("--json", json_path)
    caches, gpus = cache or list(CACHES), gpu or ["h100", "h200"]
    for option, given, known in (
        ("--cache", caches, CACHES),
        ("--shape", [shape], SHAPES),
        ("--gpu", gpus, GPUS),
    ):
        among(option, given, known)
    try:
        capability, known_gpus = gpus_of(gpus)
    except ValueError as error:
        raise UserError(f"--gpu {error}", "run the command once for each kind") from None
    table = Table("compiler", "cache", "warps", "instr.", "regs", "shared", "spills")
    for name in known_gpus:
        for title in ("programs", "cycles", "modelled"):
            table.add_column(f"{name}\n{title}", justify="right")
    rows = []
    chosen = {name: CACHES[name] for name in caches}
    for variant in variants(chosen, SHAPES[shape], capability):
        row = variant.modelled(known_gpus)
        rows.append(row)
        words = [row["compiler"], row["cache"], row["warps"], row["instructions_a_page"]]
        words += [row["registers"], row["shared_bytes"], row["spills"]]
        for name in known_gpus:
            words += [row[f"{name}_programs"], row[f"{name}_modelled_cycles_a_page"]]
            words.append(f"{row[f'{name}_modelled_share']:.0%}")
        table.add_row(*map(str, words))
        note(f"{variant.compiler}, {variant.cache}: played")
    Console(width=max(console.width, 144)).print(table)
    note("Cycles are of a multiprocessor, a page; shares, of the GPU's bandwidth. All is modelled.")
    if json_path:
        write_json(json_path, {"modelled": True, "shape": shape, "rows": rows})


if __name__ == "__main__":
    start(model)
