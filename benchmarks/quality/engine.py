"""Engines for comparisons, each in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from benchmarks.common.child import Child
from benchmarks.common.vllm_runs import environment
from benchmarks.quality.rows import CacheRow
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.progress import Update

Done = Callable[[int], object]
"""Called with the number of prompts or windows that are done so far."""

model: Any
"""In the child: the `models.Model` that computes its row."""

ITEMSIZE = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
MODEL_DTYPES = ("auto", *ITEMSIZE)


def model_facts(model: str) -> dict[str, Any]:
    """What must be known of a model before any engine starts, from its config alone.

    Returns:
        `limit`, tokens of its longest context; `dtype` of its weights; `numbers_per_token`, keys
        and values of one token, over all layers and kv heads.

    Raises:
        UserError: it has no config, or none of a decoder that this can be told of.

    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model).get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return dict(
            limit=config.max_position_embeddings,
            dtype=str(config.dtype or "bfloat16").removeprefix("torch."),
            numbers_per_token=2 * config.num_hidden_layers * heads * size,
        )
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{model} is no folder of a decoder model: {error}", "name one that vLLM can serve"
        ) from None


def arguments(row: CacheRow, model: str, max_model_len: int, **others: Any) -> dict[str, Any]:
    """The arguments of `vllm.LLM` for a row; the KIVI dtypes run with `prefill=cached`,
    but for those with a `token_budget`.

    Args:
        row: of the comparison.
        model: folder of a model.
        max_model_len: longest sequence, prompt and answer.
        others: go to `vllm.LLM` as they are, and count more than what is here.

    """
    found: dict[str, Any] = dict(
        model=model,
        max_model_len=max_model_len,
        kv_cache_dtype=row.dtype,
        max_num_seqs=8,
        # Compiling takes longer than most comparisons gain by it.
        enforce_eager=True,
        seed=0,
        disable_log_stats=True,
        # Every window is computed from nothing.
        enable_prefix_caching=False,
    )
    if row.chunk is not None:
        found["max_num_batched_tokens"] = row.chunk
    if row.is_kivi:
        prefill = "exact" if row.selects else "cached"  # which no budget goes with
        found["additional_config"] = {"kivi": {"prefill": prefill, **row.options}}
    return found | others


def start(row: CacheRow, given: dict[str, Any]) -> dict[str, Any]:
    """In the child: make the model of a row from its `arguments`; what it says of itself."""
    global model
    from benchmarks.quality import models, simulation

    others = dict(simulated=simulation.SimulatedModel, transformers=models.QuantizedCacheModel)
    model = others.get(row.kind, models.VllmModel)(row, given)
    return model.facts()


def _ask(method: str, *args: Any) -> Any:
    """In the child: call a method of its model."""
    return getattr(model, method)(*args)


class Answer(NamedTuple):
    """A greedy answer without its prompt; no text where the engine has no tokenizer."""

    text: str
    token_ids: list[int]


class Engine(Child):
    """One row's engine in a process of its own: `with Engine(row, given) as engine: ...`.

    Args:
        row: to be computed; those that vLLM does not know `hidden_states` and `compare` only.
        given: see `arguments`; other rows take `model`, `dtype` and `max_model_len` from them.
        update: told what the engine does while it starts.

    Attributes:
        facts: what the engine says of itself: `kv_cache_tokens` (capacity of the cache, None where
            nothing limits it), `kv_bytes_per_token` (of the cache, all layers and heads, without
            what a sequence holds beside it; None where unknown).

    Raises:
        ChildError: it does not start, or fails later.

    """

    def __init__(self, row: CacheRow, given: dict[str, Any], update: Update | None = None) -> None:
        # vLLM compiles a piece of its sampler even where the model is eager.
        env = {"TORCH_COMPILE_DISABLE": "1"} | environment(given["model"])
        # The child reads hidden states where they are computed: in its own process.
        env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        super().__init__(f"the engine of {row.name}", env)
        self.row, self._limit = row, given["max_model_len"]
        try:
            self.facts = self.call(start, row, given, update=update)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        on_done: Done | None = None,
        ignore_eos: bool = False,
    ) -> list[Answer]:
        """Greedy answers of at most `max_tokens` to prompts of token ids, in their order.

        Raises:
            UserError: a prompt is too long for the engine, or vLLM does not compute the row.

        """
        if self.row.kind != "vllm":
            raise UserError(
                "simulated and transformers rows are for the perplexity section only",
                "leave them out of the other sections",
            )
        for prompt in prompts:
            self._check_length(len(prompt), max_tokens)
        params = dict(max_tokens=max_tokens, ignore_eos=ignore_eos)
        return self.call(_ask, "generate", prompts, params, on_report=on_done)

    def hidden_states(self, window: Sequence[int]) -> np.ndarray:
        """The model's final hidden states (what the logits are computed from), [T, hidden] fp32.

        Args:
            window: T token ids, computed alone and from nothing.

        """
        self._check_length(len(window), 1)  # a prompt needs one token of an answer
        return self.call(_ask, "hidden_states", window)

    def decoded_states(self, window: Sequence[int], count: int) -> np.ndarray:
        """Final hidden states of a window's tokens that are decoded, [count - 1, hidden] fp32.

        Args:
            window: T token ids, all but the last `count` of which are a prompt. It gives the first
                of these, and each of them but the last is then computed in a step of its own.
            count: tokens to decode.

        """
        self._check_length(len(window) - count, count)
        return self.call(_ask, "decoded_states", window, count)

    def compare(
        self, reference: np.ndarray, states: np.ndarray | None, targets: Sequence[int]
    ) -> pd.DataFrame:
        """What two rows say of the same positions: see `models.Model.compare`."""
        return self.call(_ask, "compare", reference, states, np.asarray(targets, np.int64))

    def _check_length(self, tokens: int, answer: int) -> None:
        if tokens + answer > self._limit:
            raise UserError(
                f"a prompt of {tokens} tokens and {answer} to generate do not fit into "
                f"max_model_len {self._limit}",
                "raise max_model_len (up to the model's own limit) or take shorter prompts",
            )
