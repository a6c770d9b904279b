"""The results as tables for people and as JSON for machines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
Cell = Callable[[Result], str]


def _number(name: str) -> Cell:
    return lambda row: str(row[name])


def _ms(name: str) -> Cell:
    return lambda row: "–" if row[name] is None else f"{row[name]:.4g}"


def _times(name: str) -> Cell:
    return lambda row: "–" if row[name] is None else f"{row[name]:.2f}×"


def _share(name: str) -> Cell:
    return lambda row: "–" if row[name] is None else f"{row[name]:.1%}"


_HEAD: dict[str, Cell] = {
    "shape": _number("shape"),
    "threads": _number("threads"),
    "context": _number("context"),
}
_END: dict[str, Cell] = {
    "error": lambda row: f"{row['rel_error']:.1e}",
    "rounds": _number("iterations"),
}
_STORE: dict[str, Cell] = {
    "batch": _number("batch"),
    "new": _number("new"),
    "store_ring": _ms("store_ring_ms"),
    "store_blocks": _ms("store_blocks_ms"),
    "store": _ms("store_ms"),
    "attend": _ms("attend_ms"),
    "of attend": _share("share_of_attend"),
    "bf16 store": _ms("bf16_store_ms"),
}
TABLES: dict[str, tuple[str, dict[str, Cell]]] = {
    "decode": (
        "Decode: one token per sequence (median, ms)",
        _HEAD
        | {"batch": _number("batch"), "bf16": _ms("bf16_ms"), "fp8": _ms("fp8_ms")}
        | {name: _ms(f"{name}_ms") for name in ("kivi2", "kivi_k4v2", "kivi4")}
        | {"floor": _ms("floor_ms"), "bf16 floor": _ms("bf16_floor_ms")}
        | {"vs bf16": _times("ratio_bf16"), "vs fp8": _times("ratio_fp8")}
        | {"of floor": _share("share_of_floor")}
        | _END,
    ),
    "prefill": (
        "Prefill: one chunk of one sequence (median, ms)",
        _HEAD
        | {"new": _number("new"), "bf16": _ms("bf16_ms"), "kivi2": _ms("kivi2_ms")}
        | {"vs bf16": _times("ratio")}
        | _END,
    ),
    "store": ("Store: what a step adds for kivi2 (median, ms)", _HEAD | _STORE | _END),
}


def show(rows: dict[str, list[Result]]) -> None:
    """Print one table per section that has rows, and why cases were skipped."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    for section, (title, cells) in TABLES.items():
        if not rows[section]:
            continue
        table = Table(title=title, title_justify="left")
        for name in cells:
            table.add_column(name, justify="left" if name == "shape" else "right")
        for row in rows[section]:
            table.add_row(*_line(row, cells))
        console.print(table)
        for row in rows[section]:
            if "skipped" in row:
                what = ", ".join(f"{k} {row[k]}" for k in ("shape", "context", "batch", "threads"))
                console.print(f"skipped {what}: {row['skipped']}", markup=False, soft_wrap=True)


def _line(row: Result, cells: dict[str, Cell]) -> list[str]:
    if "skipped" not in row:
        return [cell(row) for cell in cells.values()]
    known = [name for name in ("shape", "threads", "context", "batch", "new") if name in cells]
    line = [cells[name](row) if name in known else "" for name in cells]
    line[len(known)] = "skipped"
    return line


def write(path: Path, header: Result, rows: dict[str, list[Result]]) -> None:
    """Write the JSON file whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps({"header": header, **rows}, indent=1) + "\n")
    new.replace(path)
