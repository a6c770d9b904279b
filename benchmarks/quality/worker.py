"""The child process of `run.Engine`: `python -m benchmarks.quality.worker REPLIES_FD`.

Requests come as JSON lines on stdin, the first of which says what to start; answers go to the file
descriptor. When stdin ends the process ends, so that none outlives its parent.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from benchmarks.quality import metrics
from kivi_vllm.cli.errors import UserError

if TYPE_CHECKING:
    import torch

SLICE_NUMBERS = 1 << 25
"""Logits of one model that are held at a time: 128 MiB in fp32."""


class Model(Protocol):
    """What computes a row."""

    def facts(self) -> dict[str, Any]:
        """See `run.Engine.facts`."""

    def generate(
        self, prompts: list[Any], params: dict[str, Any], done: Callable[[int], None]
    ) -> list[tuple[str, list[int]]]:
        """Texts and token ids of greedy answers."""

    def hidden_states(self, window: Sequence[int]) -> np.ndarray:
        """[T, hidden] fp32."""

    def logits(self, states: np.ndarray) -> torch.Tensor:
        """[n, hidden] fp32 -> [n, vocabulary] fp32."""


def start(specification: dict[str, Any]) -> Model:
    """The model that a specification asks for."""
    kind = specification["row"]["kind"]
    if kind == "vllm":
        from benchmarks.quality.engine import VllmModel

        return VllmModel(specification["arguments"])
    if kind == "simulated":
        from benchmarks.quality.simulation import SimulatedModel

        return SimulatedModel(specification["row"]["dtype"], specification["arguments"])
    from benchmarks.quality.quantized_cache import QuantizedCacheModel

    return QuantizedCacheModel(specification["row"]["dtype"], specification["arguments"])


class Worker:
    """Serves the requests of the parent.

    Args:
        send: takes the answers.
    """

    def __init__(self, model: Model, send: Callable[[dict[str, Any]], None]) -> None:
        self.model = model
        self.send = send

    def handle(self, request: dict[str, Any]) -> Any:
        """Do what one request asks for; returns the answer's `result`."""
        op = request.pop("op")
        if op == "generate":
            prompts = request.pop("prompts")
            return self.model.generate(prompts, request, lambda n: self.send({"done": n}))
        if op == "hidden_states":
            return self._hidden_states(request["windows"], Path(request["folder"]))
        if op == "compare":
            return self._compare(Path(request["folder"]))
        raise ValueError(f"unknown request {op!r}")

    def _hidden_states(self, windows: list[list[int]], folder: Path) -> list[str]:
        folder.mkdir()
        paths = []
        for index, window in enumerate(windows):
            path = folder / f"{index}.npy"
            np.save(path, self.model.hidden_states(window))
            paths.append(str(path))
            self.send({"done": index + 1})
        return paths

    def _compare(self, folder: Path) -> str:
        reference, targets = (np.load(folder / f"{name}.npy") for name in ("reference", "targets"))
        other = folder / "states.npy"
        states = np.load(other) if other.exists() else None
        parts: list[metrics.TokenFigures] = []
        at, size = 0, 16
        while at < len(targets):
            mine = slice(at, at + size)
            a = self.model.logits(reference[mine])
            b = a if states is None else self.model.logits(states[mine])
            parts.append(metrics.compare_logits(a, b, targets[mine]))
            at += size
            size = max(1, SLICE_NUMBERS // a.shape[1])
        path = folder / "figures.npz"
        arrays: dict[str, Any] = metrics.joined(parts).arrays()
        np.savez(path, **arrays)
        return str(path)


def main(descriptor: int, start: Callable[[dict[str, Any]], Model] = start) -> None:
    """Serve until stdin ends.

    Args:
        descriptor: where the answers go.
        start: makes the model that the first request asks for.

    """
    os.set_inheritable(descriptor, False)
    replies = os.fdopen(descriptor, "wb", buffering=0)
    requests: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os._exit(0)  # also in the middle of work: nobody waits for it

    def send(reply: dict[str, Any]) -> None:
        data = memoryview(json.dumps(reply).encode() + b"\n")
        while data:
            data = data[replies.write(data) or 0 :]

    threading.Thread(target=read, daemon=True).start()
    worker: Worker | None = None
    while True:
        request = requests.get()
        try:
            if worker is None:
                model = start(request)
                worker = Worker(model, send)
                send({"result": model.facts()})
            else:
                send({"result": worker.handle(request)})
        except UserError as error:
            send({"mistake": str(error), "remedy": error.remedy})
        except Exception as error:
            traceback.print_exc()
            send({"error": f"{type(error).__name__}: {error}"})
            if worker is None:
                return


if __name__ == "__main__":
    main(int(sys.argv[1]))
