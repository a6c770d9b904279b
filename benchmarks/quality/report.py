"""Tables of a quality comparison, from its JSON document."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.tables import cell
from benchmarks.common.tables import show as show_table


def show(data: dict[str, Any]) -> None:
    """Print the tables of a document, of the sections that were measured."""
    sizes = {one["name"]: one["kv_bytes_per_token"] for one in data["caches"]}
    for name, table in TABLES.items():
        if data.get(name):
            frame = pd.DataFrame(data[name])
            frame["bytes/token"] = frame["cache"].map(sizes)
            frame["text"] = frame["text"].map(lambda text: Path(text).name)
            table(frame)


def _together(frame: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Rows of equal values beside each other, else in their order."""
    return pd.concat([part for _, part in frame.groupby(list(names), sort=False)])


def _interval(form: str) -> Callable[[Any], str]:
    return lambda one: "{} ({}–{})".format(*(cell(one[n], form) for n in ("value", "low", "high")))


def _perplexity(frame: pd.DataFrame) -> None:
    context = frame["length"].map(lambda length: f"{length // 2:,}–{length:,}")
    _divergence(frame, context, "Perplexity and divergence from the first row, 95 % intervals")


def _decoding(frame: pd.DataFrame) -> None:
    context = frame["length"].map(lambda length: f"{length:,}")
    _divergence(frame, context, "The same of decoded tokens, at the end of contexts")


def _divergence(frame: pd.DataFrame, context: pd.Series, title: str) -> None:
    frame = frame.assign(context=context).rename(columns={"kl": "KL", "top1": "top-1"})
    frame = _together(frame, "text", "length")
    forms: dict[str, Any] = {
        "bytes/token": ",.0f",
        "perplexity": ".3f",
        "ratio": _interval(".3f"),
        "KL": _interval(".4f"),
        "top-1": _interval(".1%"),
        "tokens": ",d",
    }
    by = ["text", "context"]
    show_table(frame[[*by, "cache", *forms]], title, forms, by=by)


def _passkey(frame: pd.DataFrame) -> None:
    def found(part: pd.DataFrame) -> str:
        return f"{part['correct'].sum()}/{len(part)}"

    by = ["text", "length", "fact"]
    frame = _together(frame.rename(columns={"kind": "fact"}), *by)
    rows = [
        dict(zip((*by, "cache"), key, strict=True))
        | {f"at {depth:.0%}": found(part) for depth, part in mine.groupby("depth")}
        | {"all": found(mine)}
        for key, mine in frame.groupby([*by, "cache"], sort=False)
    ]
    table = pd.DataFrame(rows)
    forms = {"length": ",d", **dict.fromkeys(table.columns[4:], "")}
    show_table(table, "Hidden facts found, of all asked for, by depth", forms, by=by)


def _generation(frame: pd.DataFrame) -> None:
    frame = _together(frame, "text")
    frame["same"] = frame["identical"].astype(str) + "/" + frame["prompts"].astype(str)
    table = frame[["text", "cache", "median_divergence", "mean_agreement", "same"]]
    forms = {"first difference": ".0f", "agreement": ".1%", "identical": ""}
    title = f"Greedy answers of {frame['tokens'].iloc[0]} tokens against the first row's"
    show_table(table.set_axis(["text", "cache", *forms], axis=1), title, forms, by=["text"])


TABLES = {
    "perplexity": _perplexity,
    "decoding": _decoding,
    "passkey": _passkey,
    "generation": _generation,
}
