"""The results as tables for people and as JSON for machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.attention.cases import KIVI_DTYPES, Case

Result = dict[str, Any]
Cell = Callable[[Result], str]


def _number(name: str) -> Cell:
    return lambda row: str(row[name])


def _ms(name: str) -> Cell:
    return lambda row: "–" if row.get(name) is None else f"{row[name]:.4g}"


def _times(name: str) -> Cell:
    return lambda row: "–" if row.get(name) is None else f"{row[name]:.2f}×"


def _share(name: str) -> Cell:
    return lambda row: "–" if row.get(name) is None else f"{row[name]:.1%}"


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
        | {name: _ms(f"{name}_ms") for name in KIVI_DTYPES}
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


def _of_gpu() -> dict[str, tuple[str, dict[str, Cell]]]:
    """The tables of `--device cuda`: of others only the fastest over each cache."""
    head = {name: cell for name, cell in _HEAD.items() if name != "threads"}
    others = {
        "bf16": _ms("bf16_ms"),
        "which": lambda row: str(row["bf16_is"] or "–").removesuffix("_bf16"),
    }
    ratios = {"vs bf16": _times("ratio_bf16"), "vs fp8": _times("ratio_fp8")}
    fp8 = {
        "fp8": _ms("fp8_ms"),
        "which ": lambda row: str(row["fp8_is"] or "–").removesuffix("_fp8"),
        "turboquant": _ms("turboquant_ms"),
    }
    own = {name: _ms(f"{name}_ms") for name in KIVI_DTYPES}
    share = {"of bandwidth": _share("share_of_bandwidth")}
    new = {"new": _number("new")}
    kivi2 = {"kivi2": _ms("kivi2_ms"), "vs bf16": _times("ratio_bf16")}
    kivi2["served"] = _ms("kivi2_served_ms")
    titles = {name: title for name, (title, _) in TABLES.items()}
    return {
        "decode": (
            titles["decode"],
            head | {"batch": _number("batch")} | others | fp8 | own | ratios | share | _END,
        ),
        "prefill": (titles["prefill"], head | new | others | kivi2 | _END),
        "store": (titles["store"], head | _STORE | _END),
    }


def show(rows: dict[str, list[Result]], device: str, cases: Sequence[Case]) -> None:
    """Print one table per section that has rows, and why cases were skipped.

    Args:
        rows: by section.
        device: cpu or cuda.
        cases: in the order in which they were measured; shown in that of the shapes.

    """
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 180
    shapes = list(dict.fromkeys(case.shape for case in cases))
    tables = TABLES if device == "cpu" else _of_gpu()
    for section, (title, cells) in tables.items():
        mine = rows[section]
        if not mine:
            continue
        if device != "cpu":  # measured by importance
            mine = sorted(mine, key=lambda r: (shapes.index(r["shape"]), r["context"], r["batch"]))
        table = Table(title=title, title_justify="left")
        for name in cells:
            table.add_column(name, justify="left" if name == "shape" else "right")
        for row in mine:
            table.add_row(*_line(row, cells))
        console.print(table)
        said: dict[str, list[str]] = {}
        for row in mine:
            if "skipped" in row:
                names = ("shape", "context", "batch", "new", "threads")
                what = ", ".join(f"{name} {row[name]}" for name in names if name in row)
                said.setdefault(f"skipped: {row['skipped']}", []).append(what)
            missing = row.get("unavailable", {})
            if full := [name for name, why in missing.items() if why.startswith("no room")]:
                what = ", ".join(f"{name} {row[name]}" for name in ("shape", "context", "batch"))
                said.setdefault(f"no room for {', '.join(full)}", []).append(what)
            for name, why in missing.items():
                if name not in full:
                    said.setdefault(f"without {name}: {why}", [])
        for reason, where in said.items():
            console.print(reason, markup=False, soft_wrap=True)
            for what in where:
                console.print(f"  {what}", markup=False, soft_wrap=True)


def facts(header: Result) -> list[str]:
    """What else a run on a GPU found, in lines."""
    lines = []
    for name, rate in header.get("bandwidth_bytes_per_s", {}).items():
        lines.append(f"bandwidth of a {name} on {header['gpu']}: {rate / 1e12:.3g} TB/s")
    for name, found in header.items():
        if name.startswith("graph_"):
            how = "CUDA graph" if found["captured"] else f"not captured ({found['why_not']})"
            same = "the same" if found["caches_equal"] else "other"
            lines.append(
                f"{name.removeprefix('graph_')}, captured, then replayed for other lengths: {how}; "
                f"outputs differ by {found['difference']:.2g}, {same} caches"
            )
    return lines


def _line(row: Result, cells: dict[str, Cell]) -> list[str]:
    if "skipped" not in row:
        return [cell(row) for cell in cells.values()]
    known = [name for name in ("shape", "threads", "context", "batch", "new") if name in cells]
    line = [cells[name](row) if name in known else "" for name in cells]
    line[len(known)] = "skipped"
    return line
