"""A model that is none, for what `Engine` does itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.common.child import report
from benchmarks.quality import engine
from benchmarks.quality.engine import Answer
from benchmarks.quality.rows import CacheRow


class Stub:
    def generate(self, prompts: list[list[int]], params: dict[str, Any]) -> list[Answer]:
        for index in range(len(prompts)):
            report(index + 1)
        return [Answer(str(prompt), prompt) for prompt in prompts]

    def hidden_states(self, window: list[int]) -> np.ndarray:
        return np.zeros((len(window), 4), np.float32)


def start(row: CacheRow, arguments: dict[str, Any]) -> dict[str, Any]:
    print("what was going on", flush=True)
    if arguments["model"] == "fail":
        raise RuntimeError("no such model")
    engine.model = Stub()
    return {"kv_cache_tokens": 1}
