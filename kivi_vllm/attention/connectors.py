"""KV connectors: which may carry our caches out of the GPU, and why the others may not.

What a connector carries must be all that a sequence has where it resumes. At the end of a whole
block these are its pages, tails and sinks, which lie in blocks of vLLM's pool under the hashes
of prefix caching. Within a block some of its tokens are in the ring alone, which has no hashes.
So what looks blocks up by group and copies them whole is served, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import MambaSpec, SlidingWindowSpec

from kivi_vllm.attention.versions import device_kind

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SERVED = "SimpleCPUOffloadConnector"
COPIES_ON = {"cuda"}
"""Kinds of devices from which that connector of vLLM's can copy."""

DEFAULT_BYTES = 8 << 30
"""What it takes where no size is given."""

_WHOLE_PROMPTS = (
    "it hands over whole prompts, of which the tokens after the last whole block are in the "
    "ring, which belongs to one engine"
)
_REASONS = {
    "OffloadingConnector": (
        "it knows groups of full attention, windows and states only, and the first tokens of a "
        "sequence (sinks) are none of these"
    ),
    "MultiConnector": "its connectors would take turns with one prefix",
    "ExampleConnector": "it copies token by token, and a page holds 128 quantized together",
    "LMCache": "it knows one cache group, so that vLLM turns off the hybrid KV cache manager",
    "Nixl": _WHOLE_PROMPTS,
    "Mooncake": _WHOLE_PROMPTS,
    "MoRIIO": _WHOLE_PROMPTS,
    "P2p": _WHOLE_PROMPTS,
}
"""By how a connector's name begins."""

_REMEDY = (
    "use --kv-offloading-size with VLLM_USE_SIMPLE_KV_OFFLOAD=1 in the environment (vLLM's "
    f"{SERVED}), or leave out --kv-transfer-config and --kv-offloading-size"
)


def problems(vllm_config: VllmConfig) -> Iterator[str]:
    """What to say of the engine's connector, if it cannot serve our caches."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return
    name = transfer.kv_connector
    known = transfer.kv_connector_module_path in (None, _OURS)
    if name != SERVED or not known:
        reasons = (reason for start, reason in _REASONS.items() if name.startswith(start))
        reason = next(reasons, "") if known else ""
        yield f"KV connector {name}: {reason or 'it is not tested with several groups'}; {_REMEDY}"
        return
    if device_kind() not in COPIES_ON:
        yield (
            f"KV offloading: vLLM's {name} copies with CUDA only, and here the cache is in the "
            "CPU's memory already; use more --kv-cache-memory-bytes instead"
        )
    if not vllm_config.cache_config.enable_prefix_caching:
        yield (
            "KV offloading finds blocks by the hashes of prefix caching, which is off; use "
            "--enable-prefix-caching"
        )
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        yield (
            "KV offloading in a pipeline is not tested; leave out --kv-offloading-size or "
            "--pipeline-parallel-size"
        )
    if vllm_config.model_config.enable_sleep_mode:
        yield (
            "KV offloading may copy while the cache's memory is given back by sleep mode; leave "
            "out --enable-sleep-mode or --kv-offloading-size"
        )


_OURS = "kivi_vllm.attention.offload"


def use_ours(vllm_config: VllmConfig) -> None:
    """Let vLLM make its connector with what our groups need (see `offload`)."""
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector == SERVED:
        transfer.kv_connector_module_path = _OURS


def too_small(vllm_config: VllmConfig, specs: Iterable[Any], block_bytes: int) -> str | None:
    """What to say if the offloaded pool is smaller than one sequence.

    Args:
        vllm_config: the engine's configuration, with a connector.
        specs: of each cache group that prefix caching finds.
        block_bytes: of a block of the pool.

    """
    given, option = capacity(vllm_config)
    blocks = sum(_kept(spec, vllm_config) for spec in specs) + 1  # vLLM's null block
    if given >= blocks * block_bytes:
        return None
    length, mib = vllm_config.model_config.max_model_len, 1 << 20
    return (
        f"one sequence of --max-model-len {length} takes {blocks * block_bytes / mib:.1f} MiB of "
        f"the offloaded pool, which has {given / mib:.1f} MiB a rank; raise {option} or use a "
        "smaller --max-model-len"
    )


def capacity(vllm_config: VllmConfig) -> tuple[int, str]:
    """Bytes of a rank's offloaded pool, and the option that sets them."""
    transfer: Any = vllm_config.kv_transfer_config
    extra = transfer.kv_connector_extra_config
    if extra.get("kv_offload_backend", "cpu") == "disk":
        return int(extra.get("disk_capacity_bytes", 100 << 30)), "disk_capacity_bytes"
    if "cpu_bytes_to_use_per_rank" in extra:
        return int(extra["cpu_bytes_to_use_per_rank"]), "cpu_bytes_to_use_per_rank"
    of_all = int(extra.get("cpu_bytes_to_use", DEFAULT_BYTES))
    sized = vllm_config.cache_config.kv_offloading_size is not None
    option = "--kv-offloading-size" if sized else "cpu_bytes_to_use"
    return of_all // vllm_config.parallel_config.world_size, option


def _kept(spec: Any, vllm_config: VllmConfig) -> int:
    """Blocks of a group that resuming a sequence of the greatest length takes."""
    if isinstance(spec, SlidingWindowSpec):
        most = cdiv(spec.sliding_window - 1, spec.block_size)
        return min(most, vllm_config.model_config.max_model_len // spec.block_size)
    if isinstance(spec, MambaSpec):
        return 1
    return cdiv(spec.max_memory_usage_bytes(vllm_config), spec.page_size_bytes)
