"""The driver's copies between a GPU's memory and the CPU's, which here are one."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from tests.cuda.fake_device import _Stream
from tests.offload import copy_memory


def install() -> None:
    """Let vLLM's offloading find `cuMemcpyBatchAsync`, and memory that can be pinned."""
    from vllm.platforms import current_platform
    from vllm.v1.simple_kv_offload import cuda_mem_ops

    # In the copying thread, where no mode puts on the CPU what is meant for the GPU.
    type(current_platform).set_device = classmethod(lambda cls, device: None)
    _Stream.priority_range = staticmethod(lambda: (0, -1))  # type: ignore[attr-defined]
    pinned = SimpleNamespace(cudaHostRegister=lambda *_: SimpleNamespace(value=0))
    torch.cuda.cudart = lambda: pinned
    cuda_mem_ops._batch_memcpy = (copy_memory, 1)
