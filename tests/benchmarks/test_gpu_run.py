"""The one call on a machine with a GPU, with commands in place of the real ones."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

STUB = """#!/usr/bin/env bash
# What is a script or a check of a module is run; the rest is noted.
case "$1" in
-) exec {python} "$@" ;;
-c) exit 0 ;;
*) echo "$@" >>"$NOTES"; [[ "$*" != *"${{FAILS:-nothing}}"* ]] ;;
esac
"""


def run(folder: Path, **settings: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The script's end, and the modules that it ran, with their arguments."""
    stub, notes = folder / "python", folder / "notes"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    (folder / "ncu").symlink_to("/bin/true")
    path = f"{folder}:{os.environ['PATH']}"
    settings |= {"OUT": str(folder), "PYTHON": str(stub), "NOTES": str(notes), "PATH": path}
    script = [str(ROOT / "benchmarks/gpu_run.sh")]
    done = subprocess.run(script, env=os.environ | settings, capture_output=True, text=True)
    return done, notes.read_text().splitlines() if notes.exists() else []


def modules(commands: list[str]) -> list[str]:
    return [command.split()[1] for command in commands]


def test_what_tells_most_comes_first(tmp_path: Path) -> None:
    done, commands = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert modules(commands) == [
        "benchmarks.attention.gpu.canary",
        *["benchmarks.attention"] * 2,
        "benchmarks.attention.gpu.sweep",
        "benchmarks.attention",
        "pytest",
    ]
    assert "--context 32768 --batch 32" in commands[1]
    assert "--context 65536 --batch 1" in commands[2]
    assert "engine: skipped: MODEL names no model" in done.stdout


@pytest.mark.parametrize("weights", [True, False])
def test_a_model(tmp_path: Path, weights: bool) -> None:
    model = tmp_path / "model"
    model.mkdir()
    if weights:
        (model / "model.safetensors").touch()
    done, commands = run(tmp_path, MODEL=str(model), PARTS="engine")
    assert done.returncode == 0, done.stdout + done.stderr
    quality = ["benchmarks.quality"] * weights
    assert modules(commands) == [
        *quality,
        "benchmarks.engine.capacity",
        "benchmarks.engine.throughput",
    ]
    assert all(f"--kv-cache-dtype {name}" in commands[-1] for name in ("auto", "fp8", "kivi_k3v2"))
    assert ("--load-format dummy" in commands[-1]) is not weights


def test_a_part_that_fails(tmp_path: Path) -> None:
    done, commands = run(tmp_path, FAILS="gpu.canary", PARTS="canary headline")
    assert done.returncode == 1
    assert len(commands) == 3
    assert "canary: failed with status 1" in done.stdout
    assert "headline: ok" in done.stdout


def test_no_time(tmp_path: Path) -> None:
    done, commands = run(tmp_path, LIMIT="5")
    assert done.returncode == 1
    assert not commands
    assert "canary: failed: no time left" in done.stdout
