"""`examples/ray_batch.py`: every row is answered once, also when a replica is killed at work."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from kivi_vllm.cli.default_model import default_model
from kivi_vllm.cli.process import running, tail
from tests.engine import engine

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kivi-vllm[ray]'")

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_batch.py"
SETTINGS: dict[str, Any] = dict(dtype="float32", max_model_len=512)
# Answers that depend on the prompt alone, not on the rows that came before it.
KIVI = {"kivi": {"prefill": "cached"}}
MEMORY_MIB, MAX_TOKENS, BATCH = 96, 24, 4
STARTS = ("The capital of France is", "Once upon a time", "Water boils at", "def fibonacci(n):")
# Longer than a block of 128 tokens: the answers read quantized history.
FILLER = " ".join(f"Item {i} costs {7 * i} coins." for i in range(20))
# So many that there is work left for the replica that takes the killed one's place.
ROWS = [dict(id=f"row-{i}", prompt=f"{FILLER} {i}. {STARTS[i % 4]}") for i in range(128)]
TIMEOUT_S = 480.0


def _at_work(mark: str) -> list[int]:
    """The processes of the replicas that answer right now: of those that inherited `mark`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes()
            at_work = title.startswith(b"ray::Replica.answer")
            if at_work and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _one_engine() -> dict[str, str]:
    """The answers of one engine without Ray, by id."""
    from vllm import SamplingParams

    settings = dict(SETTINGS, kv_cache_memory_bytes=MEMORY_MIB << 20, skip_tokenizer_init=False)
    with engine(str(default_model()), "kivi_k3v2", additional_config=KIVI, **settings) as llm:
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        found = llm.generate([row["prompt"] for row in ROWS], params, use_tqdm=False)
    return {row["id"]: one.outputs[0].text for row, one in zip(ROWS, found, strict=True)}


def test_a_replica_killed_at_work_costs_no_row(tmp_path: Path) -> None:
    source, target, log = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "log"))
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = dict(
        SETTINGS, memory_mib=MEMORY_MIB, max_tokens=MAX_TOKENS, batch_size=BATCH, replicas=2
    )
    command = [sys.executable, str(EXAMPLE), str(source), str(target), "--enforce-eager"]
    command += ["--additional-config", json.dumps(KIVI)]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    mark = f"kivi-test-{uuid.uuid4()}"
    # A cluster of its own, whatever else runs here; and what the other tests set is no replica's.
    environment = {**os.environ, "KIVI_TEST_MARK": mark, "RAY_ADDRESS": "local"}
    environment["RAY_USAGE_STATS_ENABLED"] = "0"
    for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND"):
        environment.pop(name, None)
    partial = target.with_name("out.jsonl.part")
    cores: dict[int, set[int]] = {}  # of each replica that was at work
    victim = done_before = 0
    with running(command, log, environment) as process:
        end = time.monotonic() + TIMEOUT_S
        while process.poll() is None:
            assert time.monotonic() < end, tail(log)
            for pid in _at_work(mark):
                cores[pid] = os.sched_getaffinity(pid)
                if not victim and _rows(partial):
                    victim, done_before = pid, len(_rows(partial))
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        assert process.returncode == 0, tail(log)
    assert victim, "no replica was found at work"
    assert 0 < done_before < len(ROWS)
    assert len(cores) == 3, "Ray has started another one in its place"
    if len(os.sched_getaffinity(0)) > 1:
        first, second = set(map(frozenset, cores.values()))
        assert not first & second, "each replica has cores of its own"
    rows = _rows(target)
    assert sorted(row["id"] for row in rows) == sorted(row["id"] for row in ROWS)
    assert {row["id"]: row["text"] for row in rows} == _one_engine()
    assert not partial.exists()
