"""The results as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.attention.cases import KIVI_DTYPES, SECTIONS, Case

Result = dict[str, Any]
Columns = dict[str, tuple[str, str]]
"""By title: the row's field, and its format."""

TITLES = {
    "decode": "Decode: one token per sequence (median, ms)",
    "prefill": "Prefill: one chunk of one sequence (median, ms)",
    "store": "Store: what a step adds for kivi2 (median, ms)",
}
KEYS = ("shape", "threads", "context", "batch", "new")


def _plain(*names: str) -> Columns:
    return {name: (name, "{}") for name in names}


def _ms(*names: str) -> Columns:
    return {name: (f"{name}_ms", "{:.4g}") for name in names}


def columns(section: str, device: str) -> Columns:
    """The columns of a section's table."""
    cpu = device == "cpu"
    head = _plain("shape", *(["threads"] if cpu else []), "context")
    end: Columns = {"error": ("rel_error", "{:.1e}"), "rounds": ("iterations", "{}")}
    against = {f"vs {name}": (f"ratio_{name}", "{:.2f}×") for name in ("bf16", "fp8")}
    if section == "store":
        calls = _ms("store_ring", "store_blocks", "store", "attend")
        share = {
            "of attend": ("share_of_attend", "{:.1%}"),
            "bf16 store": _ms("bf16_store")["bf16_store"],
        }
        return head | _plain("batch", "new") | calls | share | end
    if cpu and section == "decode":
        floors = {"floor": ("floor_ms", "{:.4g}"), "bf16 floor": ("bf16_floor_ms", "{:.4g}")}
        caches = _ms("bf16", "fp8", *KIVI_DTYPES)
        share = {"of floor": ("share_of_floor", "{:.1%}")}
        return head | _plain("batch") | caches | floors | against | share | end
    if cpu:
        return head | _plain("new") | _ms("bf16", "kivi2") | {"vs bf16": ("ratio", "{:.2f}×")} | end
    # Of others only the fastest over each cache.
    bf16 = _ms("bf16") | {"which": ("bf16_is", "{}")}
    if section == "prefill":
        served = {"vs bf16": against["vs bf16"], "served": ("kivi2_served_ms", "{:.4g}")}
        return head | _plain("new") | bf16 | _ms("kivi2") | served | end
    fp8 = _ms("fp8") | {"which ": ("fp8_is", "{}")} | _ms("turboquant")
    share = {"of bandwidth": ("share_of_bandwidth", "{:.1%}")}
    return head | _plain("batch") | bf16 | fp8 | _ms(*KIVI_DTYPES) | against | share | end


def show(rows: dict[str, list[Result]], device: str, cases: Sequence[Case]) -> None:
    """Print one table per section that has rows, and why cases were skipped.

    Args:
        rows: by section.
        device: cpu or cuda.
        cases: in the order in which they were measured; shown in that of the shapes.

    """
    try:
        import pandas as pd

        from benchmarks.common.tables import show as table
    except ImportError:  # PyTorch and Triton suffice to measure
        print("no tables: pandas is not installed; --json has the rows")
        return
    shapes = list(dict.fromkeys(case.shape for case in cases))
    for section in SECTIONS:
        mine = rows[section]
        if not mine:
            continue
        if device != "cpu":  # measured by importance
            mine = sorted(mine, key=lambda r: (shapes.index(r["shape"]), r["context"], r["batch"]))
        lines = [_line(row, columns(section, device)) for row in mine]
        right = {name: str for name in lines[0] if name not in ("shape", "which", "which ")}
        table(pd.DataFrame(lines), TITLES[section], right, width=180)
        for reason, where in _reasons(mine).items():
            print("\n  ".join([reason, *where]))


def _line(row: Result, cells: Columns) -> dict[str, str]:
    line = {}
    for title, (name, form) in cells.items():
        value = row.get(name)
        if "skipped" in row and name not in KEYS:
            line[title] = "" if "skipped" in line.values() else "skipped"
        else:
            text = "–" if value is None else form.format(value)
            line[title] = text.removesuffix("_bf16").removesuffix("_fp8")
    return line


def _reasons(rows: Sequence[Result]) -> dict[str, list[str]]:
    """Why cases were skipped or contenders left out, and where."""

    def of(row: Result, names: Sequence[str]) -> str:
        return ", ".join(f"{name} {row[name]}" for name in names if name in row)

    said: dict[str, list[str]] = {}
    for row in rows:
        if "skipped" in row:
            names = ("shape", "context", "batch", "new", "threads")
            said.setdefault(f"skipped: {row['skipped']}", []).append(of(row, names))
        missing = row.get("unavailable", {})
        if full := [name for name, why in missing.items() if why.startswith("no room")]:
            where = said.setdefault(f"no room for {', '.join(full)}", [])
            where.append(of(row, ("shape", "context", "batch")))
        for name in missing.keys() - set(full):
            said.setdefault(f"without {name}: {missing[name]}", [])
    return said


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
