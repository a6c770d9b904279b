"""`vllm serve` as a process, over HTTP: chat, completion, streaming, a crowd, cancellations."""

from __future__ import annotations

import random
import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.conftest import Served

CAPITAL = "What is the capital of France? Answer with one word."


def metrics(served: Served) -> str:
    """What Prometheus would read."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{served.server.port}/metrics", timeout=30) as reply:
        return reply.read().decode()


def metric(served: Served, name: str) -> float:
    """The sum over a metric's series."""
    pattern = rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$"
    values = re.findall(pattern, metrics(served), re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(map(float, values))


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
    """32 requests at once, half of them cancelled on the way; then every block is free."""
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


def test_metrics_name_the_dtype(served: Served) -> None:
    assert re.search(r'vllm:cache_config_info\{.*cache_dtype="kivi2"', metrics(served))


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
