"""Pictures of what `benchmarks.quality --json` measured: see README.md here."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common.command import Prefix, start
from benchmarks.common.files import check_folder
from benchmarks.common.pictures import COLOURS, MARKERS, check_matplotlib, new_axes, read, save
from benchmarks.quality.engine import ITEMSIZE
from kivi_vllm.cli.errors import UserError
from kivi_vllm.config import QUANTIZED_DTYPES

KL = "mean KL to the reference, nats a token"
OWN, OLDER = "#0b4f8a", "#999999"

ROUNDING = 1e-6
"""A divergence below it is that of sums in another order."""


def plot(
    result: Annotated[Path, typer.Argument(help="What benchmarks.quality --json wrote.")],
    prefix: Prefix = Path("quality"),
    before: Annotated[
        Path | None, typer.Option(help="A result of older formats, to stand beside.")
    ] = None,
) -> None:
    """Draw divergence against the size of the cache, the context and the budget: PNG and SVG."""
    data = read(result, "benchmarks.quality", lambda data: data.get("decoding") or _frame(data))
    older = None if before is None else _frame(read(before, "benchmarks.quality", _frame))
    check_folder("-o", prefix)
    check(data)
    for path in draw(data, prefix, older):
        print(path)


def check(data: dict[str, Any] | None = None) -> None:
    """Refuse what cannot be drawn: before measuring, or with what was measured."""
    check_matplotlib()
    if data is None or _budgets(data):
        return
    if len({record["cache"] for record in data["perplexity"]}) < 2:
        raise UserError("no two rows of the perplexity section were measured", "measure", status=1)


def draw(data: dict[str, Any], prefix: Path, before: pd.DataFrame | None = None) -> Iterator[Path]:
    """Draw all pictures of a result: two for each text, and one of budgets; yields the files.

    Args:
        data: a result.
        prefix: of the files' names.
        before: see `_frame`, of older formats; its KIVI rows stand in the pictures of sizes.

    """
    header = data["header"]
    if _budgets(data):
        yield from _draw_budgets(data, prefix)
    if not data["perplexity"]:
        return
    for text, frame in _frame(data).groupby("text", sort=False):
        where = f"{header['model']['name']}, {header['dtype']}, text {Path(text).name}"
        longest = frame["length"].max()

        figure, axes = new_axes(f"Divergence by context\n{where}")
        ordered = frame.sort_values("length", kind="stable")
        _points(axes, ordered, "length", lambda cache, kl: cache if kl >= ROUNDING else None)
        lengths = sorted(frame["length"].unique())
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.set_xlabel("context in tokens (its second half)")
        axes.set(yscale="log", ylabel=KL)
        axes.legend(fontsize=8)
        yield from save(figure, f"{prefix}-{Path(text).stem}-kl")

        figure, axes = new_axes(
            f"Divergence by size, context {longest // 2:,}–{longest:,}\n{where}"
        )
        _sizes(axes, _of(frame, text, longest), _of(before, text, longest))
        size = frame["bytes"].iloc[0]  # the reference's
        if pd.notna(size):
            axes.axvline(
                size, color=COLOURS[0], ls=":", label=f"{frame['cache'].iloc[0]} (16 bits): KL 0"
            )
        axes.set(xscale="log", yscale="log", ylabel=KL)
        axes.xaxis.set_major_formatter(_thousands)
        axes.xaxis.set_minor_formatter(_thousands)
        axes.tick_params(axis="x", which="both", labelsize=7, rotation=30)
        axes.set_xlabel("bytes a token of the KV cache, all layers")
        axes.legend(fontsize=8)
        yield from save(figure, f"{prefix}-{Path(text).stem}-size")


def _budgets(data: dict[str, Any]) -> dict[str, int]:
    """Caches with a `token_budget` whose decoding was measured."""
    budgets = {one["name"]: one.get("options", {}).get("token_budget") for one in data["caches"]}
    measured = {record["cache"] for record in data.get("decoding", ())}
    return {name: budget for name, budget in budgets.items() if budget and name in measured}


def _draw_budgets(data: dict[str, Any], prefix: Path) -> Iterator[Path]:
    """Divergence from the same cache without a budget, a line for each text and length."""
    frame = pd.json_normalize(data["decoding"])
    frame["budget"] = frame["cache"].map(_budgets(data))
    frame = frame[frame["budget"].notna() & (frame["kl.value"] >= ROUNDING)].copy()
    figure, axes = new_axes(f"Divergence by token_budget\n{data['header']['model']['name']}")
    frame["cache"] = [
        f"{Path(text).stem}, {length:,} tokens"
        for text, length in zip(frame["text"], frame["length"], strict=True)
    ]
    _points(axes, frame.sort_values("budget"), "budget", lambda line, _: line)
    axes.set(xscale="log", yscale="log", ylabel=KL, xlabel="token_budget")
    axes.set_xticks(budgets := sorted(frame["budget"].unique()), [f"{n:,.0f}" for n in budgets])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    yield from save(figure, f"{prefix}-budgets")


def _thousands(x: float, _: object) -> str:
    return f"{x:,.0f}"


def _of(frame: pd.DataFrame | None, text: str, length: int) -> pd.DataFrame:
    """The rows of a text and length that have a size and diverge."""
    if frame is None:
        return pd.DataFrame()
    mine = (frame["text"] == text) & (frame["length"] == length) & frame["bytes"].notna()
    return frame[mine & (frame["kl.value"] >= ROUNDING)]


def _sizes(axes: Any, frame: pd.DataFrame, before: pd.DataFrame) -> None:
    """Divergence by bytes: the KIVI dtypes as one line, all others as points."""
    own = frame[frame["cache"].isin(QUANTIZED_DTYPES)].sort_values("bytes")
    if len(own):
        _named(axes, own, "KIVI, recipe best", color=OWN, marker="o")
    _points(axes, frame.drop(own.index), "bytes", lambda cache, _: cache, linestyle="none")
    if len(before):
        older = before[before["cache"].str.fullmatch(r"kivi\w+")].sort_values("bytes")
        style = dict(color=OLDER, marker="o", markerfacecolor="white")
        _named(axes, older, "before, recipe best", **style, linestyle="--")


def _named(axes: Any, frame: pd.DataFrame, label: str, **style: Any) -> None:
    """A line whose points have their cache's name."""
    axes.errorbar(frame["bytes"], frame["kl.value"], _ends(frame), label=label, capsize=3, **style)
    for _, row in frame.iterrows():
        axes.annotate(
            row["cache"], (row["bytes"], row["kl.value"]), xytext=(5, 5),
            textcoords="offset points", fontsize=8, color=style["color"],
        )  # fmt: skip


def _ends(frame: pd.DataFrame) -> list[pd.Series]:
    """How far the intervals of KL reach below and above."""
    value, low, high = (frame[f"kl.{part}"] for part in ("value", "low", "high"))
    return [value - low, high - value]


def _frame(data: dict[str, Any]) -> pd.DataFrame:
    """The perplexity section, intervals flat (`kl.value`), with each cache's `bytes` a token.

    Those of `auto` are what it takes in 16 bits, in which the model would be served.
    """
    frame = pd.json_normalize(data["perplexity"])
    sizes = {one["name"]: one["kv_bytes_per_token"] for one in data["caches"]}
    header = data["header"]
    dtype = header["model"]["dtype"] if header["dtype"] == "auto" else header["dtype"]
    if sizes.get("auto"):
        sizes["auto"] *= 2 / ITEMSIZE[dtype]
    return frame.assign(bytes=frame["cache"].map(sizes))


def _points(
    axes: Any, frame: pd.DataFrame, x: str, label: Callable[..., str | None], **style: Any
) -> None:
    """Each cache's KL with its intervals, if its name and largest KL make a label."""
    for index, (cache, mine) in enumerate(frame.groupby("cache", sort=False)):
        if name := label(cache, max(0.0, mine["kl.value"].max())):
            style |= dict(color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)])
            axes.errorbar(mine[x], mine["kl.value"], _ends(mine), label=name, capsize=3, **style)


if __name__ == "__main__":
    start(plot)
