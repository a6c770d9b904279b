"""A Ray cluster of `ray start` on this machine, and CPUs that pass for GPUs there."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from kivi_vllm.cli.process import running, tail
from kivi_vllm.cli.server import free_port

START_S = 90.0
Python = str
AddNode = Callable[[Python, str, int], None]


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="module")
def add_node() -> Iterator[AddNode]:
    """Starts a node of `python`'s environment at an IP address with as many "GPUs".

    The first one is the head; RAY_ADDRESS then names the cluster.
    """
    # Sockets lie in it, whose paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="kivi-ray-"))
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

        def add(python: Python, host: str, gpus: int) -> None:
            log = folder / f"{host}.log"
            command = [python, "-m", "ray.scripts.scripts", "start", "--block"]
            command += ["--num-cpus", "1", "--num-gpus", str(gpus), "--node-ip-address", host]
            command += ["--object-store-memory", str(100 << 20), "--disable-usage-stats"]
            address = os.environ.get("RAY_ADDRESS", "")
            if address:
                command += ["--address", address]
                patch.delenv("RAY_ADDRESS")
            else:
                address = f"{host}:{free_port()}"
                command += ["--head", "--port", address.partition(":")[2]]
                command += ["--include-dashboard", "false", "--temp-dir", str(folder)]
            process = stack.enter_context(running(command, log))
            end = time.monotonic() + START_S
            while "--block" not in log.read_text():  # the last thing that it says
                assert process.poll() is None and time.monotonic() < end, tail(log)
                time.sleep(0.2)
            patch.setenv("RAY_ADDRESS", address)

        yield add
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def environment_with(tmp_path: Path) -> Callable[[str | None], Python]:
    """The Python of an environment like this one, with another version of the plugin or none."""

    def make(version: str | None) -> Python:
        folder = tmp_path / f"with-{version}"
        venv.create(folder, symlinks=True)
        library = Path("lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")
        for entry in (Path(sys.prefix) / library).iterdir():
            if "kivi" not in entry.name and not (folder / library / entry.name).exists():
                (folder / library / entry.name).symlink_to(entry)
        if version:
            metadata = folder / library / f"kivi_vllm-{version}.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: kivi-vllm\nVersion: {version}\n")
        return str(folder / "bin" / "python")

    return make


@pytest.fixture
def gpus_of_ray(tmp_path: Path) -> str:
    """PYTHONPATH of a platform for vLLM: its CPU's, but Ray hands the cores out as GPUs.

    vLLM's own CPU platform has no name for its devices that Ray knows.
    """
    name = "kivi_test_platform"
    (tmp_path / f"{name}.py").write_text(
        "from vllm.platforms.cpu import CpuPlatform\n"
        "class Platform(CpuPlatform):\n"
        '    ray_device_key = "GPU"\n'
        "def register():\n"
        f'    return "{name}.Platform"\n'
    )
    about = tmp_path / f"{name}-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (about / "entry_points.txt").write_text(f"[vllm.platform_plugins]\nray_cpu = {name}:register\n")
    return os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
