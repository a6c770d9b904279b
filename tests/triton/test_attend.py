"""Attention by the Triton kernels against float64 over what each query should see."""

from __future__ import annotations

import pytest

from kivi_vllm.config import Recipe
from tests.choice import some
from tests.triton.device import BF16, FP16, Triton, simulator
from tests.unit.simulator import Case
from tests.unit.sink_logits import check_far_away

CASES = [
    Case(recipe="paper"),
    Case(model=BF16, exact=True, heads=(8, 2), head_size=128),
    Case("kivi_k3v2", residual=32, exact=True, heads=(9, 3), model=BF16),
    Case("kivi3", head_size=96, model=FP16, heads=(3, 1)),
    Case("kivi_k4v3", residual=128, alibi=True, soft_cap=5),
    Case("kivi4", window=20, model=FP16, heads=(20, 1)),
    Case("kivi3", head_size=256, model=BF16, heads=(2, 2)),
    Case("kivi_raw", residual=64),
    Case("kivi_k3v2", soft_cap=5, alibi=True, window=150),
    Case("kivi_k4v3", head_size=192, model=BF16, heads=(1, 1)),
    Case("kivi_k3v2", sinks=16, window=150, residual=32, heads=(2, 1), model=BF16),
    Case(sinks=8, window=20, exact=True, heads=(2, 1)),
    Case(per_block=3, residual=32, window=150, raw=(9, 40, 8), sinks=8, heads=(2, 1), model=BF16),
    Case("kivi3", exact=True, per_block=2, window=64, raw=(128, 1, 4), heads=(2, 1), model=BF16),
    Case("kivi_raw", per_block=5, residual=64, raw=(1, 128, 1), heads=(2, 1), model=BF16),
    Case("kivi4", "paper", head_size=96, model=BF16, residual=128),
    Case("kivi4", "paper", group=128, head_size=256, model=BF16, heads=(2, 2)),
    Case(recipe="paper", residual=32, exact=True, heads=(9, 3), model=BF16),
    Case(recipe="paper", soft_cap=5, alibi=True, window=150),
    Case(recipe="paper", group=64, head_size=128, model=FP16),
    Case(recipe="paper", sinks=16, window=150, residual=32, heads=(2, 1), model=BF16),
    Case(sink_logits=(4, 2), exact=True, heads=(9, 3), model=BF16),
    Case("kivi_raw", sink_logits=(3, 4), window=150, heads=(4, 1)),
    Case(recipe="paper", sink_logits=(2, 4), residual=32, soft_cap=5, model=FP16),
    Case(chunk=128, residual=32, heads=(9, 3), model=BF16),
    Case("kivi_raw", chunk=128, exact=True, residual=128, heads=(4, 1)),
    Case("kivi4", "paper", chunk=256, window=150, sinks=8, heads=(2, 1)),
]


@pytest.mark.parametrize("case", some(CASES, [0, 1, 3, 4, 12, 13, 21, 24]), ids=str)
def test_ragged_batches_of_random_chunks(case: Case) -> None:
    sim = simulator(case)
    requests = [sim.add(270 + case.window), sim.add(129), sim.add(2)]
    sim.run(*requests)
    assert all(r.output.isfinite().all() for r in requests)
    sim.check_untouched()


@pytest.mark.parametrize("recipe", some(["paper", "best"], [1]))
@pytest.mark.parametrize("exact", some([False, True], [0]))
def test_a_prefix_of_another_request(exact: bool, recipe: Recipe) -> None:
    """Pages are shared, the same step completes them and reads them."""
    sim = simulator(Case(model=BF16, residual=32, exact=exact, recipe=recipe))
    first = sim.add(300)
    second = sim.add(290, like=first, hit_blocks=2)
    sim.step({first: 270, second: 20})
    sim.run(first, second)
    sim.check_untouched()


@pytest.mark.parametrize("size", some([80, 112], [0]))
def test_heads_smaller_than_those_of_pages(size: int) -> None:
    pytest.importorskip("vllm")
    from tests.unit.padded_heads import ThroughTheLayer

    case = Case("kivi_k3v2", head_size=size, heads=(2, 1), model=BF16)
    sim = simulator(case, ops=ThroughTheLayer(Triton))
    sim.run(sim.add(140), sim.add(20))
    sim.check_untouched()


def test_sink_logits_far_away() -> None:
    check_far_away(simulator, 140)


def test_output_in_the_models_dtype() -> None:
    sim = simulator(Case(model=BF16, exact=True), output_dtype=BF16)
    sim.run(sim.add(140), sim.add(20))
