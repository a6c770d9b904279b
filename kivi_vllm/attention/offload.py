"""vLLM's connector for offloading to the CPU's memory or a disk, for our cache groups.

vLLM makes it by the name of the class and this module's path (see `connectors.use_ours`). It
copies blocks of the pool whole, finds them again by their hashes with managers of our kinds
over a pool of its own, and asks for nothing within a block. Two things are added:

- a sequence's first tokens are found once. Where the GPU has the beginning of a prefix, it has
  the sinks, and what comes after is looked up without them;
- a copy that fails is an error. vLLM's copies are made by threads, one of which ends with an
  exception; the requests that wait for it would wait forever.
"""

from __future__ import annotations

from collections.abc import Iterator
from threading import Thread
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1 import simple_cpu_offload_connector as vllms
from vllm.v1.kv_cache_interface import FullAttentionSpec

from kivi_vllm.attention import connectors
from kivi_vllm.attention.groups.sinks import SinkSpec
from kivi_vllm.config import KiviConfigError

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

DISK_SECTOR = 4096
"""Bytes of whose multiples files are read and written past the page cache."""


class SimpleCPUOffloadConnector(vllms.SimpleCPUOffloadConnector):
    """vLLM's, see the module."""

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        if problem := _problem(vllm_config, kv_cache_config):
            raise KiviConfigError(f"KV offloading: {problem}")
        super().__init__(vllm_config, role, kv_cache_config)
        if self.scheduler_manager is not None:
            groups = self.scheduler_manager.cpu_coordinator.attention_groups
            self._all_groups = groups
            self._without_sinks = [g for g in groups if not isinstance(g.spec, SinkSpec)]

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens after the `num_computed_tokens` that the GPU has; they end with a block."""
        manager = self.scheduler_manager
        assert manager is not None
        groups = self._without_sinks if num_computed_tokens else self._all_groups
        manager.cpu_coordinator.attention_groups = groups
        found, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        assert found is not None and found % manager.block_size == 0, (found, manager.block_size)
        return found, is_async

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """What has been copied since the last call.

        Raises:
            RuntimeError: a copy has failed.

        """
        if self.worker_handler is not None and self.worker_handler._backend is not None:
            for thread in _threads(self.worker_handler._backend):
                if not thread.is_alive():
                    raise RuntimeError(
                        "KV offloading: a copy between the cache and the offloaded pool has "
                        "failed (its exception is in the log above), and what waits for it "
                        "would wait forever; start the engine again"
                    )
        return super().get_finished(finished_req_ids)


def _threads(backend: Any) -> Iterator[Thread]:
    return (value for value in vars(backend).values() if isinstance(value, Thread))


def _problem(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str | None:
    """What is only known when the layers are there."""
    specs = []
    for group in kv_cache_config.kv_cache_groups:
        spec: Any = group.kv_cache_spec
        one = next(iter(getattr(spec, "kv_cache_specs", {0: spec}).values()))
        if one.prefix_cacheable:
            specs.append(one)
    if not any(isinstance(spec, FullAttentionSpec) for spec in specs):
        return (
            "vLLM's connector needs a layer that sees all tokens, and all of this model's have "
            "windows; leave out --kv-offloading-size"
        )
    block_bytes = kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks
    assert vllm_config.kv_transfer_config is not None
    extra = vllm_config.kv_transfer_config.kv_connector_extra_config
    on_disk = extra.get("kv_offload_backend") == "disk" and not extra.get("use_page_cache")
    if on_disk and block_bytes % DISK_SECTOR:
        return (
            f"a block has {block_bytes} bytes, no multiple of the {DISK_SECTOR} that a disk is "
            'written by; set "use_page_cache": true in kv_connector_extra_config'
        )
    return connectors.too_small(vllm_config, specs, block_bytes)
