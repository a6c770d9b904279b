"""Pages that generated tokens read, chosen and read by the kernels in CUDA C++."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kivi_vllm.ops.cuda import compiler
from kivi_vllm.ops.select import Selection
from kivi_vllm.ops.triton import select
from kivi_vllm.ops.triton.workspace import _buffers
from tests.ptx.cuda import InCuda, text
from tests.ptx.parse import Fault
from tests.unit.selecting import SelectingSimulator
from tests.unit.simulator import Case
from tests.unit.test_select import generate

BF16, FP16 = torch.bfloat16, torch.float16

pytestmark = pytest.mark.skipif(not compiler.available(), reason="there is no NVRTC")

CASES = [
    Case("kivi_k3v2", budget=256, tokens=900, heads=(4, 2), model=BF16, per_block=2),
    Case(budget=384, tokens=900, head_size=128, heads=(12, 1), model=BF16),
    Case("kivi4", budget=128, tokens=700, heads=(3, 1), residual=32, drafts=3, model=FP16),
    Case(budget=256, window=700, tokens=1300, drafts=2, soft_cap=20.0, heads=(2, 1), model=BF16),
    Case("kivi3", budget=128, chunk=512, tokens=1020, residual=64, heads=(20, 1), model=BF16),
]


def make(case: Case, ops: Any, **options: Any) -> SelectingSimulator:
    return SelectingSimulator(case, ops=ops, tolerance=1e-2, near=2e-2, num_blocks=96, **options)


def check(case: Case, capability: int, tokens: int) -> None:
    """Beside another answer, which is too short to choose."""
    ops = InCuda(capability)
    sim = make(case, ops)
    request, short = sim.add(case.tokens), sim.add(case.budget + 10)
    short.prompt = case.budget - 3
    generate(sim, request, tokens, until=case.tokens - tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim, "check", lambda *args: None)
        sim.step({short: short.prompt})
    while request.computed < case.tokens:
        n = int(sim.rng.integers(1, sim.decode_len + 1))
        sim.step({request: n, short: n})
    assert {name for _, name in ops.ran} == {"score", "choose", "decode"}
    assert sim.chosen >= tokens * case.heads[1] and sim.poisoned
    assert not short.read
    sim.check_untouched()


def test_one() -> None:
    check(CASES[0], 90, 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_chosen_is_read(case: Case) -> None:
    check(case, 80, 3)


@pytest.mark.slow
def test_a_budget_that_suffices_changes_nothing() -> None:
    """As no budget does, bit by bit."""
    outputs = []
    for budget in (0, 768, 640):
        sim = make(
            Case(budget=budget, tokens=900, residual=32, model=BF16, heads=(2, 1)),
            InCuda(80),
            seed=3,
        )
        request = sim.add(900)
        generate(sim, request, 2)
        outputs.append(request.output)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["another-row", "another-head", "older"])
def test_a_wrong_list_is_noticed(fault: str) -> None:
    case = Case(budget=384, tokens=800, heads=(4, 2), model=BF16)

    def wrong(selection: Selection | None) -> Selection | None:
        assert selection is not None
        blocks = selection.blocks.clone()
        if fault == "older":
            blocks -= 1
        return replace(selection, blocks=blocks.flip(int(fault == "another-head")).contiguous())

    sim = make(case, InCuda(80))
    requests = [sim.add(800), sim.add(780)]
    for request in requests:
        generate(sim, request, 9, until=len(request) - 8)
    sim.change = wrong
    with pytest.raises((AssertionError, Fault)):
        for _ in range(4):
            sim.step(dict.fromkeys(requests, 1))


@pytest.mark.slow
def test_pages_are_counted() -> None:
    case = Case(budget=256, tokens=900, heads=(4, 2), residual=32, model=BF16)
    sim = make(case, InCuda(80))
    request, short = sim.add(900), sim.add(330)
    request.prompt, short.prompt = 898, 328
    sim.step({request: 898, short: 328})
    _buffers.pop(("counted", torch.device("cpu")), None)
    for _ in range(2):
        sim.step({request: 1, short: 1})
    seen = sum(-(-sim.rule(t, 32) // 128) for t in range(898, 900))
    seen_short = sum(-(-sim.rule(t, 32) // 128) for t in range(328, 330))
    assert select.counted(torch.device("cpu")) == (
        2 * (seen + seen_short),
        2 * (2 * 3 + seen_short),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pattern"), [("choose", "bar.sync"), ("score", "bar.warp.sync")])
def test_what_orders_the_threads_is_needed(name: str, pattern: str) -> None:
    """Barriers taken out one by one are noticed, but for those that others make up for."""
    case = Case(budget=256, tokens=3000, heads=(1, 1), model=BF16)
    ops = InCuda(80)

    def steps(sim: SelectingSimulator) -> None:
        request = sim.add(3000)
        generate(sim, request, 1)

    steps(make(case, ops))
    [variant] = {variant for variant, of in ops.ran if of == name}
    count, noticed = text(variant, name, 80).count(pattern), 0
    for number in range(count):

        def change(ptx: str, number: int = number) -> str:
            if f".entry {name}(" not in ptx:
                return ptx
            lines = ptx.splitlines()
            found = [i for i, line in enumerate(lines) if pattern in line]
            del lines[found[number]]
            return "\n".join(lines)

        try:
            steps(make(case, InCuda(80, change)))
        except (Fault, AssertionError):
            noticed += 1
    print(f"{noticed} of {count} noticed")
    # Of `score`, shuffles order the threads as well as the second one does.
    assert count and noticed >= (0.7 if name == "choose" else 0.5) * count
