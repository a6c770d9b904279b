"""A server's life: prefix caches reset under load, events of blocks, sleep and wake-up."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from kivi_vllm.attention.impl import KiviAttentionImpl
from tests.choice import some
from tests.engine import answer, engine, gemma3, generate, random_prompt, sampling, tiny_model
from tests.invariance.conftest import free_blocks, same, scheduler
from tests.models.test_families import FAMILIES
from tests.offload import manager, offloaded, settle

PROMPTS = [random_prompt(n, seed=n) for n in (700, 300, 129, 40, 384)]
MAX_TOKENS = 12


def _options(residual: int = 32) -> dict[str, Any]:
    return {"prefill": "cached", "residual_length": residual, "sink_tokens": 8}


@pytest.mark.slow
def test_reset_under_load(smooth_codec: None, poison: Any, preempted: Any, offloading: Any) -> None:
    """`reset_prefix_cache`, which waits for nobody, or takes all pages away from everybody."""
    model = gemma3("wwf", window=200)
    settings: dict[str, Any] = dict(kivi=_options(), max_num_batched_tokens=256)
    with engine(model, "kivi_raw", enable_prefix_caching=False, **settings) as llm:
        truth = [generate(llm, [prompt], MAX_TOKENS)[0] for prompt in PROMPTS]
    settings |= offloaded(64 << 20)
    with engine(model, "kivi_raw", **settings) as llm:
        poison(llm)
        free = free_blocks(llm)
        core = llm.llm_engine
        for turn in range(2):
            for i, prompt in enumerate(PROMPTS):
                core.add_request(f"{turn}-{i}", {"prompt_token_ids": prompt}, sampling(MAX_TOKENS))
        finished, steps = {}, 0
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    finished[output.request_id] = answer(output)
            steps += 1
            assert steps < 400
            assert llm.reset_prefix_cache() == (free_blocks(llm) == free)
            if steps % 6:
                continue
            if _copies(llm):  # which vLLM does not wait for
                with pytest.raises(RuntimeError, match="Failed to reset KV cache"):
                    llm.reset_prefix_cache(reset_running_requests=True)
            else:
                assert llm.reset_prefix_cache(True, reset_connector=True)
        settle(llm)
        same([finished[f"{t}-{i}"] for t in range(2) for i in range(len(PROMPTS))], truth * 2)
        assert preempted
        assert free_blocks(llm) == free


def _copies(llm: Any) -> bool:
    """Whether any are on their way."""
    loads = any(
        request.status.name == "WAITING_FOR_REMOTE_KVS"
        for request in scheduler(llm).requests.values()
    )
    return loads or manager(llm).has_pending_stores()


@pytest.mark.parametrize("residual", some([32, 0], [0]))
def test_events(residual: int, offloading: Any) -> None:
    """Of `--kv-events-config`: every group's blocks, of their size, by the hashes of the prompt."""
    settings = dict(
        kivi=_options(residual),
        kv_events_config=dict(enable_kv_cache_events=True, publisher="null"),
        num_gpu_blocks_override=34,
        **offloaded(64 << 20),
    )
    events: list[Any] = []
    with engine(tiny_model(), "kivi2", **settings) as llm:
        publisher = scheduler(llm).kv_event_publisher
        publisher.publish = lambda batch: events.extend(batch.events)
        for seed in range(4):
            generate(llm, [random_prompt(900, seed=seed)], 2)
        settle(llm)
        assert llm.reset_prefix_cache()
        generate(llm, [random_prompt(40, seed=0)], 1)
        groups = scheduler(llm).kv_cache_config.kv_cache_groups
    kinds = {i: type(group.kv_cache_spec).__name__ for i, group in enumerate(groups)}
    there: dict[tuple[Any, Any], set] = defaultdict(set)
    stored: dict[str, int] = defaultdict(int)
    for event in events:
        match type(event).__name__:
            case "BlockStored":
                assert event.block_size == 128
                assert len(event.token_ids) >= 128 * len(event.block_hashes) > 0
                stored[f"{event.medium} {kinds[event.group_idx]}"] += len(event.block_hashes)
                there[event.medium, event.group_idx] |= set(event.block_hashes)
                if kinds[event.group_idx] == "PageSpec":
                    assert event.kv_cache_spec_kind == "full_attention"
                    known = there[event.medium, event.group_idx]
                    assert event.parent_block_hash is None or event.parent_block_hash in known
            case "BlockRemoved":
                assert set(event.block_hashes) <= there[event.medium, event.group_idx]
                there[event.medium, event.group_idx] -= set(event.block_hashes)
            case "AllBlocksCleared":
                there.clear()
    expected = {"PageSpec": 4 * 7, "SinkSpec": 4}
    if tails := [*kinds.values()].count("TailSpec"):
        expected["TailSpec"] = 4 * tails
    assert stored == {
        f"{medium} {kind}": count for medium in ("GPU", "CPU") for kind, count in expected.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", ["falcon-alibi", "gpt-oss"])
def test_wake_up(family: str, poison: Any) -> None:
    """What `--enable-sleep-mode` does on GPUs: the cache's numbers are lost, and at level 2 all."""
    prompts = PROMPTS[1:4]
    with engine(FAMILIES[family].path, "kivi2", kivi={"prefill": "cached"}) as llm:
        before = generate(llm, prompts, MAX_TOKENS)
        assert llm.reset_prefix_cache()  # vLLM does, before it sleeps
        poison(llm)
        same(generate(llm, prompts, MAX_TOKENS), before)
        assert llm.reset_prefix_cache()
        poison(llm)
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        kept = [
            tensor
            for layer in runner.compilation_config.static_forward_context.values()
            if isinstance(getattr(layer, "impl", None), KiviAttentionImpl)
            for tensor in (layer.impl.params.sink_logits, layer.impl.params.alibi_slopes)
            if tensor is not None
        ]
        assert kept
        for tensor in kept:
            tensor.fill_(torch.nan)
        assert generate(llm, prompts, MAX_TOKENS) != before  # the negative control
        assert llm.reset_prefix_cache()
        runner.reload_weights()
        same(generate(llm, prompts, MAX_TOKENS), before)
