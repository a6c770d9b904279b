"""Cheap engines: vLLM's start takes seconds of housekeeping that tests can do once."""

from __future__ import annotations

import contextlib
import gc
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

_IMPORTED_BY_EVERY_ENGINE = (
    "torch._dynamo",
    "transformers.modeling_utils",
    "vllm.v1.engine.llm_engine",
    "vllm.v1.worker.cpu_worker",
)

_registered: list[None] = []


@contextlib.contextmanager
def quick_engines() -> Iterator[None]:
    """Make engines started inside several times quicker, without touching what it computes."""
    for name in _IMPORTED_BY_EVERY_ENGINE:
        importlib.import_module(name)
    from vllm.model_executor.models import registry
    from vllm.platforms.cpu import CpuPlatform

    register = CpuPlatform.register_triton_kernel_overrides

    def once(cls: type) -> None:
        # Every engine searches all modules anew for kernels to replace, and fails where
        # numba, which n-gram drafts need, has been imported meanwhile.
        if not _registered:
            _registered.append(register())

    def here(function: Callable[[], Any]) -> Any:
        # vLLM asks a fresh process about each model class, to keep CUDA uninitialized here.
        return function()

    # Most of an engine's time is ten collections over all that is imported: keep that out of
    # them, whereas vLLM takes it out when an engine starts and puts it back when it ends.
    gc.collect()
    gc.freeze()
    unfreeze = gc.unfreeze
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        patch.setattr(CpuPlatform, "register_triton_kernel_overrides", classmethod(once))
        patch.setattr(registry, "_run_in_subprocess", here)
        try:
            yield
        finally:
            unfreeze()
