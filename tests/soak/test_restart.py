"""`vllm serve` killed in mid-load and started again: same answers, nothing left behind."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from kivi_vllm.cli.process import is_tracker, members
from kivi_vllm.cli.server import Server, free_port
from tests import metrics
from tests.soak.served import Client, Crowd, Reply, named, serving, shared_memory
from tests.soak.settings import LONG, REQUESTS, SEED
from tests.soak.storm import make_prompts

pytestmark = pytest.mark.slow

VICTIMS = (
    ["VLLM::EngineCore", "VLLM::Worker", "server", "session"] if LONG else ["VLLM::EngineCore"]
)
LOAD = REQUESTS // 5
"""Requests before each kill, and after the last start."""

END_S = 60.0
TOKENS = 24
PROMPTS = [
    prompt for prompt in make_prompts(40, random.Random(SEED)) if len(prompt) + TOKENS <= 768
][:16]


def kill(session: int, victim: str) -> None:
    """SIGKILL the processes of that name; `server`: the first one; `session`: all of them.

    But for multiprocessing's resource tracker: what it would have removed is in RAM, and
    nobody else knows of it.
    """
    if victim == "server":
        pids = [session]
    elif victim == "session":
        pids = [pid for pid in members(session) if not is_tracker(pid)]
    else:
        pids = named(session, victim)
    assert pids, f"no {victim}"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def wait_until_ended(server: Server) -> float:
    """Seconds until none of the server's processes lives, by themselves."""
    start = time.monotonic()
    while members(server.process.pid):
        server.process.poll()
        assert time.monotonic() < start + END_S, members(server.process.pid)
        time.sleep(0.1)
    return time.monotonic() - start


def wait_until_idle(port: int) -> None:
    """Wait until the server has no request; then no page is held."""

    def metric(name: str) -> float:
        return metrics.total(port, f"vllm:{name}")

    end = time.monotonic() + END_S
    while metric("num_requests_running") + metric("num_requests_waiting"):
        assert time.monotonic() < end, "cancelled requests go on"
        time.sleep(0.2)
    Client(port).ask([5, 6, 7], 1)  # the gauge is set by the last step that ran
    assert metric("kv_cache_usage_perc") == 0.0


@pytest.mark.timeout(600 * len(VICTIMS))
def test_killed_and_restarted(tmp_path: Path, record_property: Any) -> None:
    print(f"KIVI_SOAK_SEED={SEED} KIVI_SOAK_REQUESTS={REQUESTS}")
    port = free_port()
    truth: list[Reply] = []
    done = []
    for turn, victim in enumerate([*VICTIMS, None]):
        with serving(tmp_path / f"log{turn}", port) as server:
            client = Client(port)
            alone = [client.ask(prompt, TOKENS) for prompt in PROMPTS]
            truth = truth or [reply for reply in alone if reply]
            assert alone == truth  # the same processes' arithmetic: equal, near ties and all
            crowd = Crowd(port, PROMPTS, truth, SEED + turn)
            session = server.process.pid
            shared = shared_memory(session)
            assert all(path.exists() for path in shared)
            ended = "served on"
            with crowd.asking():
                crowd.wait_for(LOAD)
                if victim:
                    kill(session, victim)
            if victim:
                if victim == "server":
                    # vLLM's engine outlives its API server; the end of `serving` must end it.
                    ended = f"{len(members(session))} processes outlived it"
                else:
                    ended = f"ended after {wait_until_ended(server):.1f} s"
                assert crowd.counts["lost"], "nothing was on its way when it was killed"
            else:
                wait_until_idle(port)
                assert not crowd.counts["lost"]
        counts = ", ".join(f"{name}: {count}" for name, count in sorted(crowd.counts.items()))
        tie = f"widest tie {crowd.widest_tie:.1e}"
        done.append(f"killed {victim}: {counts}, {tie}, {len(shared)} shared memories, {ended}")
        assert members(session) == []
        assert not [path for path in shared if path.exists()]
        assert crowd.counts["answered"] and crowd.counts["cancelled"]
        assert crowd.counts["equal"] >= 0.8 * crowd.counts["tokens"]
    record_property("soak", f"seed {SEED}; " + "; ".join(done))
