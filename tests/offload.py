"""vLLM's offloading on the CPU engine: copies that take their time, and pools that are poisoned."""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import pytest
import torch

POISON = 0xFF


class Torch:
    """PyTorch as vLLM's worker sees it: the CPU has neither streams nor events."""

    class Event:
        def record(self, stream: Any = None) -> None:
            pass

        synchronize = record

        def query(self) -> bool:
            return True

    class cuda:
        class Stream:
            cuda_stream = 0
            priority_range = staticmethod(lambda: (0, 0))

            def __init__(self, **kwargs: Any) -> None:
                pass

            def wait_event(self, event: Any) -> None:
                pass

        current_stream = staticmethod(lambda: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Copy:
    """A copy between the pools that is made when it is last asked for, and not before."""

    def __init__(self, do: Callable[[], None], polls: int) -> None:
        self.do = do
        self.polls = polls
        self.done = False

    def query(self) -> bool:
        """Whether it is done, as vLLM asks at each step."""
        self.polls -= 1
        if self.polls < 0:
            self.synchronize()
        return self.done

    def synchronize(self) -> None:
        """Do it now."""
        if not self.done:
            self.do()
        self.done = True


class Copies:
    """In place of vLLM's `DmaCopyBackend`; `counts` says what it copied, over all engines."""

    counts: ClassVar[Counter[str]] = Counter()
    fault: ClassVar[str] = ""
    """ "short": loads leave out their last block; "shifted": they take the block before."""

    def __init__(self) -> None:
        self.chance = random.Random(0)

    def init(self, gpu: dict[str, torch.Tensor], cpu: dict[str, torch.Tensor], *_: Any) -> None:
        self.pools = [(gpu[name], cpu[name]) for name in gpu]
        for _, tensor in self.pools:
            tensor.view(torch.uint8).fill_(POISON)

    def launch_copy(
        self,
        source: Sequence[int],
        target: Sequence[int],
        is_store: bool,
        event_idx: int,
        events_list: list[tuple[int, Any]],
        wait_event: Any = None,
    ) -> None:
        if Copies.fault == "short" and not is_store:
            source, target = source[:-1], target[:-1]
        if Copies.fault == "shifted" and not is_store:
            source = [max(0, block - 1) for block in source]
        if is_store:  # what was there is gone
            for _, offloaded in self.pools:
                offloaded[target] = torch.tensor(POISON, dtype=torch.uint8).view(torch.int8)

        def do() -> None:
            for cache, offloaded in self.pools:
                there, here = (offloaded, cache) if is_store else (cache, offloaded)
                there[list(target)] = here[list(source)]

        what = "stored" if is_store else "loaded"
        Copies.counts[f"blocks {what}"] += len(source)
        Copies.counts[f"bytes {what}"] += len(source) * sum(c[0].nbytes for c, _ in self.pools)
        events_list.append((event_idx, Copy(do, self.chance.randrange(4))))

    def shutdown(self) -> None:
        pass


def copy_memory(targets: int, sources: int, sizes: int, count: int, *_: object) -> int:
    """As the driver's `cuMemcpyBatchAsync`, of arrays of 64-bit numbers."""
    numbers = ctypes.c_uint64 * count
    where = (numbers.from_address(array) for array in (targets, sources, sizes))
    for target, source, size in zip(*where, strict=True):
        ctypes.memmove(target, source, size)
    return 0


@pytest.fixture
def offloading(monkeypatch: pytest.MonkeyPatch) -> type[Copies]:
    """Let vLLM's connector copy on the CPU, where its copies need CUDA otherwise."""
    from vllm.platforms import current_platform
    from vllm.v1.simple_kv_offload import cuda_mem_ops, disk_backend, worker

    from kivi_vllm.attention import connectors

    monkeypatch.setattr(worker, "DmaCopyBackend", Copies)
    monkeypatch.setattr(worker, "torch", Torch())
    monkeypatch.setattr(disk_backend, "torch", Torch())
    monkeypatch.setattr(disk_backend, "pin_tensor", lambda tensor: None)
    monkeypatch.setattr(cuda_mem_ops, "_batch_memcpy", (copy_memory, 1))
    monkeypatch.setattr(type(current_platform), "set_device", lambda *_: None)
    monkeypatch.setattr(connectors, "COPIES_ON", {"cpu", "cuda"})
    monkeypatch.setattr(Copies, "counts", Counter())
    monkeypatch.setattr(Copies, "fault", "")
    return Copies


def offloaded(size: int, **extra: Any) -> dict[str, Any]:
    """Engine arguments for an offloaded pool of `size` bytes."""
    return dict(
        kv_transfer_config=dict(
            kv_connector="SimpleCPUOffloadConnector",
            kv_role="kv_both",
            kv_connector_extra_config=dict(cpu_bytes_to_use=size, **extra),
        )
    )


def manager(llm: Any) -> Any:
    """The scheduler's side of the connector."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return scheduler.connector.scheduler_manager


def settle(llm: Any) -> None:
    """Step until no copy is on its way."""
    core = llm.llm_engine.engine_core.engine_core
    for _ in range(100):
        if not core.scheduler.has_requests():
            return
        core.step_fn()
    raise AssertionError("copies never end")


def blocks_on_their_way(scheduler: Any) -> Iterator[int]:
    """The blocks of the engine's pool that copies hold besides the requests."""
    manager = scheduler.connector.scheduler_manager
    transfers = [
        *manager._store_event_to_blocks.values(),
        *manager._abandoned_store_event_to_blocks.values(),
        *manager._pending_finished_stores,
    ]
    for states in (manager._reqs_to_load, manager._abandoned_reqs_to_load):
        transfers += [state.transfer_meta for state in states.values()]
    for transfer in transfers:
        yield from transfer.gpu_block_ids
