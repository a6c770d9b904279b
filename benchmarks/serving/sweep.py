"""One cache dtype's server under several loads: a `vllm bench sweep serve` and its rows."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.vllm_runs import run_to_end, vllm_command
from kivi_vllm.cli.server import free_port, kv_tokens

PERCENTILES = ("p50", "p95", "p99")
LATENCIES = ("ttft", "tpot", "itl", "e2el")

WARM_UP = {
    "_benchmark_name": "warm-up",
    "num_prompts": 2,
    "dataset_name": "random",
    "random_input_len": 256,
    "random_output_len": 8,
}
"""Of each server, before what is measured; a sweep's own takes the first prompts of each load."""


Row = dict[str, Any]
"""One load on one server: `kv_cache_dtype`, `workload` (long, shared, kivi, context-N or rate-N),
`round`, `request_rate` (a second; None if all were there or came one by one), the requests
(`num_prompts`, `completed`, `failed`), `duration_s` from the first request to the end of the last
answer, and over that time `requests_per_s`, `output_tokens_per_s` and `tokens_per_s` (prompts,
cached or not, and outputs). `latency_ms` has `PERCENTILES` of `LATENCIES`: time to the first token,
mean time of an answer's later tokens, time between tokens, whole answers. `kv_cache_tokens` is what
vLLM reports at start, `server` what `observed.py` saw."""

_RATES = {
    "duration_s": "duration",
    "requests_per_s": "request_throughput",
    "output_tokens_per_s": "output_throughput",
    "tokens_per_s": "total_token_throughput",
}
"""Our names of what `vllm bench serve` reports, and its own."""


def sweep(
    title: str,
    model: str,
    dtype: str,
    turn: int,
    loads: Sequence[dict[str, Any]],
    serve_arguments: Sequence[str],
) -> list[Row]:
    """Start a server and put the loads on it one after the other, its prefix cache emptied between.

    Loads are records of arguments of `vllm bench serve`, each with a `_benchmark_name`. The round,
    `turn`, is also the seed of the prompts.

    Raises:
        UserError: with the end of the log, if a server or a load failed.

    """
    port = str(free_port())
    where = ["--host", "127.0.0.1", "--port", port]
    serve = [vllm_command(), "serve", model, "--kv-cache-dtype", dtype, *where]
    serve += ["--disable-uvicorn-access-log", *serve_arguments]
    bench = [sys.executable, str(Path(__file__).with_name("observed.py"))]
    bench += [vllm_command(), "bench", "serve", "--model", model, *where]
    bench += ["--seed", str(turn), "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    # The first request would otherwise be sent once more before the clock starts, and be cached.
    bench += ["--ready-check-timeout-sec", "0"]
    bench += ["--metric-percentiles", ",".join(p.removeprefix("p") for p in PERCENTILES)]
    with tempfile.TemporaryDirectory(prefix="kivi-benchmark-") as name:
        work = Path(name)
        (work / "loads.json").write_text(json.dumps([WARM_UP, *loads]))
        command = [vllm_command(), "bench", "sweep", "serve", "--show-stdout"]
        command += ["--serve-cmd", shlex.join(serve), "--bench-cmd", shlex.join(bench)]
        command += ["--bench-params", str(work / "loads.json"), "--num-runs", "1"]
        command += ["--server-ready-timeout", "1800"]
        command += ["--output-dir", name, "--experiment-name", "results"]
        what = f"vllm bench sweep serve with --kv-cache-dtype {dtype}"
        remedy = f"try the server itself: {shlex.join(serve)}"
        text = run_to_end(what, command, work / "log", model=model, title=title, remedy=remedy)
        results = [json.loads(file.read_text()) for file in (work / "results").glob("*/run=*.json")]
    found = {data["_benchmark_name"]: _row(data, dtype, turn, kv_tokens(text)) for data in results}
    return [found[load["_benchmark_name"]] for load in loads]


def _row(data: dict[str, Any], dtype: str, turn: int, tokens: int | None) -> Row:
    rate = data["request_rate"]
    return {
        "kv_cache_dtype": dtype,
        "workload": data["_benchmark_name"],
        "round": turn,
        "request_rate": None if rate == "inf" else float(rate),
        **{name: data[name] for name in ("num_prompts", "completed", "failed")},
        **{name: data[theirs] for name, theirs in _RATES.items()},
        "latency_ms": {n: {p: data[f"{p}_{n}_ms"] for p in PERCENTILES} for n in LATENCIES},
        "kv_cache_tokens": tokens,
        "server": data["server"],
    }
