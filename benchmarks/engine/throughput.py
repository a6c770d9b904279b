"""vLLM's own throughput benchmark by cache dtype, in turn on one workload: see README.md here."""

import json
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.vllm_runs import header, run_to_end, split_at_dashes, vllm_command
from kivi_vllm.cli.default_model import default_model
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.files import check_folder, write_json
from kivi_vllm.cli.main import main
from kivi_vllm.cli.process import tail
from kivi_vllm.cli.server import kv_tokens

OUTPUT_TOKENS = re.compile(r"Total num output tokens:\s*(\d+)")
DTYPES = ["auto", "fp8", "kivi2"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Run:
    """What one run of `vllm bench throughput` reports.

    Attributes:
        kv_cache_dtype: of the run.
        round: 0 .. --repeat - 1.
        elapsed_s: seconds for all prompts.
        requests_per_s, tokens_per_s, output_tokens_per_s: over these seconds;
            `tokens` counts prompts and outputs.
        kv_cache_tokens: size of the cache; None if vLLM did not say.

    """

    kv_cache_dtype: str
    round: int
    elapsed_s: float
    requests_per_s: float
    tokens_per_s: float
    output_tokens_per_s: float
    kv_cache_tokens: int | None


@app.command(
    epilog="Everything after -- goes to `vllm bench throughput` as it is: -- --max-model-len 8192"
)
def throughput(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model; SmolLM2-135M-Instruct if not given.")
    ] = None,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 4096,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 16,
    num_warmups: Annotated[int, typer.Option(min=0, help="Prompts before the clock.")] = 1,
    kv_cache_dtype: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: auto, fp8, kivi2.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds over all dtypes.")] = 1,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it.")] = None,
) -> None:
    """Run `vllm bench throughput` with each cache dtype in turn and compare."""
    folder = model if model is not None else str(default_model())
    check_folder("--json", json_path)
    sizes = {
        "--random-input-len": input_len,
        "--random-output-len": output_len,
        "--num-prompts": num_prompts,
        "--num-warmups": num_warmups,
    }
    workload = [word for name, number in sizes.items() for word in (name, str(number))]
    dtypes = list(dict.fromkeys(kv_cache_dtype or DTYPES))
    head = header("engine.throughput", folder)
    runs: list[Run] = []
    failed: dict[str, UserError] = {}
    try:
        for turn in range(repeat):
            for dtype in dtypes:
                if dtype in failed:
                    continue
                title = f"{dtype}, round {turn + 1} of {repeat}"
                try:
                    runs.append(_run(title, folder, dtype, turn, [*workload, *(context.obj or [])]))
                except UserError as error:  # the others go on
                    failed[dtype] = error
                    head["failed"] = {name: str(one) for name, one in failed.items()}
                if json_path is not None:
                    write_json(
                        json_path,
                        {
                            "header": head,
                            "summary": _medians(runs),
                            "rows": [asdict(run) for run in runs],
                        },
                    )
    finally:
        _show(runs)
    if failed:
        text = "\n\n".join(map(str, failed.values()))
        raise UserError(text, next(iter(failed.values())).remedy, status=1)


def _run(title: str, model: str, dtype: str, turn: int, arguments: Sequence[str]) -> Run:
    """One run in a process of its own."""
    with tempfile.TemporaryDirectory(prefix="kivi-benchmark-") as work:
        log, report = Path(work) / "log", Path(work) / "report.json"
        command = [vllm_command(), "bench", "throughput", "--model", model]
        command += ["--dataset-name", "random", "--kv-cache-dtype", dtype, "--disable-log-stats"]
        command += [*arguments, "--output-json", str(report)]
        what = f"vllm bench throughput --kv-cache-dtype {dtype}"
        remedy = "try the same arguments with `vllm bench throughput` itself"
        text = run_to_end(what, command, log, model=model, title=title, remedy=remedy)
        written = OUTPUT_TOKENS.search(text)
        if written is None or not report.exists():
            raise UserError(
                f"{what} did not say how many tokens it made:\n{tail(log, 30)}", remedy, status=1
            )
        result: dict[str, Any] = json.loads(report.read_text())
    return Run(
        kv_cache_dtype=dtype,
        round=turn,
        elapsed_s=result["elapsed_time"],
        requests_per_s=result["requests_per_second"],
        tokens_per_s=result["tokens_per_second"],
        output_tokens_per_s=int(written[1]) / result["elapsed_time"],
        kv_cache_tokens=kv_tokens(text),
    )


def _medians(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """Medians over the rounds by dtype, with the ratio of output tokens/s to the first dtype."""
    summary: dict[str, dict[str, float]] = {}
    for dtype in dict.fromkeys(run.kv_cache_dtype for run in runs):
        mine = [run for run in runs if run.kv_cache_dtype == dtype]
        summary[dtype] = {
            name: statistics.median(getattr(run, name) for run in mine)
            for name in ("requests_per_s", "tokens_per_s", "output_tokens_per_s")
        }
        outputs = [run.output_tokens_per_s for run in mine]
        first = next(iter(summary.values()))["output_tokens_per_s"]
        summary[dtype] |= {
            "output_tokens_per_s_min": min(outputs),
            "output_tokens_per_s_max": max(outputs),
            "ratio": summary[dtype]["output_tokens_per_s"] / first,
            "rounds": len(mine),
        }
    return summary


def _show(runs: Sequence[Run]) -> None:
    if not runs:
        return
    summary = _medians(runs)
    table = Table(title="vllm bench throughput (medians over the rounds)", title_justify="left")
    names = ("cache tokens", "requests/s", "tokens/s", "output tokens/s", "min–max", "ratio")
    table.add_column("--kv-cache-dtype")
    for name in (*names, "rounds"):
        table.add_column(name, justify="right")
    tokens = {run.kv_cache_dtype: run.kv_cache_tokens for run in runs}
    for dtype, row in summary.items():
        low, high = row["output_tokens_per_s_min"], row["output_tokens_per_s_max"]
        size = tokens[dtype]
        table.add_row(
            dtype,
            "–" if size is None else f"{size:,}",
            f"{row['requests_per_s']:.3g}",
            f"{row['tokens_per_s']:.1f}",
            f"{row['output_tokens_per_s']:.2f}",
            f"{low:.2f}–{high:.2f}",
            f"{row['ratio']:.2f}×",
            str(row["rounds"]),
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    console.print(table)


def _command() -> None:
    """Run the command with what stands before `--`; the rest is its context's object."""
    ours, for_vllm = split_at_dashes(sys.argv[1:])
    app(args=ours, obj=for_vllm)


if __name__ == "__main__":
    main(_command)
