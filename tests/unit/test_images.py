"""Images whose tokens see each other: the reference and the native kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kivi_vllm.ops import reference
from kivi_vllm.ops.images import last_visible
from kivi_vllm.ops.step import DeviceStep
from tests.choice import some
from tests.unit import native
from tests.unit.simulator import Case, Request, Simulator

BF16, FP16 = torch.bfloat16, torch.float16
MHA, MQA = (3, 3), (4, 1)

CASES = [
    Case(),
    Case(residual=64, model=BF16, tokens=517),
    Case(exact=True, heads=(8, 2), head_size=128, model=BF16, tokens=517),
    Case("kivi_raw", residual=32, heads=MHA, window=150, tokens=517),
    Case("kivi_raw", heads=MQA, tokens=517),
    Case("kivi4", window=100, heads=MQA, tokens=517),
    Case(window=30, residual=32, sinks=8, exact=True, tokens=517),  # images are wider
    Case("kivi_k3v2", alibi=True, soft_cap=20.0, heads=MQA, model=FP16),
    Case("kivi3", sinks=8, per_block=2, window=250, raw=(20, 40, 9), residual=64, tokens=700),
    Case(recipe="paper", heads=(32, 1), head_size=32),
    Case(drafts=5, exact=True, heads=(40, 2)),
]

cases = pytest.mark.parametrize("case", some(CASES, [0, 2, 3, 6, 7, 8, 10]), ids=str)


def _seeing(sim: Simulator, tokens: int, **options: Any) -> Request:
    request = sim.add(tokens)
    sim.show(request, **options)
    return request


def _ragged(sim: Simulator) -> None:
    """Requests with images and one without, in ragged batches of random chunks."""
    tokens = sim.case.tokens
    requests = [_seeing(sim, tokens), sim.add(tokens - 70), _seeing(sim, tokens - 40, longest=200)]
    assert all(requests[i].images for i in (0, 2))
    sim.run(*requests)
    assert all(r.output.isfinite().all() for r in requests)
    sim.check_untouched()


@cases
def test_ragged_batches_of_random_chunks(case: Case) -> None:
    _ragged(Simulator(case))


@pytest.mark.parametrize("case", some(CASES, [0, 4, 8]), ids=str)
def test_native_ragged_batches_of_random_chunks(isa: str, case: Case) -> None:
    _ragged(native.simulator(case))


@pytest.mark.parametrize("ops", [reference, native.operators], ids=["reference", "native"])
@pytest.mark.parametrize("image", [(0, 299), (0, 3), (100, 260), (127, 128), (128, 255), (5, 5)])
def test_an_image_anywhere(image: tuple[int, int], ops: Any) -> None:
    sim = Simulator(Case(residual=32), ops=ops, tolerance=native.TOLERANCE)
    request = sim.add(330)
    request.images.append(image)
    for n in (max(1, image[0]), 1, image[1] + 1, 330):
        sim.step({request: n})
    assert request.computed == 330


@pytest.mark.parametrize("ops", [reference, native.operators], ids=["reference", "native"])
@pytest.mark.parametrize("exact", [False, True], ids=["cached", "exact"])
def test_a_prefix_that_ends_within_an_image(exact: bool, ops: Any) -> None:
    """The rest of the image sees the pages of its beginning, and itself."""
    case = Case(residual=32, exact=exact, window=200)
    sim = Simulator(case, ops=ops, tolerance=native.TOLERANCE)
    first = sim.add(400)
    first.images += [(20, 90), (200, 270)]
    sim.step({first: 300})
    second = sim.add(350, first, 2)
    second.images += first.images
    sim.step({second: 10, first: 1})
    assert second.computed == 271
    sim.run(first, second)


def test_chunks_do_not_matter(isa: str) -> None:
    outputs = []
    for chunks in ([300], [50, 1, 90, 159], [50, 91, 100, 59]):
        sim = native.simulator(Case(residual=32, window=100, model=BF16, heads=(6, 2)), seed=7)
        request = sim.add(300)
        request.images += [(60, 140), (200, 240)]
        sim.rng = SimpleNamespace(**{n: getattr(sim.rng, n) for n in ("permutation",)}, random=int)
        for n in chunks:
            sim.step({request: n})
        assert request.computed == 300
        outputs.append(request.output)
    for other in outputs[1:]:
        assert (other - outputs[0]).abs().max() <= 1e-5 * outputs[0].abs().max()


# ---------------------------------------------------------- negative controls


def _changed(change: Callable[[Any], Any]) -> Any:
    def attend(step: Any, *args: Any) -> None:
        reference.attend(replace(step, last_visible=change(step)), *args)

    names = ("store_blocks", "store_ring")
    return SimpleNamespace(attend=attend, **{name: getattr(reference, name) for name in names})


def _one_less(step: Any) -> Any:
    at = torch.cat([torch.arange(row.a, row.b) for row in step.rows])
    return torch.maximum(step.last_visible - 1, at)


def _one_more(step: Any) -> Any:
    at = torch.cat([torch.arange(row.a, row.b) for row in step.rows])
    return step.last_visible + (step.last_visible > at).int()


WRONG = {"none": lambda step: None, "one-token-less": _one_less, "one-token-more": _one_more}


@pytest.mark.parametrize("case", CASES[:3], ids=str)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_ends_of_images_are_noticed(name: str, case: Case) -> None:
    sim = Simulator(case, ops=_changed(WRONG[name]))
    request = sim.add(300)
    request.images += [(60, 140), (200, 240)]
    with pytest.raises(AssertionError, match="are off by up to"):
        sim.step({request: 300})


@pytest.mark.parametrize(
    "change", [torch.Tensor.long, lambda x: x[:-1], lambda x: x.repeat(2)[::2]]
)
def test_positions_that_the_kernels_do_not_take(change: Callable[[Any], Any]) -> None:
    def attend(step: Any, *args: Any) -> None:
        native.operators.attend(replace(step, last_visible=change(step.last_visible)), *args)

    names = ("store_blocks", "store_ring")
    ops = {name: getattr(native.operators, name) for name in names}
    sim = Simulator(Case(), ops=SimpleNamespace(attend=attend, **ops))
    request = sim.add(100)
    request.images.append((20, 60))
    with pytest.raises(ValueError, match=r"last_visible is .* but must be int32"):
        sim.step({request: 100})


# ------------------------------------------------------------- the function


def test_last_visible() -> None:
    """Three requests: at 10..15, at 100, and at 5..9; the last image goes beyond the step.

    Of the second vLLM knows less: drafts of it were rejected.
    """
    starts, ends = (torch.tensor(x, dtype=torch.int32) for x in ([0, 6, 7, 12], [16, 104, 10]))
    ranges = {0: [(3, 11), (13, 14)], 1: [(90, 110)], 2: [(1, 2), (8, 20)]}
    seen = last_visible(ranges, starts, ends)
    assert seen is not None and seen.dtype == torch.int32
    assert seen.tolist() == [11, 11, -1, 14, 14, -1, -1, -1, -1, -1, 9, 9]


@pytest.mark.parametrize("ranges", [None, {}, {0: [], 2: []}, {1: [(90, 110)], 0: [(0, 10)]}])
def test_nothing_is_made_where_no_token_sees_another_after_it(ranges: Any) -> None:
    starts, ends = (torch.tensor(x, dtype=torch.int32) for x in ([0, 6, 7, 12], [16, 101, 10]))
    assert last_visible(ranges, starts, ends) is None


def test_rows_with_images_are_no_decodes() -> None:
    """A GPU's decodes see nothing after themselves, whatever their number of tokens."""
    from benchmarks.attention.kivi import batch_of
    from kivi_vllm.ops.step import Row, Step

    rows = [Row(0, 0, 1, 9, 10), Row(1, 1, 5, 20, 24), Row(2, 5, 105, 0, 100)]
    step = Step(rows, torch.zeros(3, 2, dtype=torch.int32), decode_len=5)
    assert DeviceStep.of(batch_of(step)).num_decodes == 2
    seen = torch.zeros(105, dtype=torch.int32)
    made = DeviceStep.of(batch_of(replace(step, last_visible=seen)))
    assert (made.num_decodes, made.num_decode_tokens) == (1, 1)
    assert made.last_visible is seen
