"""`vllm serve --data-parallel-size 2`: two engines, each with pages of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kivi_vllm.cli.process import running
from kivi_vllm.cli.server import Server, free_port, serve_command, serve_environment
from tests import metrics
from tests.engine import Answer, engine, generate, tiny_model
from tests.models.harness import LOSSLESS, PROMPTS, worst
from tests.models.pictures import tokenizer
from tests.quick import quick_engines
from tests.serving.conftest import START_S

ANSWER = 12
ENGINES = 2
# Of the prompts, 300, 77, 128 and 513 tokens, a second time.
CACHED = 256 + 512


@pytest.fixture(scope="module")
def model() -> Path:
    """A dense model: of mixtures of experts vLLM's CPU workers cannot run two engines."""
    path = tiny_model()
    tokenizer().save_pretrained(path)
    return Path(path)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[Answer]:
    """Answers of one engine on vLLM's own attention."""
    with quick_engines(), engine(str(model), "auto") as llm:
        return generate(llm, PROMPTS, ANSWER)


@pytest.fixture(scope="module")
def server(
    model: Path, expected: list[Answer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server with two engines; both have the two cores."""
    port = free_port()
    options = ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    options += ["--kv-cache-memory-bytes", str(32 << 20), "--max-num-batched-tokens", "200"]
    options += ["--data-parallel-size", str(ENGINES), "--api-server-count", "1"]
    log = tmp_path_factory.mktemp("serve") / "log"
    environment = serve_environment(log.parent)
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    with running(serve_command(model, "kivi_raw", port, options), log, environment) as process:
        server = Server(process, log, port)
        server.wait_until_healthy(START_S, lambda text: None)
        yield server


def _ask(server: Server, name: str, rank: int | None = None) -> list[Answer]:
    """Answers to the prompts; `rank`: of this engine, where the server has several."""
    from openai import OpenAI

    client = OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", timeout=300)
    headers = {} if rank is None else {"X-data-parallel-rank": str(rank)}
    answers = []
    for prompt in PROMPTS:
        reply = client.completions.create(
            model=name,
            prompt=list(prompt),
            max_tokens=ANSWER,
            temperature=0,
            logprobs=0,
            extra_headers=headers,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
        [choice] = reply.choices
        tokens: Any = choice.model_extra["token_ids"]
        answers.append(Answer(tuple(tokens), tuple(choice.logprobs.token_logprobs)))
    return answers


def _by_engine(server: Server, name: str) -> dict[str, float]:
    """A metric of each engine."""
    return {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(metrics.read(server.port))
        for sample in family.samples
        if sample.name == name
    }


@pytest.mark.slow
def test_one_server_for_two_engines(server: Server, model: Path, expected: list[Answer]) -> None:
    for rank in range(ENGINES):
        for _ in range(2):
            assert worst(_ask(server, model.name, rank), expected) < LOSSLESS
    hits = _by_engine(server, "vllm:prefix_cache_hits_total")
    assert hits == {str(rank): CACHED for rank in range(ENGINES)}
    # Who does not choose is served too.
    assert worst(_ask(server, model.name), expected) < LOSSLESS
    assert _by_engine(server, "vllm:kv_cache_usage_perc") == {"0": 0.0, "1": 0.0}
