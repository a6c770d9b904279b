"""Pictures of what `benchmarks.quality --json` measured: see README.md here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common.command import Prefix, start
from benchmarks.common.files import check_folder
from benchmarks.common.pictures import COLOURS, MARKERS, check_matplotlib, new_axes, read, save
from kivi_vllm.cli.errors import UserError

ROUNDING = 1e-6
"""A divergence below it is that of sums in another order."""


def plot(
    result: Annotated[Path, typer.Argument(help="What benchmarks.quality --json wrote.")],
    prefix: Prefix = Path("quality"),
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
    """Draw all pictures of a result: two for each text; yields the files."""
    header = data["header"]
    for text, frame in _frame(data).groupby("text", sort=False):
        where = f"{header['model']['name']}, {header['dtype']}, text {Path(text).name}"
        longest = frame["length"].max()

        figure, axes = new_axes(f"Divergence by context\n{where}")
        ordered = frame.sort_values("length", kind="stable")
        _points(axes, ordered, "length", "kl", lambda cache, kl: cache if kl >= ROUNDING else None)
        lengths = sorted(frame["length"].unique())
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("context in tokens (its second half)")
        axes.set(yscale="log", ylabel="mean KL to the reference, nats a token")
        axes.legend(fontsize=8)
        yield from save(figure, f"{prefix}-{Path(text).stem}-kl")

        figure, axes = new_axes(f"Quality by size, context {longest // 2:,}–{longest:,}\n{where}")
        known = frame[(frame["length"] == longest) & frame["bytes"].notna()]
        _points(axes, known, "bytes", "ratio", "{} (KL {:.2g})".format, linestyle="none")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_xlabel("bytes a token of the KV cache, all layers")
        axes.set_ylabel("perplexity / the reference's")
        axes.legend(fontsize=8)
        yield from save(figure, f"{prefix}-{Path(text).stem}-size")


def _frame(data: dict[str, Any]) -> pd.DataFrame:
    """The perplexity section, intervals flat (`kl.value`), with each cache's `bytes` a token."""
    frame = pd.json_normalize(data["perplexity"])
    sizes = {one["name"]: one["kv_bytes_per_token"] for one in data["caches"]}
    return frame.assign(bytes=frame["cache"].map(sizes))


def _points(
    axes: Any, frame: pd.DataFrame, x: str, y: str, label: Callable[..., str | None], **style: Any
) -> None:
    """Each cache's values with their intervals, if its name and largest KL make a label."""
    for index, (cache, mine) in enumerate(frame.groupby("cache", sort=False)):
        if name := label(cache, max(0.0, mine["kl.value"].max())):
            values, low, high = (mine[f"{y}.{part}"] for part in ("value", "low", "high"))
            style |= dict(color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)])
            errors = [values - low, high - values]
            axes.errorbar(mine[x], values, errors, label=name, capsize=3, **style)


if __name__ == "__main__":
    start(plot)
