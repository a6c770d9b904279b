"""Engines for comparisons, each in a child process of its own.

vLLM cannot make two engines one after the other in a process on every platform, and a process
that ends gives all its memory back. The two sides talk in JSON lines; arrays go through files.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.child import Child, Done, EngineError
from benchmarks.quality.metrics import TokenFigures
from benchmarks.quality.rows import CacheRow
from kivi_vllm.cli.default_model import cache_folder
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.process import tail
from kivi_vllm.cli.progress import Update
from kivi_vllm.cli.server import latest, serve_environment

WORKER = "benchmarks.quality.worker"
"""The module that a child runs."""

__all__ = ["Done", "Engine", "EngineError", "Generation", "Settings"]


def _ignore(_: object) -> None:
    """Nobody wants to know."""


@dataclass(frozen=True)
class Settings:
    """What all engines of a comparison have in common.

    Attributes:
        model: folder of a model.
        max_model_len: longest sequence, prompt and answer.
        dtype: of the model's weights and activations.
        kv_cache_memory_bytes: size of the KV cache; what vLLM takes by itself if None.
        max_num_batched_tokens: tokens of a step; longer prompts are computed in chunks of it.
        max_num_seqs: sequences that run together.
        prefill: mode of the KIVI dtypes for rows that do not name one: `exact`, `cached`, or None
            for the default.
        extra: further arguments of `vllm.LLM`.

    """

    model: str
    max_model_len: int
    dtype: str = "auto"
    kv_cache_memory_bytes: int | None = None
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 8
    prefill: str | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def for_row(self, row: CacheRow) -> dict[str, Any]:
        """The arguments of `vllm.LLM` for one row."""
        arguments: dict[str, Any] = dict(
            model=self.model,
            max_model_len=self.max_model_len,
            dtype=self.dtype,
            kv_cache_dtype=row.dtype,
            max_num_seqs=self.max_num_seqs,
            # Compiling takes longer than most comparisons gain by it.
            enforce_eager=True,
            seed=0,
            disable_log_stats=True,
        )
        if self.kv_cache_memory_bytes is not None:
            arguments["kv_cache_memory_bytes"] = self.kv_cache_memory_bytes
        if self.max_num_batched_tokens is not None:
            arguments["max_num_batched_tokens"] = self.max_num_batched_tokens
        if row.is_kivi:
            mode = {"prefill": self.prefill} if self.prefill is not None else {}
            arguments["additional_config"] = {"kivi": {**mode, **row.options}}
        return {**arguments, **self.extra}


@dataclass(frozen=True)
class Generation:
    """A greedy answer.

    Attributes:
        text: without the prompt; empty where the engine has no tokenizer.
        token_ids: of the answer.

    """

    text: str
    token_ids: list[int]


class Engine:
    """One row's engine in a child process: `with Engine(settings, row) as engine: ...`.

    Args:
        settings: of the comparison.
        row: whose cache dtype and options are used. Rows that vLLM does not compute know
            `hidden_states` and `compare` only.
        log: where the child's output goes; kept. Without it the log is a temporary file, kept only
            if the engine fails.
        update: told what the child does while it starts.

    Attributes:
        facts: what the child says of itself: `kv_cache_tokens` (capacity of the cache, None where
            nothing limits it), `kv_bytes_per_token` (of the cache, all layers and heads, without
            what a sequence holds beside it; None where unknown).

    """

    def __init__(
        self,
        settings: Settings,
        row: CacheRow,
        log: Path | None = None,
        update: Update = _ignore,
    ) -> None:
        self.settings = settings
        self.row = row
        self.facts: dict[str, Any] = {}
        self._keep_log = log is not None
        self._update = update
        self._folder = Path(tempfile.mkdtemp(prefix="kivi-evaluation-"))
        self.log = log or self._folder / "log"
        self._child: Child | None = None
        self._files = 0

    # ------------------------------------------------------------------ life

    def __enter__(self) -> Engine:
        try:
            self._start()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def _start(self) -> None:
        environment = _environment(self.settings)
        self._child = Child(self.row.name, WORKER, self.log, environment)
        arguments = self.settings.for_row(self.row)
        if self.row.kind != "vllm":
            arguments["options"] = self.row.options
        self.facts = self._child.ask(
            dict(row=asdict(self.row), arguments=arguments),
            waiting=lambda: self._update(latest(tail(self.log, 5))),
        )

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.close()
        if isinstance(error, EngineError) and not self._keep_log:
            for path in self._folder.iterdir():
                if path != self.log:  # which the message names
                    shutil.rmtree(path, ignore_errors=True)
        else:
            shutil.rmtree(self._folder, ignore_errors=True)

    # ------------------------------------------------------------------ work

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | Sequence[str],
        max_tokens: int,
        stop: Sequence[str] | None = None,
        on_done: Done | None = None,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Greedy answers, in the order of the prompts.

        Args:
            prompts: token ids, or texts that the model's tokenizer is to split.
            max_tokens: of each answer.
            stop: texts that end an answer; they are no part of it.
            on_done: called with the number of answers that are done.
            ignore_eos: go on to `max_tokens` whatever the model says.

        Raises:
            UserError: a prompt is too long for the engine.

        """
        for prompt in prompts:
            if not isinstance(prompt, str):
                self._check_length(len(prompt), max_tokens)
        found = self._ask(
            dict(
                op="generate",
                prompts=[p if isinstance(p, str) else list(map(int, p)) for p in prompts],
                max_tokens=max_tokens,
                stop=list(stop or []),
                ignore_eos=ignore_eos,
            ),
            on_done,
        )
        return [Generation(text, ids) for text, ids in found]

    def hidden_states(
        self, windows: Sequence[Sequence[int]], on_done: Done | None = None
    ) -> list[np.ndarray]:
        """The model's final hidden states (what the logits are computed from) by position.

        Args:
            windows: token ids, each computed alone and from nothing.
            on_done: called with the number of windows that are done.

        Returns:
            for each window of T tokens, [T, hidden] fp32.

        """
        for window in windows:
            # A prompt needs one token of an answer to be computed.
            self._check_length(len(window), 1)
        request = dict(op="hidden_states", windows=[list(map(int, w)) for w in windows])
        request["folder"] = str(self._new("states"))
        paths = self._ask(request, on_done)
        states = [np.load(path) for path in paths]
        shutil.rmtree(str(request["folder"]))
        return states

    def compare(
        self, reference: np.ndarray, states: np.ndarray, targets: Sequence[int]
    ) -> TokenFigures:
        """What two rows say of the same positions, over the whole vocabulary.

        Logits are made from the states by this engine's model, in slices: the head of the model is
        the same in every row.

        Args:
            reference, states: hidden states [T, hidden] of the reference and of the row; the same
                array if the row is the reference.
            targets: [T] the token that follows each position.

        """
        folder = self._new("compare")
        folder.mkdir()
        arrays = dict(reference=reference, targets=np.asarray(targets, np.int64))
        if states is not reference:
            arrays["states"] = states
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        path = self._ask(dict(op="compare", folder=str(folder)))
        with np.load(path) as file:
            figures = TokenFigures(**{name: file[name] for name in file.files})
        shutil.rmtree(folder)
        return figures

    # ------------------------------------------------------------------ parts

    def _check_length(self, tokens: int, answer: int) -> None:
        limit = self.settings.max_model_len
        if tokens + answer > limit:
            raise UserError(
                f"a prompt of {tokens} tokens and {answer} to generate do not fit into "
                f"max_model_len {limit}",
                "raise max_model_len (up to the model's own limit) or take shorter prompts",
            )

    def _new(self, name: str) -> Path:
        self._files += 1
        return self._folder / f"{name}-{self._files}"

    def _ask(self, request: dict[str, Any], on_done: Done | None = None) -> Any:
        if self._child is None:
            raise RuntimeError("the engine does not run: use it as a context manager")
        return self._child.ask(request, on_done)


def _environment(settings: Settings) -> dict[str, str]:
    env = serve_environment(cache_folder())
    if not Path(settings.model).is_dir() and "HF_HUB_OFFLINE" not in os.environ:
        del env["HF_HUB_OFFLINE"]  # the model may have to come from somewhere
    # The child reads hidden states where they are computed: in its own process.
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if settings.extra.get("enforce_eager", True):
        # vLLM compiles a piece of its sampler even where the model is eager.
        env.setdefault("TORCH_COMPILE_DISABLE", "1")
    return env
