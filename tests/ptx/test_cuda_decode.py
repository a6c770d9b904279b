"""The kernel in CUDA C++, compiled by NVRTC and run here, against float64."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from kivi_vllm.ops.cuda import compiler
from kivi_vllm.ops.step import LayerCache, Step
from kivi_vllm.ops.triton import decode
from tests.ptx.cuda import InCuda, text
from tests.ptx.parse import Fault
from tests.unit.simulator import Case, Simulator

BF16, FP16 = torch.bfloat16, torch.float16

pytestmark = pytest.mark.skipif(not compiler.available(), reason="there is no NVRTC")


CASES = [
    Case(head_size=128, heads=(8, 2), model=BF16),
    Case("kivi_k3v2", head_size=128, heads=(4, 1), model=BF16),
    Case("kivi3", head_size=128, heads=(4, 1), soft_cap=20, model=FP16),
    Case("kivi_k4v3", head_size=128, heads=(2, 2), model=BF16),
    Case("kivi4", head_size=128, heads=(8, 1), alibi=True, model=BF16),
    Case(heads=(3, 1), model=BF16, per_block=3, raw=(60, 50, 10), residual=64),
    Case("kivi3", heads=(9, 3), model=BF16, window=200, residual=32, drafts=3),
    Case("kivi_k3v2", heads=(12, 1), model=FP16, drafts=1),  # two tiles of 16 columns
    Case("kivi_k4v3", heads=(4, 1), model=FP16, chunk=256, sink_logits=(4, 2, 0)),
    Case("kivi4", head_size=96, heads=(16, 1), model=BF16),
    Case(head_size=256, heads=(2, 1), model=BF16),
]


def decoded(case: Case, ops: Any, **options: Any) -> Simulator:
    """Prompts by the reference, then decodes by `ops`, of which some end blocks."""
    sim, tokens = Simulator(case, tolerance=1e-2, num_blocks=64, **options), 1 + case.drafts
    long, short = sim.add(511 + 2 * tokens), sim.add(8 + 2 * tokens)
    sim.step({long: 511 - tokens, short: 8})
    sim.ops = ops
    for _ in range(2):
        sim.step({long: tokens, short: tokens})
    return sim


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decodes(case: Case) -> None:
    ops = InCuda(80 if CASES.index(case) % 2 else 90)
    decoded(case, ops).check_untouched()
    assert len(ops.ran) == 2


def test_one() -> None:
    decoded(Case(heads=(3, 1), model=BF16), InCuda(90)).check_untouched()


@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [(1e-3, 1.0), (1e3, 1.0), (1.0, 1e-4), (1.0, 1e3), (0.0, 1.0), (1.0, 1e-6)], ids=str
)
def test_magnitudes(size: tuple[float, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys and of values; queries are such that scores are not."""
    of_keys, of_values = size
    case = Case(heads=(3, 1), model=BF16, scale=0.125 / (of_keys or 1.0))
    add = Simulator.add

    def scaled(self: Simulator, *args: Any, **options: Any) -> Any:
        request = add(self, *args, **options)
        request.k *= of_keys
        request.v *= of_values
        return request

    monkeypatch.setattr(Simulator, "add", scaled)
    decoded(case, InCuda(80))


def without(pattern: str, number: int) -> Any:
    """A change of PTX: without one of the lines that have `pattern`."""

    def change(ptx: str) -> str:
        lines = ptx.splitlines()
        found = [i for i, line in enumerate(lines) if pattern in line]
        del lines[found[number]]
        return "\n".join(lines)

    return change


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["cp.async.wait_group", "bar.warp.sync"])
def test_what_orders_the_threads_is_needed(pattern: str) -> None:
    """Each wait for copies, and each barrier of the warp, taken out alone, is noticed."""
    case = Case(heads=(3, 1), model=BF16)
    ops = InCuda(80)
    decoded(case, ops)
    count = text(ops.ran[0][0], "decode", 80).count(pattern)
    assert count == {"cp.async.wait_group": 2, "bar.warp.sync": 4}[pattern]
    for number in range(count):
        with pytest.raises((Fault, AssertionError)):
            decoded(case, InCuda(80, without(pattern, number)))


def test_other_pages_are_noticed() -> None:
    """A page's address off by one head's stride."""

    class Wrong(InCuda):
        def attend(self, step: Step, cache: LayerCache, *args: Any) -> None:
            fields = decode.fields

            def shifted(*given: Any) -> dict[str, int | float]:
                found = fields(*given)
                return found | {"page_head": 0}

            with mock.patch.object(decode, "fields", shifted):
                super().attend(step, cache, *args)

    with pytest.raises((Fault, AssertionError)):
        decoded(Case(heads=(4, 2), model=BF16), Wrong(80))
