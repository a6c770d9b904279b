"""Where an engine's time goes, by cache dtype: attention, the rest of the model, the rest."""

import multiprocessing
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.common.vllm_runs import environment, header
from kivi_vllm.cli.default_model import default_model
from kivi_vllm.cli.files import check_folder, write_json
from kivi_vllm.cli.main import main
from kivi_vllm.cli.plan import parse_memory
from kivi_vllm.cli.progress import step

ATTENTION = ("vllm::unified_attention_with_output", "vllm::unified_kv_cache_update")
"""vLLM's operators around a layer's attention, of every backend: attending and storing."""

FORWARD = "gpu_model_runner: forward"
RUNNER = "gpu_model_runner: "

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Shares:
    """Seconds of one phase, which add up to `wall`.

    Attributes:
        kv_cache_dtype: of the engine.
        phase: prefill, of prompts of which nothing is cached, or decode.
        batch: sequences.
        tokens: prompt tokens computed, or tokens decoded, of all sequences.
        wall: the phase.
        attention: attending and storing, all layers.
        model: the rest of the forward pass.
        runner: preparing inputs, sampling, bookkeeping.
        engine: what is left: scheduler, detokenization, Python between.

    """

    kv_cache_dtype: str
    phase: str
    batch: int
    tokens: int
    wall: float
    attention: float
    model: float
    runner: float
    engine: float


@app.command()
def shares(
    model: Annotated[
        str | None, typer.Argument(help="Folder of a model; SmolLM2-135M-Instruct if not given.")
    ] = None,
    kv_cache_dtype: Annotated[
        list[str] | None, typer.Option(help="Repeatable; default: auto, fp8, kivi2.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable; default: 1 and 3.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 3500,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps measured.")] = 16,
    memory: Annotated[str, typer.Option(help="Of the KV cache.")] = "256MiB",
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Where to write it.")] = None,
) -> None:
    """Profile prefill and decode in vLLM's engine, in eager mode, with PyTorch's profiler."""
    check_folder("--json", json_path)
    folder = model if model is not None else str(default_model())
    os.environ.update(environment(folder))
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CUSTOM_SCOPES_FOR_PROFILING": "1"}
    options = {
        "model": folder,
        "dtype": dtype,
        "max_model_len": context + steps + 2,
        "kv_cache_memory_bytes": parse_memory(memory),
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    head = header("engine.shares", folder)
    found: list[Shares] = []
    for name in dict.fromkeys(kv_cache_dtype or ["auto", "fp8", "kivi2"]):
        with step(f"profiling {name}"), _process() as process:
            work = process.submit(_measure, name, batch or [1, 3], context, steps, options)
            found += work.result()
        if json_path is not None:
            write_json(json_path, {"header": head, "rows": [asdict(one) for one in found]})
    _show(found)


def _process() -> ProcessPoolExecutor:
    """A process for one engine: a second one does not start where vLLM has run."""
    return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _measure(
    name: str, batches: list[int], context: int, steps: int, options: dict[str, Any]
) -> list[Shares]:
    from vllm import LLM, SamplingParams

    engine = LLM(kv_cache_dtype=name, **options)
    vocabulary = engine.get_tokenizer().vocab_size
    dice = random.Random(0)
    found = []

    def run(prompts: list[dict[str, Any]], tokens: int) -> None:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        engine.generate(prompts, sampling, use_tqdm=False)

    def new(length: int) -> dict[str, Any]:
        return {"prompt_token_ids": [dice.randrange(vocabulary) for _ in range(length)]}

    run([new(64)], 4)
    for batch in batches:
        prompts = [new(context) for _ in range(batch)]
        found.append(_profile(partial(run, prompts, 1), name, "prefill", batch, batch * context))
        # Now all of the prompts but their last block are in the prefix cache, if they fit there:
        # what that block costs is measured by itself and taken off.
        short = _profile(partial(run, prompts, 1), name, "decode", batch, 0)
        whole = _profile(partial(run, prompts, 1 + steps), name, "decode", batch, batch * steps)
        found.append(_difference(whole, short))
    return found


def _profile(work: Callable[[], None], name: str, phase: str, batch: int, tokens: int) -> Shares:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        work()
        wall = time.perf_counter() - start
    seconds = {one.key: one.cpu_time_total / 1e6 for one in profiler.key_averages()}
    attention = sum(seconds.get(key, 0.0) for key in ATTENTION)
    forward = seconds[FORWARD]
    runner = sum(value for key, value in seconds.items() if key.startswith(RUNNER)) - forward
    rest = wall - forward - runner
    return Shares(name, phase, batch, tokens, wall, attention, forward - attention, runner, rest)


def _difference(whole: Shares, part: Shares) -> Shares:
    times = ("wall", "attention", "model", "runner", "engine")
    values = {name: getattr(whole, name) - getattr(part, name) for name in times}
    return Shares(whole.kv_cache_dtype, whole.phase, whole.batch, whole.tokens, **values)


def _show(found: list[Shares]) -> None:
    table = Table(title="Where the time goes", title_justify="left")
    for title in ("--kv-cache-dtype", "phase"):
        table.add_column(title)
    for title in ("batch", "ms a token", "attention", "model", "runner", "engine"):
        table.add_column(title, justify="right")
    for one in found:
        values = (one.attention, one.model, one.runner, one.engine)
        table.add_row(
            one.kv_cache_dtype,
            one.phase,
            str(one.batch),
            f"{1000 * one.wall / one.tokens:.2f}",
            *(f"{value / one.wall:.0%}" for value in values),
        )
    Console(highlight=False, width=120).print(table)


if __name__ == "__main__":
    main(app)
