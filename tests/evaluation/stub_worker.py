"""A worker whose model does nothing, or what its prompts ask for: dies, hangs, is used wrongly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.quality import worker
from kivi_vllm.cli.errors import UserError


class Stub:
    """Answers with its prompts."""

    def __init__(self, specification: dict[str, Any]) -> None:
        print("what was going on", flush=True)
        if specification["arguments"]["model"] == "fail":
            raise RuntimeError("no such model")

    def facts(self) -> dict[str, Any]:
        return {"kv_cache_tokens": 1}

    def generate(
        self, prompts: list[Any], params: dict[str, Any], done: Callable[[int], None]
    ) -> list[tuple[str, list[int]]]:
        for index, prompt in enumerate(prompts):
            if prompt == "mistake":
                raise UserError("a mistake", "mend it")
            if prompt == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt == "orphan":  # which holds our files open
                subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            if prompt in ("exit", "orphan"):
                os._exit(3)
            if prompt == "sleep":
                time.sleep(60)
            done(index + 1)
        return [(str(prompt), []) for prompt in prompts]

    def hidden_states(self, window: Sequence[int]) -> np.ndarray:
        return np.zeros((len(window), 4), np.float32)

    def logits(self, states: np.ndarray) -> Any:
        raise NotImplementedError


if __name__ == "__main__":
    worker.main(int(sys.argv[1]), Stub)
