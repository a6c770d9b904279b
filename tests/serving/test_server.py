"""`vllm serve` as a process, over HTTP: chat, streaming, a crowd, cancellations, /metrics."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.spec_decode.metrics import SpecDecodingProm

from kivi_vllm.cli.server import kv_tokens
from tests import metrics
from tests.deploy.expressions import FROM_PROMETHEUS, dashboard, exported
from tests.serving.conftest import Served

CAPITAL = "What is the capital of France? Answer with one word."


def metric(served: Served, name: str) -> float:
    """The sum over a metric's series."""
    return metrics.total(served.server.port, name)


Labels = dict[str, list[dict[str, str]]]
"""The label sets of each sample name."""


def labels_of(text: str) -> Labels:
    found: Labels = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def speculation() -> str:
    """What vLLM adds with a draft configuration, which the server here has not."""
    registry = CollectorRegistry()

    class Prom(SpecDecodingProm):
        _counter_cls = functools.partial(Counter, registry=registry)

    Prom(SimpleNamespace(num_speculative_tokens=1), ["model_name", "engine"], {0: ["model", "0"]})
    return generate_latest(registry).decode()


@pytest.fixture(scope="module")
def samples(served: Served) -> Labels:
    return labels_of(metrics.read(served.server.port))


def test_log_names_the_operators(served: Served) -> None:
    served.client.completions.create(model=served.name, prompt="Hello", max_tokens=2)
    log = served.server.log.read_text()
    assert len(re.findall("KIVI operators on cpu", log)) == 1


def test_chat(served: Served) -> None:
    messages = [{"role": "user", "content": CAPITAL}]
    reply = served.client.chat.completions.create(
        model=served.name, messages=messages, max_tokens=12, temperature=0
    )
    assert "Paris" in reply.choices[0].message.content
    # The same, streamed, and now with a prompt that crosses a block.
    filler = [
        {"role": "user", "content": "Count to five."},
        {"role": "assistant", "content": "One, two, three, four, five."},
    ]
    stream = served.client.chat.completions.create(
        model=served.name,
        messages=filler * 8 + messages,
        max_tokens=12,
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 1
    assert "Paris" in "".join(pieces)


def test_crowd(served: Served) -> None:
    """32 requests together, half of them cancelled on the way; then every block is free."""
    chance = random.Random(0)
    words = ["the", "of", "and", "to", "in", "is", "that", "it", "was", "for", "on", "are"]

    def prompt(index: int) -> str:
        length = chance.choice((5, 60, 127, 128, 129, 300, 500))
        return f"Request {index}: " + " ".join(chance.choice(words) for _ in range(length))

    prompts = [prompt(i) for i in range(32)]
    started = threading.Barrier(32)

    def ask(index: int) -> tuple[int, int | None]:
        started.wait()
        stream = served.client.completions.create(
            model=served.name,
            prompt=prompts[index],
            max_tokens=24,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        for count, chunk in enumerate(stream):
            if chunk.usage is not None:
                return index, chunk.usage.completion_tokens
            if index % 2 and count >= index // 4:
                stream.close()
                return index, None
        raise AssertionError("the stream ended without its usage")

    with ThreadPoolExecutor(32) as pool:
        replies = dict(pool.map(ask, range(32)))
    assert [replies[i] for i in range(0, 32, 2)] == [24] * 16
    assert [replies[i] for i in range(1, 32, 2)] == [None] * 16

    deadline = time.monotonic() + 120
    while metric(served, "vllm:num_requests_running") + metric(served, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline, "cancelled requests go on"
        time.sleep(0.5)
    # The gauge is set by the last step that ran.
    served.client.completions.create(model=served.name, prompt="Hi", max_tokens=1)
    assert metric(served, "vllm:kv_cache_usage_perc") == 0.0
    assert served.server.process.poll() is None


def test_cache_is_described(served: Served, samples: Labels) -> None:
    (cache,) = samples["vllm:cache_config_info"]
    assert (cache["cache_dtype"], cache["block_size"]) == ("kivi2", "128")
    tokens = int(cache["kv_cache_size_tokens"])
    assert tokens == kv_tokens(served.server.log.read_text())
    # Not the capacity: some pages are rings and sinks. deploy/README.md warns of it.
    assert int(cache["num_gpu_blocks"]) * int(cache["block_size"]) > tokens


def test_dashboard_and_alerts_ask_for_what_there_is(samples: Labels) -> None:
    known = samples | labels_of(speculation())
    assert "vllm:gpu_cache_usage_perc" not in known  # as it was called once: names do change
    for expression in exported():
        missing = expression.metrics - set(known)
        assert not missing, f"{expression.where}: no {missing}"
        for name in expression.metrics:
            assert expression.labels - FROM_PROMETHEUS <= set(known[name][0]), expression


def test_table_shows_labels_that_there_are(samples: Labels) -> None:
    (table,) = [panel for panel in dashboard()["panels"] if panel["type"] == "table"]
    shown = table["transformations"][0]["options"]["include"]["names"]
    assert set(shown) - FROM_PROMETHEUS <= set(samples["vllm:cache_config_info"][0])
    assert "cache_dtype" in shown


@pytest.mark.parametrize("length", [1900])
def test_prefix_hit_gives_the_same_answer(served: Served, length: int) -> None:
    prompt = "A list of numbers: " + " ".join(str(n) for n in range(length // 4))
    hits = metric(served, "vllm:prefix_cache_hits_total")
    texts = [
        served.client.completions.create(
            model=served.name, prompt=prompt, max_tokens=16, temperature=0
        )
        .choices[0]
        .text
        for _ in range(2)
    ]
    assert metric(served, "vllm:prefix_cache_hits_total") > hits
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_a_benchmark_sees_what_the_server_does(served: Served, model: Path, tmp_path: Path) -> None:
    """benchmarks/serving/observed.py around vLLM's own load."""
    observed = Path(__file__).parents[2] / "benchmarks" / "serving" / "observed.py"
    vllm = Path(sys.executable).with_name("vllm")
    # Often, so that a machine of any speed is seen at work.
    command = [sys.executable, str(observed), "--every", "0.1"]
    command += [str(vllm), "bench", "serve", "--host", "127.0.0.1"]
    command += ["--port", str(served.server.port), "--model", str(model), "--num-prompts", "12"]
    command += ["--served-model-name", served.name, "--dataset-name", "random", "--ignore-eos"]
    command += ["--random-input-len", "300", "--random-output-len", "96", "--save-result"]
    command += ["--random-prefix-len", "256", "--ready-check-timeout-sec", "0"]
    command += ["--result-dir", str(tmp_path), "--result-filename", "result.json"]
    before = metric(served, "vllm:num_preemptions_total")
    # vLLM's client heeds what the environment says of proxies.
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (12, 0), done.stdout + done.stderr
    seen = result["server"]
    assert seen["cache_dtype"] == "kivi2"
    # How many at once is a matter of the moments: a loaded machine may show one at most.
    assert 1 <= seen["running_max"] <= 12 and 0 < seen["kv_cache_usage_max"] <= 1, seen
    assert seen["preemptions"] == metric(served, "vllm:num_preemptions_total") - before
    assert seen["prefix_hit_rate"] <= 256 / 556, seen
    # The engine's process is counted, not the API server's alone: it holds the weights.
    assert seen["memory_peak_bytes"] > 135e6 * 4, seen
