"""Pictures of what `benchmarks/serving --json` measured: see README.md here."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.pictures import COLOURS, MARKERS, check_matplotlib, new_axes, read, save
from benchmarks.serving.workloads import AT_ONCE
from kivi_vllm.cli.files import check_folder
from kivi_vllm.cli.main import main

Record = dict[str, Any]
Point = tuple[float, float]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="What serving.py --json wrote.")],
    prefix: Annotated[
        Path, typer.Option("-o", "--output", help="Beginning of the files' names.")
    ] = Path("serving"),
) -> None:
    """Draw what was measured: batch, throughput, latency, decode rate, capacity: PNG and SVG."""
    data = read(result, "serving.py", lambda data: [r["latency_ms"] for r in data["summary"]])
    check_folder("-o", prefix)
    check_matplotlib()
    for path in draw(data["header"], data["summary"], prefix):
        print(path)


def draw(header: Record, summary: Sequence[Record], prefix: Path) -> Iterator[Path]:
    """Draw all pictures for which there are figures; yields the files."""
    where = f"{header['model']}, {header['gpu'] or header['cpu']}"
    capacity = {r["kv_cache_dtype"]: r["kv_cache_tokens"] for r in summary}
    if all(capacity.values()):
        yield from _capacity(capacity, f"KV cache\n{where}", f"{prefix}-capacity")
    loads = [r for r in summary if r["workload"] in AT_ONCE]
    if loads:
        yield from _bars(loads, f"All requests at once\n{where}", f"{prefix}-load")
    rates = [r for r in summary if r["workload"].startswith("rate-")]
    if rates:
        title = f"Shared prefixes, rising request rate\n{where}"
        yield from _lines(
            rates,
            lambda r: (r["request_rate"], r["output_tokens_per_s"]),
            ("requests a second offered", "output tokens a second"),
            title,
            f"{prefix}-rate",
        )
        yield from _lines(
            rates,
            lambda r: (r["latency_ms"]["e2el"]["p50"] / 1000, r["output_tokens_per_s"]),
            ("median seconds for a whole answer", "output tokens a second"),
            title,
            f"{prefix}-pareto",
        )
    contexts = [r for r in summary if r["workload"].startswith("context-")]
    if contexts:
        yield from _lines(
            contexts,
            lambda r: (int(r["workload"].split("-")[1]), 1000 / r["latency_ms"]["tpot"]["p50"]),
            ("tokens in the prompt", "tokens a second"),
            f"Decode of one sequence\n{where}",
            f"{prefix}-context",
        )


def _lines(
    summary: Sequence[Record],
    point: Callable[[Record], Point],
    units: tuple[str, str],
    title: str,
    name: str,
) -> Iterator[Path]:
    """A line for each cache dtype, its points in the order of the load."""
    figure, axes = new_axes(title)
    for index, dtype in enumerate(dict.fromkeys(r["kv_cache_dtype"] for r in summary)):
        points = [point(r) for r in summary if r["kv_cache_dtype"] == dtype]
        axes.plot(
            *zip(*points, strict=True),
            marker=MARKERS[index % len(MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            label=dtype,
        )
    axes.set_xlabel(units[0])
    axes.set_ylabel(units[1])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    yield from save(figure, name)


def _capacity(capacity: dict[str, int], title: str, name: str) -> Iterator[Path]:
    figure, axes = new_axes(title)
    bars = axes.bar(list(capacity), list(capacity.values()), color=COLOURS[: len(capacity)])
    axes.bar_label(bars, fmt="{:,.0f}")
    axes.set_ylabel("tokens that fit")
    yield from save(figure, name)


def _bars(summary: Sequence[Record], title: str, name: str) -> Iterator[Path]:
    """Two panels: requests that ran at once, and output tokens a second, by workload."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 4.5), layout="constrained")
    figure.suptitle(title, fontsize=10)
    workloads = list(dict.fromkeys(r["workload"] for r in summary))
    dtypes = list(dict.fromkeys(r["kv_cache_dtype"] for r in summary))
    units = {"running": "requests at once", "output_tokens_per_s": "output tokens a second"}
    width = 0.8 / len(dtypes)
    for axes, (field, unit) in zip(panels, units.items(), strict=True):
        for index, dtype in enumerate(dtypes):
            mine = {r["workload"]: r[field] for r in summary if r["kv_cache_dtype"] == dtype}
            places = [workloads.index(workload) + index * width for workload in mine]
            bars = axes.bar(
                places,
                list(mine.values()),
                width,
                label=dtype,
                color=COLOURS[index % len(COLOURS)],
            )
            axes.bar_label(bars, fmt="{:.3g}", fontsize=7)
        middle = width * (len(dtypes) - 1) / 2
        axes.set_xticks([place + middle for place in range(len(workloads))], workloads)
        axes.set_title(unit, fontsize=9)
        axes.grid(True, axis="y", alpha=0.3)
    panels[0].legend(fontsize=8)
    yield from save(figure, name)


if __name__ == "__main__":
    main(app)
