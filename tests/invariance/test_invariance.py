"""In `cached` mode an answer depends on its prompt and on nothing else.

Not on the chunks of the prefill, on prefix hits, on who else is in the batch, or on
preemption; nor on drafts (`test_drafts`). Each with the ring alone, and with tails
and sinks too, on pages that are poisoned whenever they change hands.
"""

from __future__ import annotations

from typing import Any

import pytest

from kivi_vllm.attention.groups.ring import RingManager
from kivi_vllm.ops import reference
from kivi_vllm.ops.cpu import operators as native
from tests.choice import some
from tests.engine import answer, engine, generate, random_prompt, sampling, tiny_model
from tests.invariance.conftest import check_preemption, free_blocks, same, scheduler, use

PROMPTS = [random_prompt(n, seed=n) for n in (700, 129, 40, 384, 255)]
MAX_TOKENS = 20

# A ring alone, and what has tails and sinks too, which is in the quick choice.
residuals = pytest.mark.parametrize("residual", some([0, 32], [1]), ids=["R0", "R32-sinks8"])
slow = pytest.mark.slow


def _options(residual: int) -> dict[str, Any]:
    sinks = 8 if residual else 0
    return {"prefill": "cached", "residual_length": residual, "sink_tokens": sinks}


def _alone(llm: Any) -> list:
    return [generate(llm, [prompt], MAX_TOKENS)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("module", some([native, reference], [0]), ids=["native", "reference"])
@residuals
def test_chunks_and_batch(
    residual: int, module: Any, operators: Any, smooth_codec: None, poison: Any
) -> None:
    use(operators, module)
    options = _options(residual)
    with engine(tiny_model(), "kivi_raw", kivi=options, enable_prefix_caching=False) as llm:
        poison(llm)
        free = free_blocks(llm)
        truth = _alone(llm)
        for chunk in (48, 100, 128, 2048):
            scheduler(llm).max_num_scheduled_tokens = chunk
            same(_alone(llm), truth)
            same(generate(llm, PROMPTS, MAX_TOKENS), truth)
        assert free_blocks(llm) == free


@residuals
def test_prefix_hits(residual: int, smooth_codec: None, poison: Any) -> None:
    prompts = [*PROMPTS, PROMPTS[0][:600] + random_prompt(60, seed=99)]
    options = _options(residual)
    with engine(tiny_model(), "kivi_raw", kivi=options, enable_prefix_caching=False) as llm:
        poison(llm)
        truth = [generate(llm, [prompt], MAX_TOKENS)[0] for prompt in prompts]
    with engine(tiny_model(), "kivi_raw", kivi=options, enable_prefix_caching=True) as llm:
        poison(llm)
        # Hits within one step: the same prompt three times in one batch.
        together = generate(llm, [prompts[0]] * 3, MAX_TOKENS)
        same(together, [truth[0]] * 3)
        assert [a.num_cached_tokens for a in together] == [0, 640, 640]
        # Hits on what earlier requests left behind.
        for _ in range(2):
            again = [generate(llm, [prompt], MAX_TOKENS)[0] for prompt in prompts]
            same(again, truth)
        cached = [a.num_cached_tokens for a in again]
        assert cached[:5] == [640, 128, 0, 256, 128]
        # 600 shared tokens: four whole blocks, found by the second request at the latest.
        assert cached[5] >= 512


@slow
def test_tails_of_every_block(smooth_codec: None, poison: Any) -> None:
    """With `--prefix-cache-retention-interval 128`, in a pool for one request and in a larger."""
    prompts = [random_prompt(1000, seed=1), random_prompt(700, seed=2)]
    later = [prompts[0][:600] + random_prompt(50, seed=3), prompts[1][:300]]
    answers = []
    for blocks in (20, 100):
        with engine(
            tiny_model(),
            "kivi_raw",
            kivi=_options(32),
            num_gpu_blocks_override=blocks,
            max_num_batched_tokens=256,
            max_model_len=1024,
            prefix_cache_retention_interval=128,
        ) as llm:
            poison(llm)
            answers.append(generate(llm, prompts, MAX_TOKENS))
            again = generate(llm, later, MAX_TOKENS)
    same(*answers)
    assert [answer.num_cached_tokens for answer in again] == [512, 256]


@residuals
def test_preemption(residual: int, smooth_codec: None, poison: Any, preempted: list[str]) -> None:
    options = _options(residual)
    for caching in (False, True):
        with engine(
            tiny_model(),
            "kivi_raw",
            kivi=options,
            enable_prefix_caching=caching,
            num_gpu_blocks_override=16 if residual else 13,
            max_num_batched_tokens=512,
            max_model_len=512,
        ) as llm:
            poison(llm)
            check_preemption(llm, preempted)


@slow
@residuals
def test_a_new_request_leaves_the_others_their_next_block(
    residual: int, preempted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each completes a block in its answer, for which all prompts together leave no room."""
    prompts = [random_prompt(n, seed=n) for n in (250, 240, 120, 375, 246)]
    settings: dict[str, Any] = dict(
        kivi=_options(residual),
        num_gpu_blocks_override=19 if residual else 15,
        max_num_batched_tokens=512,
        max_model_len=512,
    )
    with engine(tiny_model(), "kivi_raw", **settings) as llm:
        generate(llm, prompts, 40)
        assert not preempted
    monkeypatch.setattr(
        RingManager,
        "get_num_blocks_to_allocate",
        lambda self, request_id, num_tokens, *_, **__: self._missing(request_id, num_tokens),
    )
    with engine(tiny_model(), "kivi_raw", **settings) as llm:
        generate(llm, prompts, 40)
        assert preempted, "the pool was large enough for all: nothing was tested"


@slow
@residuals
def test_aborted_neighbours(residual: int, smooth_codec: None, poison: Any) -> None:
    options = _options(residual)
    with engine(tiny_model(), "kivi_raw", kivi=options, enable_prefix_caching=False) as llm:
        taken = poison(llm)
        free = free_blocks(llm)
        truth = _alone(llm)
        core = llm.llm_engine
        scheduler(llm).max_num_scheduled_tokens = 200
        finished = {}
        for i, prompt in enumerate(PROMPTS):
            for name in (f"keep-{i}", f"drop-{i}"):
                tokens = prompt if name.startswith("keep") else random_prompt(500 - 90 * i, seed=i)
                core.add_request(name, {"prompt_token_ids": tokens}, sampling(MAX_TOKENS))
        before = len(taken)
        for step in range(400):
            for output in core.step():
                if output.finished and output.request_id.startswith("keep"):
                    finished[output.request_id] = answer(output)
            if step in (2, 5, 8, 11, 14):
                core.abort_request([f"drop-{step // 3}"])
            if not core.has_unfinished_requests():
                break
        same([finished[f"keep-{i}"] for i in range(len(PROMPTS))], truth)
        reused = taken[before:]
        assert len(set(reused)) < len(reused), "no page changed hands: nothing was tested"
        assert free_blocks(llm) == free


@pytest.mark.parametrize("fault", some(["ring", "rule", "pages", "sinks"], [1]))
def test_a_fault_is_seen(
    fault: str,
    operators: Any,
    smooth_codec: None,
    poison: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative controls: each of these faults breaks what the tests above assert."""
    use(operators, reference)
    options = _options(32)
    with engine(tiny_model(), "kivi_raw", kivi=options, enable_prefix_caching=False) as llm:
        poison(llm)
        truth = _alone(llm)
        if fault == "ring":  # a ring that is never written
            operators.store_ring = lambda *args: None
        elif fault == "rule":  # a residual that starts one block late
            tiles = reference._tiles

            def late(*args: Any, **options: Any) -> Any:
                return ((s, e, min(s, f + 32)) for s, e, f in tiles(*args, **options))

            monkeypatch.setattr(reference, "_tiles", late)
        elif fault == "sinks":  # sinks that are never written
            keep = reference._keep

            def forgetful(raw: Any, index: int, entries: slice, *kv: Any) -> None:
                if kv[0].shape[2] != 8:
                    keep(raw, index, entries, *kv)

            monkeypatch.setattr(reference, "_keep", forgetful)
        else:  # pages of the block before
            history = reference._page_history

            def shifted(*args: Any) -> Any:
                return tuple(x.roll(128, dims=1) for x in history(*args))

            monkeypatch.setattr(reference, "_page_history", shifted)
        scheduler(llm).max_num_scheduled_tokens = 100
        faulty = _alone(llm)
        assert max(a.difference(b) for a, b in zip(faulty, truth, strict=True)) > 0.01
