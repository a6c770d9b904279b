"""A worker without a model, for what `Engine` does itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.child import report
from benchmarks.quality.rows import CacheRow


def start(row: CacheRow, arguments: dict[str, Any]) -> dict[str, Any]:
    print("what was going on", flush=True)
    if arguments["model"] == "fail":
        raise RuntimeError("no such model")
    return {"kv_cache_tokens": 1}


def generate(prompts: list[list[int]], params: dict[str, Any]) -> list[tuple[str, list[int]]]:
    for index in range(len(prompts)):
        report(index + 1)
    return [(str(prompt), prompt) for prompt in prompts]


def hidden_states(window: list[int]) -> np.ndarray:
    return np.zeros((len(window), 4), np.float32)
