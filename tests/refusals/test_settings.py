"""Engine settings that the KIVI cache refuses at start, each with its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kivi_vllm.attention import refusals
from kivi_vllm.config import KiviConfigError
from tests.refusals.configs import config_only, engine_config, llama4, refusal

_PREFIX = "--kv-cache-dtype kivi2: "


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(block_size=64),
            "--block-size 64 is not supported: pages hold 128 tokens; leave --block-size out",
        ),
        (
            dict(block_size=256),
            "--block-size 256 is not supported: pages hold 128 tokens; leave --block-size out",
        ),
        (
            dict(kv_cache_dtype_skip_layers=["0", "2", "windows"]),
            "--kv-cache-dtype-skip-layers 2 windows names no layer; give numbers up to 1, or "
            "sliding_window",
        ),
        (
            dict(kv_sharing_fast_prefill=True),
            "--kv-sharing-fast-prefill is not supported: layers that share a cache must see the "
            "same tokens of a step; leave it out",
        ),
        (
            dict(disable_hybrid_kv_cache_manager=True),
            "the full-precision residual needs the hybrid KV cache manager; "
            "leave out --disable-hybrid-kv-cache-manager",
        ),
        (
            dict(speculative_config={"method": "ngram_gpu", "num_speculative_tokens": 3}),
            "speculation with 'ngram_gpu' is not supported; use one of: ngram, suffix, eagle, "
            "eagle3, mtp, draft_model",
        ),
        (
            dict(pipeline_parallel_size=2, enforce_eager=True),
            "vLLM's CPU workers make what stages hand over only when they compile, and fail at the "
            "first request of an eager pipeline, whatever the cache; leave out --enforce-eager",
        ),
        (
            dict(ubatch_size=2, all2all_backend="deepep_low_latency"),
            "micro-batches are not supported; leave out --enable-dbo and --ubatch-size",
        ),
        (
            dict(tensor_parallel_size=4, decode_context_parallel_size=2),
            "decode context parallelism (2) is not supported: it deals the tokens of a sequence "
            "out to ranks, and a page quantizes 128 of them together; use --tensor-parallel-size "
            "instead",
        ),
        (
            dict(attention_backend="CPU_ATTN"),
            "attention backend CPU_ATTN cannot read KIVI pages; leave the attention backend out, "
            "it follows from the cache dtype",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_setting(settings: dict[str, Any], message: str) -> None:
    assert refusal(**settings) == _PREFIX + message


def test_attention_backend_for_a_kind_of_layers() -> None:
    message = refusal(attention_config={"backend_per_kind": {"full_attention": "CPU_ATTN"}})
    assert "attention backend CPU_ATTN cannot read KIVI pages" in message


def test_chunked_local_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself disables the cache manager of such models where the environment says so."""
    config = engine_config(llama4())
    assert config.model_config.attention_chunk_size == 256
    monkeypatch.setenv("VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE", "0")
    assert refusal(llama4()) == (
        f"{_PREFIX}the full-precision residual needs the hybrid KV cache manager; leave out "
        "--disable-hybrid-kv-cache-manager, leave "
        "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE unset, and do not speculate with EAGLE"
    )


def test_data_parallel_on_ray() -> None:
    message = refusal(data_parallel_size=2, data_parallel_backend="ray")
    assert "--data-parallel-backend ray is not tested; use --data-parallel-backend mp" in message


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "distributed_executor_backend",
            "ray",
            "vLLM has no Ray executor on cpu; use --distributed-executor-backend mp",
        ),
        (
            "prefill_context_parallel_size",
            2,
            "prefill context parallelism (2) is not supported: it deals the tokens of a "
            "sequence out to ranks, and a page quantizes 128 of them together; use "
            "--tensor-parallel-size instead",
        ),
    ],
    ids=["ray", "prefill context parallel"],
)
def test_setting_that_this_vllm_itself_refuses_earlier(
    field: str, value: Any, message: str
) -> None:
    # Ray where it is not installed, else in the engine; the other one in the CPU's model runner.
    config = engine_config()
    setattr(config.parallel_config, field, value)
    with pytest.raises(KiviConfigError) as caught:
        refusals.check(config)
    assert str(caught.value) == _PREFIX + message


def pretend(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> None:
    """Give vLLM's platform other answers."""
    from vllm.platforms import current_platform

    for name, answer in answers.items():
        method = lambda self, *_, answer=answer, **__: answer  # noqa: E731
        monkeypatch.setattr(type(current_platform), name, method, raising=False)


def test_device_without_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config()
    pretend(monkeypatch, is_cpu=False)
    message = r"operators for CPUs and NVIDIA GPUs only.* use --kv-cache-dtype"
    with pytest.raises(KiviConfigError, match=message):
        refusals.check(config)


@pytest.mark.parametrize(
    ("capability", "vllm", "message"),
    [
        (
            (7, 5),
            "0.33.0",
            "Tesla T4 has compute capability 7.5, and the kernels need 8.0 or newer (Ampere); "
            "use --kv-cache-dtype auto or fp8",
        ),
        (
            (9, 0),
            "0.32.0",
            "GPUs are served with vLLM 0.33, not 0.32; pip install 'kivi-vllm[cuda]'",
        ),
    ],
    ids=["old GPU", "old vLLM"],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], vllm: str, message: str
) -> None:
    from vllm.platforms.interface import DeviceCapability

    config = engine_config(config_only(head_dim=64), dtype="bfloat16")
    pretend(
        monkeypatch,
        is_cpu=False,
        is_cuda=True,
        get_device_capability=DeviceCapability(*capability),
        get_device_name="Tesla T4",
    )
    monkeypatch.setattr(refusals, "vllm_version", lambda: vllm)
    with pytest.raises(KiviConfigError) as caught:
        refusals.check(config)
    assert str(caught.value) == _PREFIX + message


def test_models_that_gpus_do_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms.interface import DeviceCapability

    config = engine_config(config_only(head_dim=32), dtype="float32")
    pretend(monkeypatch, is_cpu=False, is_cuda=True, get_device_capability=DeviceCapability(9, 0))
    monkeypatch.setattr(refusals, "vllm_version", lambda: "0.33.0")
    with pytest.raises(KiviConfigError) as caught:
        refusals.check(config)
    first, second = str(caught.value).splitlines()
    assert "head size 32 is not supported on GPUs (supported: 64, 96, 128, 256)" in first
    assert "--dtype float32 is not supported on GPUs; use --dtype bfloat16" in second


def test_every_reason_is_given_at_once() -> None:
    message = refusal(block_size=64, kv_cache_dtype_skip_layers=["9"], kv_offloading_size=1)
    first, *others = message.splitlines()
    assert "--block-size 64" in first
    assert [line.split()[0] for line in others] == ["also:", "also:"]
    assert "--kv-cache-dtype-skip-layers 9 names no layer" in message
    assert "--kv-offloading-size" in message


def test_what_is_supported_passes() -> None:
    engine_config(
        speculative_config=dict(
            method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=2
        ),
        tensor_parallel_size=2,
        data_parallel_size=2,
        enable_lora=True,
        scheduling_policy="priority",
        block_size=128,
        attention_backend="KIVI",
        enable_prefix_caching=False,
    )


# ---------------------------------------------------------------- compiler


def test_compilation_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")  # which `tests.engine` sets
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert refusal(enforce_eager=False) == (
        f"{_PREFIX}torch.compile needs a C++ compiler and none was found; install one "
        "(apt-get install g++), set CXX, or pass --enforce-eager"
    )
    engine_config(enforce_eager=True)  # needs none


def test_compilation_with_a_compiler_that_torch_does_not_look_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clang = tmp_path / "clang++"
    clang.touch(mode=0o755)
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    message = refusal(enforce_eager=False)
    assert message == f"{_PREFIX}torch.compile looks for $CXX or g++ only; set CXX={clang}"
    monkeypatch.setenv("CXX", str(clang))
    engine_config(enforce_eager=False)


# ------------------------------------------------------------------ memory


def test_memory_too_small_for_one_sequence() -> None:
    # 1024 tokens: 8 pages, 12 ring pages of 11 tokens (fp32), one of sinks, and the null block;
    # 2 layers, 2 kv heads, 22 bytes a token.
    message = refusal(kv_cache_memory_bytes=5 * 22 * 128 * 2 * 2)
    assert message.startswith(f"{_PREFIX}one sequence of --max-model-len 1024 needs 0.2 MiB")
    assert "(22 blocks)" in message
    assert "there are 0.1 MiB (5 blocks)" in message
    assert message.endswith(
        "raise --kv-cache-memory-bytes (or --num-gpu-blocks-override): no length fits"
    )


@pytest.mark.parametrize("blocks", [21, 22])
def test_blocks_just_too_few_and_just_enough(blocks: int) -> None:
    def start() -> Any:
        return engine_config(num_gpu_blocks_override=blocks)

    if blocks < 22:
        with pytest.raises(KiviConfigError, match=r"\(22 blocks\).*\(21 blocks\)") as caught:
            start()
        # Seven whole blocks of 128, and the most that a ring holds.
        assert str(caught.value).endswith("or use --max-model-len 1023")
        engine_config(max_model_len=1023, num_gpu_blocks_override=blocks)
    else:
        start()


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        # A page more for the drafts of two steps.
        (
            dict(
                speculative_config=dict(
                    method="ngram", num_speculative_tokens=5, prompt_lookup_max=3
                )
            ),
            23,
        ),
        # 3 more groups for the last 32 tokens of a block, 11 in a page each; 4 pages of each.
        (dict(additional_config={"kivi": {"residual_length": 32}}), 34),
    ],
    ids=["draft tokens", "tails"],
)
def test_memory_counts(settings: dict[str, Any], blocks: int) -> None:
    assert f"({blocks} blocks)" in refusal(num_gpu_blocks_override=19, **settings)


def test_memory_of_the_deepest_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "0")  # no pipeline on CPUs without compilation

    def start(blocks: int) -> Any:
        # 4 layers in 3 stages: 1, 2 and 1.
        return engine_config(
            config_only(num_hidden_layers=4),
            pipeline_parallel_size=3,
            enforce_eager=False,
            kv_cache_memory_bytes=blocks * 2 * 22 * 128 * 2,
        )

    with pytest.raises(KiviConfigError, match=r"\(22 blocks\).*\(21 blocks\)"):
        start(21)
    start(22)


def test_length_that_vllm_fits_to_the_memory_is_not_refused() -> None:
    engine_config(config_only(), max_model_len=-1, kv_cache_memory_bytes=1 << 16)
