"""A cache that is hostile to whoever reads what is not theirs, and a codec that is fair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tests.engine  # noqa: F401  (sets vLLM's environment before it is imported)
from kivi_vllm.ops import dispatch, reference
from tests.engine import generate, random_prompt
from tests.offload import offloading  # noqa: F401  (a fixture)
from tests.quick import quick_engines

TOLERANCE = 1e-4  # of log-probabilities
POISON = 0xFF  # NaN in fp16, bf16 and fp32 alike; as codes, the largest


@pytest.fixture(scope="package", autouse=True)
def _quick() -> Iterator[None]:
    from vllm.plugins import load_general_plugins

    # Before a test replaces what the plugin wraps: what it puts back would be without the wrapper.
    load_general_plugins()
    with quick_engines():
        yield


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The operators that all layers call; a test may replace each."""
    chosen = SimpleNamespace()
    use(chosen, dispatch.operators("cpu"))
    monkeypatch.setattr(dispatch, "operators", lambda device: chosen)
    return chosen


def use(operators: SimpleNamespace, module: Any) -> None:
    """Take the operators of `module`."""
    names = "limits step prepare store_blocks select attend attend_selected store_ring"
    for name in names.split():
        setattr(operators, name, getattr(module, name))


@pytest.fixture
def smooth_codec(operators: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `kivi_raw` pages lossy but continuous.

    Rounding to codes turns a difference of 1e-7 in a key, as another order of
    summation makes, into a whole step now and then. With this codec pages
    differ from the residual as much as quantized ones do, and such differences
    stay small: what is left is the plumbing.
    """
    from kivi_vllm.ops.cpu import operators as native

    for module in (native, reference):
        monkeypatch.setattr(module, "store_blocks", _lossy(module.store_blocks))
    use(operators, native if operators.attend is native.attend else reference)


def _lossy(store_blocks: Callable[..., None]) -> Callable[..., None]:
    def store(step: Any, cache: Any, key: torch.Tensor, value: torch.Tensor) -> None:
        store_blocks(step, cache, key, value)
        for row in step.rows:
            at = torch.arange(row.a // 128, row.b // 128)
            per_block = cache.pages_per_block
            where = step.block_table[row.index, at // per_block].long(), at % per_block
            pages = cache.pages[where].view(cache.fmt.raw_dtype)
            k, v = pages.chunk(2, -1)
            cache.pages[where] = torch.cat([k * 0.8 + 0.05, v * 0.7], -1).view(torch.uint8)

    return store


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], list[int]]]:
    """Call it with an engine: all its pages are poisoned now, and each when it is taken.

    Returns the list of the page ids taken so far, which grows.
    """
    from vllm.v1.core.block_pool import BlockPool

    get_new_blocks = BlockPool.get_new_blocks
    engines: list[tuple[Any, list[torch.Tensor], list[int]]] = []

    def get_poisoned_blocks(self: Any, num_blocks: int) -> Any:
        blocks = get_new_blocks(self, num_blocks)
        for pool, caches, taken in engines:
            if pool is not self:  # a connector has one of its own
                continue
            ids = [block.block_id for block in blocks]
            taken.extend(ids)
            for cache in caches:
                cache[ids] = POISON
        return blocks

    def start(llm: Any) -> list[int]:
        config = llm.llm_engine.vllm_config.compilation_config
        # States of Mamba layers are several tensors; a sharing layer's is its owner's.
        caches = [
            tensor.view(torch.uint8)
            for layer in config.static_forward_context.values()
            if getattr(layer, "kv_sharing_target_layer_name", None) is None
            for tensor in _tensors(getattr(layer, "kv_cache", ()))
        ]
        for cache in caches:
            cache.fill_(POISON)
        engines[:] = [(scheduler(llm).kv_cache_manager.block_pool, caches, [])]
        return engines[0][2]

    monkeypatch.setattr(BlockPool, "get_new_blocks", get_poisoned_blocks)
    yield start
    engines.clear()


def _tensors(cache: Any) -> list[torch.Tensor]:
    return [cache] if isinstance(cache, torch.Tensor) else list(cache)


def scheduler(llm: Any) -> Any:
    """The engine's scheduler, to change its chunk size or look at its pool."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def free_blocks(llm: Any) -> int:
    """Pages that nobody holds."""
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def same(answers: list, truth: list) -> None:
    """Assert that each answer is the one that is wanted."""
    for got, want in zip(answers, truth, strict=True):
        assert got.difference(want) <= TOLERANCE


@pytest.fixture
def preempted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that were preempted so far."""
    from vllm.v1.core.sched.scheduler import Scheduler

    found: list[str] = []
    preempt = Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    return found


def check_preemption(llm: Any, preempted: list[str]) -> None:
    """Assert that requests which take pages from each other answer as each does alone.

    Raises:
        AssertionError: an answer differs, nobody was preempted, or a page was not given back.

    """
    # Long answers: what a new request leaves free is not enough for them.
    prompts = [random_prompt(n, seed=n) for n in (250, 240, 120, 340, 246)]
    free = free_blocks(llm)
    truth = [generate(llm, [prompt], 150)[0] for prompt in prompts]
    assert not preempted
    same(generate(llm, prompts, 150), truth)
    assert preempted, "the pool was large enough for all: nothing was tested"
    assert free_blocks(llm) == free
    preempted.clear()
