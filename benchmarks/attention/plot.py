"""Pictures of what `benchmarks/attention --device cuda --json` measured: see README.md here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.pictures import check_matplotlib, read, save
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.files import check_folder
from kivi_vllm.cli.main import main

Row = dict[str, Any]
Value = Callable[[Row], float | None]

LABELS = {
    "bf16_ms": "bf16, the fastest there",
    "fp8_ms": "fp8, the fastest there",
    "turboquant_ms": "TurboQuant, 4 bits",
    "kivi4_ms": "kivi4",
    "kivi_k4v2_ms": "kivi_k4v2",
    "kivi2_ms": "kivi2",
}
"""Columns of decode rows, and their names in the legend."""

COLOURS = dict(
    zip(LABELS, ("#444444", "#999999", "#c58a2b", "#86b6dd", "#4f8fc4", "#0b4f8a"), strict=True)
)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="What attention.py --json wrote.")],
    prefix: Annotated[
        Path, typer.Option("-o", "--output", help="Beginning of the files' names.")
    ] = Path("attention"),
) -> None:
    """Draw decode times and speed-ups against the context, per shape and batch: PNG and SVG."""
    data = read(result, "attention.py", lambda data: data["decode"])
    rows = [row for row in data["decode"] if "skipped" not in row]
    if not rows:
        raise UserError(f"{result} has no decode rows that were measured", "measure some", status=1)
    check_folder("-o", prefix)
    check_matplotlib()
    header = data["header"]
    machine = str(header.get("gpu" if header.get("device") == "cuda" else "cpu", "?"))
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        for name in _draw(mine, prefix, shape, machine):
            print(name)


def _draw(rows: list[Row], prefix: Path, shape: str, machine: str) -> Iterator[Path]:
    """The two pictures of one shape; yields the names of the files."""
    times = {name: _column(name) for name in LABELS}
    ups = {name: _speedup(name) for name in LABELS if name != "bf16_ms"}
    yield from _picture(
        rows, times, f"{prefix}-{shape}-time", "ms for one layer", f"Decode, {shape}, {machine}"
    )
    yield from _picture(
        rows,
        ups,
        f"{prefix}-{shape}-speedup",
        "times as fast as bf16",
        f"Decode against the fastest bf16, {shape}, {machine}",
        logarithmic=False,
    )


def _column(name: str) -> Value:
    return lambda row: row.get(name)


def _speedup(name: str) -> Value:
    def value(row: Row) -> float | None:
        bf16, mine = row.get("bf16_ms"), row.get(name)
        return bf16 / mine if bf16 and mine else None

    return value


def _picture(
    rows: list[Row],
    lines: dict[str, Value],
    path: str,
    unit: str,
    title: str,
    logarithmic: bool = True,
) -> Iterator[Path]:
    """One picture, a panel per batch; yields the names of the files."""
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    batches = sorted({row["batch"] for row in rows})
    figure, panels = pyplot.subplots(
        1,
        len(batches),
        figsize=(1.5 + 3.2 * len(batches), 3.8),
        squeeze=False,
        sharey=not logarithmic,
    )
    for panel, batch in zip(panels[0], batches, strict=True):
        mine = sorted((row for row in rows if row["batch"] == batch), key=lambda r: r["context"])
        for name, value in lines.items():
            points = [(row["context"], y) for row in mine if (y := value(row)) is not None]
            if points:
                label = LABELS[name]
                panel.plot(*zip(*points, strict=True), "o-", ms=4, color=COLOURS[name], label=label)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(_tokens))
        panel.set_xlabel("cached tokens")
        panel.set_title(f"batch {batch}", fontsize=10)
        panel.grid(alpha=0.3, which="major")
        if logarithmic:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            panel.yaxis.set_minor_formatter(NullFormatter())
        else:
            panel.axhline(1, color=COLOURS["bf16_ms"], lw=1)
            panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel(unit)
    entries: dict[str, Any] = {}
    for panel in panels[0]:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.suptitle(title, fontsize=11)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.legend(
        entries.values(), entries.keys(), loc="lower center", ncols=len(entries), fontsize=8
    )
    yield from save(figure, path)


def _tokens(x: float, _: object) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"


if __name__ == "__main__":
    main(app)
