"""`--scheduling-policy priority`: the urgent take pages from the others, and nobody sees it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import answer, engine, generate, random_prompt, sampling, tiny_model
from tests.invariance.conftest import free_blocks

TOLERANCE = 1e-4
LONG_ANSWER = 150


@pytest.mark.slow
def test_the_urgent_preempt_the_others(
    smooth_codec: None, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[tuple[int, list[int]]] = []  # the victim's priority, those of who goes on
    preempt = Scheduler._preempt_request

    def watched(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        others = [r.priority for r in self.running if r is not request]
        preempted.append((request.priority, others))
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", watched)
    prompts = [random_prompt(n, seed=n) for n in (250, 240, 120, 340, 246)]
    with engine(
        tiny_model(),
        "kivi_raw",
        kivi={"prefill": "cached", "residual_length": 32, "sink_tokens": 8},
        scheduling_policy="priority",
        num_gpu_blocks_override=16,
        max_num_batched_tokens=512,
        max_model_len=512,
    ) as llm:
        poison(llm)
        free = free_blocks(llm)
        truth = [generate(llm, [prompt], LONG_ANSWER)[0] for prompt in prompts]
        assert not preempted
        core, finished = llm.llm_engine, {}
        for index, prompt in enumerate(prompts):
            tokens = {"prompt_token_ids": prompt}
            # Smaller is more urgent: who comes later goes first.
            core.add_request(str(index), tokens, sampling(LONG_ANSWER), priority=-index)
            core.step()
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    finished[int(output.request_id)] = answer(output)
        assert free_blocks(llm) == free
    assert preempted, "the pool was large enough for all: nothing was tested"
    # First come, first served would take the pages of the most urgent.
    assert all(victim > max(others) for victim, others in preempted)
    for index, want in enumerate(truth):
        assert finished[index].difference(want) <= TOLERANCE
