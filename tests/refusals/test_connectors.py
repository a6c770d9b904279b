"""KV connectors that cannot carry the KIVI cache, each by its name, with its reason and remedy."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kivi_vllm.attention import connectors
from kivi_vllm.config import KiviConfig, KiviConfigError
from kivi_vllm.ops.format import PageFormat
from tests.engine import engine, gemma3, tiny_model
from tests.offload import offloaded, offloading  # noqa: F401  (a fixture)
from tests.refusals.configs import engine_config, refusal

REMEDY = (
    "use --kv-offloading-size with VLLM_USE_SIMPLE_KV_OFFLOAD=1 in the environment (vLLM's "
    "SimpleCPUOffloadConnector), or leave out --kv-transfer-config and --kv-offloading-size"
)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ExampleConnector", "it copies token by token, and a page holds 128"),
        ("MultiConnector", "its connectors would take turns with one prefix"),
        ("NixlConnector", "it hands over whole prompts, of which the tokens after the last whole"),
        ("MooncakeConnector", "it hands over whole prompts"),
        ("DecodeBenchConnector", "it is not tested with several groups"),
    ],
)
def test_by_name(name: str, reason: str) -> None:
    transfer: dict[str, Any] = dict(kv_connector=name, kv_role="kv_both")
    if name == "MultiConnector":
        transfer["kv_connector_extra_config"] = dict(connectors=[])
    message = refusal(kv_transfer_config=transfer)
    assert f"KV connector {name}: {reason}" in message
    assert message.endswith(REMEDY)


def test_lmcache(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--kv-offloading-backend lmcache`, whose package is not here."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    monkeypatch.setattr(KVConnectorFactory, "supports_hma_config", lambda transfer: False)
    message = refusal(kv_offloading_size=1, kv_offloading_backend="lmcache")
    assert "KV connector LMCacheMPConnector: it knows one cache group" in message


def test_vllms_choice(monkeypatch: pytest.MonkeyPatch, offloading: Any) -> None:  # noqa: F811
    """`--kv-offloading-size` is one connector or the other, by an environment variable."""
    message = refusal(kv_offloading_size=1)
    assert "KV connector OffloadingConnector: it knows groups of full attention" in message
    assert message.endswith(REMEDY)
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    transfer = engine_config(kv_offloading_size=1).kv_transfer_config
    assert transfer.kv_connector == "SimpleCPUOffloadConnector"
    assert transfer.kv_connector_module_path == "kivi_vllm.attention.offload"


def test_other_dtypes_have_vllms() -> None:
    config = engine_config(kv_cache_dtype="auto", **offloaded(1 << 30))
    assert config.kv_transfer_config.kv_connector_module_path is None


def test_on_a_cpu() -> None:
    assert refusal(**offloaded(1 << 30)) == (
        "--kv-cache-dtype kivi2: KV offloading: vLLM's SimpleCPUOffloadConnector copies with CUDA "
        "only, and here the cache is in the CPU's memory already; use more "
        "--kv-cache-memory-bytes instead"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(enable_prefix_caching=False), "which is off; use --enable-prefix-caching"),
        (
            dict(pipeline_parallel_size=2),
            "KV offloading in a pipeline is not tested; leave out --kv-offloading-size or "
            "--pipeline-parallel-size",
        ),
    ],
)
def test_together(settings: dict[str, Any], message: str, offloading: Any) -> None:  # noqa: F811
    assert message in refusal(**settings, **offloaded(1 << 30))


def test_sleep(offloading: Any) -> None:  # noqa: F811
    config = engine_config(**offloaded(1 << 30))
    assert list(connectors.problems(config)) == []
    config.model_config.enable_sleep_mode = True
    (problem,) = connectors.problems(config)
    assert problem.endswith("leave out --enable-sleep-mode or --kv-offloading-size")


def test_less_than_one_sequence(offloading: Any) -> None:  # noqa: F811
    """Of layers that are alike: 8 pages, the sinks and vLLM's null block."""
    fmt = PageFormat.of(KiviConfig.from_options("kivi2", {}), 32, torch.float32)
    size = 10 * 128 * fmt.bytes_per_token * 2 * 2  # of 2 heads in 2 layers
    engine_config(tiny_model(), **offloaded(size))
    assert refusal(tiny_model(), **offloaded(size - 1)) == (
        f"--kv-cache-dtype kivi2: KV offloading: one sequence of --max-model-len 1024 takes "
        f"{size / (1 << 20):.1f} MiB of the offloaded pool, which has {size / (1 << 20):.1f} MiB a "
        "rank; raise cpu_bytes_to_use or use a smaller --max-model-len"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "extra", "message"),
    [
        (
            lambda: gemma3("wwf"),
            dict(cpu_bytes_to_use=1 << 16),
            "one sequence of --max-model-len 1024 takes .* MiB of the offloaded pool, which has "
            "0.1 MiB a rank; raise cpu_bytes_to_use or use a smaller --max-model-len",
        ),
        (
            lambda: gemma3("ww"),
            {},
            "needs a layer that sees all tokens, and all of this model's have windows; leave out "
            "--kv-offloading-size",
        ),
        (
            lambda: tiny_model(num_hidden_layers=3),
            dict(kv_offload_backend="disk", disk_path="kv"),
            r'"use_page_cache": true in kv_connector_extra_config',
        ),
    ],
    ids=["size", "windows", "disk"],
)
def test_when_the_layers_are_there(
    model: Any,
    extra: dict[str, Any],
    message: str,
    offloading: Any,  # noqa: F811
) -> None:
    settings = offloaded(1 << 30)
    settings["kv_transfer_config"]["kv_connector_extra_config"].update(extra)
    with pytest.raises(KiviConfigError, match=message), engine(model(), "kivi2", **settings):
        pass


def test_without_the_managers_of_several_groups(
    monkeypatch: pytest.MonkeyPatch,
    offloading: Any,  # noqa: F811
) -> None:
    """The connector that is served does not let pass what is refused without one."""
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    message = refusal(kv_offloading_size=1, disable_hybrid_kv_cache_manager=True)
    assert "the full-precision residual needs the hybrid KV cache manager" in message
