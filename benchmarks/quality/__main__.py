"""What a quantized KV cache costs in quality, by cache dtype: see README.md here."""

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import machine
from benchmarks.common.command import Json, Model, among, failures, folder_of, start
from benchmarks.common.files import check_folder, write_json
from benchmarks.quality import plot, report
from benchmarks.quality.engine import ITEMSIZE, MODEL_DTYPES, arguments, model_facts
from benchmarks.quality.passkey import KINDS
from benchmarks.quality.rows import CacheRow
from benchmarks.quality.sections import MORE_SECTIONS, SECTIONS, Workload, measure
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.progress import note
from kivi_vllm.config import DTYPES, QUANTIZED_DTYPES

CACHES = [
    "auto",
    "fp8",
    *reversed(QUANTIZED_DTYPES),
    *(f"{name}:recipe=paper" for name in reversed(QUANTIZED_DTYPES) if DTYPES[name].published),
    "transformers:kv2",
]


Names = list[str] | None


def quality(
    model: Model = None,
    cache: Annotated[
        Names, typer.Option(help="Repeatable, the reference first; default: " + " ".join(CACHES))
    ] = None,
    text: Annotated[Names, typer.Option(help="Repeatable: pydoc (default), or a file.")] = None,
    section: Annotated[
        Names,
        typer.Option(
            help=f"Repeatable; default: {', '.join(SECTIONS)}; more: {', '.join(MORE_SECTIONS)}."
        ),
    ] = None,
    fact: Annotated[Names, typer.Option(help="Repeatable: passkey (default), needle.")] = None,
    lengths: Annotated[str, typer.Option(help="Contexts in tokens, with commas.")] = "1024,4096",
    fraction: Annotated[
        float, typer.Option(help="Of the whole workload; less is quicker and less certain.")
    ] = 0.125,
    dtype: Annotated[
        str, typer.Option(help="Of the model; float32 is quicker where the CPU has no bf16.")
    ] = "auto",
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(min=1, help="Of each engine; default: enough for two sequences.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the hidden keys.")] = 0,
    json_path: Json = None,
    plots: Annotated[Path | None, typer.Option(help="Beginning of PNG and SVG names.")] = None,
) -> None:
    """Compare cache dtypes with the first one: perplexity and KL, retrieval, long answers."""
    check_folder("--json", json_path)
    check_folder("--plots", plots)
    if plots is not None:
        plot.check()
    if not 0 < fraction <= 100:
        raise UserError(f"--fraction {fraction}: must be above 0", "--fraction 0.125")
    among("--dtype", [dtype], MODEL_DTYPES)
    sections = among("--section", section or SECTIONS, (*SECTIONS, *MORE_SECTIONS))
    kinds = among("--fact", fact or list(KINDS)[:1], KINDS)
    rows = list(dict.fromkeys(CacheRow.parse(name) for name in cache or CACHES))
    if rows[0].kind != "vllm":
        raise UserError(f"--cache {rows[0].name}: it cannot be the reference", "--cache auto first")
    if not all(part.strip().isdecimal() for part in lengths.split(",")):
        raise UserError(f"--lengths {lengths}: not numbers with commas", "--lengths 1024")
    sizes = list(map(int, lengths.split(",")))
    skipped = {row.name: row.missing for row in rows if row.missing}
    for name, remedy in skipped.items():
        note(f"{name} is left out; to have it: {remedy}")
    rows = [row for row in rows if row.name not in skipped]

    folder = folder_of(model)
    facts = model_facts(folder)
    texts = list(dict.fromkeys(text or ["pydoc"]))
    work = Workload.make(folder, sections, texts, sizes, kinds, fraction, facts["limit"], seed)
    # Blocks are whole, and a sequence of the KIVI dtypes holds more than its tokens.
    tokens = 2 * work.max_model_len + 1024
    itemsize = ITEMSIZE[facts["dtype"] if dtype == "auto" else dtype]
    memory = kv_cache_memory_bytes or facts["numbers_per_token"] * itemsize * tokens
    header = machine.header("quality") | {
        "model": {"name": Path(folder).name, **facts},
        "dtype": dtype,
        "fraction": fraction,
        "seed": seed,
        "skipped": skipped,
    }
    data: dict[str, Any] = {"header": header, "caches": [], **{name: [] for name in SECTIONS}}
    failed: dict[str, UserError] = {}
    reference: dict[str, Any] = {}
    try:
        for row in rows:
            options = dict(dtype=dtype, kv_cache_memory_bytes=memory)
            given = arguments(row, folder, work.max_model_len, **options)
            try:
                for name, records in measure(row, given, work, reference).items():
                    data.setdefault(name, []).extend(records)
            except UserError as error:  # the others go on
                if row is rows[0]:
                    raise
                note(f"{row.name} failed: {error}")
                failed[row.name] = error
                header["failed"] = {name: str(one) for name, one in failed.items()}
            if json_path is not None:
                write_json(json_path, data)
    finally:
        report.show(data)
    if plots is not None:
        plot.check(data)
        for path in plot.draw(data, plots):
            print(path)
    failures(failed)


if __name__ == "__main__":
    start(quality)
