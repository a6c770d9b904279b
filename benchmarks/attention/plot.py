"""Pictures of what `benchmarks/attention --device cuda --json` measured: see README.md here."""

from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common.command import Prefix, start
from benchmarks.common.files import check_folder
from benchmarks.common.pictures import check_matplotlib, read, save
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
    """Draw decode times and speed-ups against the context, per shape and batch: PNG and SVG."""
    data = read(result, "benchmarks.attention", lambda data: data["decode"])
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
        panel.set_xscale("log", base=2)
        panel.set_xticks(mine.index, [f"{n / 1024:.3g}k" for n in mine.index])
        panel.set(xlabel="cached tokens", title=f"batch {batch}")
        panel.grid(alpha=0.3)
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
