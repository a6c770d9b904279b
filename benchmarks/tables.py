"""Every table of figures in `DOCUMENTS`, from the JSON files.

    python -m benchmarks.tables            prints them all
    python -m benchmarks.tables --write    rewrites them where they stand

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and a figure of a sentence between
`<!-- figure: NAME -->` and `<!-- end -->`. A test compares them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.published import digits, fits, gains, markdown, read, span, text
from benchmarks.quality import tables as quality
from benchmarks.reach import tables as reach
from kivi_vllm.config import RECOMMENDED_DTYPE

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = tuple(
    ROOT / name
    for name in (
        "README.md",
        "docs/evidence.md",
        "benchmarks/results/README.md",
        "docs/quality.md",
        "docs/selection.md",
        "docs/support.md",
    )
)
MARKED = re.compile(r"(<!-- (?:table|figure): ([\w-]+) -->\n?).*?(<!-- end -->)", re.S)
WAITING, MOST = "running, median while others wait", "most running"
SHAPES = {
    "smollm2": "9/3, head size 64 (SmolLM2-135M)",
    "llama3-8b": "32/8, head size 128 (Llama-3-8B)",
    "llama2-7b": "32/32, head size 128 (Llama-2-7B)",
}
SETS = {"avx512": "AVX-512", "avx2": "AVX2"}
AVX512 = ("attention-cpu-avx512-1-thread", "attention-cpu-avx512-2-threads")
AVX2 = ("attention-cpu-avx2-1-thread", "attention-cpu-avx2-2-threads")


def by_shape(columns: dict[str, pd.Series]) -> pd.DataFrame:
    """Columns by shape, in the order of `SHAPES`."""
    return pd.DataFrame(columns).loc[list(SHAPES)].reset_index(names="shape")


def named(dtypes: pd.Series, file: str = "") -> pd.Series:
    """`auto` by what it holds."""
    return dtypes.replace("auto", "float32" if "float32" in file else "bf16")


def capacity() -> pd.DataFrame:
    """README: what fits into 256 MiB."""
    tokens = gains(fits(4096)[["auto", RECOMMENDED_DTYPE]], "{:,}")
    title = "256 MiB of KV cache, `--max-model-len 4096`"
    return pd.DataFrame({title: named(pd.Series(tokens.index)), "tokens": tokens.to_list()})


def ranges(file: str, column: str, form: str) -> pd.Series:
    """Ranges at decode by shape, whether from 4,096 tokens on, and whether of a batch."""
    rows = read(file, "decode")
    groups = rows.groupby(["shape", rows["context"] >= 4096, rows["batch"] > 1])
    return groups[column].agg(lambda values: span(values, form))


def speed() -> pd.DataFrame:
    """README: decode attention from 4,096 tokens on."""
    columns = {
        "against bf16": (AVX512[0], "ratio_bf16", True),
        "against fp8": (AVX512[0], "ratio_fp8", True),
        "one sequence, bf16": (AVX512[0], "ratio_bf16", False),
        "two threads, bf16": (AVX512[1], "ratio_bf16", True),
        "AVX2, bf16": (AVX2[0], "ratio_bf16", True),
    }
    cells = {
        title: ranges(file, column, "{:.1f}×")[:, True, batches]
        for title, (file, column, batches) in columns.items()
    }
    table = by_shape(cells)
    return table.replace(SHAPES).rename(columns={"shape": "heads"})[::-1]


def decode(files: Sequence[str], fp8: bool) -> pd.DataFrame:
    """Ranges over the cases of one file a number of threads."""
    columns = {}
    for file, threads, end in zip(files, ("1 thread", "2 threads"), ("", " "), strict=True):
        columns[f"{threads}: vs bf16"] = ranges(file, "ratio_bf16", "{:.2f}")
        if fp8:
            columns[f"vs fp8{end}"] = ranges(file, "ratio_fp8", "{:.2f}")
        columns[f"of the read floor{end}"] = ranges(file, "share_of_floor", "{:.0%}")
    keys = list(product(SHAPES, (False, True), (False, True)))
    cases = [f"{'≥ 4,096' if a else '1,024'} × {'8, 32' if b else '1'}" for _, a, b in keys]
    table = pd.DataFrame(columns).loc[keys]
    table.insert(0, "shape", [shape for shape, *_ in keys])
    table.insert(1, "context × batch", cases)
    return table


def prefill(files: Sequence[str]) -> pd.DataFrame:
    """Prefill against bf16, and the store's share of a decode step; a file a number of threads."""

    def both(part: str, column: str, form: str, **where: int) -> pd.Series:
        one, two = (read(file, part, **where).set_index("shape")[column] for file in files)
        return text(one, form) + " / " + text(two, form)

    ratios, share = partial(both, "prefill", "ratio", "{:.2f}"), "share_of_attend"
    columns = {
        "first 2,048 tokens, vs bf16": ratios(new=2048, context=0),
        "first 8,192": ratios(new=8192, context=0),
        "2,048 behind 8,192 cached": ratios(new=2048, context=8192),
        "store, share of a decode step at 4,096 × 8": both("store", share, "{:.1%}", new=1),
    }
    return by_shape(columns)


def builds() -> pd.DataFrame:
    """Builds of the kernels against the builds before them."""
    columns = {}
    for name, new, title in (("", "after", "attend"), ("store-", "now", "store_blocks")):
        for threads in ("1 thread", "2 threads"):
            rows = read(f"builds-{name}cpu-avx2-{threads[0]}", "rows").set_index("shape")
            columns[f"`{title}`, {threads}"] = text(rows[f"ratio_{new}"], "{:.2f}×")
    return by_shape(columns)


def by_set(name: str) -> tuple[dict[str, pd.DataFrame], dict[str, pd.Series]]:
    """Builds' rows by instruction set, and the columns that say what they are of."""
    rows = {title: read(f"builds-{name}-{isa}", "rows") for isa, title in SETS.items()}
    first = next(iter(rows.values()))
    return rows, {"shape": first["shape"], "cached tokens": text(first["context"], "{:,}")}


def fetch() -> pd.DataFrame:
    """Times of `kivi2` with pages that are fetched into L2, where it serves, by those before."""
    rows, columns = by_set("fetch")
    return pd.DataFrame(columns | {isa: text(of["1_ratio"], "{:.2f}") for isa, of in rows.items()})


def pages() -> pd.DataFrame:
    """Times of today's pages and kernels by those of 0.2, one decode step's attention."""
    rows, columns = by_set("pages")
    for isa, one in rows.items():
        columns[f"`kivi2`, {isa}"] = text(one["1_ratio"], "{:.2f}")
        columns[f"`kivi_k3v2` by `kivi2`, {isa}"] = text(one["2_ratio"], "{:.2f}")
        columns[f"`kivi4`, {isa}"] = text(one["4_ratio"] / one["3_ratio"], "{:.2f}")
    return pd.DataFrame(columns)


def selection() -> pd.DataFrame:
    """Decode with a token budget, against the same cache without, and against bf16."""
    tables = []
    files = {f"selection-cpu-{isa}": f"{title}, by ranges" for isa, title in SETS.items()}
    files |= {f"selection-keys-cpu-{isa}": f"{title}, by keys" for isa, title in SETS.items()}
    for file, title in files.items():
        rows = read(file, "selection")
        for cache in ("kivi2", "kivi_k3v2"):
            of = rows.filter(regex=rf"^caches\.{cache}\.").rename(
                columns=lambda name: name.rpartition(".")[2]
            )
            ratios = [text(of[f"ratio_{n}"], "{:.1f}") for n in (1024, 2048, 4096)]
            columns = {
                "kernels, cache": f"{title}, `{cache}`",
                "context": text(rows["context"], "{:,}"),
                "budget 1,024 / 2,048 / 4,096, vs dense": ratios[0].str.cat(ratios[1:], " / "),
                "2,048, vs bf16": text(of["ratio_bf16_2048"], "{:.1f}"),
                "choosing, of dense": text(of["share_of_dense"], "{:.0%}"),
                "reading, of 2,048": text(of["floor_2048_ms"] / of["selected_2048_ms"], "{:.0%}"),
            }
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables)


def recipes() -> pd.DataFrame:
    """What the default recipe costs over KIVI as published."""
    keys = ["shape", "batch"]
    rows = read(AVX512[0], "decode", context=4096).set_index(keys)
    columns = {
        "shape × batch": [f"{shape} × {batch}" for shape, batch in rows.index],
        "attend, best / paper": text(rows["kivi2_ms"] / rows["kivi2_paper_ms"], "{:.3f}"),
    }
    return pd.DataFrame(columns)


def throughput() -> pd.DataFrame:
    """`vllm bench throughput`: output tokens a second."""
    loads = {
        "throughput-cpu": "16 requests of 4,096 tokens in",
        "throughput-cpu-small": "4 requests of 2,048 tokens in",
        "throughput-cpu-float32": "16 of 4,096, model in float32 (Zen 3)",
    }
    rows = pd.concat(read(file, "summary") for file in loads)
    own, fp8, kivi2 = (rows[f"{x}.output_tokens_per_s"] for x in ("auto", "fp8", "kivi2"))
    columns = {"128 tokens out": loads.values(), "vLLM's own (bf16, float32)": text(own, "{:.2f}")}
    columns |= {"fp8": text(fp8, "{:.2f}"), "kivi2": text(kivi2, "{:.2f}")}
    return pd.DataFrame(columns | {"kivi2 against its own": text(kivi2 / own, "{:.2f}×")})


def shares() -> pd.DataFrame:
    """Where an engine's time goes."""
    rows = read("shares-cpu", "rows").sort_values("phase", ascending=False, kind="stable")
    parts = {"attention": "attention", "model": "rest of the model", "runner": "runner"}
    parts["engine"] = "scheduler and the rest"
    title = "three sequences of 3,500 tokens"
    columns = {title: named(rows["kv_cache_dtype"]) + ", " + rows["phase"]}
    columns["ms a token"] = text(1e3 * rows["wall"] / rows["tokens"], digits)
    columns |= {parts[name]: text(rows[name] / rows["wall"], "{:.0%}") for name in parts}
    return pd.DataFrame(columns)


def seen(rows: pd.DataFrame, write: Callable[..., pd.Series] = gains) -> dict[str, pd.Series]:
    """What a load and its server say, with the multiples of the first cache's.

    Concurrency is the median of the running requests over the moments at which others waited;
    the most that ran at any moment stands beside it.
    """
    everything = rows["saturated"].map({True: "", False: ", all"})
    return {
        WAITING: write(rows["running_while_others_wait"], "{:.0f}"),
        MOST: write(rows["running"], "{:.0f}") + everything,
        "output tokens/s": write(rows["output_tokens_per_s"], digits),
        "preempted": text(rows["preemptions"], "{:.0f}"),
    }


def load() -> pd.DataFrame:
    """README: three loads on three caches."""
    loads = {
        ("cpu", "long"): "16 prompts of their own, 3,000–4,000 tokens, 128 out",
        ("cpu-shared", "shared"): "48 prompts of 3,500 tokens, 8 shared prefixes, 128 out",
        ("cpu-kivi", "kivi"): "72 prompts of about 160 tokens, 338 out (KIVI's lengths)",
    }
    tables: list[Any] = []
    for (file, workload), title in loads.items():
        rows = read(f"serving-{file}", "summary", workload=workload)
        sizes = {} if tables else {"tokens that fit": gains(rows["kv_cache_tokens"], "{:,}")}
        table = pd.DataFrame(sizes | seen(rows)).set_index(named(rows["kv_cache_dtype"])).T
        table.insert(0, "", [title if name == WAITING else "" for name in table.index])
        table.insert(1, " ", table.index)
        tables.append(table)
    return pd.concat(tables)


def served(workload: str, *files: str) -> pd.DataFrame:
    """One load on each cache, with everything that was seen."""
    found = []
    for file in files:
        rows = read(f"serving-{file}", "summary", workload=workload)
        again = "" if file == files[0] else " again"
        found.append(rows.assign(name=named(rows["kv_cache_dtype"], file) + again))
    rows = pd.concat(found, ignore_index=True)
    columns = {"": rows["name"], "cache tokens": text(rows["kv_cache_tokens"], "{:,}")}
    columns |= seen(rows)
    if rows["prefix_hit_rate"].any():
        columns["prompt tokens found"] = text(rows["prefix_hit_rate"], "{:.0%}")
    ends = [text(rows[f"latency_ms.e2el.{p}"] / 1e3, "{:.0f}") for p in ("p50", "p95")]
    columns |= {
        "first token, p50": text(rows["latency_ms.ttft.p50"] / 1e3, "{:.0f} s"),
        "a later token, p50": text(rows["latency_ms.tpot.p50"], "{:,.0f} ms"),
        "whole answer, p50 / p95": ends[0] + " / " + ends[1] + " s",
        "peak memory": text(rows["memory_peak_bytes"] / 2**20, "{:,.0f} MiB"),
    }
    return pd.DataFrame(columns)


def rate() -> pd.DataFrame:
    """A rising request rate: bf16 / kivi2."""
    bf16, kivi2 = (
        read("serving-cpu-rate", "summary", kv_cache_dtype=name).reset_index(drop=True)
        for name in ("auto", "kivi2")
    )

    def columns(rows: pd.DataFrame) -> pd.DataFrame:
        ends = {
            "first token, p50, s": text(rows["latency_ms.ttft.p50"] / 1e3, "{:.1f}"),
            "whole answer, p50, s": text(rows["latency_ms.e2el.p50"] / 1e3, "{:.0f}"),
        }
        return pd.DataFrame(seen(rows, text) | ends)

    table = columns(bf16) + " / " + columns(kivi2)
    offered = text(bf16["request_rate"], "{:.3f}").replace("–", "all at the start")
    table.insert(0, "requests/s", offered)
    ratio = kivi2["output_tokens_per_s"] / bf16["output_tokens_per_s"]
    table.insert(5, "ratio", text(ratio, "{:.2f}×"))
    return table


def context() -> pd.DataFrame:
    """One request at a time: milliseconds of a token behind so many others."""
    rows = read("serving-cpu-context", "summary")
    rows["tokens"] = rows["workload"].str.removeprefix("context-").astype(int)
    table = rows.pivot(index="kv_cache_dtype", columns="tokens", values="latency_ms.tpot.p50")
    table = table.loc[rows["kv_cache_dtype"].unique()]
    columns = {f"{tokens:,}": text(table[tokens], "{:.0f}") for tokens in table}
    return pd.DataFrame({"ms a token": named(pd.Series(table.index, table.index))} | columns)


TABLES: dict[str, Callable[[], pd.DataFrame]] = {
    "capacity": capacity,
    "dtypes": quality.dtypes,
    "quality": quality.quality,
    "simulated": quality.simulated,
    "long": quality.long_quality,
    "gemma": quality.gemma,
    "residual": quality.residual,
    "speed": speed,
    "load": load,
    "decode-avx512": partial(decode, AVX512, True),
    "prefill-avx512": partial(prefill, AVX512),
    "decode-avx2": partial(decode, AVX2, False),
    "prefill-avx2": partial(prefill, AVX2),
    "builds": builds,
    "fetch": fetch,
    "pages": pages,
    "recipes": recipes,
    "selection": selection,
    "budgets": quality.budgets,
    "passkeys": quality.passkeys,
    "throughput": throughput,
    "shares": shares,
    "load-long": partial(served, "long", "cpu", "cpu-long-kivi2"),
    "load-shared": partial(served, "shared", "cpu-shared"),
    "load-kivi": partial(served, "kivi", "cpu-kivi"),
    "load-long-float32": partial(served, "long", "cpu-float32"),
    "load-shared-float32": partial(served, "shared", "cpu-float32"),
    "rate": rate,
    "context": context,
    "reach": reach.reach,
    "hit-strides": reach.hit_strides,
}
"""By the name in the markers."""
FIGURES: dict[str, Callable[[], str]] = {
    # Times bf16's speed: batches from 4,096 tokens on, all shapes, one thread; smollm2 at 1,024
    # tokens, one sequence; prefill with AVX2.
    "decode-speed": lambda: span(
        read(AVX512[0], "decode").query("context >= 4096 and batch > 1")["ratio_bf16"], "{:.1f}"
    ),
    "short-decode": lambda: ranges(AVX512[0], "ratio_bf16", "{:.1f}")["smollm2", False, False],
    "avx2-prefill": lambda: span(pd.concat(read(x, "prefill")["ratio"] for x in AVX2), "{:.1f}"),
    "reach-kivi2": reach.readme,
}


def rewritten(text: str) -> str:
    """A document with all its marked tables and figures made anew.

    Raises:
        KeyError: a marker names none.

    """

    def made(found: re.Match[str]) -> str:
        name = found[2]
        text = FIGURES[name]() if name in FIGURES else markdown(TABLES[name]())
        return found[1] + text + found[3]

    return MARKED.sub(made, text)


def main(
    write: Annotated[bool, typer.Option(help="Rewrite the tables where they stand.")] = False,
) -> None:
    """Print every published table from the JSON files, or put them into the documents."""
    if not write:
        print("\n".join(f"{name}\n\n{markdown(make())}" for name, make in TABLES.items()))
        return
    for path in DOCUMENTS:
        path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
    typer.run(main)
