"""Rows of the published JSON files, and how figures are written in the tables of documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

RESULTS = Path(__file__).resolve().parent / "results"


def read(file: str, part: str, **where: Any) -> pd.DataFrame:
    """The measured rows of a file with these fields; a field in a field is `outer.inner`."""
    rows = pd.json_normalize(json.loads((RESULTS / f"{file}.json").read_text())[part])
    if "skipped" in rows:
        rows = rows[rows["skipped"].isna()]
    for name, value in where.items():
        rows = rows[rows[name] == value]
    return rows


def text(values: pd.Series, form: str | Callable[[Any], str]) -> pd.Series:
    """Cells: a dash for what is missing, and a blank before the sign of percent."""
    write = form.format if isinstance(form, str) else form
    return values.map(lambda x: "–" if pd.isna(x) else write(x).replace("%", " %"))


def gains(values: pd.Series, form: str | Callable[[Any], str]) -> pd.Series:
    """Cells with their multiples of the first, as in `23 (1.15×)`."""
    multiples = text(values / values.iloc[0], " ({:.2f}×)").where(values.notna(), "")
    multiples.iloc[0] = ""
    return text(values, form) + multiples


def digits(value: float) -> str:
    """Three of them."""
    return f"{value:#.3g}".rstrip(".")


def span(values: pd.Series, form: str) -> str:
    """The smallest and the largest value, or the one that there is."""
    low, high = (form.format(x) for x in (values.min(), values.max()))
    unit = low.lstrip("0123456789.")
    return (low if low == high else f"{low.removesuffix(unit)}–{high}").replace("%", " %")


def markdown(table: pd.DataFrame) -> str:
    """A Markdown table. Columns of the same name differ in blanks at their ends."""
    cells = [list(table), ["---"] * table.shape[1], *table.to_numpy().tolist()]
    return "".join(f"| {' | '.join(cell.rstrip() for cell in line)} |\n" for line in cells)


def fits(length: int) -> pd.Series:
    """Tokens that fit into 256 MiB, by cache dtype."""
    return read("capacity", "rows", max_model_len=length).set_index("cache_dtype")["tokens"]
