"""Prefixes that come back from an offloaded pool: the answers of a quiet engine.

In pools that are too small for what comes again, with copies that are made as late as may be, on
pages that are poisoned whenever they change hands, here and there.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from vllm.distributed.kv_transfer import get_kv_transfer_group

from kivi_vllm.attention.groups.tails import TailManager
from tests.choice import some
from tests.engine import Answer, engine, gemma3, generate, random_prompt, tiny_model
from tests.invariance.conftest import free_blocks, same
from tests.models.test_hybrids import HYBRIDS
from tests.offload import offloaded, settle

MAX_TOKENS = 12
STEMS = [random_prompt(900, seed=n) for n in range(4)]
PROMPTS = [
    *STEMS,
    *(stem[:600] + random_prompt(90, seed=10 + i) for i, stem in enumerate(STEMS)),
    STEMS[0][:385],
    STEMS[1][:257],
]

MODELS: dict[str, Callable[[], str]] = {
    "plain": tiny_model,
    "windows": lambda: gemma3("wwf", window=200),  # pages two to a block where there is none
}
BLOCKS = {"plain": 26, "windows": 30}
"""Of the pool: for two of the long prompts at a time, and what is kept of a third."""


def _options(residual: int) -> dict[str, Any]:
    return {"prefill": "cached", "residual_length": residual, "sink_tokens": 8}


def _settings(name: str, residual: int, **extra: Any) -> dict[str, Any]:
    return dict(
        kivi=_options(residual),
        num_gpu_blocks_override=BLOCKS[name] + (8 if residual else 0),
        max_num_batched_tokens=512,
        **offloaded(64 << 20, **extra),
    )


def _quiet(name: str, residual: int, prompts: Sequence[list[int]] = PROMPTS) -> list[Answer]:
    options = dict(kivi=_options(residual), enable_prefix_caching=False)
    with engine(MODELS[name](), "kivi_raw", **options) as llm:
        return [generate(llm, [prompt], MAX_TOKENS)[0] for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "residual", "lazy"),
    some(
        [("plain", 32, False), ("plain", 0, True), ("windows", 32, True)],
        [0],
    ),
)
def test_rounds(
    name: str, residual: int, lazy: bool, smooth_codec: None, poison: Any, offloading: Any
) -> None:
    truth = _quiet(name, residual)
    settings = _settings(name, residual, lazy_offload=lazy)
    if residual:
        settings["prefix_cache_retention_interval"] = 256
    with engine(MODELS[name](), "kivi_raw", **settings) as llm:
        poison(llm)
        free = free_blocks(llm)
        chance, found = random.Random(0), 0
        for _ in range(4):
            order = chance.sample(range(len(PROMPTS)), len(PROMPTS))
            for start in range(0, len(order), 5):
                some_of_them = order[start : start + 5]
                answers = generate(llm, [PROMPTS[i] for i in some_of_them], MAX_TOKENS)
                same(answers, [truth[i] for i in some_of_them])
                found += sum(answer.num_cached_tokens for answer in answers)
        settle(llm)
        assert free_blocks(llm) == free
    assert offloading.counts["blocks loaded"] > 50
    assert found > 2 * sum(map(len, PROMPTS))


@pytest.mark.parametrize("residual", some([0, 32], [0]))
def test_what_is_moved(residual: int, smooth_codec: None, poison: Any, offloading: Any) -> None:
    """Of a sequence its pages, its sinks, and the tail where it ends; of a part what is lacking."""
    counts = offloading.counts
    with engine(tiny_model(), "kivi_raw", **_settings("plain", residual)) as llm:
        poison(llm)
        truth = generate(llm, STEMS[:1], MAX_TOKENS)
        settle(llm)
        assert counts["blocks stored"] == 7 + 1 + bool(residual)
        assert llm.reset_prefix_cache()
        again = generate(llm, STEMS[:1], MAX_TOKENS)
        same(again, truth)
        assert again[0].num_cached_tokens == 896
        assert counts["blocks loaded"] == 7 + 1 + bool(residual)
        if residual:  # of whose prefixes the end alone is kept
            return
        # The end of a prefix is evicted first: its beginning is here, the rest is loaded.
        for i, length in enumerate((900, 900, 300)):
            generate(llm, [random_prompt(length, seed=99 + i)], 1)
        settle(llm)
        counts.clear()
        again = generate(llm, STEMS[:1], MAX_TOKENS)
        same(again, truth)
        assert again[0].num_cached_tokens == 896
        assert 0 < counts["blocks loaded"] < 7


@pytest.mark.slow
def test_states(poison: Any, offloading: Any) -> None:
    """Of hybrids, whose answers on a CPU depend on the chunks: as after a hit that is here."""
    again = []
    for connector in ({}, offloaded(64 << 20)):
        options = dict(kivi=_options(0), enable_prefix_caching=True, max_model_len=2048)
        with engine(HYBRIDS["lfm2"].path, "kivi_raw", **options, **connector) as llm:
            poison(llm)
            generate(llm, [LONG], MAX_TOKENS)
            if connector:
                settle(llm)
                assert llm.reset_prefix_cache()
            again += generate(llm, [LONG], MAX_TOKENS)
    assert again[0].num_cached_tokens == again[1].num_cached_tokens > 0
    same(again[1:], again[:1])
    assert offloading.counts["blocks loaded"]


LONG = random_prompt(1900, seed=7)


def _loaded(llm: Any) -> list[Answer]:
    """Answers to a prompt and to its beginning, after what the pool no longer has."""
    generate(llm, PARTS, MAX_TOKENS)
    settle(llm)
    assert llm.reset_prefix_cache()  # not that of the connector
    return generate(llm, PARTS, MAX_TOKENS)


PARTS = [STEMS[0], STEMS[0][:385]]


@pytest.mark.parametrize("fault", some(["none", "short", "shifted", "tails"], [3]))
def test_a_fault_is_seen(
    fault: str,
    smooth_codec: None,
    poison: Any,
    offloading: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative controls: each of these faults changes an answer, and nothing else does."""
    if fault == "tails":  # the row of the block table has no page for what is loaded

        def without(self: Any, request_id: str, local: int, external: int, **_: Any) -> None:
            self._append(request_id, [], [], (local + external) // 128)

        monkeypatch.setattr(TailManager, "allocate_external_computed_blocks", without)
    truth = _quiet("plain", 32, PARTS)
    settings = _settings("plain", 32) | dict(prefix_cache_retention_interval=128)
    with engine(tiny_model(), "kivi_raw", **settings) as llm:
        poison(llm)
        offloading.fault = fault
        found = _loaded(llm)
        assert [answer.num_cached_tokens for answer in found] == [896, 384]
        differences = [a.difference(b) for a, b in zip(found, truth, strict=True)]
        assert (max(differences) > 0.01) == (fault != "none"), differences


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_disk(smooth_codec: None, poison: Any, offloading: Any, tmp_path: Path) -> None:
    """vLLM's own threads and files; a file that has lost its end is an error."""
    disk = dict(kv_offload_backend="disk", disk_path=str(tmp_path / "kv"), use_page_cache=True)
    settings = _settings("plain", 32, disk_capacity_bytes=64 << 20, **disk)
    with engine(tiny_model(), "kivi_raw", **settings) as llm:
        poison(llm)
        truth = generate(llm, STEMS[:1], MAX_TOKENS)
        settle(llm)
        assert llm.reset_prefix_cache()
        again = generate(llm, STEMS[:1], MAX_TOKENS)
        same(again, truth)
        assert again[0].num_cached_tokens == 896
        (file,) = tmp_path.iterdir()
        os.truncate(file, 1 << 10)
        assert llm.reset_prefix_cache()
        with pytest.raises(RuntimeError, match="a copy between the cache and the offloaded pool"):
            generate(llm, STEMS[:1], MAX_TOKENS)


def test_a_copy_that_fails(offloading: Any) -> None:
    """vLLM's thread is gone, and nobody else would tell the request that waits for it."""
    with engine(tiny_model(), "kivi_raw", **_settings("plain", 0)) as llm:
        generate(llm, STEMS[:1], 1)
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        get_kv_transfer_group().worker_handler._backend.thread = thread
        with pytest.raises(RuntimeError, match="a copy between the cache and the offloaded pool"):
            generate(llm, STEMS[:1], 1)
