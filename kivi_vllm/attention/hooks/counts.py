"""What generated tokens have read of pages, as metrics of the server.

The kernels count in the workers. The counts of the first one travel with what it answers to a step
to the scheduler, and from there with its statistics, in the place of a KV connector's at steps
where there are none. The metrics are `kivi:pages_seen` and `kivi:pages_read`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from kivi_vllm.ops.select import COUNTED

KEY = "kivi_pages"

METRICS = {
    "kivi:pages_seen": "Pages that generated tokens saw, in layers with a token_budget.",
    "kivi:pages_read": "Those of them that they read.",
}
"""One for each page, token and head of keys and values."""


def answer(original: Callable) -> Callable:
    """`ModelRunnerOutput.__init__`, with the counts of the worker that makes it."""

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        counts = COUNTED.tolist()
        if counts[0]:
            setattr(self, KEY, counts)

    return __init__


def keep(original: Callable) -> Callable:
    """`Scheduler.update_from_output`, which hears of them."""

    def update_from_output(
        self: Any, scheduled: Any, output: Any, *args: Any, **kwargs: Any
    ) -> Any:
        if (counts := getattr(output, KEY, None)) is not None:
            setattr(self, KEY, counts)
        return original(self, scheduled, output, *args, **kwargs)

    return update_from_output


def send(original: Callable) -> Callable:
    """`Scheduler.make_stats`, with what it has heard."""

    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats, counts = original(self, *args, **kwargs), getattr(self, KEY, None)
        if stats is not None and counts and stats.kv_connector_stats is None:
            stats.kv_connector_stats = {KEY: counts}
        return stats

    return make_stats


def receive(original: Callable) -> Callable:
    """`StatLoggerManager.record`, which takes them out again."""

    def record(self: Any, scheduler_stats: Any, *args: Any, **kwargs: Any) -> Any:
        sent = getattr(scheduler_stats, "kv_connector_stats", None)
        if sent and KEY in sent:
            scheduler_stats.kv_connector_stats = None
            engine = kwargs.get("engine_idx", args[2] if len(args) > 2 else None) or 0
            _publish(str(engine), sent[KEY])
        return original(self, scheduler_stats, *args, **kwargs)

    return record


_published: dict[str, list[int]] = {}  # by engine


def _publish(engine: str, counts: list[int]) -> None:
    """Let the metrics grow to the counts of an engine; one that began anew begins at 0."""
    before = _published.get(engine, [0, 0])
    for metric, now, then in zip(_counters(), counts, before, strict=True):
        metric.labels(engine).inc(now - then if now >= then else now)
    _published[engine] = counts


@functools.cache
def _counters() -> list[Any]:
    from prometheus_client import Counter

    return [Counter(name, text, ["engine"]) for name, text in METRICS.items()]
