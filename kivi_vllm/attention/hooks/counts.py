"""What generated tokens have read of pages, as metrics of the server.

The kernels count where the workers are. Where these are in the engine core's process, as those of
one device are, the counts travel with its scheduler's statistics, in the place of a KV connector's,
of which the KIVI cache has none. The metrics are `kivi:pages_seen` and `kivi:pages_read`.
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


def send(original: Callable) -> Callable:
    """`Scheduler.make_stats`, with the counts of this process."""

    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        counts = COUNTED.tolist()
        if stats is not None and counts[0] and stats.kv_connector_stats is None:
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
