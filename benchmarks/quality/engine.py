"""Engines for comparisons, each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.common.child import Child
from benchmarks.quality import worker
from benchmarks.quality.rows import CacheRow
from kivi_vllm.cli.default_model import cache_folder
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.progress import Update
from kivi_vllm.cli.server import serve_environment

Done = Callable[[int], object]
"""Called with the number of prompts or windows that are done so far."""


@dataclass(frozen=True)
class Settings:
    """What all engines of a comparison have in common.

    Attributes:
        model: folder of a model.
        max_model_len: longest sequence, prompt and answer.
        dtype: of the model's weights and activations.
        kv_cache_memory_bytes: size of the KV cache; what vLLM takes by itself if None.
        max_num_batched_tokens: tokens of a step; longer prompts are computed in chunks of it.
        extra: further arguments of `vllm.LLM`.

    """

    model: str
    max_model_len: int
    dtype: str = "auto"
    kv_cache_memory_bytes: int | None = None
    max_num_batched_tokens: int | None = None
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def for_row(self, row: CacheRow) -> dict[str, Any]:
        """The arguments of `vllm.LLM` for one row; the KIVI dtypes run with `prefill=cached`."""
        arguments: dict[str, Any] = dict(
            model=self.model,
            max_model_len=self.max_model_len,
            dtype=self.dtype,
            kv_cache_dtype=row.dtype,
            max_num_seqs=8,
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
            arguments["additional_config"] = {"kivi": {"prefill": "cached", **row.options}}
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
    """One row's engine in a process of its own: `with Engine(settings, row) as engine: ...`.

    Args:
        settings: of the comparison.
        row: whose cache dtype and options are used. Rows that vLLM does not compute know
            `hidden_states` and `compare` only.
        update: told what the engine does while it starts.

    Attributes:
        facts: what the engine says of itself: `kv_cache_tokens` (capacity of the cache, None where
            nothing limits it), `kv_bytes_per_token` (of the cache, all layers and heads, without
            what a sequence holds beside it; None where unknown).

    Raises:
        ChildError: it does not start, or fails later.

    """

    def __init__(self, settings: Settings, row: CacheRow, update: Update | None = None) -> None:
        self.settings = settings
        self.row = row
        self._child = Child(f"the engine of {row.name}", _environment(settings))
        try:
            self.facts = self._child.call(worker.start, row, settings.for_row(row), update=update)
        except BaseException as error:
            self._child.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: Any) -> None:
        self._child.__exit__(*error)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        on_done: Done | None = None,
        ignore_eos: bool = False,
    ) -> list[Generation]:
        """Greedy answers, in the order of the prompts.

        Args:
            prompts: token ids.
            max_tokens: of each answer.
            on_done: called with the number of answers that are done.
            ignore_eos: go on to `max_tokens` whatever the model says.

        Raises:
            UserError: a prompt is too long for the engine.

        """
        for prompt in prompts:
            self._check_length(len(prompt), max_tokens)
        params = dict(max_tokens=max_tokens, ignore_eos=ignore_eos)
        given = [list(map(int, prompt)) for prompt in prompts]
        found = self._child.call(worker.generate, given, params, on_report=on_done)
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
        states: list[np.ndarray] = []
        for window in windows:
            states.append(self._child.call(worker.hidden_states, list(map(int, window))))
            if on_done is not None:
                on_done(len(states))
        return states

    def compare(
        self, reference: np.ndarray, states: np.ndarray, targets: Sequence[int]
    ) -> pd.DataFrame:
        """What two rows say of the same positions, over the whole vocabulary: see `metrics`.

        Logits are made from the states by this engine's model, in slices: the head of the model is
        the same in every row.

        Args:
            reference, states: hidden states [T, hidden] of the reference and of the row; the same
                array if the row is the reference.
            targets: [T] the token that follows each position.

        """
        mine = None if states is reference else states
        return self._child.call(worker.compare, reference, mine, np.asarray(targets, np.int64))

    def _check_length(self, tokens: int, answer: int) -> None:
        limit = self.settings.max_model_len
        if tokens + answer > limit:
            raise UserError(
                f"a prompt of {tokens} tokens and {answer} to generate do not fit into "
                f"max_model_len {limit}",
                "raise max_model_len (up to the model's own limit) or take shorter prompts",
            )


def _environment(settings: Settings) -> dict[str, str]:
    env = serve_environment(cache_folder())
    if not Path(settings.model).is_dir() and "HF_HUB_OFFLINE" not in os.environ:
        del env["HF_HUB_OFFLINE"]  # the model may have to come from somewhere
    # The child reads hidden states where they are computed: in its own process.
    env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # vLLM compiles a piece of its sampler even where the model is eager.
    env.setdefault("TORCH_COMPILE_DISABLE", "1")
    return env
