"""The results of benchmarks/serving: medians over the rounds, tables, the JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common.files import write_json
from benchmarks.common.tables import show as table
from benchmarks.serving.sweep import LATENCIES, PERCENTILES, Row

Summary = dict[str, Any]

WAITING, MOST = "running, median while others wait", "most running"
"""The two figures of concurrency, by what they are."""

TITLES = {
    "long": "long: prompts of their own, all from the start",
    "shared": "shared: prompts with shared prefixes, all from the start",
    "kivi": "kivi: KIVI's lengths, all from the start",
    "rate": "rate: shared prefixes at a rising request rate",
    "context": "context: one request at a time",
}


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Medians over the rounds, by dtype and workload, in the order of the rows.

    `running_while_others_wait` is the median of the requests that run while others wait, and
    `running` the most that ran at any moment. `ratio` is that of the output tokens a second to the
    first dtype's on the same workload, `concurrency_ratio` that of the median, `batch_ratio` of the
    most.
    """
    found: list[Summary] = []
    if not rows:
        return found
    groups = pd.json_normalize(rows).groupby(["workload", "kv_cache_dtype"], sort=False)
    for (workload, dtype), mine in groups:
        row = rows[mine.index[0]]

        def median(name: str, of: pd.DataFrame = mine) -> float | None:
            value = pd.to_numeric(of[name]).median()
            return None if pd.isna(value) else float(value)

        one: Summary = {
            "workload": workload,
            "kv_cache_dtype": dtype,
            "rounds": len(mine),
            "request_rate": row["request_rate"],
            "kv_cache_tokens": row["kv_cache_tokens"],
            "failed": int((mine["num_prompts"] - mine["completed"]).sum()),
            "requests_per_s": median("requests_per_s"),
            "output_tokens_per_s": median("output_tokens_per_s"),
            "output_tokens_per_s_all": mine["output_tokens_per_s"].to_list(),
            "latency_ms": {
                name: {p: median(f"latency_ms.{name}.{p}") for p in PERCENTILES}
                for name in LATENCIES
            },
            "saturated": bool((mine["server.running_max"] < mine["num_prompts"]).all()),
            "running": median("server.running_max"),
            **{name: median(f"server.{name}") for name in _OF_SERVER},
        }
        first = next((other for other in found if other["workload"] == workload), one)
        for name, of in _RATIOS.items():
            one[name] = one[of] / first[of] if one[of] and first[of] else None
        found.append(one)
    return found


_OF_SERVER = (
    "running_while_others_wait",
    "kv_cache_usage_max",
    "preemptions",
    "prefix_hit_rate",
    "memory_peak_bytes",
    "gpu_memory_peak_bytes",
)
_RATIOS = {
    "ratio": "output_tokens_per_s",
    "concurrency_ratio": "running_while_others_wait",
    "batch_ratio": "running",
}


def write(path: Path | None, head: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the JSON file."""
    data = {"header": head, "summary": summarize(rows), "rows": list(rows)}
    write_json(path, data)


_KEYS = {"workload": "workload", "kv_cache_dtype": "--kv-cache-dtype"}
_COLUMNS: dict[str, tuple[str, Any]] = {
    "requests_per_s": ("req/s", ".3g"),
    "output_tokens_per_s": ("output tok/s", ".2f"),
    "ratio": ("ratio", "{:.2f}×".format),
    "running_while_others_wait": (WAITING, ".0f"),
    "concurrency_ratio": ("ratio ", "{:.2f}×".format),
    "most": (MOST, str),
    "kv_cache_usage_max": ("cache used", ".0%"),
    "preemptions": ("preempted", ".0f"),
    "prefix_hit_rate": ("hits", ".0%"),
    "memory": ("peak MiB", ",.0f"),
    "failed": ("failed", "d"),
    "rounds": ("rounds", "d"),
}


def show(rows: Sequence[Row]) -> None:
    """Print the tables."""
    frame = pd.json_normalize(summarize(rows))
    stars = frame["saturated"].map({True: "", False: " *"})
    frame["most"] = frame["running"].map("{:.0f}".format) + stars
    gpu = pd.to_numeric(frame["gpu_memory_peak_bytes"])
    frame["memory"] = gpu.fillna(frame["memory_peak_bytes"]) / 2**20
    titles = {name: title for name, (title, _) in _COLUMNS.items()}
    keys = frame[list(_KEYS)].rename(columns=_KEYS)
    loads = keys.join(frame[list(titles)].rename(columns=titles))
    spans = {f"latency_ms.{name}.{p}": f"{name} {p}" for name in LATENCIES for p in PERCENTILES}
    latencies = keys.join(frame[list(spans)].rename(columns=spans))
    sizes = frame.groupby("kv_cache_dtype", sort=False)["kv_cache_tokens"].first()
    sizes = pd.DataFrame({"cache tokens": sizes, "ratio": sizes / sizes.iloc[0]})
    table(sizes.reset_index(), "Capacity", {"cache tokens": ",.0f", "ratio": "{:.2f}×".format})
    for kind, title in TITLES.items():
        mine = frame["workload"].str.split("-").str[0] == kind
        if mine.any():
            table(loads[mine], title, dict(_COLUMNS.values()), width=180)
            if not frame["saturated"][mine].all():
                print("* all requests ran: the cache would hold more")
            forms = dict.fromkeys(spans.values(), ",.0f")
            table(latencies[mine], f"{title}: milliseconds", forms, width=180)
