"""Where an engine's time goes, by cache dtype: attention, the rest of the model, the rest."""

import random
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import pandas as pd
import typer

from benchmarks.common.child import Child
from benchmarks.common.command import Dtypes, Json, Memory, Model, folder_of, start
from benchmarks.common.files import check_folder, write_json
from benchmarks.common.tables import show
from benchmarks.common.vllm_runs import environment, header
from kivi_vllm.cli.plan import parse_memory
from kivi_vllm.cli.progress import step

ATTENTION = ("vllm::unified_attention_with_output", "vllm::unified_kv_cache_update")
"""vLLM's operators around a layer's attention, of every backend: attending and storing."""

FORWARD = "gpu_model_runner: forward"
RUNNER = "gpu_model_runner: "
PARTS = ("attention", "model", "runner", "engine")
"""What the seconds of a phase, `wall`, add up from: attending and storing in all layers; the rest
of the forward pass; making inputs, sampling and bookkeeping; scheduler and detokenization."""

Row = dict[str, Any]
"""One phase: `kv_cache_dtype`, `phase` (prefill, of prompts of which nothing is cached, or decode),
`batch` (sequences), `tokens` (of prompts, or decoded, of all sequences), `wall` and `PARTS`."""


def shares(
    model: Model = None,
    kv_cache_dtype: Dtypes = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable; default: 1 and 3.")] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a prompt.")] = 3500,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps measured.")] = 16,
    memory: Memory = "256MiB",
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "auto",
    json_path: Json = None,
) -> None:
    """Profile prefill and decode in vLLM's engine, in eager mode, with PyTorch's profiler."""
    check_folder("--json", json_path)
    options = {
        "dtype": dtype,
        "max_model_len": context + steps + 2,
        "kv_cache_memory_bytes": parse_memory(memory),
        "enforce_eager": True,
        "disable_log_stats": True,
    }
    folder = folder_of(model)
    env = environment(folder)
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CUSTOM_SCOPES_FOR_PROFILING": "1"}

    head = header("engine.shares", folder)
    rows: list[Row] = []
    for name in dict.fromkeys(kv_cache_dtype or ["auto", "fp8", "kivi2"]):
        work = (folder, name, batch or [1, 3], context, steps, options)
        with step(f"profiling {name}") as update, Child(f"the engine of {name}", env) as child:
            rows += child.call(measure, *work, update=update)
        write_json(json_path, {"header": head, "rows": rows})
    table = pd.DataFrame(rows)
    table.insert(3, "ms a token", 1000 * table["wall"] / table["tokens"])
    for part in PARTS:
        table[part] /= table["wall"]
    forms = {"ms a token": ".2f"} | dict.fromkeys(PARTS, ".0%")
    show(table.drop(columns=["tokens", "wall"]), "Where the time goes", forms)


def measure(
    model: str, name: str, batches: list[int], context: int, steps: int, options: dict[str, Any]
) -> list[Row]:
    """Profile one engine; in its own process, as a second one does not start where one has run."""
    from vllm import LLM, SamplingParams

    engine = LLM(model, kv_cache_dtype=name, **options)
    vocabulary = engine.get_tokenizer().vocab_size
    dice = random.Random(0)
    rows = []

    def run(prompts: list[Any], tokens: int) -> None:
        sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0)
        engine.generate(prompts, sampling, use_tqdm=False)

    def new(length: int) -> Any:
        return {"prompt_token_ids": [dice.randrange(vocabulary) for _ in range(length)]}

    run([new(64)], 4)
    for batch in batches:
        prompts = [new(context) for _ in range(batch)]
        own = {"kv_cache_dtype": name, "phase": "prefill", "batch": batch}
        rows.append(own | {"tokens": batch * context} | _profile(partial(run, prompts, 1)))
        # Now all of the prompts but their last block are in the prefix cache, if they fit there:
        # what that block costs is measured by itself and taken off.
        short = _profile(partial(run, prompts, 1))
        whole = _profile(partial(run, prompts, 1 + steps))
        decode = {key: whole[key] - short[key] for key in whole}
        rows.append(own | {"phase": "decode", "tokens": batch * steps} | decode)
    return rows


def _profile(work: Callable[[], None]) -> dict[str, float]:
    """Seconds of some work: `wall` and `PARTS`."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        work()
        wall = time.perf_counter() - start
    seconds = {one.key: one.cpu_time_total / 1e6 for one in profiler.key_averages()}
    attention = sum(seconds.get(key, 0.0) for key in ATTENTION)
    forward = seconds[FORWARD]
    runner = sum(value for key, value in seconds.items() if key.startswith(RUNNER)) - forward
    parts = (attention, forward - attention, runner, wall - forward - runner)
    return {"wall": wall} | dict(zip(PARTS, parts, strict=True))


if __name__ == "__main__":
    start(shares)
