"""vLLM's own throughput benchmark by cache dtype, in turn on one workload: see README.md here."""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common.command import Dtypes, Json, Model, Repeat, folder_of, start
from benchmarks.common.files import check_folder, write_json
from benchmarks.common.tables import show
from benchmarks.common.vllm_runs import Rounds, header, run_to_end, vllm_command
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import tail
from kivi_vllm.cli.server import kv_tokens

OUTPUT_TOKENS = re.compile(r"Total num output tokens:\s*(\d+)")
DTYPES = ["auto", "fp8", "kivi2"]

Row = dict[str, Any]
"""One run: `kv_cache_dtype`, `round`, `elapsed_s` for all prompts, `requests_per_s`,
`tokens_per_s` (prompts and outputs), `output_tokens_per_s`, and `kv_cache_tokens`, the size of the
cache, None if vLLM did not say."""


def throughput(
    context: typer.Context,
    model: Model = None,
    input_len: Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")] = 4096,
    output_len: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts.")] = 16,
    num_warmups: Annotated[int, typer.Option(min=0, help="Prompts before the clock.")] = 1,
    kv_cache_dtype: Dtypes = None,
    repeat: Repeat = 1,
    json_path: Json = None,
) -> None:
    """Run `vllm bench throughput` with each cache dtype in turn and compare.

    Everything after -- goes to `vllm bench throughput` as it is: -- --max-model-len 8192
    """
    check_folder("--json", json_path)
    folder = folder_of(model)
    arguments = f"--random-input-len {input_len} --random-output-len {output_len}".split()
    arguments += f"--num-prompts {num_prompts} --num-warmups {num_warmups}".split()
    rounds = Rounds(kv_cache_dtype or DTYPES, header("engine.throughput", folder))
    runs: list[Row] = []

    def measure(title: str, dtype: str, turn: int) -> None:
        row = _run(title, folder, dtype, [*arguments, *context.obj])
        runs.append({"kv_cache_dtype": dtype, "round": turn} | row)

    def save() -> None:
        data = {"header": rounds.header, "summary": summarize(runs), "rows": runs}
        write_json(json_path, data)

    try:
        rounds.make(repeat, measure, save)
    finally:
        if runs:
            _show(runs)
    rounds.end()


def _run(title: str, model: str, dtype: str, arguments: Sequence[str]) -> Row:
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
            said = f"{what} did not say how many tokens it made:\n{tail(log, 30)}"
            raise UserError(said, remedy, status=1)
        result: dict[str, Any] = json.loads(report.read_text())
    return {
        "elapsed_s": result["elapsed_time"],
        "requests_per_s": result["requests_per_second"],
        "tokens_per_s": result["tokens_per_second"],
        "output_tokens_per_s": int(written[1]) / result["elapsed_time"],
        "kv_cache_tokens": kv_tokens(text),
    }


def summarize(runs: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Medians over the rounds by dtype, with the ratio of output tokens/s to the first dtype."""
    if not runs:
        return {}
    by = pd.DataFrame(runs).groupby("kv_cache_dtype", sort=False)
    table = by[["requests_per_s", "tokens_per_s", "output_tokens_per_s"]].median()
    outputs = by["output_tokens_per_s"].agg(["min", "max"]).add_prefix("output_tokens_per_s_")
    ratio = table["output_tokens_per_s"] / table["output_tokens_per_s"].iloc[0]
    table = table.join(outputs).assign(ratio=ratio, rounds=by.size())
    return {str(dtype): table.loc[[dtype]].to_dict("records")[0] for dtype in table.index}


def _show(runs: Sequence[Row]) -> None:
    table = pd.DataFrame(summarize(runs)).T
    sizes = {run["kv_cache_dtype"]: run["kv_cache_tokens"] for run in runs}
    table.insert(0, "cache tokens", pd.to_numeric(pd.Series(sizes)))
    table.columns = [name.replace("_per_s", "/s").replace("_", " ") for name in table.columns]
    forms = dict.fromkeys(table.columns, ".2f") | {"cache tokens": ",.0f", "rounds": ".0f"}
    forms["requests/s"] = ".3g"
    title = "vllm bench throughput (medians over the rounds)"
    show(table.reset_index(names="--kv-cache-dtype"), title, forms)


if __name__ == "__main__":
    start(throughput, passes_on=True)
