"""Pictures of what `benchmarks.quality --json` measured: see README.md here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common.files import check_folder
from benchmarks.common.pictures import COLOURS, MARKERS, check_matplotlib, new_axes, read, save
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.main import main

ROUNDING = 1e-6
"""A divergence below it is that of sums in another order."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="What benchmarks.quality --json wrote.")],
    prefix: Annotated[
        Path, typer.Option("-o", "--output", help="Beginning of the files' names.")
    ] = Path("quality"),
) -> None:
    """Draw divergence against the size of the cache, and against the context: PNG and SVG."""
    data = read(result, "benchmarks.quality", _frame)
    check_folder("-o", prefix)
    check(data)
    for path in draw(data, prefix):
        print(path)


def check(data: dict[str, Any] | None = None) -> None:
    """Refuse what cannot be drawn: before measuring, or with what was measured."""
    check_matplotlib()
    if data is not None and len({record["cache"] for record in data["perplexity"]}) < 2:
        raise UserError("no two rows of the perplexity section were measured", "measure", status=1)


def draw(data: dict[str, Any], prefix: Path) -> Iterator[Path]:
    """Draw all pictures of a result; yields the files."""
    frame = _frame(data)
    for text, mine in frame.groupby("text", sort=False):
        header = data["header"]
        where = f"{header['model']['name']}, {header['dtype']}, text {Path(text).name}"
        name = f"{prefix}-{Path(text).stem}"
        yield from _by_context(mine, where, f"{name}-kl")
        yield from _by_size(mine, where, f"{name}-size")


def _frame(data: dict[str, Any]) -> pd.DataFrame:
    """The perplexity section, intervals flat (`kl.value`), with each cache's `bytes` a token."""
    frame = pd.json_normalize(data["perplexity"])
    sizes = {one["name"]: one["kv_bytes_per_token"] for one in data["caches"]}
    return frame.assign(bytes=frame["cache"].map(sizes))


def _by_context(frame: pd.DataFrame, where: str, name: str) -> Iterator[Path]:
    """KL against the context, a line a cache; those without any are left out."""
    figure, axes = new_axes(f"Divergence by context\n{where}")
    for index, (cache, mine) in enumerate(frame.groupby("cache", sort=False)):
        if mine["kl.value"].max() >= ROUNDING:
            _points(axes, index, mine.sort_values("length"), "length", "kl", cache, "-")
    lengths = sorted(frame["length"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("context in tokens (its second half)")
    axes.set_yscale("log")
    axes.set_ylabel("mean KL to the reference, nats a token")
    axes.legend(fontsize=8)
    yield from save(figure, name)


def _by_size(frame: pd.DataFrame, where: str, name: str) -> Iterator[Path]:
    """Perplexity ratio, with the KL, at the longest context against the bytes of a token."""
    longest = frame["length"].max()
    figure, axes = new_axes(f"Quality by size, context {longest // 2:,}–{longest:,}\n{where}")
    known = frame[(frame["length"] == longest) & frame["bytes"].notna()]
    for index, (cache, mine) in enumerate(known.groupby("cache", sort=False)):
        label = f"{cache} (KL {max(0.0, mine['kl.value'].iloc[0]):.2g})"
        _points(axes, index, mine, "bytes", "ratio", label, "none")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel("bytes a token of the KV cache, all layers")
    axes.set_ylabel("perplexity / the reference's")
    axes.legend(fontsize=8)
    yield from save(figure, name)


def _points(
    axes: Any, index: int, frame: pd.DataFrame, x: str, y: str, label: str, line: str
) -> None:
    """One cache's values with their intervals."""
    values, low, high = (frame[f"{y}.{part}"] for part in ("value", "low", "high"))
    axes.errorbar(
        frame[x],
        values,
        [values - low, high - values],
        label=label,
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=line,
        capsize=3,
    )


if __name__ == "__main__":
    main(app)
