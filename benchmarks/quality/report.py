"""Tables and JSON of a quality comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.tables import cell
from benchmarks.common.tables import show as show_table
from benchmarks.quality.sections import SECTIONS, Result


def document(header: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """What the JSON file holds: the header, and the records of all rows by section."""
    parts = [asdict(result) for result in results]
    return {
        "header": header,
        "caches": [part["cache"] for part in parts],
        **{name: [record for part in parts for record in part[name]] for name in SECTIONS},
    }


def show(data: dict[str, Any]) -> None:
    """Print the tables of a document, of the sections that were measured."""
    for name, table in zip(SECTIONS, (_perplexity, _passkey, _generation), strict=True):
        if data[name]:
            frame = pd.DataFrame(data[name])
            frame.insert(0, "where", frame["text"].map(lambda text: Path(text).name))
            table(frame, data)


def _together(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Rows of equal values beside each other, else in their order."""
    return pd.concat([part for _, part in frame.groupby(list(names), sort=False)])


def _interval(form: str) -> Callable[[Any], str]:
    def write(one: dict[str, float]) -> str:
        value, low, high = (cell(one[name], form) for name in ("value", "low", "high"))
        return f"{value} ({low}–{high})"

    return write


def _perplexity(frame: pd.DataFrame, data: dict[str, Any]) -> None:
    frame = _together(frame, "where", "length")
    sizes = {one["name"]: one["kv_bytes_per_token"] for one in data["caches"]}
    table = pd.DataFrame(
        {
            "text": frame["where"],
            "context": frame["length"].map(lambda length: f"{length // 2:,}–{length:,}"),
            "cache": frame["cache"],
            "bytes/token": frame["cache"].map(sizes),
            "perplexity": frame["perplexity"],
            "ratio": frame["ratio"],
            "KL": frame["kl"],
            "top-1": frame["top1"],
            "tokens": frame["tokens"],
        }
    )
    forms = {"bytes/token": ",.0f", "perplexity": ".3f", "tokens": ",d"}
    intervals = {"ratio": _interval(".3f"), "KL": _interval(".4f"), "top-1": _interval(".1%")}
    title = "Perplexity and divergence from the first row, 95 % intervals"
    show_table(table, title, {**forms, **intervals}, by=["text", "context"])


def _passkey(frame: pd.DataFrame, data: dict[str, Any]) -> None:
    def found(part: pd.DataFrame) -> str:
        return f"{part['correct'].sum()}/{len(part)}"

    place = ["where", "length", "kind", "cache"]
    rows = [
        dict(zip(("text", "length", "fact", "cache"), key, strict=True))
        | {f"at {depth:.0%}": found(part) for depth, part in mine.groupby("depth")}
        | {"all": found(mine)}
        for key, mine in _together(frame, *place[:3]).groupby(place, sort=False)
    ]
    table = pd.DataFrame(rows)
    forms: dict[str, Any] = {"length": ",d", **dict.fromkeys(table.columns[4:], str)}
    title = "Hidden facts found, of all asked for, by depth"
    show_table(table, title, forms, by=["text", "length", "fact"])


def _generation(frame: pd.DataFrame, data: dict[str, Any]) -> None:
    frame = _together(frame, "where")
    counts = zip(frame["identical"], frame["prompts"], strict=True)
    table = pd.DataFrame(
        {
            "text": frame["where"],
            "cache": frame["cache"],
            "first difference": frame["median_divergence"],
            "agreement": frame["mean_agreement"],
            "identical": [f"{same}/{prompts}" for same, prompts in counts],
        }
    )
    forms = {"first difference": ".0f", "agreement": ".1%", "identical": str}
    title = f"Greedy answers of {frame['tokens'].iloc[0]} tokens against the first row's"
    show_table(table, title, forms, by=["text"])
