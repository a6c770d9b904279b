"""vLLM's Ray executor: tensor and pipeline parallel workers that are actors change nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.engine import tiny_model
from tests.models.child import assert_same, results_in_child
from tests.models.harness import own_attention
from tests.models.test_pipeline import COMPILED, ENVIRONMENT
from tests.ray.conftest import AddNode

pytest.importorskip("ray", reason="Ray is not installed: pip install 'kivi-vllm[ray]'")

pytestmark = pytest.mark.slow


def test_two_stages_of_two_workers_equal_one(
    add_node: AddNode, gpus_of_ray: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(num_hidden_layers=3, num_key_value_heads=4)
    expected = own_attention(model, max_tokens=12)
    # The workers' environment is that of `ray start`.
    environment = dict(ENVIRONMENT, PYTHONPATH=gpus_of_ray)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    add_node(sys.executable, "127.0.0.2", 4)
    run = dict(
        kv_cache_dtype="kivi_raw",
        distributed_executor_backend="ray",
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        max_num_batched_tokens=200,
        **COMPILED,
    )
    [found] = results_in_child(tmp_path, model, [run], **environment)
    assert_same(found, expected)
