"""A vLLM server under load by cache dtype, driven by vLLM's own benchmarks: see README.md here."""

import sys
from pathlib import Path
from typing import Annotated, Any

import plot_serving
import typer

from benchmarks.common.pictures import check_matplotlib
from benchmarks.common.vllm_runs import header, split_at_dashes
from benchmarks.serving import report
from benchmarks.serving.sweep import Row, check_pandas, sweep
from benchmarks.serving.workloads import KIVI_LONGEST, SUFFIX, WORKLOADS, Sizes, rising, saturating
from kivi_vllm.cli.default_model import default_model
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.files import check_folder
from kivi_vllm.cli.main import main
from kivi_vllm.cli.plan import parse_memory

DTYPES = ["auto", "fp8", "kivi4", "kivi_k4v2", "kivi2"]
SECTIONS = (*WORKLOADS, "rate")
LOADS = (0.5, 1.0, 2.0, 4.0)
"""Request rates, in parts of what the first dtype serves when all requests are there at once."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(epilog="Everything after -- goes to `vllm serve` as it is: -- --dtype float32")
def serving(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model; SmolLM2-135M-Instruct if not given.")
    ] = None,
    kv_cache_dtype: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; the others are compared with the first. Default: all."),
    ] = None,
    section: Annotated[
        list[str] | None, typer.Option(help=f"Repeatable: {', '.join(SECTIONS)}; default: all.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Of the KV cache.")] = "256MiB",
    max_model_len: Annotated[int, typer.Option(min=1024, help="Longest sequence.")] = 8192,
    input_len: Annotated[
        int, typer.Option(min=SUFFIX + 1, help="Mean tokens of long and shared prompts.")
    ] = 3500,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens of their answers.")] = 128,
    prefixes: Annotated[int, typer.Option(min=1, help="Different shared prefixes.")] = 8,
    scale: Annotated[float, typer.Option(help="Multiplies the numbers of requests.")] = 1.0,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds over all dtypes.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Beginning of the names of pictures, PNG and SVG.")
    ] = None,
) -> None:
    """Compare cache dtypes under load: throughput, latency, batch and capacity in one memory."""
    check_folder("--json", json_path)
    check_folder("--plots", plots)
    if plots is not None:
        check_matplotlib()
    if not 0 < scale <= 1000:
        raise UserError(f"--scale {scale}: must be above 0", "--scale 1")
    chosen = list(dict.fromkeys(section or SECTIONS))
    for name in chosen:
        if name not in SECTIONS:
            raise UserError(f"--section {name}: there is none", f"one of: {', '.join(SECTIONS)}")
    longest = max(input_len + -(-input_len // 7) + output_len, KIVI_LONGEST)
    if longest > max_model_len:
        raise UserError(
            f"--input-len {input_len} and --output-len {output_len} make up to {longest} tokens, "
            f"more than --max-model-len {max_model_len}",
            f"--max-model-len {longest}",
        )
    sizes = Sizes(input_len, output_len, prefixes, scale, max_model_len)
    arguments = ["--kv-cache-memory-bytes", str(parse_memory(memory))]
    arguments += ["--max-model-len", str(max_model_len), *(context.obj or [])]
    check_pandas()
    folder = model if model is not None else str(default_model())
    run = _Run(folder, list(dict.fromkeys(kv_cache_dtype or DTYPES)), arguments, json_path)
    try:
        loads = [load for name in WORKLOADS if name in chosen for load in saturating(name, sizes)]
        if "rate" in chosen and "shared" not in chosen:
            loads += saturating("shared", sizes)  # the rates are measured in it
        if loads:
            run.rounds(repeat, loads, "load")
        if "rate" in chosen:
            run.rounds(repeat, list(rising(sizes, run.rates())), "rates")
    finally:
        if run.rows:
            report.show(run.rows)
            if plots is not None:
                for path in plot_serving.draw(run.header, report.summarize(run.rows), plots):
                    print(path)
    if run.failed:
        text = "\n\n".join(f"{dtype}: {error}" for dtype, error in run.failed.items())
        raise UserError(text, next(iter(run.failed.values())).remedy, status=1)


class _Run:
    """Rows so far, and the dtypes that failed: the others go on without them."""

    def __init__(
        self, model: str, dtypes: list[str], arguments: list[str], path: Path | None
    ) -> None:
        self.model, self.dtypes, self.arguments, self.path = model, dtypes, arguments, path
        self.header = header("serving", model) | {"serve_arguments": arguments}
        self.rows: list[Row] = []
        self.failed: dict[str, UserError] = {}

    def rounds(self, repeat: int, loads: list[dict[str, Any]], what: str) -> None:
        """Measure `loads` with each dtype in turn, `repeat` times over."""
        for turn in range(repeat):
            for dtype in self.dtypes:
                if dtype in self.failed:
                    continue
                title = f"{what}, {dtype}, round {turn + 1} of {repeat}"
                try:
                    self.rows += sweep(title, self.model, dtype, turn, loads, self.arguments)
                except UserError as error:
                    self.failed[dtype] = error
                    self.header["failed"] = {name: str(one) for name, one in self.failed.items()}
                if self.path is not None:
                    report.write(self.path, self.header, self.rows)

    def rates(self) -> list[float]:
        """Request rates around what the first dtype that works can serve.

        Raises:
            UserError: none of them does.

        """
        for one in report.summarize(self.rows):
            if one["workload"] == "shared":
                return [float(f"{load * one['requests_per_s']:.3g}") for load in LOADS]
        first = next(iter(self.failed.values()))
        raise UserError(f"no cache dtype could be measured: {first}", first.remedy, status=1)


def _command() -> None:
    ours, for_vllm = split_at_dashes(sys.argv[1:])
    app(args=ours, obj=for_vllm)


if __name__ == "__main__":
    main(_command)
