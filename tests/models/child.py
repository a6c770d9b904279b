"""Engines in a process of their own: `python -m tests.models.child RUNS_JSON RESULT_FILE`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from kivi_vllm.attention.selection import pages_counted
from tests.engine import Answer, engine, generate
from tests.models.harness import LOSSLESS, PROMPTS, backends, capacity

WORKERS = dict(
    VLLM_ENABLE_V1_MULTIPROCESSING="1",
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # `results` sends functions to the workers
)
"""The environment of engines with several workers."""


def results(model: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a user sees of each run: `runs` are the engines' arguments, and perhaps `prompts`."""
    from vllm.config.cache import CacheDType

    found = []
    for run in runs:
        prompts = run.pop("prompts", PROMPTS)
        with engine(model, **run) as llm:
            answers = generate(llm, prompts, 12)
            found.append(
                dict(
                    tokens=[list(a.tokens) for a in answers],
                    logprobs=[list(a.logprobs) for a in answers],
                    backends=sorted(backends(llm)),
                    capacity=capacity(llm),
                    kivi_dtypes="kivi2" in get_args(CacheDType),
                    pages_counted=[list(x) for x in llm.collective_rpc(pages_counted)],
                    blocks=llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
                )
            )
    return found


def results_in_child(
    folder: Path, model: str, runs: list[dict[str, Any]], **environment: str
) -> list[dict[str, Any]]:
    """`results` of a fresh process with these environment variables."""
    path = folder / "results.json"
    spec = json.dumps(dict(model=model, runs=runs))
    done = subprocess.run(
        [sys.executable, "-m", __name__, spec, str(path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads(path.read_text())


def assert_same(found: dict[str, Any], expected: Sequence[Answer]) -> None:
    """Assert that a run on KIVI's attention gave these answers."""
    assert found["backends"] == ["KIVI"]
    for answer, tokens, logprobs in zip(expected, found["tokens"], found["logprobs"], strict=True):
        assert list(answer.tokens) == tokens
        assert list(answer.logprobs) == pytest.approx(logprobs, abs=LOSSLESS)


def _main() -> None:
    spec, path = sys.argv[1:]
    Path(path).write_text(json.dumps(results(**json.loads(spec))))


if __name__ == "__main__":
    _main()
