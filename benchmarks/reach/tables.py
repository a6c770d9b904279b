"""The tables of `benchmarks/results/reach.json`."""

from __future__ import annotations

import pandas as pd

from benchmarks.published import read, text

OWN, LAST = "auto", "kivi2"
README = {
    "Qwen3-32B": " (layers alike)",
    "Gemma-3-27B": " (windows)",
    "Qwen3-Next-80B-A3B": " (states)",
}
"""The models of the README's sentence, and what is special about them."""


def reach() -> pd.DataFrame:
    """How many sequences of three lengths fit, or why a model is not served."""
    rows = read("reach", "rows")
    held = rows.pivot(index=["model", "cache_dtype"], columns="max_model_len", values="sequences")
    lines = []
    for model, of in rows.groupby("model", sort=False):
        line = {"model": model, "layers": _layers(of.iloc[0].filter(like="parts."))}
        for dtype, one in of.groupby("cache_dtype", sort=False):
            own, mine = held.loc[model, OWN], held.loc[model, dtype]
            cells = text(mine, "{:.1f}") if dtype == OWN else text(mine / own, "{:.2f}")
            line[_title(dtype)] = " / ".join(cells) if one["refused"].isna().any() else "–"
        line["hits at"] = _hits(of)
        if isinstance(why := of["refused"].iloc[-1], str):
            where = "" if of["refused"].isna().any() else "not built here: "
            line[_title(LAST)] = where + _short(why)
        lines.append(line)
    return pd.DataFrame(lines)


def hit_strides() -> pd.DataFrame:
    """What a bound on the hit stride costs, with the last dtype, in one model."""
    rows = read("reach-hit-stride", "rows")
    held = rows.pivot(
        index=["cache_dtype", "hit_stride"], columns="max_model_len", values="sequences"
    )
    own, lines = held.loc[(OWN, 0)], []
    for stride, of in rows[rows["cache_dtype"] == LAST].groupby("hit_stride", sort=False):
        cells = text(held.loc[(LAST, stride)] / own, "{:.2f}")
        one = of.iloc[0]
        lines.append(
            {
                "`hit_stride`": f"{stride:,}",
                "hits at": f"{one['hits_at']:,.0f}",
                "block tables": f"{one['block_tables']:.0f}",
                "sequences, of bf16's": " / ".join(cells),
            }
        )
    return pd.DataFrame(lines)


def readme() -> str:
    """The last dtype against bf16 at 32,768 tokens, for a few kinds of models."""
    rows = read("reach", "rows", max_model_len=32768)
    held = rows.pivot(index="model", columns="cache_dtype", values="sequences")
    ratios = held[LAST] / held[OWN]
    return ", ".join(f"{ratios[name]:.2f} for {name}{what}" for name, what in README.items())


def _hits(of: pd.DataFrame) -> str:
    """What prefix hits are multiples of, with bf16's own cache and with the last dtype."""
    strides = [of[of["cache_dtype"] == dtype]["hits_at"].iloc[0] for dtype in (OWN, LAST)]
    return " / ".join(text(pd.Series(strides), "{:,.0f}"))


def _title(dtype: str) -> str:
    return "bf16, sequences" if dtype == OWN else f"`{dtype}`"


def _layers(parts: pd.Series) -> str:
    """Kinds of a model's layers, from the groups of its own cache."""
    parts = parts.dropna()
    names = parts.index.str.removeprefix("parts.").str.removeprefix("bfloat16, ")
    counts = dict(zip(names, parts.astype(int), strict=True))
    kinds = sorted(counts, key=lambda kind: kind != "all tokens")
    if kinds == ["all tokens"]:
        return str(counts["all tokens"])
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds) or "–"


def _short(why: str) -> str:
    """A refusal without what was asked for, the remedy, and further reasons."""
    return why.removeprefix("--kv-cache-dtype ").partition(": ")[2].partition(";")[0] or why
