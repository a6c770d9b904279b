"""The printer of all tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks.common import tables


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    frame = pd.DataFrame(
        {
            "text": ["pydoc", "pydoc", "austen"],
            "bytes": [46080, None, 4320.4],
            "right": ["a", "bb", "[b]c"],
        }
    )
    tables.show(frame, "A title", {"bytes": ",.0f", "right": lambda x: f"<{x}>"}, by=["text"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].strip() == "A title"
    assert "│ pydoc  │ 46,080 │    <a> │" in lines
    assert "│ pydoc  │      – │   <bb> │" in lines
    assert "│ austen │  4,320 │ <[b]c> │" in lines
    assert sum(line.startswith("├") for line in lines) == 1, "one section ends"


@pytest.mark.parametrize(
    ("value", "form", "text"),
    [
        (-1e-9, ".4f", "0.0000"),
        (-0.5, ".1f", "-0.5"),
        (-0.0001, ".1%", "0.0%"),
        (np.nan, ".4f", "–"),
        (None, str, "–"),
        ("a [b]", str, "a [b]"),
        ((1, 2), str, "(1, 2)"),
    ],
)
def test_cells(value: object, form: tables.Form, text: str) -> None:
    assert tables.cell(value, form) == text
