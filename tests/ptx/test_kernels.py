"""The compiled kernels against float64 over what each query should see, and the stored bytes."""

from __future__ import annotations

import pytest

from kivi_vllm.config import DTYPES, QUANTIZED_DTYPES
from kivi_vllm.ops.triton import decode
from tests.choice import some
from tests.ptx.device import BF16, FP16, Compiled, simulator
from tests.unit.simulator import Case

AMPERE = [
    Case(heads=(8, 2), model=BF16),
    Case("kivi_k3v2", drafts=2, residual=32, heads=(9, 3), model=BF16),
    Case("kivi3", head_size=128, soft_cap=5, alibi=True, model=FP16),
    Case("kivi_k4v3", per_block=3, residual=64, raw=(20, 40, 9), heads=(4, 1), model=BF16),
    Case("kivi4", head_size=128, window=200, sink_logits=(4, 2), heads=(4, 1), model=BF16),
    Case("kivi_raw", drafts=1, residual=32, heads=(2, 2), model=BF16),
    Case(recipe="paper", sinks=8, model=FP16),
    Case("kivi4", "paper", head_size=128, exact=True, heads=(8, 1), model=BF16),
]
HOPPER = [
    Case(head_size=128, drafts=3, heads=(4, 1), model=BF16),
    Case("kivi_k3v2", head_size=128, sink_logits=(4, 2), model=BF16),
    Case("kivi3", residual=32, per_block=2, raw=(128, 9, 16), heads=(3, 1), model=BF16),
    Case("kivi_k4v3", head_size=128, soft_cap=5, alibi=True, heads=(8, 1), model=FP16),
    Case("kivi4", drafts=1, chunk=256, model=BF16),
    Case("kivi_raw", head_size=128, sinks=8, window=200, heads=(4, 1), model=FP16),
    Case(recipe="paper", head_size=128, drafts=2, residual=64, heads=(4, 1), model=BF16),
    Case("kivi4", "paper", alibi=True, heads=(8, 2), model=BF16),
]


@pytest.mark.parametrize("cases", [AMPERE, HOPPER], ids=["Ampere", "Hopper"])
def test_every_format_has_a_case(cases: list[Case]) -> None:
    formats = {(case.dtype, case.recipe) for case in cases}
    assert formats == {(dtype, "best") for dtype in DTYPES} | {
        (dtype, "paper") for dtype in QUANTIZED_DTYPES if DTYPES[dtype].published
    }
    of_both = {(c.dtype, c.recipe, c.head_size) for c in AMPERE + HOPPER}
    assert len(of_both) == 2 * len(formats)  # each at both head sizes


def follow(case: Case, capability: int) -> None:
    """A prompt over pages, which completes a block, and one without; then all decode."""
    sim, tokens = simulator(case), 1 + case.drafts
    long, short, new = (sim.add(n + 3 * tokens) for n in (398, 4, 20))
    sim.step({long: 378, short: 3})
    sim.ops = Compiled(capability)
    sim.step({long: 20, short: 1, new: 20})
    for _ in range(2):
        sim.step(dict.fromkeys([long, short, new], tokens))
    sim.check_untouched()


@pytest.mark.parametrize("case", some(AMPERE, [0]), ids=str)
def test_ampere(case: Case) -> None:
    follow(case, 80)


@pytest.mark.slow
@pytest.mark.parametrize("case", HOPPER, ids=str)
def test_hopper(case: Case) -> None:
    """Programs of four warps and more multiply asynchronously there: `wgmma`."""
    follow(case, 90)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "capability"), [(AMPERE[0], 80), (HOPPER[1], 90)], ids=str)
def test_many_pages_in_one_split(
    case: Case, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than are on their way at a time."""
    monkeypatch.setattr(decode, "num_splits", lambda *_: 1)
    sim = simulator(case)
    request = sim.add(901)
    sim.step({request: 900})
    sim.ops = Compiled(capability)
    sim.step({request: 1})
