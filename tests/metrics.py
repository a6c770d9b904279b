"""What a server's /metrics says."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def read(port: int) -> str:
    """What Prometheus would read from a server of this machine."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        return reply.read().decode()


def total(port: int, name: str) -> float:
    """The sum over a metric's series; `name` is that of its samples."""
    values = [
        sample.value
        for family in text_string_to_metric_families(read(port))
        for sample in family.samples
        if sample.name == name
    ]
    assert values, f"no metric {name}"
    return sum(values)
