"""Every table of figures in README.md and benchmarks/results/README.md, from the JSON files.

    python -m benchmarks.tables            prints them all
    python -m benchmarks.tables --write    rewrites them where they stand

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, and a figure of a sentence between
`<!-- figure: NAME -->` and `<!-- end -->`. A test compares them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = tuple(
    ROOT / name for name in ("README.md", "docs/evidence.md", "benchmarks/results/README.md")
)
MARKED = re.compile(r"(<!-- (?:table|figure): ([\w-]+) -->\n?).*?(<!-- end -->)", re.S)
WAITING, MOST = "running, median while others wait", "most running"
SHAPES = {
    "smollm2": "9/3, head size 64 (SmolLM2-135M)",
    "llama3-8b": "32/8, head size 128 (Llama-3-8B)",
    "llama2-7b": "32/32, head size 128 (Llama-2-7B)",
}
Lines = Sequence[dict[str, str]]
"""A table's lines: cells by the column's title."""


def read(name: str) -> Any:
    """A file of results, by its name without `.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(lines: Lines) -> str:
    """A Markdown table. Columns of the same name differ in blanks at their ends."""
    head = list(lines[0])
    cells = [head, ["---"] * len(head), *(list(line.values()) for line in lines)]
    return "".join(f"| {' | '.join(cell.rstrip() for cell in line)} |\n" for line in cells)


def one(rows: Sequence[dict[str, Any]], **key: Any) -> dict[str, Any]:
    """The one row with these fields."""
    (found,) = [row for row in rows if all(row[name] == value for name, value in key.items())]
    return found


def span(values: pd.Series, form: str = "{:.2f}", scale: float = 1.0) -> str:
    """The smallest and the largest value, or the one that there is."""
    low, high = (form.format(x * scale) for x in (values.min(), values.max()))
    unit = low.lstrip("0123456789.")
    return low if low == high else f"{low.removesuffix(unit)}–{high}"


def times(value: float, first: float) -> str:
    """As in ` (1.15×)`."""
    return f" ({value / first:.2f}×)"


def digits(value: float) -> str:
    """Three of them."""
    return f"{value:#.3g}".rstrip(".")


def percent(share: float, form: str = ".0f") -> str:
    """As in `17 %`."""
    return f"{100 * share:{form}} %"


def capacity() -> Lines:
    """README: what fits into 256 MiB."""
    fits = _capacity(4096)
    title = "256 MiB of KV cache, `--max-model-len 4096`"
    return [
        {title: "bf16", "tokens": f"{fits['auto']:,}"},
        {title: "kivi2", "tokens": f"{fits['kivi2']:,}{times(fits['kivi2'], fits['auto'])}"},
    ]


def _capacity(length: int) -> dict[str, int]:
    rows = read("capacity")["rows"]
    return {row["cache_dtype"]: row["tokens"] for row in rows if row["max_model_len"] == length}


def dtypes() -> Lines:
    """README: bytes, capacity and quality by dtype."""
    data, lines = read("quality-pydoc"), []
    loss = {
        row["cache"]: f"{row['ratio']['value']:.3f} ({row['kl']['value']:.3f})"
        for row in data["perplexity"]
    }
    sizes = {row["name"]: row["kv_bytes_per_token"] for row in data["caches"]}
    sizes["auto"] /= 2  # the model of these runs was in float32
    for name in ("auto", "fp8", "kivi4", "kivi_k4v2", "kivi2"):
        fits = [_capacity(length) for length in (4096, 8192)]
        ratios = " / ".join(f"{fit[name] / fit['auto']:.2f}" for fit in fits)
        lines.append(
            {
                "`--kv-cache-dtype`": f"`{name}`",
                "bytes a token": f"{sizes[name]:,.0f} ({percent(sizes[name] / sizes['auto'])})",
                "tokens that fit, of bf16's: 4,096 / 8,192 long": ratios,
                "perplexity (KL), default": loss[name],
                "`recipe: paper`": loss.get(f"{name}:recipe=paper", "–"),
            }
        )
    return lines


def _decode(name: str, shape: str, batches: Sequence[int], long: bool = True) -> pd.DataFrame:
    rows = pd.DataFrame([row for row in read(name)["decode"] if "skipped" not in row])
    rows = rows[(rows["shape"] == shape) & rows["batch"].isin(batches)]
    return rows[(rows["context"] >= 4096) == long]


def speed() -> Lines:
    """README: decode attention from 4,096 tokens on."""
    columns = {
        "against bf16": ("1-thread", (8, 32), "ratio_bf16"),
        "against fp8": ("1-thread", (8, 32), "ratio_fp8"),
        "one sequence, bf16": ("1-thread", (1,), "ratio_bf16"),
        "two threads, bf16": ("2-threads", (8, 32), "ratio_bf16"),
        "AVX2 (EPYC), bf16": ("avx2-1-thread", (8, 32), "ratio_bf16"),
    }
    return [
        {"heads": SHAPES[shape]}
        | {
            title: span(_decode(f"attention-cpu-{file}", shape, batches)[field], "{:.1f}×")
            for title, (file, batches, field) in columns.items()
        }
        for shape in reversed(SHAPES)
    ]


def decode(files: Sequence[str], fp8: bool) -> Lines:
    """Ranges over the cases of one file a number of threads."""
    lines = []
    for shape in SHAPES:
        for long in (False, True):
            for batches in ((1,), (8, 32)):
                what = f"{'≥ 4,096' if long else '1,024'} × {', '.join(map(str, batches))}"
                line = {"shape": shape, "context × batch": what}
                for blanks, name in (("", files[0]), (" ", files[1])):
                    mine = _decode(name, shape, batches, long)
                    threads = "2 threads" if blanks else "1 thread"
                    line[f"{threads}: vs bf16"] = span(mine["ratio_bf16"])
                    if fp8:
                        line[f"vs fp8{blanks}"] = span(mine["ratio_fp8"])
                    line[f"of the read floor{blanks}"] = span(
                        mine["share_of_floor"], "{:.0f} %", 100
                    )
                lines.append(line)
    return lines


def prefill(files: Sequence[str]) -> Lines:
    """Prefill against bf16, and the store's share of a decode step; a file a number of threads."""
    data, lines = [read(name) for name in files], []
    chunks = {
        "first 2,048 tokens, vs bf16": (2048, 0),
        "first 8,192": (8192, 0),
        "2,048 behind 8,192 cached": (2048, 8192),
    }
    for shape in SHAPES:
        line = {"shape": shape}
        for title, (new, cached) in chunks.items():
            key = {"shape": shape, "new": new, "context": cached}
            line[title] = " / ".join(f"{one(x['prefill'], **key)['ratio']:.2f}" for x in data)
        shares = [one(x["store"], shape=shape, new=1)["share_of_attend"] for x in data]
        title = "store, share of a decode step at 4,096 × 8"
        lines.append(line | {title: " / ".join(percent(share, ".1f") for share in shares)})
    return lines


def builds() -> Lines:
    """Builds of the kernels against the builds before them."""
    lines: dict[str, dict[str, str]] = {shape: {"shape": shape} for shape in SHAPES}
    for title, name, new in (("attend", "", "after"), ("store_blocks", "store-", "now")):
        for threads in ("1 thread", "2 threads"):
            for row in read(f"builds-{name}cpu-avx2-{threads[0]}")["rows"]:
                lines[row["shape"]][f"`{title}`, {threads}"] = f"{row[f'ratio_{new}']:.2f}×"
    return list(lines.values())


def recipes() -> Lines:
    """What the default recipe costs over KIVI as published."""
    data = read("attention-cpu-recipes")
    stores = {
        (row["shape"], row["batch"]): percent(row["share_of_attend"], ".1f")
        for row in data["store"]
        if row["new"] == 1
    }
    return [
        {
            "shape × batch": f"{row['shape']} × {row['batch']}",
            "attend, best / paper": f"{row['kivi2_ms'] / row['kivi2_paper_ms']:.3f}",
            "store of `best`, of attend": stores.get((row["shape"], row["batch"]), "–"),
        }
        for row in data["decode"]
    ]


def throughput() -> Lines:
    """`vllm bench throughput`: output tokens a second."""
    loads = {
        "throughput-cpu": "16 requests of 4,096 tokens in",
        "throughput-cpu-small": "4 requests of 2,048 tokens in",
        "throughput-cpu-float32": "16 of 4,096, model in float32 (EPYC)",
    }
    lines = []
    for name, title in loads.items():
        rates = {key: row["output_tokens_per_s"] for key, row in read(name)["summary"].items()}
        line = {"128 tokens out": title}
        for key, what in {
            "auto": "vLLM's own (bf16, float32)",
            "fp8": "fp8",
            "kivi2": "kivi2",
        }.items():
            line[what] = f"{rates[key]:.2f}" if key in rates else "–"
        lines.append(line | {"kivi2 against its own": f"{rates['kivi2'] / rates['auto']:.2f}×"})
    return lines


def shares() -> Lines:
    """Where an engine's time goes."""
    parts = {"attention": "attention", "model": "rest of the model", "runner": "runner"}
    parts["engine"] = "scheduler and the rest"
    return [
        {
            "three sequences of 3,500 tokens": f"{_name(row['kv_cache_dtype'])}, {row['phase']}",
            "ms a token": digits(1e3 * row["wall"] / row["tokens"]),
            **{title: percent(row[name] / row["wall"]) for name, title in parts.items()},
        }
        for row in sorted(read("shares-cpu")["rows"], key=lambda row: row["phase"], reverse=True)
    ]


def _name(dtype: str, file: str = "") -> str:
    """`auto` by what it holds."""
    return ("float32" if "float32" in file else "bf16") if dtype == "auto" else dtype


def seen(row: dict[str, Any], first: dict[str, Any] | None = None) -> dict[str, str]:
    """What a load and its server say, with the multiples of the first cache's.

    Concurrency is the median of the running requests over the moments at which others waited;
    the most that ran at any moment stands beside it.
    """

    def cell(name: str, form: Callable[[float], str]) -> str:
        if row[name] is None:
            return "–"
        gain = "" if first in (None, row) else times(row[name], first[name])  # type: ignore[index]
        return form(row[name]) + gain

    return {
        WAITING: cell("running_while_others_wait", "{:.0f}".format),
        MOST: cell("running", "{:.0f}".format) + ("" if row["saturated"] else ", all"),
        "output tokens/s": cell("output_tokens_per_s", digits),
        "preempted": f"{row['preemptions']:.0f}",
    }


def load() -> Lines:
    """README: three loads on three caches."""
    loads = {
        ("cpu", "long"): "16 prompts of their own, 3,000–4,000 tokens, 128 out",
        ("cpu-shared", "shared"): "48 prompts of 3,500 tokens, 8 shared prefixes, 128 out",
        ("cpu-kivi", "kivi"): "72 prompts of about 160 tokens, 338 out (KIVI's lengths)",
    }
    lines: list[dict[str, str]] = []
    for (file, workload), title in loads.items():
        rows = [row for row in read(f"serving-{file}")["summary"] if row["workload"] == workload]
        columns = {_name(row["kv_cache_dtype"]): seen(row, rows[0]) for row in rows}
        if not lines:
            sizes = {_name(row["kv_cache_dtype"]): row["kv_cache_tokens"] for row in rows}
            own = sizes["bf16"]
            gains = {name: times(n, own) if n != own else "" for name, n in sizes.items()}
            cells = {name: f"{n:,}{gains[name]}" for name, n in sizes.items()}
            lines.append({"": "", " ": "tokens that fit"} | cells)
        for name in columns["bf16"]:
            cells = {dtype: column[name] for dtype, column in columns.items()}
            lines.append({"": title if name == WAITING else "", " ": name} | cells)
    return lines


def served(workload: str, *files: str) -> Lines:
    """One load on each cache, with everything that was seen."""
    rows = [
        row | {"": _name(row["kv_cache_dtype"], file) + (" again" if file != files[0] else "")}
        for file in files
        for row in read(f"serving-{file}")["summary"]
        if row["workload"] == workload
    ]
    hits, lines = any(row["prefix_hit_rate"] for row in rows), []
    for row in rows:
        p50, ends = (
            {name: x["p50"] for name, x in row["latency_ms"].items()},
            row["latency_ms"]["e2el"],
        )
        line = {"": row[""], "cache tokens": f"{row['kv_cache_tokens']:,}"} | seen(row, rows[0])
        line |= {"prompt tokens found": percent(row["prefix_hit_rate"])} if hits else {}
        lines.append(
            line
            | {
                "first token, p50": f"{p50['ttft'] / 1e3:.0f} s",
                "a later token, p50": f"{p50['tpot']:,.0f} ms",
                "whole answer, p50 / p95": f"{ends['p50'] / 1e3:.0f} / {ends['p95'] / 1e3:.0f} s",
                "peak memory": f"{row['memory_peak_bytes'] / 2**20:,.0f} MiB",
            }
        )
    return lines


def rate() -> Lines:
    """A rising request rate: bf16 / kivi2."""
    data, lines = read("serving-cpu-rate")["summary"], []
    for bf16 in (row for row in data if row["kv_cache_dtype"] == "auto"):
        kivi2 = one(data, workload=bf16["workload"], kv_cache_dtype="kivi2")
        both, offered = (bf16, kivi2), bf16["request_rate"]
        line = {"requests/s": f"{offered:.3f}" if offered else "all at the start"}
        line |= {name: f"{text} / {seen(kivi2)[name]}" for name, text in seen(bf16).items()}
        line["ratio"] = f"{kivi2['output_tokens_per_s'] / bf16['output_tokens_per_s']:.2f}×"
        for name, form, title in (("ttft", ".1f", "first token"), ("e2el", ".0f", "whole answer")):
            seconds = [f"{row['latency_ms'][name]['p50'] / 1e3:{form}}" for row in both]
            line[f"{title}, p50, s"] = " / ".join(seconds)
        lines.append(line)
    return lines


def context() -> Lines:
    """One request at a time: milliseconds of a token behind so many others."""
    lines: dict[str, dict[str, str]] = {}
    for row in read("serving-cpu-context")["summary"]:
        line = lines.setdefault(row["kv_cache_dtype"], {"ms a token": _name(row["kv_cache_dtype"])})
        tokens = int(row["workload"].removeprefix("context-"))
        line[f"{tokens:,}"] = f"{row['latency_ms']['tpot']['p50']:.0f}"
    return list(lines.values())


def short() -> str:
    """How many times bf16's speed smollm2 has at 1,024 tokens: one sequence, one thread."""
    return span(
        _decode("attention-cpu-1-thread", "smollm2", (1,), long=False)["ratio_bf16"], "{:.1f}"
    )


def prefill_gain() -> str:
    """Prefill on the EPYC, times bf16's speed."""
    ratios = [row["ratio"] for name in EPYC for row in read(name)["prefill"]]
    return span(pd.Series(ratios), "{:.1f}")


CASCADE = ("attention-cpu-1-thread", "attention-cpu-2-threads")
EPYC = ("attention-cpu-avx2-1-thread", "attention-cpu-avx2-2-threads")
TABLES: dict[str, Callable[[], Lines]] = {
    "capacity": capacity,
    "dtypes": dtypes,
    "speed": speed,
    "load": load,
    "decode-avx512": partial(decode, CASCADE, True),
    "prefill-avx512": partial(prefill, CASCADE),
    "decode-avx2": partial(decode, EPYC, False),
    "prefill-avx2": partial(prefill, EPYC),
    "builds": builds,
    "recipes": recipes,
    "throughput": throughput,
    "shares": shares,
    "load-long": partial(served, "long", "cpu", "cpu-long-kivi2"),
    "load-shared": partial(served, "shared", "cpu-shared"),
    "load-kivi": partial(served, "kivi", "cpu-kivi"),
    "load-long-float32": partial(served, "long", "cpu-float32"),
    "load-shared-float32": partial(served, "shared", "cpu-float32"),
    "rate": rate,
    "context": context,
}
"""By the name in the markers."""
FIGURES: dict[str, Callable[[], str]] = {"short-decode": short, "avx2-prefill": prefill_gain}


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
