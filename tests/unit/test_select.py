"""Which pages generated tokens read: the rule, and the kernels that choose and read by it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kivi_vllm.attention.metadata import mark_generated
from kivi_vllm.config import Estimate, Recipe
from kivi_vllm.ops import reference
from kivi_vllm.ops.cpu import operators as native
from kivi_vllm.ops.select import COUNTED, Selection, best, weights
from tests.choice import some
from tests.unit import kivi_numpy
from tests.unit.native import TOLERANCE
from tests.unit.selecting import SelectingSimulator
from tests.unit.simulator import Case, Request, Simulator
from tests.unit.test_attend import BF16, FP16, MHA, MQA

BOTH = pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])

CASES = [
    Case(budget=256, tokens=900),
    Case("kivi_k3v2", budget=256, tokens=900, head_size=128, heads=(8, 2), model=BF16),
    Case(recipe="paper", budget=384, tokens=900, sinks=4, model=FP16),
    Case("kivi4", budget=128, tokens=700, heads=MQA, residual=32, drafts=3, head_size=96),
    Case("kivi4", "paper", group=64, budget=256, tokens=800, residual=128, heads=MHA),
    Case(budget=256, window=700, tokens=1300, per_block=3, drafts=2, soft_cap=20.0),
    Case("kivi_k4v3", budget=128, chunk=512, tokens=1020, residual=64, sink_logits=(4, 2)),
    Case("kivi3", budget=256, tokens=800, heads=(9, 1), head_size=32),
    Case(budget=128, tokens=400, heads=(65, 1), head_size=512, residual=32),  # 64 rows at most
    Case(budget=256, tokens=900, estimate="keys"),
    Case(
        "kivi_k3v2",
        budget=256,
        tokens=900,
        head_size=128,
        heads=(8, 2),
        model=BF16,
        estimate="keys",
    ),
    Case(
        "kivi4",
        budget=128,
        tokens=700,
        heads=MQA,
        residual=32,
        drafts=3,
        head_size=96,
        estimate="keys",
    ),
    Case(
        budget=256, window=700, tokens=1300, per_block=3, drafts=2, soft_cap=20.0, estimate="keys"
    ),
    Case("kivi_k4v3", budget=128, chunk=512, tokens=1020, sink_logits=(4, 2), estimate="keys"),
    Case("kivi3", budget=256, tokens=800, heads=(9, 1), head_size=32, estimate="keys"),
    Case(budget=128, tokens=400, heads=(65, 1), head_size=512, estimate="keys"),
]


def generate(
    sim: Simulator, request: Request, tokens: int, *others: Request, until: int | None = None
) -> None:
    """Compute a prompt in two chunks, then so many tokens after it, some of them together."""
    request.prompt = len(request) - tokens
    with pytest.MonkeyPatch.context() as patch:  # other tests look at prompts
        patch.setattr(sim, "check", lambda *args: None)
        sim.step({request: request.prompt // 2})
        sim.step({request: request.prompt - request.computed})
    while request.computed < (until or len(request)):
        n = int(sim.rng.integers(1, sim.decode_len + 1))
        more = {other: 50 for other in others if other.computed < len(other)}
        sim.step({request: n} | more)


def make(case: Case, ops: Any = native, **options: Any) -> SelectingSimulator:
    near = 5e-2 if case.estimate == "keys" else 5e-3  # products of eight bits
    tolerance = {} if ops is reference else {"tolerance": TOLERANCE, "near": near}
    return SelectingSimulator(case, ops=ops, at_once=True, **tolerance | options)


@pytest.mark.parametrize("case", some(CASES, [5]), ids=str)
def test_reference(case: Case) -> None:
    check(case, reference)


@pytest.mark.parametrize("case", some(CASES, [1, 4]), ids=str)
def test_native(isa: str, case: Case) -> None:
    check(case, native)


def check(case: Case, ops: Any) -> None:
    """Beside a prompt, and another answer that is too short to choose."""
    sim = make(case, ops)
    request, prompt, short = sim.add(case.tokens), sim.add(150), sim.add(case.budget + 10)
    short.prompt = 1
    generate(sim, request, 9, prompt, short)
    assert sim.chosen >= 9 * case.heads[1] and sim.poisoned
    assert not short.read and not prompt.read
    sim.check_untouched()


@pytest.mark.parametrize("estimate", ["ranges", "keys"])
def test_threads_choose_alike(isa: str, threads: None, estimate: Estimate) -> None:
    """Parts of one long sequence's pages, which several threads score."""
    case = Case(budget=1024, tokens=9000, heads=(2, 1), head_size=64, estimate=estimate)
    lists = []
    for count in (1, 3):
        torch.set_num_threads(count)
        sim = make(case, seed=5)
        request = sim.add(case.tokens)
        request.prompt = case.tokens - 2
        sim.check = lambda *args: None  # type: ignore[method-assign]
        sim.step({request: request.prompt})
        for _ in range(2):
            sim.step({request: 1})
        assert sim.chosen == 2
        lists.append(request.read)
    for t in lists[0]:
        assert np.array_equal(lists[0][t], lists[1][t])


@BOTH
def test_a_budget_that_suffices_changes_nothing(ops: Any) -> None:
    """As no budget does: no list is made, and outputs are the same bit by bit."""
    made: list[Selection | None] = []

    def look(selection: Selection | None) -> Selection | None:
        made.append(selection)
        return selection

    outputs = []
    for budget in (0, 768, 640):
        made.clear()
        sim = make(Case(budget=budget, tokens=900, residual=32, drafts=2, model=BF16), ops, seed=3)
        sim.change = look
        request = sim.add(900)
        generate(sim, request, 20)
        assert any(made) == (budget == 640)  # the control: of six whole pages
        outputs.append(request.output)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@BOTH
@pytest.mark.parametrize("fault", some(["another-row", "another-head", "none", "older"], [0]))
def test_a_wrong_list_is_noticed(ops: Any, fault: str) -> None:
    """Negative controls: attention that reads other pages than were chosen meets a NaN."""
    case = Case(budget=384, tokens=800)

    def wrong(selection: Selection | None) -> Selection | None:
        if selection is None or fault == "none":
            return None
        blocks = selection.blocks.clone()
        if fault == "older":
            blocks -= 1
        return replace(selection, blocks=blocks.flip(int(fault == "another-head")))

    sim = make(case, ops)
    requests = [sim.add(800), sim.add(780)]
    for request in requests:
        generate(sim, request, 9, until=len(request) - 8)
    sim.change = wrong
    with pytest.raises((AssertionError, ValueError), match=r"are off by up to nan|selection"):
        for _ in range(9):
            sim.step(dict.fromkeys(requests, 1))


BAD = {
    "dtype": lambda s: replace(s, blocks=s.blocks.long()),
    "heads": lambda s: replace(s, blocks=s.blocks[:, :1].contiguous()),
    "strides": lambda s: replace(s, blocks=s.blocks.mT.contiguous().mT),
    "tokens": lambda s: replace(s, counts=s.counts[:0]),
    "more-than-there-are": lambda s: replace(s, counts=s.counts + 1),
    "not-ascending": lambda s: replace(s, blocks=s.blocks.flip(-1).contiguous()),
    "not-seen": lambda s: replace(s, blocks=s.blocks + 100),
}


@BOTH
@pytest.mark.parametrize(("dtype", "recipe"), [("kivi2", "paper"), ("kivi_raw", "best")])
def test_pages_that_cannot_be_chosen(ops: Any, dtype: str, recipe: Recipe) -> None:
    sim = make(Case(dtype, recipe, budget=256, tokens=660, estimate="keys"), ops)
    request = sim.add(660)
    request.prompt = 650
    with pytest.raises(ValueError, match=r"under recipe 'best' only|kivi_raw have no ranges"):
        sim.step({request: 650})
        sim.step({request: 1})


@pytest.mark.parametrize("fault", BAD)
def test_lists_are_checked_before_anything_is_read(fault: str) -> None:
    sim = make(Case(budget=256, tokens=660, heads=(2, 2), residual=32))
    request = sim.add(660)
    generate(sim, request, 9, until=652)
    sim.change = BAD[fault]
    with pytest.raises(ValueError, match="selection"):
        sim.step({request: 1})


def choice_after(sim: SelectingSimulator, request: Request, prompt: int) -> list[int]:
    """Blocks that the first token after a prompt reads, of head 0; outputs are not checked."""
    request.prompt = prompt
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sim, "check", lambda *args: None)
        sim.step({request: prompt})
        sim.step({request: 1})
    return np.flatnonzero(request.read[prompt][0]).tolist()


def test_ties_go_to_the_older_page_and_the_newest_is_there(isa: str) -> None:
    """Keys that are the same in all pages, but for one: its weight is the largest."""
    for ops in (reference, native):
        sim = make(Case(budget=384, tokens=1100, heads=(1, 1)), ops)
        request = sim.add(1100)
        request.k[:] = request.k[:16].repeat(69, 1, 1)[:1100]
        request.k[640:768] += 0.25 * request.q[1090]
        chosen = choice_after(sim, request, 1090)
        # Sinks stay out of the first page's ranges, so that this one differs a little.
        assert sim.chosen
        assert chosen[-2:] == [5, 7] and chosen[0] in (0, 1)


@pytest.mark.parametrize(("estimate", "chosen"), [("ranges", 5), ("keys", 2)])
def test_keys_tell_where_ranges_cannot(isa: str, estimate: Estimate, chosen: int) -> None:
    """A token that the query wants; elsewhere outliers in all channels, but no such token."""
    for ops in (reference, native):
        sim = make(Case(budget=256, tokens=1100, heads=(1, 1), estimate=estimate), ops, seed=1)
        request = sim.add(1100)
        query = request.q[1090, 0]
        request.k[300, 0] = 1.5 * query
        outlier = torch.arange(128)[:, None] % 16 == torch.arange(64) % 16
        request.k[640:768, 0] = torch.where(outlier, 4.0, -0.5) * query.sign()
        assert choice_after(sim, request, 1090) == [chosen, 7]


@pytest.mark.parametrize(("number", "heads"), [(torch.nan, 2), (torch.inf, 1)])
def test_keys_that_are_not_finite(isa: str, number: float, heads: int) -> None:
    """All kernels leave the same out: in pages, and of the newest one's steps.

    Infinite ones are large ones to a page, and of its others eight bits know nothing: one head
    says that it is the best page.
    """
    lists = []
    for ops in (reference, native):
        sim = make(Case(budget=384, tokens=1100, heads=(heads, 1), estimate="keys"), ops, seed=2)
        sim._check_choice = lambda *args: None  # type: ignore[method-assign]
        request = sim.add(1100)
        request.k[300] = number
        request.k[1000, 0, 3] = number
        lists.append(choice_after(sim, request, 1090))
    assert lists[0] == lists[1]


def test_weights_of_what_is_not_finite() -> None:
    x = torch.zeros(1, 2, 5, 4)
    x[0, 0, 1, 2], x[0, 1, 3] = torch.nan, torch.inf
    w = weights(x)
    assert w.isfinite().all() and w[0, 3] < w[0, 1] < w[0, 0]
    assert best(w, 4).tolist() == [[0, 1, 2, 4]]
    assert best(weights(torch.full_like(x, torch.nan)), 3).tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("dtype", ["kivi2", "kivi_k3v2", "kivi4"])
def test_the_whole_radius_bounds_all_keys(dtype: str) -> None:
    """Quest's bound: no key of a group has a larger product with the query."""
    rng = np.random.default_rng(0)
    fmt = Case(dtype).fmt
    k, v = (rng.normal(size=(128, 64)).astype(np.float32) for _ in range(2))
    page = kivi_numpy.encode_page(k, v, fmt)
    low, high = kivi_numpy.ranges(page, fmt)
    keys = kivi_numpy.decode_page(page, fmt)[0].reshape(-1, fmt.group_size, 64)
    for q in rng.normal(size=(50, 64)):
        bound = q @ (low + high).T / 2 + np.abs(q) @ (high - low).T / 2
        assert (bound[:, None] >= keys @ q - 1e-4).all()


@BOTH
def test_pages_are_counted(ops: Any) -> None:
    case = Case(budget=256, tokens=900, heads=(4, 2), residual=32, drafts=1)
    sim = make(case, ops)
    request, short = sim.add(900), sim.add(330)
    request.prompt, short.prompt = 890, 320
    sim.step({request: 890, short: 320})
    COUNTED.zero_()
    for _ in range(5):
        sim.step({request: 2, short: 2})
    seen = sum(-(-sim.rule(t, 32) // 128) for t in range(890, 900))
    seen_short = sum(-(-sim.rule(t, 32) // 128) for t in range(320, 330))
    assert COUNTED.tolist() == [2 * (seen + seen_short), 2 * (10 * 3 + seen_short)]


def test_rows_of_padding_do_not_generate() -> None:
    """A graph of four rows, of which vLLM knows three; the memory is the same in every step."""
    kept = torch.ones(6, dtype=torch.bool)
    rows = mark_generated(kept[:4], torch.tensor([False, True, False]))
    assert rows.tolist() == [True, False, True, False]
    assert rows.data_ptr() == kept.data_ptr() and kept[4:].all()
    more = mark_generated(kept[:2], torch.tensor([True, False, True]))
    assert more.tolist() == [False, True]
