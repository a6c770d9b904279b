"""`--scheduling-policy priority`: the urgent take pages from the others, and nobody sees it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine import answer, engine, generate, random_prompt, sampling, tiny_model
from tests.invariance.conftest import free_blocks

TOLERANCE = 1e-4
LONG_ANSWER = 150


@pytest.mark.slow
def test_urgent_requests_preempt_the_others(
    smooth_codec: None, poison: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted: list[int] = []
    preempt = Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.priority)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    later, urgent = 5, -1  # vLLM serves the smaller number first
    prompts = [random_prompt(n, seed=n) for n in (250, 240, 120, 340, 246)]
    priorities = [later, later, later, urgent, urgent]
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

        def add(index: int) -> None:
            tokens = {"prompt_token_ids": prompts[index]}
            name = str(index)
            core.add_request(name, tokens, sampling(LONG_ANSWER), priority=priorities[index])

        def steps(number: int) -> None:
            for _ in range(number):
                for output in core.step():
                    if output.finished:
                        finished[int(output.request_id)] = answer(output)

        for index in (0, 1, 2):
            add(index)
        steps(5)  # they have begun to answer
        for index in (3, 4):
            add(index)
        while core.has_unfinished_requests():
            steps(1)
        assert free_blocks(llm) == free
    assert preempted and set(preempted) == {later}, "the urgent took nobody's pages"
    assert next(iter(finished)) in (3, 4)
    for index, want in enumerate(truth):
        assert finished[index].difference(want) <= TOLERANCE
