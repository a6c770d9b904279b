"""The results of benchmarks/serving: medians over the rounds, tables, the JSON file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving.sweep import LATENCIES, PERCENTILES, Row
from kivi_vllm.cli.files import write_json

Summary = dict[str, Any]


def median(values: Iterable[float | None]) -> float | None:
    """The median of what is there."""
    there = [value for value in values if value is not None]
    return statistics.median(there) if there else None


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Medians over the rounds, by dtype and workload, in the order of the rows.

    `ratio` is that of the output tokens a second to the first dtype's on the same
    workload, and `batch_ratio` that of the most requests that ran at once.
    """
    found: list[Summary] = []
    for key in dict.fromkeys((row.workload, row.kv_cache_dtype) for row in rows):
        mine = [row for row in rows if (row.workload, row.kv_cache_dtype) == key]
        server = [row.server for row in mine]
        found.append(
            {
                "workload": key[0],
                "kv_cache_dtype": key[1],
                "rounds": len(mine),
                "request_rate": mine[0].request_rate,
                "kv_cache_tokens": mine[0].kv_cache_tokens,
                "failed": sum(row.num_prompts - row.completed for row in mine),
                "requests_per_s": median(row.requests_per_s for row in mine),
                "output_tokens_per_s": median(row.output_tokens_per_s for row in mine),
                "output_tokens_per_s_all": [row.output_tokens_per_s for row in mine],
                "latency_ms": {
                    name: {p: median(row.latency_ms[name][p] for row in mine) for p in PERCENTILES}
                    for name in LATENCIES
                },
                "running": median(s["running_max"] for s in server),
                "running_while_others_wait": median(s["running_while_others_wait"] for s in server),
                "saturated": all(row.server["running_max"] < row.num_prompts for row in mine),
                "kv_cache_usage_max": median(s["kv_cache_usage_max"] for s in server),
                "preemptions": median(s["preemptions"] for s in server),
                "prefix_hit_rate": median(s["prefix_hit_rate"] for s in server),
                "memory_peak_bytes": median(s["memory_peak_bytes"] for s in server),
                "gpu_memory_peak_bytes": median(s["gpu_memory_peak_bytes"] for s in server),
            }
        )
    for one in found:
        first = next(other for other in found if other["workload"] == one["workload"])
        one["ratio"] = one["output_tokens_per_s"] / first["output_tokens_per_s"]
        one["batch_ratio"] = one["running"] / first["running"] if first["running"] else None
    return found


def write(path: Path, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the JSON file."""
    data = {"header": head, "summary": summarize(rows), "rows": [asdict(row) for row in rows]}
    write_json(path, data)


def show(rows: Sequence[Row]) -> None:
    """Print the tables."""
    summary = summarize(rows)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 150
    for table in _tables(summary):
        console.print(table)


def _tables(summary: Sequence[Summary]) -> Iterator[Table]:
    capacity = {one["kv_cache_dtype"]: one["kv_cache_tokens"] for one in summary}
    if capacity:
        yield _capacity(capacity)
    titles = {
        "long": "long: prompts of their own, all at once",
        "shared": "shared: prompts with shared prefixes, all at once",
        "kivi": "kivi: KIVI's lengths, all at once",
        "rate": "rate: shared prefixes at a rising request rate",
        "context": "context: one request at a time",
    }
    for kind, title in titles.items():
        mine = [one for one in summary if one["workload"].split("-")[0] == kind]
        if not mine:
            continue
        yield _loads(title, mine)
        yield _latencies(title, mine)


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _capacity(capacity: dict[str, int | None]) -> Table:
    table = _table("Capacity", ["--kv-cache-dtype"], ["cache tokens", "ratio"])
    first = next(iter(capacity.values()))
    for dtype, tokens in capacity.items():
        ratio = tokens / first if tokens and first else None
        table.add_row(dtype, _number(tokens, ",d"), _number(ratio, ".2f", "×"))
    return table


def _loads(title: str, summary: Sequence[Summary]) -> Table:
    names = ["req/s", "output tok/s", "ratio", "running", "ratio", "cache used", "preempted"]
    names += ["hits", "peak memory", "failed", "rounds"]
    table = _table(title, ["workload", "--kv-cache-dtype"], names)
    for one in summary:
        memory = one["gpu_memory_peak_bytes"] or one["memory_peak_bytes"]
        table.add_row(
            one["workload"],
            one["kv_cache_dtype"],
            _number(one["requests_per_s"], ".3g"),
            _number(one["output_tokens_per_s"], ".2f"),
            _number(one["ratio"], ".2f", "×"),
            _number(one["running"], ".0f") + ("" if one["saturated"] else " *"),
            _number(one["batch_ratio"], ".2f", "×"),
            _number(one["kv_cache_usage_max"], ".0%"),
            _number(one["preemptions"], ".0f"),
            _number(one["prefix_hit_rate"], ".0%"),
            f"{memory / 2**20:,.0f} MiB",
            str(one["failed"]),
            str(one["rounds"]),
        )
    if not all(one["saturated"] for one in summary):
        table.caption = "* all requests ran at once: the cache would hold more"
    return table


def _latencies(title: str, summary: Sequence[Summary]) -> Table:
    names = [f"{name} {p}" for name in LATENCIES for p in PERCENTILES]
    table = _table(f"{title}: milliseconds", ["workload", "--kv-cache-dtype"], names)
    for one in summary:
        values = [one["latency_ms"][name][p] for name in LATENCIES for p in PERCENTILES]
        cells = [_number(value, ",.0f") for value in values]
        table.add_row(one["workload"], one["kv_cache_dtype"], *cells)
    return table


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
