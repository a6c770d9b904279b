"""The default model, served by `vllm serve` as anyone would."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kivi_vllm.cli.default_model import cache_folder, default_model
from kivi_vllm.cli.process import running
from kivi_vllm.cli.server import Server, free_port, serve_command, serve_environment

START_S = 600.0


@pytest.fixture(scope="session")
def model() -> Path:
    """SmolLM2-135M-Instruct."""
    return default_model()


@dataclass
class Served:
    """A healthy server, a client of it, and the model's name there."""

    server: Server
    client: Any
    name: str


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`vllm serve --kv-cache-dtype kivi2`, with torch.compile as is vLLM's default."""
    from openai import OpenAI

    port = free_port()
    options = ["--max-model-len", "2048", "--kv-cache-memory-bytes", str(96 << 20)]
    options += ["--max-num-seqs", "32", "--dtype", "float32", "--max-num-batched-tokens", "512"]
    command = serve_command(model, "kivi2", port, options)
    environment = serve_environment(cache_folder())
    # Those of the other tests are not what a user has.
    for name in ("OMP_NUM_THREADS", "TORCH_COMPILE_DISABLE", "VLLM_CPU_OMP_THREADS_BIND"):
        environment.pop(name, None)
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = tmp_path_factory.mktemp("serve") / "log"
    with running(command, log, environment) as process:
        server = Server(process, log, port)
        server.wait_until_healthy(START_S, lambda text: None)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=300)
        yield Served(server, client, model.name)
