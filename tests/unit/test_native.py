"""The native CPU kernels, each instruction set here, against float64 attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.choice import some
from tests.unit.native import TOLERANCE, simulator
from tests.unit.simulator import Case
from tests.unit.sink_logits import check_far_away
from tests.unit.test_attend import BF16, CASES, FP16, MHA, MQA

# Scores eight times as large as models have them: what 16 bits lack of them weighs more.
STEEP, STEEP_TOLERANCE = Case(heads=MQA, scale=1.0, tokens=400, dtype="kivi4"), 8e-3

MORE = [
    *(Case(heads=(n, 1), head_size=32, tokens=200) for n in (5, 6, 7, 8, 71, 130)),
    Case(heads=(10, 2), head_size=96, dtype="kivi4", tokens=280),
    Case(heads=(12, 4), head_size=160, dtype="kivi_k4v3", model=BF16),
    Case(heads=(32, 8), head_size=128, model=BF16, tokens=200),
    Case(heads=(32, 4), head_size=256, dtype="kivi_k3v2", model=FP16, tokens=200),
    Case(heads=(32, 4), head_size=256, recipe="paper", group=64, model=FP16, tokens=200),
    Case(heads=(8, 1), head_size=512, dtype="kivi_k3v2", model=BF16, tokens=400),
    Case(heads=(71, 1), head_size=512, dtype="kivi3", exact=True),
    Case(heads=(4, 1), head_size=512, dtype="kivi_raw", model=FP16, window=130),
    Case(recipe="paper", residual=128, head_size=128, group=128),
    Case(dtype="kivi_raw", residual=128, model=FP16, window=130),
    Case(heads=MHA, scale=0.5, tokens=400),  # peaked
    STEEP,
]


@pytest.mark.parametrize("case", some(CASES + MORE, range(0, len(CASES + MORE), 3)), ids=str)
def test_ragged_batches_of_random_chunks(isa: str, case: Case) -> None:
    sim = simulator(case, tolerance=STEEP_TOLERANCE if case is STEEP else TOLERANCE)
    requests = [sim.add(case.tokens), sim.add(max(1, case.tokens - 70)), sim.add(2)]
    sim.run(*requests)
    assert all(r.output.isfinite().all() for r in requests)
    sim.check_untouched()


@pytest.mark.parametrize("tokens", some([1, 127, 128, 129, 4097], range(4)))
def test_lengths_at_decode(isa: str, tokens: int) -> None:
    sim = simulator(Case(model=BF16, heads=(3, 1), tokens=tokens))
    request = sim.add(tokens + 3)
    if tokens > 1:
        sim.step({request: tokens - 1})
    for _ in range(4):
        sim.step({request: 1})


@pytest.mark.parametrize(
    "case",
    [
        Case(drafts=4, residual=64, tokens=400),
        Case(drafts=16, dtype="kivi4", window=16, tokens=300),
        Case(drafts=5, exact=True, model=BF16, tokens=300),
    ],
    ids=str,
)
def test_rejected_drafts(isa: str, case: Case) -> None:
    sim = simulator(case)
    request = sim.add(case.tokens)
    sim.step({request: 100})
    while request.computed < len(request):
        start, n = request.computed, 1 + case.drafts
        sim.step({request: n})
        kept = int(sim.rng.integers(1, n + 1))
        if start + kept < request.computed:
            sim.rewind(request, start + kept)
    sim.check_untouched()


SPLIT = [
    Case(tokens=1400, model=BF16, residual=32, heads=(4, 1)),
    Case(tokens=2600, dtype="kivi4", window=1500, alibi=True, heads=MHA),
    Case(tokens=1400, model=BF16, sink_logits=(4, 2), heads=(4, 1)),
    Case(tokens=1800, chunk=1024, heads=MHA),
]


@pytest.mark.parametrize("case", some(SPLIT, [0, 2]), ids=str)
def test_split_sequences_are_put_together(isa: str, case: Case, threads: None) -> None:
    outputs = []
    for count in (3, 1):
        torch.set_num_threads(count)
        sim = simulator(case)
        long, short = case.tokens, case.tokens // 2 - 50
        requests = [sim.add(long), sim.add(short)]
        sim.step({requests[0]: long - 10, requests[1]: short - 10})
        for _ in range(10):
            sim.step(dict.fromkeys(requests, 1))
        outputs.append(requests[0].output)
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-5 * outputs[1].abs().max()


@pytest.mark.parametrize(("residual", "window"), [(0, 0), (64, 0), (0, 150)])
def test_chunks_do_not_matter(isa: str, residual: int, window: int) -> None:
    outputs = []
    for chunks in ([300], [1] * 300, [127, 2, 127, 44], [5, 250, 1, 1, 43]):
        case = Case(residual=residual, window=window, model=BF16, heads=(6, 2))
        sim = simulator(case, seed=7)
        request = sim.add(300)
        for n in chunks:
            sim.step({request: n})
        outputs.append(request.output)
    for other in outputs[1:]:
        assert (other - outputs[0]).abs().max() <= 1e-5 * outputs[0].abs().max()


@pytest.mark.parametrize("model", [BF16, FP16], ids=str)
def test_output_in_the_models_dtype(isa: str, model: torch.dtype) -> None:
    sim = simulator(Case(model=model, exact=True), output_dtype=model)
    sim.run(sim.add(300))


@pytest.mark.parametrize("tokens", [300, 1400])
def test_sink_logits_far_away(isa: str, tokens: int, threads: None) -> None:
    torch.set_num_threads(3)  # the longer ones' pages are split
    check_far_away(simulator, tokens)


@pytest.mark.parametrize("where", ["k", "v"])
def test_outliers(isa: str, where: str) -> None:
    """A few channels of K twenty times as large, or a few tokens of V ten times."""
    sim = simulator(Case(model=BF16, heads=(8, 2), head_size=128, tokens=400))
    request = sim.add(400)
    if where == "k":
        request.k[..., [5, 17]] *= 20
        request.q[..., 5] *= 0.2  # where keys are large, queries are small, or are not
    else:
        request.v[7::50] *= 10
    sim.run(request)


def test_large_sums_of_zeros(isa: str) -> None:
    """All channels of a large head add up, on groups of keys with the largest zeros."""
    sim = simulator(Case(heads=(2, 1), head_size=512, tokens=300))
    request = sim.add(300)
    request.k += 4 * (torch.arange(300) // 16 % 8)[:, None, None]
    request.q[:] = 0.05
    sim.run(request)


def test_nan_reaches_only_its_own_request(isa: str) -> None:
    sim = simulator(Case())
    bad, good = sim.add(300), sim.add(300)
    bad.k[40, 0, 3] = bad.v[200, 1, 5] = torch.nan
    sim.check = lambda request, a, b: None  # type: ignore[method-assign]
    sim.step({bad: 150, good: 150})
    sim.step({bad: 150, good: 150})
    assert good.output.isfinite().all()
    assert bad.output[299, :2].isnan().all()


def test_nan_alone_in_a_tile(isa: str) -> None:
    """A query whose newest tile shows it a NaN and nothing else."""
    sim = simulator(Case(model=BF16))
    request = sim.add(100)
    request.k[64] = torch.nan
    sim.check = lambda request, a, b: None  # type: ignore[method-assign]
    sim.step({request: 100})
    assert request.output[:64].isfinite().all() and request.output[64:].isnan().all()


def test_huge_window_is_none() -> None:
    outputs = []
    for window in (0, 2**32 + 5, 2**63 - 1):
        sim = simulator(Case(recipe="paper", tokens=300), seed=3)
        sim.case = replace(sim.case, window=window)
        sim.check = lambda request, a, b: None  # type: ignore[method-assign]
        sim.step({sim.add(300): 300})
        outputs.append(sim.requests[0].output)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
