"""What a quantized KV cache costs in quality, by cache dtype: see README.md here."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import machine
from benchmarks.common.files import check_folder, write_json
from benchmarks.quality import perplexity, plot, quantized_cache, report
from benchmarks.quality.engine import Settings
from benchmarks.quality.model_facts import DTYPES, ModelFacts, model_facts
from benchmarks.quality.passkey import KINDS
from benchmarks.quality.rows import CacheRow
from benchmarks.quality.sections import SECTIONS, Reference, Result, Workload, measure
from kivi_vllm.cli.default_model import default_model
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.main import main
from kivi_vllm.cli.progress import note

CACHES = ["auto", "fp8", "kivi4", "kivi_k4v2", "kivi2:recipe=paper", "kivi2", "transformers:kv2"]
LENGTHS = "1024,4096"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def quality(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model; SmolLM2-135M-Instruct if not given.")
    ] = None,
    cache: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; the first is the reference. Default: " + " ".join(CACHES)),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable: pydoc (default), or the path of a file."),
    ] = None,
    section: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(SECTIONS)}; default: all.")
    ] = None,
    fact: Annotated[
        list[str] | None, typer.Option(help="Repeatable: passkey (default), needle.")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Contexts in tokens, with commas.")] = LENGTHS,
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
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Beginning of the names of pictures, PNG and SVG.")
    ] = None,
) -> None:
    """Compare cache dtypes with the first one: perplexity and KL, retrieval, long answers."""
    check_folder("--json", json_path)
    check_folder("--plots", plots)
    if plots is not None:
        plot.check()
    if not 0 < fraction <= 100:
        raise UserError(f"--fraction {fraction}: must be above 0", "--fraction 0.125")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: there is no such dtype", f"one of: {', '.join(DTYPES)}")
    sections = _chosen("--section", section, SECTIONS, SECTIONS)
    facts_to_hide = _chosen("--fact", fact, KINDS, KINDS[:1])
    rows = list(dict.fromkeys(CacheRow.parse(name) for name in cache or CACHES))
    if rows[0].kind != "vllm":
        raise UserError(f"--cache {rows[0].name}: it cannot be the reference", "--cache auto first")
    sizes = _lengths(lengths)
    skipped = {row.name: remedy for row in rows if (remedy := quantized_cache.missing(row))}
    for name, remedy in skipped.items():
        note(f"{name} is left out; to have it: {remedy}")
    rows = [row for row in rows if row.name not in skipped]

    folder = model if model is not None else str(default_model())
    facts = model_facts(folder)
    work = Workload.make(
        folder,
        sections,
        texts=list(dict.fromkeys(text or ["pydoc"])),
        lengths=sizes,
        kinds=facts_to_hide,
        fraction=fraction,
        limit=facts.limit,
        seed=seed,
    )
    results: list[Result] = []
    failed: dict[str, str] = {}
    header: dict[str, Any] = machine.header("quality") | {
        "model": {"name": Path(folder).name, **asdict(facts)},
        "dtype": dtype,
        "fraction": fraction,
        "seed": seed,
        "skipped": skipped,
    }
    reference = Reference()
    try:
        for row in rows:
            settings = _settings(folder, dtype, work, facts, kv_cache_memory_bytes, row)
            try:
                results.append(measure(settings, row, work, reference, row is rows[0]))
            except UserError as error:  # the others go on
                if row is rows[0]:
                    raise
                note(f"{row.name} failed: {error}")
                header["failed"] = failed = {**failed, row.name: str(error)}
            if json_path is not None:
                write_json(json_path, report.document(header, results))
    finally:
        report.show(report.document(header, results))
    if plots is not None:
        data = report.document(header, results)
        plot.check(data)
        for path in plot.draw(data, plots):
            print(path)
    if failed:
        raise UserError(
            f"these rows failed: {', '.join(failed)}", "their messages are above", status=1
        )


def _chosen(
    option: str, given: list[str] | None, known: Sequence[str], default: Sequence[str]
) -> list[str]:
    for name in given or []:
        if name not in known:
            raise UserError(f"{option} {name}: there is none", f"one of: {', '.join(known)}")
    return list(dict.fromkeys(given or default))


def _lengths(given: str) -> list[int]:
    try:
        return sorted({int(part) for part in given.split(",")})
    except ValueError:
        raise UserError(f"--lengths {given}: not numbers with commas", "--lengths 1024") from None


def _settings(
    model: str,
    dtype: str,
    work: Workload,
    facts: ModelFacts,
    memory: int | None,
    row: CacheRow,
) -> Settings:
    """Of one row's engine: all alike, but for the steps of caches that are not ours."""
    if memory is None:
        # Blocks are whole, and a sequence of the KIVI dtypes holds more than its tokens.
        memory = facts.cache_bytes(dtype, 2 * work.max_model_len + 1024)
    return Settings(
        model=model,
        max_model_len=work.max_model_len,
        dtype=dtype,
        kv_cache_memory_bytes=memory,
        max_num_batched_tokens=perplexity.chunk(row),
    )


if __name__ == "__main__":
    main(app)
