"""Nodes of a Ray cluster without this plugin, or with another version, are refused at start."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from kivi_vllm.attention import ray_nodes
from tests.ray.conftest import AddNode
from tests.refusals.configs import engine_config, refusal

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kivi-vllm[ray]'")

OURS = f"kivi_vllm {importlib.metadata.version('kivi-vllm')}"


@pytest.fixture(autouse=True)
def _cpus_are_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from vllm.platforms import current_platform
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    monkeypatch.setattr(type(current_platform), "ray_device_key", "GPU")
    # Ray's workers look for packages in the driver's folder too: a checkout has this one.
    monkeypatch.chdir(tmp_path)


def _start(**others: object) -> dict[str, object]:
    return dict(distributed_executor_backend="ray", tensor_parallel_size=2, **others)


@pytest.mark.slow
def test_every_node_is_asked(
    add_node: AddNode, environment_with: Callable[[str | None], str]
) -> None:
    add_node(sys.executable, "127.0.0.2", 1)
    engine_config(**_start())

    add_node(environment_with(None), "127.0.0.3", 1)
    other = environment_with("0.0.9")
    add_node(other, "127.0.0.4", 1)
    add_node(other, "127.0.0.5", 0)  # no place for workers
    message = refusal(**_start())
    first, second = message.splitlines()  # in the order of the addresses
    assert "127.0.0.2" not in message
    assert "127.0.0.5" not in message
    for line, host, has in ((first, "127.0.0.3", "none"), (second, "127.0.0.4", "0.0.9")):
        assert f"Ray node {host} has kivi_vllm {has} and vLLM " in line
        assert f"but workers need {OURS} and vLLM " in line
        assert "install that in the Python environment in which `ray start` ran there" in line
    engine_config(**_start(kv_cache_dtype="auto"))  # which needs nothing there


def test_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(ray_nodes, "TIMEOUT_S", 4.0)
    message = refusal(**_start())
    assert "Ray does not say what the nodes of its cluster have: no answer within 8 s" in message
    assert "see `ray status`" in message
