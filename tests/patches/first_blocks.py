"""What vLLM 0.33's OffloadingConnector finds and loads of a group of first blocks; prints JSON.

`python -m tests.patches.first_blocks UNPATCHED`, with vLLM 0.33's patched sources before anything
else. What the connector does comes from these, and from the folder UNPATCHED too.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from tests.cuda import fake_device

fake_device.install()

import torch  # noqa: E402
from vllm.distributed.kv_transfer.kv_connector.v1 import offloading  # noqa: E402
from vllm.v1.core.kv_cache_utils import KVCacheBlock  # noqa: E402
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec  # noqa: E402
from vllm.v1.kv_offload.base import LookupResult  # noqa: E402

BLOCKS = 7
"""Whole ones of a prompt of 900 tokens."""


@dataclass(frozen=True, kw_only=True)
class FirstBlockSpec(AttentionSpec):
    """As a plugin makes one."""

    @property
    def caches_first_block_only(self) -> bool:
        return True


FIELDS: dict[str, Any] = dict(block_size=128, num_kv_heads=1, head_size=64, dtype=torch.uint8)
SPECS = FullAttentionSpec(**FIELDS), FirstBlockSpec(**FIELDS)


def module(root: Path, name: str) -> ModuleType:
    """A module of the connector, of these sources."""
    folder = Path(*offloading.__name__.split("."))
    spec = importlib.util.spec_from_file_location(
        f"{name}_{len(sys.modules)}", root / folder / f"{name}.py"
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made  # its dataclasses look there
    spec.loader.exec_module(made)
    return made


def window(config: Any, spec: Any) -> Any:
    """What the connector takes a group for."""
    try:
        return config.get_sliding_window_size_in_chunks(spec, 128)
    except AssertionError:
        return "AssertionError"


def outcome(scheduler: Any, local: int, first_is_there: bool) -> dict[str, Any]:
    """Tokens found after `local` ones, and the blocks loaded of each group."""
    groups = [
        scheduler.GroupOffloadConfig(
            group_idx=i,
            tokens_per_block=128,
            tokens_per_chunk=128,
            hashes_per_chunk=1,
            kv_event_group_spec=MagicMock(),
            sliding_window_size_in_chunks=None,
            kv_cache_spec=spec,
            manager_cls=MagicMock(),
        )
        for i, spec in enumerate(SPECS)
    ]
    config: Any = SimpleNamespace(
        kv_group_configs=groups, blocks_per_chunk=1, num_workers=1, supports_partial_tail=False
    )
    hashes = [bytes([n]) * 32 for n in range(BLOCKS)]
    request: Any = SimpleNamespace(
        request_id="r", num_tokens=900, block_hashes=hashes, kv_transfer_params=None
    )
    status = scheduler.RequestOffloadState(
        config=config, req=request, req_context=MagicMock(), offloading_context=MagicMock()
    )
    status.update_offload_keys()
    status.num_locally_computed_tokens = local
    pages, first = (state.offload_keys for state in status.group_states)
    stored = {*pages, *(first[:1] if first_is_there else ())}

    connector: Any = object.__new__(scheduler.OffloadingConnectorScheduler)
    connector.config = config
    connector.manager = MagicMock()
    connector.manager.lookup = lambda key, context: (
        LookupResult.HIT if key in stored else LookupResult.MISS
    )
    connector._events_tracker = MagicMock()
    connector._lookup_groups, connector._sliding_window_groups = (0, 1), ()
    connector._mamba_align_size = connector._chunks_being_loaded = None
    connector._current_batch_allocated_block_ids = set()
    connector._current_batch_sync_loads = set()
    connector._current_batch_load_jobs, connector._jobs = {}, {}
    connector._job_counter = 0
    connector._req_status = {"r": status}
    found = connector._lookup_complete_chunks(status)
    if not found:
        return dict(found=found)
    rows = [KVCacheBlock(1 + n) for n in range(BLOCKS)], [KVCacheBlock(20)]
    for n in range(local // 128):
        rows[0][n]._block_hash = b"hashed"
    if local:
        rows[1][0]._block_hash = b"hashed"
    connector.update_state_after_alloc(request, SimpleNamespace(blocks=rows), found)
    (job,) = connector._current_batch_load_jobs.values()
    keys = connector.manager.prepare_load.call_args[0][0]
    return dict(
        found=found,
        blocks=[int(block) for block in job.dst_spec.block_ids],
        of_groups=list(job.dst_spec.group_sizes),
        known=all(key in stored for key in keys) and len(keys) == len(job.dst_spec.block_ids),
    )


def outcomes(root: Path) -> dict[str, Any]:
    """Of these sources."""
    config, scheduler = (module(root, name) for name in ("config", "scheduler"))
    found: dict[str, Any] = {"windows": [window(config, spec) for spec in SPECS]}
    for local in (0, 256):
        for there in (True, False):
            found[f"{local} {there}"] = outcome(scheduler, local, there)
    return found


if __name__ == "__main__":
    roots = {"before": Path(sys.argv[1]), "after": Path()}
    print(json.dumps({name: outcomes(root) for name, root in roots.items()}))
