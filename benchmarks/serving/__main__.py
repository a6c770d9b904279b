"""A vLLM server under load by cache dtype, driven by vLLM's own benchmarks: see README.md here."""

from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common.command import Dtypes, Json, Memory, Model, Repeat, among, folder_of, start
from benchmarks.common.files import check_folder
from benchmarks.common.pictures import check_matplotlib
from benchmarks.common.vllm_runs import Rounds, header
from benchmarks.serving import plot, report
from benchmarks.serving.sweep import Row, sweep
from benchmarks.serving.workloads import KIVI_LONGEST, SUFFIX, WORKLOADS, Sizes, rising, saturating
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.plan import CACHE_DTYPES, parse_memory

SECTIONS = (*WORKLOADS, "rate")
LOADS = (0.5, 1.0, 2.0, 4.0)
"""Request rates, in parts of what the first dtype serves when all requests are there at first."""


def serving(
    context: typer.Context,
    model: Model = None,
    kv_cache_dtype: Dtypes = None,
    section: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(SECTIONS)}; default: all.")
    ] = None,
    memory: Memory = "256MiB",
    max_model_len: Annotated[int, typer.Option(min=1024, help="Longest sequence.")] = 8192,
    input_len: Annotated[
        int, typer.Option(min=SUFFIX + 1, help="Mean tokens of long and shared prompts.")
    ] = 3500,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of their answers.")] = 128,
    prefixes: Annotated[int, typer.Option(min=1, help="Different shared prefixes.")] = 8,
    scale: Annotated[float, typer.Option(help="Multiplies the numbers of requests.")] = 1.0,
    repeat: Repeat = 1,
    json_path: Json = None,
    plots: Annotated[
        Path | None, typer.Option(help="Beginning of the names of pictures, PNG and SVG.")
    ] = None,
) -> None:
    """Compare cache dtypes under load: throughput, latency, concurrency, capacity in one memory.

    Everything after -- goes to `vllm serve` as it is: -- --dtype float32
    """
    check_folder("--json", json_path)
    check_folder("--plots", plots)
    if plots is not None:
        check_matplotlib()
    if not 0 < scale <= 1000:
        raise UserError(f"--scale {scale}: must be above 0", "--scale 1")
    chosen = among("--section", section or SECTIONS, SECTIONS)
    longest = max(input_len + -(-input_len // 7) + output_len, KIVI_LONGEST)
    if longest > max_model_len:
        raise UserError(
            f"--input-len {input_len} and --output-len {output_len} make up to {longest} tokens, "
            f"more than --max-model-len {max_model_len}",
            f"--max-model-len {longest}",
        )
    sizes = Sizes(input_len, output_len, prefixes, scale, max_model_len)
    arguments = ["--kv-cache-memory-bytes", str(parse_memory(memory))]
    arguments += ["--max-model-len", str(max_model_len), *context.obj]
    folder = folder_of(model)
    head = header("serving", folder) | {"serve_arguments": arguments}
    rounds, rows = Rounds(kv_cache_dtype or CACHE_DTYPES, head), list[Row]()

    def run(loads: list[dict[str, Any]], what: str) -> None:
        def measure(title: str, dtype: str, turn: int) -> None:
            rows.extend(sweep(f"{what}, {title}", folder, dtype, turn, loads, arguments))

        rounds.make(repeat, measure, lambda: report.write(json_path, head, rows))

    try:
        names = [name for name in WORKLOADS if name in chosen]
        if "rate" in chosen and "shared" not in chosen:
            names.append("shared")  # the rates are measured in it
        run([load for name in names for load in saturating(name, sizes)], "load")
        if "rate" in chosen:
            served = [x for x in report.summarize(rows) if x["workload"] == "shared"]
            if not served:
                rounds.end()
            rates = [float(f"{load * served[0]['requests_per_s']:.3g}") for load in LOADS]
            run(rising(sizes, rates), "rates")
    finally:
        if rows:
            report.show(rows)
            if plots is not None:
                for path in plot.draw(head, report.summarize(rows), plots):
                    print(path)
    rounds.end()


if __name__ == "__main__":
    start(serving, passes_on=True)
