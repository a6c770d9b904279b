"""What a `token_budget` does: said when an engine starts, counted, and said again at its end."""

from __future__ import annotations

import functools
import logging
from multiprocessing import util
from typing import Any, NamedTuple

from kivi_vllm.config import BLOCK_SIZE, Estimate, KiviConfig
from kivi_vllm.ops.select import COUNTERS


class PagesCounted(NamedTuple):
    """What generated tokens saw and read, in layers with a budget.

    One for each page, token and head of K and V; the kernels count what they read.
    """

    seen: int
    read: int


def pages_counted(worker: Any = None) -> PagesCounted:
    """Of this process so far; `LLM.collective_rpc(pages_counted)` asks all workers."""
    return PagesCounted(*(sum(of) for of in zip(*(each() for each in COUNTERS), strict=True)))


def start_line(config: KiviConfig, estimate: Estimate, max_model_len: int, num_layers: int) -> str:
    """What the budget does with sequences up to `max_model_len`, in a model of so many layers."""
    if config.dense_layers >= num_layers:
        return (
            f"kivi.token_budget {config.token_budget} selects nothing: kivi.dense_layers is "
            f"{config.dense_layers}, and the model has {num_layers}"
        )
    read, most = config.token_budget // BLOCK_SIZE, max_model_len // BLOCK_SIZE
    if most <= read:
        return (
            f"kivi.token_budget {config.token_budget} selects nothing: sequences have up to "
            f"{most} pages of {BLOCK_SIZE} tokens, all of which are read"
        )
    dense = {0: "in all layers", 1: "in all layers but the first"}.get(
        config.dense_layers, f"in all layers but the first {config.dense_layers}"
    )
    return (
        f"kivi.token_budget {config.token_budget}: a generated token selects {read} of up to "
        f"{most} pages of each head, by their {estimate}, {dense}"
    )


def end_line() -> str:
    """What the generated tokens of this process have read."""
    seen, read = pages_counted()
    if not seen:
        return "page selection: no generated token has seen a page"
    return (
        f"page selection: generated tokens have read {read} of {seen} pages ({read / seen:.1%}), "
        "counted for each token, layer with a budget and head"
    )


@functools.cache
def report_at_the_end() -> None:
    """Log `end_line` when this process ends: also a worker, which runs no `atexit`."""
    from vllm.logger import init_logger

    logger = init_logger("vllm.kivi_vllm")

    def say() -> None:
        streams = [
            getattr(handler, "stream", None) for handler in logging.getLogger("vllm").handlers
        ]
        if not any(getattr(stream, "closed", False) for stream in streams):
            logger.info("%s", end_line())

    util.Finalize(None, say, exitpriority=100)
