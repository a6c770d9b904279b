"""Pictures of what `benchmarks/quality --json` measured: see README.md here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.pictures import COLOURS, MARKERS, check_matplotlib, new_axes, read, save
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.files import check_folder
from kivi_vllm.cli.main import main

Record = dict[str, Any]

ROUNDING = 1e-6
"""A divergence below it is that of sums in another order."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def plot(
    result: Annotated[Path, typer.Argument(help="What quality.py --json wrote.")],
    prefix: Annotated[
        Path, typer.Option("-o", "--output", help="Beginning of the files' names.")
    ] = Path("quality"),
) -> None:
    """Draw divergence against the size of the cache, and against the context: PNG and SVG."""

    def look(data: Any) -> None:
        for record in data["perplexity"]:
            _ = record["kl"]["value"], record["length"], record["text"], record["cache"]

    data = read(result, "quality.py", look)
    check_folder("-o", prefix)
    check(data)
    for path in draw(data, prefix):
        print(path)


def check(data: Record | None = None) -> None:
    """Refuse what cannot be drawn: before measuring, or with what was measured."""
    check_matplotlib()
    if data is not None and len({record["cache"] for record in data["perplexity"]}) < 2:
        raise UserError("no two rows of the perplexity section were measured", "measure", status=1)


def draw(data: Record, prefix: Path) -> Iterator[Path]:
    """Draw all pictures of a result; yields the files."""
    header = data["header"]
    title = f"{header['model']['name']}, {header['dtype']}"
    for text in dict.fromkeys(record["text"] for record in data["perplexity"]):
        mine = [r for r in data["perplexity"] if r["text"] == text]
        where = f"{title}, text {Path(text).name}"
        name = f"{prefix}-{Path(text).stem}"
        yield from _by_context(mine, where, f"{name}-kl")
        sizes = {c["name"]: c["kv_bytes_per_token"] for c in data["caches"]}
        yield from _by_size(mine, sizes, where, f"{name}-size")


def _by_context(records: list[Record], where: str, name: str) -> Iterator[Path]:
    """KL against the context, a line a cache; those without any are left out."""
    figure, axes = new_axes(f"Divergence by context\n{where}")
    for index, cache in enumerate(dict.fromkeys(r["cache"] for r in records)):
        mine = sorted((r for r in records if r["cache"] == cache), key=lambda r: r["length"])
        values = [r["kl"]["value"] for r in mine]
        if max(values) < ROUNDING:
            continue
        below = [r["kl"]["value"] - r["kl"]["low"] for r in mine]
        above = [r["kl"]["high"] - r["kl"]["value"] for r in mine]
        axes.errorbar(
            [r["length"] for r in mine],
            values,
            [below, above],
            label=cache,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        sorted({r["length"] for r in records}),
        [f"{n:,}" for n in sorted({r["length"] for r in records})],
    )
    axes.set_xlabel("context in tokens (its second half)")
    axes.set_yscale("log")
    axes.set_ylabel("mean KL to the reference, nats a token")
    axes.legend(fontsize=8)
    yield from save(figure, name)


def _by_size(
    records: list[Record], sizes: dict[str, float | None], where: str, name: str
) -> Iterator[Path]:
    """KL and perplexity ratio at the longest context against the bytes of a token."""
    longest = max(r["length"] for r in records)
    mine = [r for r in records if r["length"] == longest and sizes.get(r["cache"])]
    figure, axes = new_axes(f"Quality by size, context {longest // 2:,}–{longest:,}\n{where}")
    for index, record in enumerate(mine):
        ratio = record["ratio"]
        axes.errorbar(
            [sizes[record["cache"]]],
            [ratio["value"]],
            [[ratio["value"] - ratio["low"]], [ratio["high"] - ratio["value"]]],
            label=f"{record['cache']} (KL {max(0.0, record['kl']['value']):.2g})",
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle="none",
            capsize=3,
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.set_xlabel("bytes a token of the KV cache, all layers")
    axes.set_ylabel("perplexity / the reference's")
    axes.legend(fontsize=8)
    yield from save(figure, name)


if __name__ == "__main__":
    main(app)
