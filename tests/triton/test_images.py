"""Images whose tokens see each other, by the Triton kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.choice import some
from tests.triton.device import BF16, FP16, Triton, simulator
from tests.unit.simulator import Case

CASES = [
    Case(model=BF16),
    Case("kivi_raw", window=60, residual=32, heads=(2, 1), model=BF16),
    Case("kivi_k3v2", exact=True, heads=(9, 3), model=FP16, sinks=8),
    Case("kivi4", window=30, alibi=True, soft_cap=20, heads=(20, 1), model=FP16),
    Case(recipe="paper", residual=64, heads=(2, 1), model=BF16, exact=True),
    Case("kivi3", drafts=5, heads=(2, 1), model=BF16),
]


@pytest.mark.parametrize("case", some(CASES, [0, 1]), ids=str)
def test_ragged_batches_of_random_chunks(case: Case) -> None:
    sim = simulator(case)
    requests = [sim.add(300), sim.add(129), sim.add(200)]
    for i in (0, 2):
        sim.show(requests[i], longest=150)
        assert requests[i].images
    sim.run(*requests)
    assert all(r.output.isfinite().all() for r in requests)
    sim.check_untouched()


def test_a_prefix_that_ends_within_an_image() -> None:
    sim = simulator(Case(model=BF16, heads=(2, 1), drafts=10))
    first = sim.add(200)
    first.images.append((90, 135))
    sim.step({first: 150})
    second = sim.add(200, first, 1)
    second.images.append((90, 135))
    sim.step({second: 2, first: 1})  # fewer tokens than a decode has
    assert second.computed == 136
    sim.run(first, second)


class Causal(Triton):
    """It knows of no images."""

    @staticmethod
    def attend(step: Any, *args: Any) -> None:
        Triton.attend(replace(step, last_visible=None), *args)


def test_ignored_images_are_noticed() -> None:
    sim = simulator(Case(model=BF16, heads=(2, 1)), ops=Causal)
    request = sim.add(100)
    request.images.append((20, 60))
    with pytest.raises(AssertionError, match="are off by up to"):
        sim.step({request: 100})
