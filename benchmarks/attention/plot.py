"""Pictures of what `benchmarks/attention --device cuda --json` measured: see README.md here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common.command import Prefix, start
from benchmarks.common.files import check_folder
from benchmarks.common.pictures import COLOURS, MARKERS, check_matplotlib, read, save
from kivi_vllm.cli.errors import UserError

LINES = {
    "bf16_ms": ("bf16, the fastest there", "#444444"),
    "fp8_ms": ("fp8, the fastest there", "#999999"),
    "turboquant_ms": ("TurboQuant, 4 bits", "#c58a2b"),
    "kivi4_ms": ("kivi4", "#b9d5ec"),
    "kivi_k4v3_ms": ("kivi_k4v3", "#86b6dd"),
    "kivi_k4v2_ms": ("kivi_k4v2", "#7a5ca8"),
    "kivi3_ms": ("kivi3", "#4f8fc4"),
    "kivi_k3v2_ms": ("kivi_k3v2", "#0b4f8a"),
    "kivi2_ms": ("kivi2", "#072f52"),
}
"""Fields of decode rows, of older files too: their names in the legend, and colours."""


def plot(
    result: Annotated[Path, typer.Argument(help="What benchmarks.attention --json wrote.")],
    prefix: Prefix = Path("attention"),
) -> None:
    """Draw decode times and speed-ups against the context, per shape and batch: PNG and SVG.

    Of what `--token-budget` measured: how many times as fast as bf16, by budget.
    """
    data = read(
        result, "benchmarks.attention", lambda data: data.get("selection") or data["decode"]
    )
    if data.get("selection"):
        check_folder("-o", prefix)
        check_matplotlib()
        for file in draw_selection(data, prefix):
            print(file)
        return
    rows = pd.DataFrame([row for row in data["decode"] if "skipped" not in row])
    if rows.empty:
        raise UserError(f"{result} has no decode rows that were measured", "measure some", status=1)
    check_folder("-o", prefix)
    check_matplotlib()
    header = data["header"]
    machine = str(header.get("gpu" if header.get("device") == "cuda" else "cpu", "?"))
    times = rows.reindex(columns=list(LINES)).apply(pd.to_numeric)
    ups = times.rdiv(times["bf16_ms"], axis=0).drop(columns="bf16_ms")
    for shape, mine in rows.groupby("shape", sort=False):
        where = f"{shape}, {machine}"
        keys = mine[["batch", "context"]]
        for values, name, unit, title in (
            (times, "time", "ms for one layer", "Decode"),
            (ups, "speedup", "times as fast as bf16", "Decode against the fastest bf16"),
        ):
            lines = keys.join(values)
            figure = _picture(lines, f"{title}, {where}", unit, logarithmic=name == "time")
            for file in save(figure, f"{prefix}-{shape}-{name}"):
                print(file)


def draw_selection(data: dict[str, Any], prefix: Path) -> Iterator[Path]:
    """Draw what budgets bring against the context, a panel per cache; yields the files."""
    from matplotlib import pyplot

    rows = [row for row in data["selection"] if "skipped" not in row]
    if not rows:
        raise UserError("no selection was measured", "measure some", status=1)
    where = f"{data['header'].get('cpu', '?')}, {data['header'].get('isa', '?')}"
    for (shape, batch, threads), mine in pd.DataFrame(rows).groupby(["shape", "batch", "threads"]):
        names = list(mine["caches"].iloc[0])
        figure, panels = pyplot.subplots(
            1, len(names), figsize=(1 + 4 * len(names), 3.8), squeeze=False, sharey=True,
            layout="constrained",
        )  # fmt: skip
        for panel, name in zip(panels[0], names, strict=True):
            times = pd.DataFrame([row[name] for row in mine["caches"]], index=mine["context"])
            ups = times.filter(regex=r"^(dense|selected_\d+)_ms$").rdiv(times["bf16_ms"], axis=0)
            for index, column in enumerate(ups):
                label = column.removesuffix("_ms").replace("selected_", "token_budget ")
                colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
                panel.plot(ups[column], marker=marker, color=colour, label=label)
            _by_context(panel, ups.index, name)
            panel.set_ylim(bottom=0)
        panels[0][0].set_ylabel("times as fast as vLLM's bf16")
        panels[0][0].legend(fontsize=8)
        figure.suptitle(
            f"Attention of a generated token, {shape}, batch {batch}, {where}", fontsize=11
        )
        yield from save(figure, f"{prefix}-{shape}-{batch}-{threads}-selection")


def _by_context(panel: Any, contexts: pd.Index, title: str) -> None:
    """What panels over the context have in common."""
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [f"{n / 1024:.3g}k" for n in contexts])
    panel.set(xlabel="cached tokens", title=title)
    panel.grid(alpha=0.3)


def _picture(lines: pd.DataFrame, title: str, unit: str, logarithmic: bool) -> Any:
    """One picture, a panel per batch."""
    from matplotlib import pyplot

    batches, entries = lines.groupby("batch"), {}
    size = (1.5 + 3.2 * len(batches), 3.8)
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=size, squeeze=False, sharey=not logarithmic, layout="constrained"
    )
    for panel, (batch, mine) in zip(panels[0], batches, strict=True):
        mine = mine.sort_values("context").set_index("context").drop(columns="batch")
        for name in mine.columns[mine.notna().any()]:
            label, colour = LINES[name]
            (entries[label],) = panel.plot(mine[name].dropna(), "o-", ms=4, color=colour)
        _by_context(panel, mine.index, f"batch {batch}")
        if logarithmic:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
        else:
            panel.axhline(1, color=LINES["bf16_ms"][1], lw=1)
    panels[0][0].set_ylabel(unit)
    if not logarithmic:  # once all are drawn: it is the limit of all
        panels[0][0].set_ylim(bottom=0)
    figure.suptitle(title, fontsize=11)
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=6, fontsize=8)
    return figure


if __name__ == "__main__":
    start(plot)
