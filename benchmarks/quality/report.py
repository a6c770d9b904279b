"""Tables and JSON of a quality comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.quality.sections import Result
from kivi_vllm.cli.files import write_json


def document(header: dict[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """What the JSON file holds: the header, and the records of all rows by section."""
    parts = [asdict(result) for result in results]
    return {
        "header": header,
        "caches": [part["cache"] for part in parts],
        **{
            name: [record for part in parts for record in part[name]]
            for name in ("perplexity", "passkey", "generation")
        },
    }


def write(path: Path, header: dict[str, Any], results: Sequence[Result]) -> None:
    """Write the JSON file."""
    write_json(path, document(header, results))


def show(results: Sequence[Result]) -> None:
    """Print the tables of the sections that were measured."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    for table in (*_perplexity(results), *_passkey(results), *_generation(results)):
        console.print(table)


def _table(title: str, names: Sequence[str], left: int) -> Table:
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < left else "right")
    return table


def _interval(estimate: dict[str, float], form: str) -> str:
    value, low, high = (_number(estimate[name], form) for name in ("value", "low", "high"))
    return f"{value} ({low}–{high})"


def _number(value: float, form: str) -> str:
    """A formatted number; what rounds to nothing has no sign (a KL may be -1e-9)."""
    text = format(value, form)
    return text if text.strip("-0.%") else text.lstrip("-")


def _perplexity(results: Sequence[Result]) -> Iterator[Table]:
    records = [record for result in results for record in result.perplexity]
    if not records:
        return
    bytes_of = {r.cache["name"]: r.cache["kv_bytes_per_token"] for r in results}
    names = (
        "text",
        "context",
        "cache",
        "bytes/token",
        "perplexity",
        "ratio",
        "KL",
        "top-1",
        "tokens",
    )
    table = _table("Perplexity and divergence from the first row, 95 % intervals", names, 3)
    places = list(dict.fromkeys((r["text"], r["length"]) for r in records))
    for text, length in places:
        for record in (r for r in records if (r["text"], r["length"]) == (text, length)):
            size = bytes_of[record["cache"]]
            table.add_row(
                Path(text).name,
                f"{length // 2:,}–{length:,}",
                record["cache"],
                "–" if size is None else f"{size:,.0f}",
                f"{record['perplexity']:.3f}",
                _interval(record["ratio"], ".3f"),
                _interval(record["kl"], ".4f"),
                _interval(record["top1"], ".1%"),
                f"{record['tokens']:,}",
            )
        table.add_section()
    yield table


def _passkey(results: Sequence[Result]) -> Iterator[Table]:
    records = [record for result in results for record in result.passkey]
    if not records:
        return
    depths = sorted({r["depth"] for r in records})
    names = ("text", "length", "fact", "cache", *(f"at {d:.0%}" for d in depths), "all")
    table = _table("Hidden facts found, of all asked for, by depth", names, 4)
    for text, length, kind in dict.fromkeys((r["text"], r["length"], r["kind"]) for r in records):
        for result in results:
            mine = [
                r
                for r in result.passkey
                if (r["text"], r["length"], r["kind"]) == (text, length, kind)
            ]
            groups = [*([r for r in mine if r["depth"] == d] for d in depths), mine]
            if mine:
                cells = (f"{sum(r['correct'] for r in g)}/{len(g)}" for g in groups)
                table.add_row(Path(text).name, f"{length:,}", kind, result.cache["name"], *cells)
        table.add_section()
    yield table


def _generation(results: Sequence[Result]) -> Iterator[Table]:
    records = [record for result in results for record in result.generation]
    if not records:
        return
    names = ("text", "cache", "first difference", "agreement", "identical")
    table = _table(
        f"Greedy answers of {records[0]['tokens']} tokens against the first row's", names, 2
    )
    for text in dict.fromkeys(record["text"] for record in records):
        for record in (r for r in records if r["text"] == text):
            table.add_row(
                Path(text).name,
                record["cache"],
                f"{record['median_divergence']:.0f}",
                f"{record['mean_agreement']:.1%}",
                f"{record['identical']}/{record['prompts']}",
            )
        table.add_section()
    yield table
