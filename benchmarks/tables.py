"""Every table of figures in README.md and benchmarks/results/README.md, from the JSON files.

    python -m benchmarks.tables            prints them all
    python -m benchmarks.tables --write    rewrites them where they stand

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. A test compares both.
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
NAMES = ("README.md", "docs/evidence.md", "benchmarks/results/README.md")
DOCUMENTS = tuple(ROOT / name for name in NAMES)
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)

SHAPES = {
    "llama2-7b": "32/32, head size 128 (Llama-2-7B)",
    "llama3-8b": "32/8, head size 128 (Llama-3-8B)",
    "smollm2": "9/3, head size 64 (SmolLM2-135M)",
}
WAITING, MOST = "running, median while others wait", "most running"
_MEDIAN = "running_while_others_wait"

Cells = list[list[str]]


def read(name: str) -> Any:
    """A file of results, by its name without `.json`."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(head: Sequence[str], cells: Cells) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def span(values: pd.Series, form: str = ".2f", unit: str = "", scale: float = 1.0) -> str:
    """The smallest and the largest of what is there, or the one that there is."""
    values = values.dropna() * scale
    if values.empty:
        return "–"
    ends = dict.fromkeys(f"{x:{form}}" for x in (values.min(), values.max()))
    return "–".join(ends) + unit


def times(value: float, first: float) -> str:
    """` (1.15×)`."""
    return f" ({value / first:.2f}×)"


def digits(value: float) -> str:
    """Three of them."""
    return f"{value:#.3g}".rstrip(".")


def percent(share: float, form: str = ".0f") -> str:
    """As in `17 %`."""
    return f"{100 * share:{form}} %"


# ---------------------------------------------------------------- capacity and quality


def capacity() -> str:
    """README: what fits into 256 MiB."""
    tokens = {row["cache_dtype"]: row["tokens"] for row in _capacities(4096)}
    kivi2 = tokens["kivi2"]
    return markdown(
        ["256 MiB of KV cache, `--max-model-len 4096`", "tokens"],
        [
            ["bf16", f"{tokens['auto']:,}"],
            ["kivi2", f"{kivi2:,}{times(kivi2, tokens['auto'])}"],
        ],
    )


def _capacities(length: int) -> list[dict[str, Any]]:
    return [row for row in read("capacity")["rows"] if row["max_model_len"] == length]


def dtypes() -> str:
    """README: bytes, capacity and quality by dtype."""
    data, cells = read("quality-pydoc"), []
    of = {row["cache"]: row for row in data["perplexity"]}
    nbytes = {row["name"]: row["kv_bytes_per_token"] for row in data["caches"]}
    fits = [{row["cache_dtype"]: row["tokens"] for row in _capacities(n)} for n in (4096, 8192)]
    for name in ("auto", "fp8", "kivi4", "kivi_k4v2", "kivi2"):
        # The model of the quality runs was in float32, what `auto` holds in bf16 is half of that.
        size = nbytes[name] / 2 if name == "auto" else nbytes[name]
        ratios = [f"{fit[name] / fit['auto']:.2f}" for fit in fits]
        paper = of.get(f"{name}:recipe=paper")
        losses = [_loss(of[name]), _loss(paper) if paper else "–"]
        share = percent(size / (nbytes["auto"] / 2))
        cells.append([f"`{name}`", f"{size:,.0f} ({share})", " / ".join(ratios), *losses])
    head = ["`--kv-cache-dtype`", "bytes a token", "tokens that fit, of bf16's: 4,096 / 8,192 long"]
    return markdown([*head, "perplexity (KL), default", "`recipe: paper`"], cells)


def _loss(row: dict[str, Any]) -> str:
    return f"{row['ratio']['value']:.3f} ({row['kl']['value']:.3f})"


# ---------------------------------------------------------------- one layer's attention


def speed() -> str:
    """README: decode attention from 4,096 tokens on."""
    one, two = (_decode(f"attention-cpu-{name}") for name in ("1-thread", "2-threads"))
    other = _decode("attention-cpu-avx2-1-thread")
    cells = []
    for shape, title in SHAPES.items():
        many = partial(_long, shape=shape)
        against = [many(one).ratio_bf16, many(one).ratio_fp8, many(one, batches=(1,)).ratio_bf16]
        against += [many(two).ratio_bf16, many(other).ratio_bf16]
        cells.append([title, *(span(values, ".1f", "×") for values in against)])
    head = ["heads", "against bf16", "against fp8", "one sequence, bf16", "two threads, bf16"]
    return markdown([*head, "AVX2 (EPYC), bf16"], cells)


def _decode(name: str) -> pd.DataFrame:
    rows = pd.DataFrame(read(name)["decode"])
    rows = rows[rows["skipped"].isna()] if "skipped" in rows else rows
    return rows.assign(ratio_fp8=rows.get("ratio_fp8"))


def _long(rows: pd.DataFrame, shape: str, batches: tuple[int, ...] = (8, 32)) -> pd.DataFrame:
    return rows[(rows["shape"] == shape) & (rows.context >= 4096) & rows.batch.isin(batches)]


def decode(files: Sequence[str]) -> str:
    """Ranges over the cases of one file a number of threads."""
    head, cells = ["shape", "context × batch"], []
    frames = [_decode(name) for name in files]
    fp8 = all(frame.ratio_fp8.notna().any() for frame in frames)
    for threads in range(1, len(files) + 1):
        head += [f"{threads} thread{'s' * (threads > 1)}: vs bf16", *["vs fp8"] * fp8]
        head += ["of the read floor"]
    for shape in reversed(SHAPES):
        for long in (False, True):
            for batches in ((1,), (8, 32)):
                what = "≥ 4,096" if long else "1,024"
                line = [shape, f"{what} × {', '.join(map(str, batches))}"]
                for frame in frames:
                    mine = frame[(frame["shape"] == shape) & frame.batch.isin(batches)]
                    mine = mine[(mine.context >= 4096) == long]
                    line += [span(mine.ratio_bf16), *[span(mine.ratio_fp8)] * fp8]
                    line += [span(mine.share_of_floor, ".0f", " %", 100)]
                cells.append(line)
    return markdown(head, cells)


def prefill(files: Sequence[str]) -> str:
    """Prefill against bf16, and the store's share of a decode step; a file a number of threads."""
    data, cells = [read(name) for name in files], []
    for shape in reversed(SHAPES):
        line = [shape]
        for new, cached in ((2048, 0), (8192, 0), (2048, 8192)):
            key = {"shape": shape, "new": new, "context": cached}
            line.append(" / ".join(f"{_one(one['prefill'], **key)['ratio']:.2f}" for one in data))
        stores = [_one(one["store"], shape=shape, new=1)["share_of_attend"] for one in data]
        cells.append([*line, " / ".join(percent(share, ".1f") for share in stores)])
    head = ["shape", "first 2,048 tokens, vs bf16", "first 8,192", "2,048 behind 8,192 cached"]
    return markdown([*head, "store, share of a decode step at 4,096 × 8"], cells)


def _one(rows: Sequence[dict[str, Any]], **key: Any) -> dict[str, Any]:
    (found,) = [row for row in rows if all(row[name] == value for name, value in key.items())]
    return found


def builds() -> str:
    """Builds of the kernels against the builds before them."""
    head, columns = ["shape"], []
    for title, name in (("attend", "builds-cpu-avx2"), ("store_blocks", "builds-store-cpu-avx2")):
        for threads in (1, 2):
            rows = read(f"{name}-{threads}")["rows"]
            last = [key for key in rows[0] if key.startswith("ratio_")][-1]
            head.append(f"`{title}`, {threads} thread{'s' * (threads > 1)}")
            columns.append({row["shape"]: f"{row[last]:.2f}×" for row in rows})
    shapes = list(reversed(SHAPES))
    return markdown(head, [[shape, *(column[shape] for column in columns)] for shape in shapes])


def recipes() -> str:
    """What the default recipe costs over KIVI as published."""
    data, cells = read("attention-cpu-recipes"), []
    for row in data["decode"]:
        store = [
            percent(one["share_of_attend"], ".1f")
            for one in data["store"]
            if one["new"] == 1 and (one["shape"], one["batch"]) == (row["shape"], row["batch"])
        ]
        ratio = f"{row['kivi2_ms'] / row['kivi2_paper_ms']:.3f}"
        cells.append([f"{row['shape']} × {row['batch']}", ratio, *(store or ["–"])])
    return markdown(["shape × batch", "attend, best / paper", "store of `best`, of attend"], cells)


# ---------------------------------------------------------------- a whole engine


def throughput() -> str:
    """`vllm bench throughput`: output tokens a second."""
    loads = {
        "throughput-cpu": "16 requests of 4,096 tokens in",
        "throughput-cpu-small": "4 requests of 2,048 tokens in",
        "throughput-cpu-float32": "16 of 4,096, model in float32 (EPYC)",
    }
    cells = []
    for name, title in loads.items():
        rates = {key: row["output_tokens_per_s"] for key, row in read(name)["summary"].items()}
        line = [f"{rates[key]:.2f}" if key in rates else "–" for key in ("auto", "fp8", "kivi2")]
        cells.append([title, *line, f"{rates['kivi2'] / rates['auto']:.2f}×"])
    head = ["128 tokens out", "vLLM's own (bf16, float32)", "fp8", "kivi2", "kivi2 against its own"]
    return markdown(head, cells)


def shares() -> str:
    """Where an engine's time goes."""
    cells = []
    for row in sorted(read("shares-cpu")["rows"], key=lambda row: row["phase"], reverse=True):
        parts = [row[name] / row["wall"] for name in ("attention", "model", "runner", "engine")]
        what = f"{_name(row['kv_cache_dtype'])}, {row['phase']}"
        cells.append([what, digits(1e3 * row["wall"] / row["tokens"]), *map(percent, parts)])
    head = ["three sequences of 3,500 tokens", "ms a token", "attention", "rest of the model"]
    return markdown([*head, "runner", "scheduler and the rest"], cells)


# ---------------------------------------------------------------- a server under load


def _name(dtype: str, file: str = "") -> str:
    """`auto` by what it holds."""
    return ("float32" if "float32" in file else "bf16") if dtype == "auto" else dtype


def _loads(files: Sequence[str], workload: str) -> list[dict[str, Any]]:
    found = []
    for name in files:
        for one in read(f"serving-{name}")["summary"]:
            if one["workload"] == workload:
                found.append(one | {"dtype": _name(one["kv_cache_dtype"], name)})
    return found


def seen(one: dict[str, Any], first: dict[str, Any]) -> dict[str, str]:
    """What a load and its server say, with the multiples of the first cache's.

    Concurrency is the median of the running requests over the moments at which others waited;
    the most that ran at any moment stands beside it.
    """

    def many(value: float | None, of_first: float | None) -> str:
        if value is None:
            return "–"
        return f"{value:.0f}" + ("" if one is first or not of_first else times(value, of_first))

    rate = one["output_tokens_per_s"]
    return {
        WAITING: many(one[_MEDIAN], first[_MEDIAN]),
        MOST: many(one["running"], first["running"]) + ("" if one["saturated"] else ", all"),
        "output tokens/s": digits(rate)
        + ("" if one is first else times(rate, first["output_tokens_per_s"])),
        "preempted": f"{one['preemptions']:.0f}",
    }


def load() -> str:
    """README: three loads on three caches."""
    loads = {
        ("cpu", "long"): "16 prompts of their own, 3,000–4,000 tokens, 128 out",
        ("cpu-shared", "shared"): "48 prompts of 3,500 tokens, 8 shared prefixes, 128 out",
        ("cpu-kivi", "kivi"): "72 prompts of about 160 tokens, 338 out (KIVI's lengths)",
    }
    cells: Cells = []
    for (file, workload), title in loads.items():
        rows = _loads([file], workload)
        if not cells:
            fit, own = [row["kv_cache_tokens"] for row in rows], rows[0]["kv_cache_tokens"]
            cells.append(["", "tokens that fit", f"{own:,}"])
            cells[0] += [f"{tokens:,}{times(tokens, own)}" for tokens in fit[1:]]
        columns = [seen(row, rows[0]) for row in rows]
        for name in columns[0]:
            left = title if name == WAITING else ""
            cells.append([left, name, *(one[name] for one in columns)])
    return markdown(["", "", "bf16", "fp8", "kivi2"], cells)


def served(files: Sequence[str], workload: str) -> str:
    """One load on each cache, with everything that was seen."""
    table: list[dict[str, str]] = []
    rows = _loads(files, workload)
    for row in rows:
        latency, dtype = row["latency_ms"], row["dtype"]
        again = any(one[""] == dtype for one in table)
        line = {"": f"{dtype} again" if again else dtype}
        line |= {"cache tokens": f"{row['kv_cache_tokens']:,}"} | seen(row, rows[0])
        if any(one["prefix_hit_rate"] for one in rows):
            line["prompt tokens found"] = percent(row["prefix_hit_rate"])
        whole = " / ".join(f"{latency['e2el'][p] / 1e3:.0f}" for p in ("p50", "p95"))
        line["first token, p50"] = f"{latency['ttft']['p50'] / 1e3:.0f} s"
        line["a later token, p50"] = f"{latency['tpot']['p50']:,.0f} ms"
        line["whole answer, p50 / p95"] = f"{whole} s"
        line["peak memory"] = f"{row['memory_peak_bytes'] / 2**20:,.0f} MiB"
        table.append(line)
    return markdown(list(table[0]), [list(line.values()) for line in table])


def rate() -> str:
    """A rising request rate: bf16 / kivi2."""
    data, cells = read("serving-cpu-rate")["summary"], []
    for bf16 in (one for one in data if one["kv_cache_dtype"] == "auto"):
        kivi2 = _one(data, workload=bf16["workload"], kv_cache_dtype="kivi2")
        both, offered = (bf16, kivi2), bf16["request_rate"]
        line = [f"{offered:.3f}" if offered else "all at the start"]
        line += [
            " / ".join(cell) for cell in zip(*(seen(x, x).values() for x in both), strict=True)
        ]
        line.insert(4, f"{kivi2['output_tokens_per_s'] / bf16['output_tokens_per_s']:.2f}×")
        for name, form in (("ttft", ".1f"), ("e2el", ".0f")):
            line.append(" / ".join(f"{x['latency_ms'][name]['p50'] / 1e3:{form}}" for x in both))
        cells.append(line)
    head = ["requests/s", WAITING, MOST, "output tokens/s", "ratio", "preempted"]
    return markdown([*head, "first token, p50, s", "whole answer, p50, s"], cells)


def context() -> str:
    """One request at a time: milliseconds of a token behind so many others."""
    rows = pd.DataFrame(read("serving-cpu-context")["summary"])
    rows["tokens"] = rows.workload.str.removeprefix("context-").astype(int)
    rows["ms"] = [f"{one['tpot']['p50']:.0f}" for one in rows.latency_ms]
    table = rows.pivot(index="kv_cache_dtype", columns="tokens", values="ms")
    cells = [[_name(dtype), *table.loc[dtype]] for dtype in ("auto", "fp8", "kivi2")]
    return markdown(["ms a token", *(f"{n:,}" for n in table.columns)], cells)


CASCADE = ("attention-cpu-1-thread", "attention-cpu-2-threads")
EPYC = ("attention-cpu-avx2-1-thread", "attention-cpu-avx2-2-threads")
TABLES: dict[str, Callable[[], str]] = {
    "capacity": capacity,
    "dtypes": dtypes,
    "speed": speed,
    "load": load,
    "decode-avx512": partial(decode, CASCADE),
    "prefill-avx512": partial(prefill, CASCADE),
    "decode-avx2": partial(decode, EPYC),
    "prefill-avx2": partial(prefill, EPYC),
    "builds": builds,
    "recipes": recipes,
    "throughput": throughput,
    "shares": shares,
    "load-long": partial(served, ["cpu", "cpu-long-kivi2"], "long"),
    "load-shared": partial(served, ["cpu-shared"], "shared"),
    "load-kivi": partial(served, ["cpu-kivi"], "kivi"),
    "load-long-float32": partial(served, ["cpu-float32"], "long"),
    "load-shared-float32": partial(served, ["cpu-float32"], "shared"),
    "rate": rate,
    "context": context,
}
"""By the name in the markers."""


def rewritten(text: str) -> str:
    """A document with all its marked tables made anew.

    Raises:
        KeyError: a marker names no table.

    """
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main(
    write: Annotated[bool, typer.Option(help="Rewrite the tables where they stand.")] = False,
) -> None:
    """Print every published table from the JSON files, or put them into the documents."""
    if not write:
        print("\n".join(f"{name}\n\n{make()}" for name, make in TABLES.items()))
        return
    for path in DOCUMENTS:
        path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
    typer.run(main)
