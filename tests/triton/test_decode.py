"""Decode steps by the Triton kernels: lengths, draft tokens, splits, outliers."""

from __future__ import annotations

import pytest
import torch

from kivi_vllm.config import Recipe
from kivi_vllm.ops.triton import decode
from tests.choice import some
from tests.triton.device import BF16, FP16, Decodes, Triton, simulator
from tests.unit.simulator import Case

PAGES: list[tuple[str, Recipe]] = [
    ("kivi2", "paper"),
    ("kivi4", "paper"),
    ("kivi2", "best"),
    ("kivi3", "best"),
]
"""Of each recipe, what differs in what a decode reads."""


@pytest.mark.parametrize("tokens", some([1, 127, 128, 129, 257, 4097], [2, 3]))
@pytest.mark.parametrize(("dtype", "recipe"), some(PAGES, [1, 3]))
def test_lengths(dtype: str, recipe: Recipe, tokens: int) -> None:
    case = Case(dtype, recipe, model=BF16, heads=(3, 1), tokens=tokens)
    sim = simulator(case, Decodes)
    request, other = sim.add(tokens + 2), sim.add(40)
    if tokens > 1:
        sim.step({request: tokens - 1, other: 30})
    for _ in range(3):
        sim.step({request: 1, other: 1})


DRAFTS = [
    Case(recipe="paper", drafts=4, residual=64, model=FP16, heads=(9, 3)),
    Case("kivi4", "paper", drafts=12, window=16),
    Case("kivi_k4v3", drafts=5, exact=True, model=BF16, heads=(8, 1)),
    Case(drafts=4, model=BF16, heads=(3, 1)),
    Case("kivi_k3v2", drafts=7, residual=32, window=100, heads=(3, 1)),
    Case(drafts=2, sink_logits=(4, 2, 0), heads=(9, 3), model=BF16),
    Case(drafts=5, chunk=128, residual=64, heads=(3, 1)),
]


@pytest.mark.parametrize("case", some(DRAFTS, [4, 5]), ids=str)
def test_rejected_drafts(case: Case) -> None:
    """Drafts on both sides of the end of a block, some of which are taken back."""
    sim = simulator(case, Triton)
    request = sim.add(290)
    sim.step({request: 120})
    for _ in range(4):
        start, n = request.computed, 1 + case.drafts
        sim.step({request: n})
        kept = int(sim.rng.integers(1, n + 1))
        if start + kept < request.computed:
            sim.rewind(request, start + kept)
    sim.check_untouched()


@pytest.mark.parametrize(
    ("window", "recipe"),
    some([(0, "paper"), (0, "best"), (700, "paper"), (700, "best")], [3]),
)
def test_splits_do_not_matter(window: int, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = []
    for splits in (1, 3, 100):
        monkeypatch.setattr(decode, "num_splits", lambda *_, splits=splits: splits)
        sim = simulator(Case(recipe=recipe, window=window), Decodes)
        long, short = sim.add(1300), sim.add(10)
        sim.step({long: 1298, short: 8})
        for _ in range(2):
            sim.step({long: 1, short: 1})
        outputs.append(long.output[-2:])
    for other in outputs[1:]:
        assert (other - outputs[0]).abs().max() <= 1e-3 * outputs[0].abs().max()


@pytest.mark.parametrize("window", some(range(396, 404), [2, 5]))
def test_windows_that_reach_some_of_the_sinks(window: int) -> None:
    sim = simulator(Case("kivi_k3v2", window=window, heads=(2, 1), drafts=1), Decodes)
    request = sim.add(404)
    sim.step({request: 400})
    for n in (1, 2, 1):
        sim.step({request: n})


@pytest.mark.parametrize(("dtype", "recipe"), some(PAGES, [2]))
@pytest.mark.parametrize("where", some(["k", "q", "v", "small v"], [0, 2]))
def test_magnitudes(where: str, dtype: str, recipe: Recipe) -> None:
    """Outlier channels of K, large queries, outlier tokens of V, and values near fp16's least."""
    sim = simulator(Case(dtype, recipe, model=BF16, heads=(8, 2), head_size=128), Decodes)
    request = sim.add(403)
    if where == "k":
        request.k[..., [5, 17]] *= 20
        request.q[..., 5] *= 0.2
    elif where == "q":
        request.q[-3:] *= 3000
    elif where == "v":
        request.v[7::50] *= 1000
    else:
        request.v *= 1e-3
    sim.step({request: 400})
    for _ in range(3):
        sim.step({request: 1})


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_nan_reaches_only_its_own_request(recipe: Recipe) -> None:
    sim = simulator(Case(recipe=recipe), Decodes)
    bad, good = sim.add(302), sim.add(302)
    bad.k[40, 0, 3] = bad.v[200, 1, 5] = torch.nan
    sim.check = lambda request, a, b: None  # type: ignore[method-assign]
    sim.step({bad: 300, good: 300})
    sim.step({bad: 1, good: 1})
    assert good.output[300].isfinite().all()
    assert bad.output[300, :2].isnan().all()
