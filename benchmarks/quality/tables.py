"""The published tables of quality."""

from __future__ import annotations

from typing import Any

import pandas as pd

from benchmarks.published import fits, read, text
from benchmarks.quality.decoding import DECODED
from kivi_vllm.config import QUANTIZED_DTYPES

WINDOWS = "quality-windows"


def bytes_of(file: str) -> pd.Series:
    """Bytes of a token by row, `auto` in bf16 though the model of these runs was in float32."""
    sizes = read(file, "caches").set_index("name")["kv_bytes_per_token"]
    return sizes.where(sizes.index != "auto", sizes / 2)


def divergence(file: str, **where: Any) -> pd.DataFrame:
    """The figures of the perplexity section by row, with their intervals."""
    return read(file, "perplexity", **where).set_index("cache")


def lost(rows: pd.DataFrame) -> dict[str, pd.Series]:
    """What rows lose, as three columns."""
    return {
        "ratio": text(rows["ratio.value"], "{:.3f}"),
        "KL": text(rows["kl.value"], "{:.4f}"),
        "top-1": text(rows["top1.value"], "{:.1%}"),
    }


def interval(rows: pd.DataFrame) -> pd.Series:
    """The ends of KL's 95 % interval."""
    return text(rows["kl.low"], "{:.4f}") + "–" + text(rows["kl.high"], "{:.4f}")


def rows_named(columns: dict[str, pd.Series], note: str = "") -> pd.DataFrame:
    """A table with the rows' names as in `kivi2`, paper."""
    table = pd.DataFrame(columns).fillna("–")
    names = table.index.str.replace(r"^([^:]+)", r"`\1`", regex=True)
    names = names.str.replace(":recipe=paper", ", paper").str.replace(
        r":residual_length=(\d+)", r", R = \1", regex=True
    )
    table.insert(0, "cache", names + note)
    return table


def budgets() -> pd.DataFrame:
    """What decoded tokens lose by a token budget, against the same cache without one."""
    by_keys = ("quality-budget-keys-4k", "quality-budget-keys")
    files = ("quality-budget", "quality-budget-8k", *by_keys)
    rows = pd.concat([read(name, "decoding") for name in files])
    rows = rows[rows["cache"].str.contains("token_budget")]
    rows = rows.drop_duplicates(["text", "length", "cache"], keep="last")
    rows["budget"] = rows["cache"].str.extract(r"token_budget=(\d+)", expand=False).astype(int)
    rows["by"] = _chosen_by(rows["cache"])
    order = ["length", "text", "by", "budget"]
    rows = rows.sort_values(order, ascending=[True, False, False, True])
    columns = {
        "text": rows["text"].replace({"pydoc": "manual", "austen.txt": "novels"}),
        "windows": text(rows["tokens"] // (DECODED - 1), "{}"),
        "context": text(rows["length"], "{:,}"),
        "pages by": rows["by"],
        "budget": text(rows["budget"], "{:,}"),
        **lost(rows),
        "KL, 95 %": interval(rows),
    }
    return pd.DataFrame(columns)


def _chosen_by(caches: pd.Series | pd.Index) -> Any:
    """What pages are chosen by, of caches with a token budget."""
    return caches.str.extract("estimate=([a-z]+)", expand=False).fillna("keys")


def passkeys() -> pd.DataFrame:
    """Hidden numbers that are found, by token budget."""
    files = ("quality-passkey-budget", "quality-passkey-keys")
    each = [read(name, "passkey", kind="passkey", length=8192) for name in files]
    rows = pd.concat(each).drop_duplicates(["cache", "depth", "key"])  # without a budget: once

    def found(*by: str) -> pd.Series:
        counts = rows.groupby(list(by), sort=False)["correct"].agg(["sum", "count"])
        return counts["sum"].map(str) + counts["count"].map(" of {}".format)

    table = found("cache", "depth").unstack()
    table.columns = [f"at {100 * depth:.0f} %" for depth in table.columns]
    budgets = table.index.str.extract(r"token_budget=(\d+)", expand=False)
    table.insert(0, "budget", [f"{int(x):,}" if pd.notna(x) else "none" for x in budgets])
    table.insert(1, "pages by", _chosen_by(table.index).where(budgets.notna(), "–"))
    table["all"] = found("cache")
    return table


def dtypes() -> pd.DataFrame:
    """README: bytes, capacity and quality by dtype."""
    names = ["auto", "fp8", *reversed(QUANTIZED_DTYPES)]
    sizes = bytes_of(WINDOWS)
    short, long = (text(fits(n) / fits(n)["auto"], "{:.2f}") for n in (4096, 8192))
    rows = divergence(WINDOWS, text="pydoc")
    loss = text(rows["ratio.value"], "{:.3f}") + text(rows["kl.value"], " ({:.3f})")
    paper = loss.reindex([f"{name}:recipe=paper" for name in names], fill_value="–")
    columns = {
        "`--kv-cache-dtype`": pd.Series({name: f"`{name}`" for name in names}),
        "bytes a token": text(sizes, "{:,.0f}") + text(sizes / sizes["auto"], " ({:.0%})"),
        "tokens that fit, of bf16's: 4,096 / 8,192 long": short + " / " + long,
        "perplexity (KL), default": loss,
        "`recipe: paper`": paper.set_axis(names),
    }
    return pd.DataFrame(columns).loc[names]


def windows(file: str, note: str = "") -> pd.DataFrame:
    """Four windows of the manual and four of the second text, by row of a file."""
    rows, other = (divergence(file, text=name) for name in ("pydoc", "wiki.txt"))
    sizes = bytes_of(file)
    columns = {"bytes a token": text(sizes, "{:,.0f}")} | lost(rows)
    columns["KL, 95 %"] = interval(rows)
    columns |= {f"wiki: {name}": cells for name, cells in lost(other).items() if name != "top-1"}
    return rows_named({name: cells.loc[rows.index] for name, cells in columns.items()}, note)


def quality() -> pd.DataFrame:
    """What every dtype and recipe loses, the formats of before below them."""
    older = windows("quality-old-formats", ", before").loc[["kivi4", "kivi_k4v2", "kivi2"]]
    return pd.concat([windows(WINDOWS), older])


def simulated() -> pd.DataFrame:
    """Ratio and KL through the engine and simulated: of the first window, and of all four."""
    names = list(divergence(WINDOWS, text="pydoc").index.drop(["auto", "fp8"]))
    other = [f"simulated:{name}" for name in names]

    def cells(file: str, rows: list[str]) -> pd.Series:
        found = divergence(file, text="pydoc")
        both = text(found["ratio.value"], "{:.3f}") + text(found["kl.value"], " ({:.4f})")
        return both.reindex(rows).set_axis(names)

    return rows_named(
        {
            "first window: ratio (KL)": cells("quality-pydoc", names),
            "simulated": cells("quality-pydoc", other),
            "four windows": cells(WINDOWS, names),
            "simulated ": cells("quality-simulated", other),
        }
    )


def long_quality() -> pd.DataFrame:
    """The first 4,096 tokens, and passkeys."""
    rows = divergence("quality-long", length=4096)
    keys = read("quality-passkey", "passkey").groupby("cache")["correct"]
    found, asked = keys.sum().astype(int), keys.size()
    columns = lost(rows) | {"KL, 95 %": interval(rows)}
    columns["passkeys at 1,024"] = found.map(str) + asked.map(" of {}".format)
    return rows_named(columns).loc[list(divergence(WINDOWS, text="pydoc").index)]


def gemma() -> pd.DataFrame:
    """Gemma-3-270M on two texts; `kivi2` of before below."""

    def of(file: str, note: str = "") -> pd.DataFrame:
        rows, other = (divergence(file, text=name) for name in ("pydoc", "wiki.txt"))
        columns = lost(rows) | {"KL, 95 %": interval(rows)}
        for name, cells in lost(other).items():
            if name != "top-1":
                columns[f"wiki: {name}"] = cells
        return rows_named(columns, note)

    rows = of("quality-gemma3-270m")
    names = [name for name in divergence(WINDOWS, text="pydoc").index if name in rows.index]
    older = of("quality-old-gemma3-270m", ", before").loc[["kivi2"]]
    return pd.concat([rows.loc[names], older])


def residual() -> pd.DataFrame:
    """What R gives back."""
    plain, rows = (divergence(f"quality-{name}", text="pydoc") for name in ("windows", "residual"))
    rows = rows.drop(index="auto")
    names = dict.fromkeys(name.partition(":")[0] for name in rows.index)
    both = [pd.concat([plain.loc[[name]], rows.filter(like=f"{name}:", axis=0)]) for name in names]
    table = pd.concat(both)
    return rows_named(lost(table) | {"KL, 95 %": interval(table)})
