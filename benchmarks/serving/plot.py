"""Pictures of what `benchmarks/serving --json` measured: see README.md here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common.command import Prefix, start
from benchmarks.common.files import check_folder
from benchmarks.common.pictures import COLOURS, MARKERS, check_matplotlib, new_axes, read, save
from benchmarks.serving.workloads import SATURATING

SPEED = "output tokens a second"
PANELS = {
    "running_while_others_wait": "running, median while others wait",
    "running": "most running",
    "output_tokens_per_s": SPEED,
}


def plot(
    results: Annotated[
        list[Path],
        typer.Argument(help="What benchmarks.serving --json wrote; of a load the last one counts."),
    ],
    prefix: Prefix = Path("serving"),
) -> None:
    """Draw what was measured: concurrency, throughput, latency, decode, capacity: PNG and SVG."""
    found: dict[Any, dict[str, Any]] = {}
    for path in results:
        data = read(
            path, "benchmarks.serving", lambda data: [r["latency_ms"] for r in data["summary"]]
        )
        found |= {(one["workload"], one["kv_cache_dtype"]): one for one in data["summary"]}
    check_folder("-o", prefix)
    check_matplotlib()
    for path in draw(data["header"], list(found.values()), prefix):
        print(path)


def draw(header: dict[str, Any], summary: list[dict[str, Any]], prefix: Path) -> Iterator[Path]:
    """Draw all pictures for which there are figures; yields the files."""
    where = f"{header['model']}, {header['gpu'] or header['cpu']}"
    frame = pd.json_normalize(summary)
    kind = frame.workload.str.split("-")
    frame["seconds"] = frame["latency_ms.e2el.p50"] / 1000
    frame["decode"] = 1000 / frame["latency_ms.tpot.p50"]
    capacity = frame.groupby("kv_cache_dtype", sort=False).kv_cache_tokens.first()
    if capacity.notna().all():
        figure, axes = new_axes(f"KV cache\n{where}")
        bars = axes.bar(capacity.index, capacity, color=COLOURS[: len(capacity)])
        axes.bar_label(bars, fmt="{:,.0f}")
        axes.set_ylabel("tokens that fit")
        yield from save(figure, f"{prefix}-capacity")
    if len(loads := frame[kind.str[0].isin(SATURATING)]):
        yield from _bars(loads, f"All requests from the start\n{where}", f"{prefix}-load")
    if len(rates := frame[kind.str[0] == "rate"]):
        title = f"Shared prefixes, rising request rate\n{where}"
        offered = ("request_rate", "requests a second offered")
        yield from _lines(rates, offered, ("output_tokens_per_s", SPEED), title, f"{prefix}-rate")
        answer = ("seconds", "median seconds for a whole answer")
        yield from _lines(rates, answer, ("output_tokens_per_s", SPEED), title, f"{prefix}-pareto")
    if len(contexts := frame[kind.str[0] == "context"]):
        contexts = contexts.assign(tokens=kind.str[-1][contexts.index].astype(int))
        title, x = f"Decode of one sequence\n{where}", ("tokens", "tokens in the prompt")
        y = ("decode", "tokens a second")
        yield from _lines(contexts, x, y, title, f"{prefix}-context")


def _lines(
    frame: pd.DataFrame, x: tuple[str, str], y: tuple[str, str], title: str, name: str
) -> Iterator[Path]:
    """A line for each cache dtype, its points in the order of the load."""
    figure, axes = new_axes(title)
    for index, (dtype, mine) in enumerate(frame.groupby("kv_cache_dtype", sort=False)):
        look = {"marker": MARKERS[index % len(MARKERS)], "color": COLOURS[index % len(COLOURS)]}
        axes.plot(mine[x[0]], mine[y[0]], label=dtype, **look)
    axes.set(xlabel=x[1], ylabel=y[1], xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=8)
    yield from save(figure, name)


def _bars(frame: pd.DataFrame, title: str, name: str) -> Iterator[Path]:
    """A panel for each of `PANELS`, by workload and cache dtype."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(13, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, (field, unit) in zip(panels, PANELS.items(), strict=True):
        values = frame.assign(value=pd.to_numeric(frame[field]))
        table = values.pivot(index="workload", columns="kv_cache_dtype", values="value")
        table = table.loc[frame.workload.unique(), frame.kv_cache_dtype.unique()]
        table.plot.bar(ax=axes, color=list(COLOURS), rot=0, width=0.8, legend=False)
        for bars in axes.containers:
            axes.bar_label(bars, fmt="{:.3g}", fontsize=7)
        axes.set(title=unit, xlabel="")
        axes.grid(True, axis="y", alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    yield from save(figure, name)


if __name__ == "__main__":
    start(plot)
