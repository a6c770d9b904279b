"""The results as tables for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.attention.cases import KIVI_DTYPES, SHAPES

Result = dict[str, Any]

TITLES = {
    "decode": "Decode: one token per sequence (median, ms)",
    "prefill": "Prefill: one chunk of one sequence (median, ms)",
    "store": "Store: what a step adds for kivi2 (median, ms)",
    "selection": "Decode with a token budget (median, ms)",
}
KEYS = ("shape", "threads", "context", "batch", "new")
FIELDS = {
    ("cpu", "decode"): "batch bf16_ms fp8_ms CACHES floor_ms bf16_floor_ms ratio_bf16 ratio_fp8 "
    "share_of_floor",
    ("cpu", "prefill"): "new bf16_ms kivi2_ms ratio",
    (
        "cpu",
        "selection",
    ): "batch cache token_budget dense_ms choose_ms selected_ms floor_ms bf16_ms ratio_dense "
    "ratio_bf16 share_of_dense",
    ("cuda", "decode"): "batch bf16_ms bf16_is fp8_ms fp8_is turboquant_ms CACHES ratio_bf16 "
    "ratio_fp8 share_of_bandwidth",
    ("cuda", "prefill"): "new bf16_ms bf16_is kivi2_ms ratio_bf16 kivi2_served_ms",
}
"""A section's columns on a device, beside those that all have; others are `STORE`."""
STORE = "batch new store_ring_ms store_blocks_ms store_ms attend_ms share_of_attend bf16_store_ms"
NAMES = {
    "bf16_is": "which",
    "fp8_is": "which ",
    "ratio": "vs bf16",
    "token_budget": "budget",
    "kivi2_served_ms": "served",
    "bf16_floor_ms": "bf16 floor",
    "bf16_store_ms": "bf16 store",
    "rel_error": "error",
    "iterations": "rounds",
}
"""Titles of fields that are not their names in words."""
FORMS = {"ms": "{:.4g}", "ratio": "{:.2f}×", "share": "{:.1%}", "rel": "{:.1e}"}
"""How a field is written, by the first or the last word of its name."""


def show(rows: dict[str, list[Result]], header: Result) -> None:
    """Print one table per section that has rows, and why cases were skipped."""
    for name, rate in header.get("bandwidth_bytes_per_s", {}).items():
        print(f"bandwidth of a {name} on {header['gpu']}: {rate / 1e12:.3g} TB/s")
    try:
        import pandas as pd

        from benchmarks.common.tables import show as table
    except ImportError:  # PyTorch and Triton suffice to measure
        print("no tables: pandas is not installed; --json has the rows")
        return
    device, shapes = header["device"], list(SHAPES)
    for section, title in TITLES.items():
        caches = " ".join(f"{name}_ms" for name in KIVI_DTYPES)
        own = FIELDS.get((device, section), STORE).replace("CACHES", caches).split()
        threads = ["threads"] if device == "cpu" else []
        fields = ["shape", *threads, "context", *own, "rel_error", "iterations"]
        mine = sorted(  # measured by importance
            _by_budget(rows.get(section, ())),
            key=lambda r: (r.get("threads"), shapes.index(r["shape"]), r["context"], r["batch"]),
        )
        if mine:
            frame = pd.DataFrame([_line(row, fields) for row in mine])
            left = ("shape", "which", "which ")
            table(frame, title, {name: str for name in frame if name not in left}, width=180)
        for reason, where in _reasons(mine).items():
            print("\n  ".join([reason, *where]))


def _by_budget(rows: Sequence[Result]) -> list[Result]:
    """Rows of the section "selection" with one cache and one token budget each; others as is."""
    made: list[Result] = []
    for row in rows:
        for cache, of in row.get("caches", {}).items():
            fields = ("dense_ms", "bf16_ms", "choose_ms", "share_of_dense", "iterations")
            more = {"cache": cache, "rel_error": row["rel_errors"][cache]}
            more |= {name: of[name] for name in fields}
            budgets = (int(name.split("_")[-1]) for name in of if name.startswith("ratio_bf16_"))
            made += [
                row
                | more
                | {
                    "token_budget": n,
                    "selected_ms": of[f"selected_{n}_ms"],
                    "floor_ms": of.get(f"floor_{n}_ms"),
                    "ratio_dense": of[f"ratio_{n}"],
                    "ratio_bf16": of[f"ratio_bf16_{n}"],
                }
                for n in budgets
            ]
        if "caches" not in row:
            made.append(row)
    return made


def _line(row: Result, fields: Sequence[str]) -> dict[str, str]:
    line: dict[str, str] = {}
    for name in fields:
        words, value = name.split("_"), row.get(name)
        form = FORMS.get(words[-1]) or FORMS.get(words[0], "{}")
        text = "–" if value is None else form.format(value)
        if "skipped" in row and name not in KEYS:
            text = "" if "skipped" in line.values() else "skipped"
        plain = name.removesuffix("_ms").replace("ratio_", "vs ").replace("share_of_", "of ")
        title = NAMES.get(name, plain)
        line[title] = text.removesuffix("_bf16").removesuffix("_fp8")
    return line


def _reasons(rows: Sequence[Result]) -> dict[str, list[str]]:
    """Why cases were skipped or contenders left out, and where."""
    said: dict[str, list[str]] = {}
    for row in rows:
        where = ", ".join(f"{name} {row[name]}" for name in KEYS if name in row)
        if "skipped" in row:
            said.setdefault(f"skipped: {row['skipped']}", []).append(where)
        missing = row.get("unavailable", {})
        if full := [name for name, why in missing.items() if why.startswith("no room")]:
            said.setdefault(f"no room for {', '.join(full)}", []).append(where)
        for name in missing.keys() - set(full):
            said.setdefault(f"without {name}: {missing[name]}", [])
    return said
