"""`vllm bench serve`, and what the server says of itself meanwhile.

    python observed.py [--every SECONDS] \\
        vllm bench serve --host ... --port ... --result-dir ... --result-filename ...

runs that command, reads the server's /metrics and the memory of its processes every
so many seconds (1), and adds both to the result file as "server". It is the
`--bench-cmd` of `vllm bench sweep`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
from prometheus_client.parser import text_string_to_metric_families

METRICS = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "usage": "kv_cache_usage_perc",
    "preemptions": "num_preemptions_total",
    "queries": "prefix_cache_queries_total",
    "hits": "prefix_cache_hits_total",
}
"""Our names of vLLM's metrics, and its own behind `vllm:`."""

CONFIG = "vllm:cache_config_info"


def parse(text: str) -> dict[str, Any]:
    """`METRICS` in the Prometheus text format, all labels added up, and the labels of `CONFIG`."""
    found: dict[str, Any] = dict.fromkeys(METRICS, 0.0)
    names = {f"vllm:{theirs}": ours for ours, theirs in METRICS.items()}
    for family in text_string_to_metric_families(text):
        for one in family.samples:
            if one.name in names:
                found[names[one.name]] += one.value
            elif one.name == CONFIG:
                found[CONFIG] = one.labels
    return found


class Observer:
    """Reads a server every so many seconds, from the start to the end of a `with` block."""

    def __init__(self, host: str, port: int, every: float = 1.0) -> None:
        self.url, self.port, self.every = f"http://{host}:{port}/metrics", port, every
        self.samples: list[dict[str, Any]] = []
        self.memory: list[int] = []
        self.gpu_memory: list[int] = []
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Observer:
        self._processes = server_processes(self.port)
        self._has_gpu = shutil.which("nvidia-smi") is not None
        self._read()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._read()

    def summary(self) -> dict[str, Any]:
        """What was seen; counters are those of the block alone."""
        seen = pd.DataFrame(self.samples)
        most, grown = seen[list(METRICS)].max(), seen[list(METRICS)].diff().sum()
        full = seen["running"][seen["waiting"] > 0]  # while requests wait, what runs is what fits
        config = self.samples[-1].get(CONFIG, {})
        return {
            "running_max": float(most["running"]),
            "running_while_others_wait": float(full.median()) if len(full) else None,
            "waiting_max": float(most["waiting"]),
            "kv_cache_usage_max": float(most["usage"]),
            "preemptions": float(grown["preemptions"]),
            "prefix_hit_rate": grown["hits"] / grown["queries"] if grown["queries"] else None,
            "memory_peak_bytes": max(self.memory),
            "gpu_memory_peak_bytes": max(self.gpu_memory, default=None),
            "cache_dtype": config.get("cache_dtype"),
            "num_gpu_blocks": config.get("num_gpu_blocks"),
            "samples": len(seen),
        }

    def _watch(self) -> None:
        while not self._done.wait(self.every):
            self._read()

    def _read(self) -> None:
        with self._opener.open(self.url, timeout=60) as reply:
            self.samples.append(parse(reply.read().decode()))
        total = 0
        for process in self._processes:
            with suppress(psutil.Error):  # it has gone
                total += process.memory_full_info().pss  # shared pages by their share
        self.memory.append(total)
        if self._has_gpu and (used := _gpu_bytes()) is not None:
            self.gpu_memory.append(used)


def server_processes(port: int) -> list[psutil.Process]:
    """The process that listens on a port, and its descendants; RuntimeError if none does."""
    for process in psutil.process_iter():
        with suppress(psutil.AccessDenied, psutil.NoSuchProcess):
            for one in process.net_connections("tcp"):
                if one.status == psutil.CONN_LISTEN and one.laddr.port == port:
                    # The one that was started is above those that inherited its socket.
                    return [process, *process.children(recursive=True)]
    raise RuntimeError(f"no process of this user listens on port {port}")


def _gpu_bytes() -> int | None:
    """Memory in use on all GPUs; None if the driver does not say."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return sum(int(line) << 20 for line in said.stdout.split())


def main() -> int:
    """Run the command line as the module says; its exit status."""
    words, every = sys.argv[1:], 1.0
    if words[:1] == ["--every"]:
        every, words = float(words[1]), words[2:]
    option = dict(pairwise(words))
    with Observer(option["--host"], int(option["--port"]), every) as observer:
        status = subprocess.run(words, check=False).returncode
    if status == 0:
        path = Path(option["--result-dir"], option["--result-filename"])
        path.write_text(json.dumps(json.loads(path.read_text()) | {"server": observer.summary()}))
    return status


if __name__ == "__main__":
    sys.exit(main())
