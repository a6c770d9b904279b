"""Tables on the terminal, from pandas frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from rich.console import Console
from rich.table import Table

Form = str | Callable[[object], str]
"""How a cell is written: a format such as `,.1f`, or a function."""


def show(
    frame: pd.DataFrame,
    title: str = "",
    forms: Mapping[str, Form] | None = None,
    by: Sequence[str] = (),
    width: int = 160,
) -> None:
    """Print a frame as a table; where the output is no terminal, `width` characters wide.

    `forms` says how cells are written, by column; `str` for the others. Such columns stand at the
    right, and so do numbers. A change in the columns `by` begins a new section.
    """
    forms = forms or {}
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = width
    table = Table(title=title or None, title_justify="left")
    for name in frame.columns:
        right = name in forms or pd.api.types.is_numeric_dtype(frame[name])
        table.add_column(str(name), justify="right" if right else "left")
    before = None
    for row in frame.to_dict("records"):
        section = [row[name] for name in by]
        if before not in (None, section):
            table.add_section()
        before = section
        table.add_row(*(cell(row[name], forms.get(name, str)) for name in frame.columns))
    console.print(table)


def cell(value: object, form: Form = str) -> str:
    """One cell; a dash for what is missing, and no sign for what rounds to nothing."""
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return "–"
    if callable(form):
        return form(value)
    text = format(value, form)
    return text if text.strip("-0.,% ") else text.lstrip("-")
