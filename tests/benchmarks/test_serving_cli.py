"""`benchmarks/serving` without servers: mistakes, the loads as vLLM takes them, its results."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import plot, report
from benchmarks.serving.observed import Observer, parse
from benchmarks.serving.sweep import LATENCIES, PERCENTILES, WARM_UP, Row
from benchmarks.serving.workloads import WORKLOADS, Sizes, rising, saturating

ROOT = Path(__file__).parents[2]
SIZES = Sizes(input_len=3500, output_len=128, prefixes=8, scale=1.0, max_model_len=8192)


def serving(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.serving", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--section", "nothing"], ["--section nothing", "long, shared, kivi"]),
        (["--max-model-len", "4096"], ["4128 tokens", "--max-model-len 4128"]),
        (["--memory", "much"], ["much"]),
        (["--scale", "0"], ["--scale 0"]),
        (["--json", "/no/such/folder/x.json"], ["/no/such/folder"]),
    ],
)
def test_mistakes_show_before_a_server_starts(arguments: list[str], words: list[str]) -> None:
    done = serving(*arguments)
    assert done.returncode == 2
    for word in [*words, "remedy:"]:
        assert word in done.stderr


def test_what_vllm_needs_at_the_end_is_asked_for_first() -> None:
    """`vllm bench sweep` would ask for pandas after the last load."""
    code = "import sys, runpy; sys.modules['pandas'] = None; runpy.run_module('benchmarks.serving')"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert "pandas is not installed" in done.stderr and "kivi-vllm[bench]" in done.stderr


@pytest.mark.parametrize("scale", [1.0, 0.01])
def test_vllm_takes_every_load(scale: float) -> None:
    """The records are arguments of the `vllm bench serve` that is installed, of the right size."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.benchmarks.sweep.param_sweep import ParameterSweep
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    sizes = replace(SIZES, scale=scale)
    records: list[dict[str, Any]] = [WARM_UP, *rising(sizes, [0.05, 2.0])]
    for name in WORKLOADS:
        records += saturating(name, sizes)
    names = [record["_benchmark_name"] for record in records]
    contexts = [f"context-{tokens}" for tokens in (512, 1024, 2048, 4096)]
    assert names == ["warm-up", "rate-0.05", "rate-2", "long", "shared", "kivi", *contexts]
    for item in ParameterSweep.from_records(records):
        arguments = parser.parse_args(item.apply_to_cmd(["--model", "m"]))
        for key, value in item.items():
            if key == "_benchmark_name":
                continue
            assert str(getattr(arguments, key)) in (str(value), json.dumps(value))
        if arguments.dataset_name == "prefix_repetition":
            assert arguments.num_prompts >= arguments.prefix_repetition_num_prefixes


def test_prompts_spread_from_3000_to_4000() -> None:
    """What the README says of the workload `long`, by vLLM's own sampling."""
    from transformers import AutoTokenizer
    from vllm.benchmarks.datasets import RandomDataset

    from kivi_vllm.cli.default_model import default_model

    (load,) = saturating("long", SIZES)
    tokenizer = AutoTokenizer.from_pretrained(default_model())
    requests = RandomDataset(random_seed=0).sample(
        tokenizer=tokenizer,
        num_requests=load["num_prompts"],
        input_len=load["random_input_len"],
        output_len=load["random_output_len"],
        range_ratio=load["random_range_ratio"],
    )
    lengths = sorted(request.prompt_len for request in requests)
    assert lengths[0] >= 3000 and lengths[-1] <= 4000
    assert lengths[-1] - lengths[0] > 500
    assert {request.expected_output_len for request in requests} == {128}


def row(dtype: str, turn: int, speed: float, running: float) -> Row:
    return {
        "kv_cache_dtype": dtype,
        "workload": "long",
        "round": turn,
        "request_rate": None,
        "num_prompts": 24,
        "completed": 24 if turn else 23,
        "failed": 0 if turn else 1,
        "duration_s": 10.0,
        "requests_per_s": speed / 128,
        "output_tokens_per_s": speed,
        "tokens_per_s": speed * 30,
        "latency_ms": {name: {p: 100.0 * speed for p in PERCENTILES} for name in LATENCIES},
        "kv_cache_tokens": {"auto": 11648, "kivi2": 50937}[dtype],
        "server": {
            "running_max": running + 1,
            "running_while_others_wait": running,
            "waiting_max": 20,
            "kv_cache_usage_max": 0.9,
            "preemptions": 2,
            "prefix_hit_rate": None,
            "memory_peak_bytes": 1 << 30,
            "gpu_memory_peak_bytes": None,
        },
    }


ROWS = [
    row("auto", 0, 5.0, 3),
    row("kivi2", 0, 20.0, 12),
    row("auto", 1, 7.0, 3),
    row("kivi2", 1, 10.0, 13),
]


def test_summary_is_of_medians_against_the_first() -> None:
    auto, kivi2 = report.summarize(ROWS)
    assert auto["output_tokens_per_s"] == 6.0 and kivi2["output_tokens_per_s"] == 15.0
    assert auto["ratio"] == 1.0 and kivi2["ratio"] == 2.5
    assert kivi2["running"] == 13.5 and kivi2["batch_ratio"] == pytest.approx(13.5 / 4)
    assert kivi2["running_while_others_wait"] == 12.5
    assert kivi2["concurrency_ratio"] == pytest.approx(12.5 / 3)
    assert kivi2["failed"] == 1 and kivi2["rounds"] == 2 and kivi2["saturated"]
    (free,) = report.summarize([row("kivi2", 1, 10.0, 23)])
    assert free["running"] == 24 and not free["saturated"]


def test_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(ROWS)
    shown = capsys.readouterr().out
    assert "50,937" in shown and "4.37×" in shown and "2.50×" in shown
    # One definition of concurrency, and the most beside it, named as such.
    assert f"{12.5 / 3:.2f}×" in shown and "at once" not in shown
    assert all(word in shown for word in ("running", "while", "wait", "most"))
    pytest.importorskip("matplotlib")
    header = {"model": "m", "gpu": None, "cpu": "c"}
    rates = [
        one | {"workload": f"rate-{rate}", "request_rate": rate} for one in ROWS for rate in (1, 2)
    ]
    contexts = [one | {"workload": "context-512"} for one in ROWS]
    path = tmp_path / "serving.json"
    report.write(path, header, [*ROWS, *rates, *contexts])
    assert json.loads(path.read_text())["rows"][0] == ROWS[0]
    command = [sys.executable, "-m", "benchmarks.serving.plot", str(path)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "p")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    files = {Path(name).name for name in done.stdout.split()}
    kinds = ("capacity", "load", "rate", "pareto", "context")
    assert files == {f"p-{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")}


RESULTS = sorted(path.name for path in (ROOT / "benchmarks" / "results").glob("serving-*.json"))


@pytest.mark.parametrize("name", RESULTS)
def test_published_files_are_drawn(name: str, tmp_path: Path) -> None:
    """The files' schema is the one that is drawn."""
    pytest.importorskip("matplotlib").use("Agg")
    data = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    files = list(plot.draw(data["header"], data["summary"], tmp_path / "p"))
    assert len(files) >= 4 and all(file.stat().st_size > 1000 for file in files)


def test_summary_of_published_rows_is_the_published_one() -> None:
    """Every field of an old file's summary is still made, from its own rows."""
    for name in RESULTS:
        data = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
        made = report.summarize(data["rows"])
        for old, new in zip(data["summary"], made, strict=True):
            assert {key: new[key] for key in old} == old, name


METRICS = """\
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0"} %d
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0"} %d
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0"} 0.5
# TYPE vllm:num_preemptions counter
vllm:num_preemptions_total{engine="0"} %d
# TYPE vllm:prefix_cache_queries counter
vllm:prefix_cache_queries_total{engine="0"} %d
# TYPE vllm:prefix_cache_hits counter
vllm:prefix_cache_hits_total{engine="0"} %d
"""


def test_counters_are_those_of_the_load_alone() -> None:
    observer = Observer("127.0.0.1", 1)
    readings = [(0, 0, 4, 100, 50), (3, 5, 4, 200, 60), (4, 9, 6, 250, 70), (9, 0, 7, 300, 100)]
    observer.samples = [parse(METRICS % reading) for reading in readings]
    observer.memory = [5, 9, 7, 6]
    seen = observer.summary()
    assert seen["running_max"] == 9 and seen["running_while_others_wait"] == 3.5
    assert seen["preemptions"] == 3 and seen["prefix_hit_rate"] == 0.25
    assert seen["memory_peak_bytes"] == 9 and seen["waiting_max"] == 9
