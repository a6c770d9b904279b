"""Lossy where it must be, exact elsewhere; and proof that the checks can fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kivi_vllm.config import Recipe
from kivi_vllm.ops import reference
from tests.unit.simulator import Case, Simulator, first_raw, truth

# -------------------------------------------------------------- lossy, exact


@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("residual", [0, 32, 64, 128])
@pytest.mark.parametrize(
    ("dtype", "recipe"),
    [
        *((name, "paper") for name in ("kivi2", "kivi4", "kivi_raw")),
        *((name, "best") for name in ("kivi2", "kivi_k3v2", "kivi3", "kivi_k4v3", "kivi4")),
    ],
)
def test_completed_blocks_are_lossy_and_the_residual_is_exact(
    dtype: str, recipe: Recipe, residual: int, part: str
) -> None:
    """Compared with full-precision attention, when only keys or only values can lose anything.

    The others survive quantization: they are constant in every group, or values of recipe "best"
    that are, rotated, on two levels of their codes. Raw pages are the negative control: they lose
    nothing.
    """
    case = Case(dtype=dtype, recipe=recipe, residual=residual, tokens=400)
    sim = Simulator(case, tolerance=1.0)  # of outputs that may cancel out
    request = sim.add(400)
    survives = request.v if part == "keys" else request.k
    if part == "keys" and recipe == "best":
        survives.zero_()
        level = {2: 1.5, 3: 1.5, 4: 2.5}[case.fmt.v_bits]  # codes from their middle
        survives[..., 0] = level / 2 * (1 - torch.arange(400) % 2 * 2)[:, None]
    elif part == "keys":  # constant over channels
        survives[:] = survives[..., :1].abs().half().float() + 1  # that do not cancel out
    else:  # constant over tokens: every position weighs the same
        survives[:] = survives[:1].half().float()
    for n in (100, 250, 1, 49):
        sim.step({request: n})
    full = torch.from_numpy(truth(request, 0, 400, [0] * 400, case))
    error = (request.output - full).abs().amax((1, 2))
    first_lossy = next(t for t in range(400) if first_raw(t, residual) > 0)
    assert first_lossy == {0: 128, 32: 128, 64: 128, 128: 256}[residual]
    assert error[:first_lossy].max() < 1e-5
    if dtype == "kivi_raw":
        assert error.max() < 1e-5
    else:
        assert error[first_lossy:].min() > 1e-4


@pytest.mark.parametrize("residual", [0, 32, 64, 128])
def test_the_very_tokens_that_are_exact(residual: int) -> None:
    """Each query looks at one position alone, and gets its value bit for bit or as dequantized."""
    case = Case(
        recipe="paper", residual=residual, head_size=128, heads=(1, 1), scale=100.0, tokens=300
    )
    for s in (0, 127, 255 - residual, 256 - residual, 256):
        sim = Simulator(case)
        request = sim.add(300)
        request.q[:], request.k[:] = 0, 0
        request.q[..., 0] = 1
        request.k[s, :, 0] = 3  # a group's maximum: exact when quantized too
        sim.step({request: 300})
        raw = torch.equal(request.output[299], request.v[s])
        assert raw == (s >= 256 - residual)
        if not raw:
            page = reference.encode_pages(
                *(x[s // 128 * 128 :][:128, 0] for x in (request.k, request.v)), case.fmt
            )
            dequantized = reference.decode_pages(page, case.fmt)[1][s % 128]
            assert torch.equal(request.output[299, 0], dequantized)


# ---------------------------------------------------------- negative controls

WRONG_RULES: dict[str, tuple[int, Callable[[int, int], int]]] = {
    "no-residual": (64, lambda t, r: t // 128 * 128),
    "whole-blocks-of-t-minus-R": (64, lambda t, r: max(0, t - r) // 128 * 128),
    "residual-of-t": (64, lambda t, r: max(0, min(t // 128 * 128, t - r))),
    "one-token-more": (64, lambda t, r: max(0, t // 128 * 128 - r - 1)),
    "one-token-less": (64, lambda t, r: max(0, t // 128 * 128 - r + 1) if t >= 128 else 0),
    "one-token-more-without-residual": (0, lambda t, r: max(0, t // 128 * 128 - 1)),
    "block-one-token-late": (0, lambda t, r: max(0, t - 1) // 128 * 128),
    "block-one-token-early": (32, lambda t, r: max(0, (t + 1) // 128 * 128 - r)),
    "all-raw": (0, lambda t, r: 0),
}


@pytest.mark.parametrize("dtype", ["kivi2", "kivi4"])
@pytest.mark.parametrize("name", WRONG_RULES)
def test_wrong_rules_are_noticed(name: str, dtype: str) -> None:
    residual, rule = WRONG_RULES[name]
    case = Case(dtype=dtype, residual=residual)
    for wrong in (False, True):
        sim = Simulator(case, rule=rule if wrong else first_raw)
        request = sim.add(384)
        if wrong:
            with pytest.raises(AssertionError, match="are off by up to"):
                sim.step({request: 384})
        else:
            sim.step({request: 384})


def test_wrong_prefill_mode_is_noticed() -> None:
    for exact in (True, False):
        sim = Simulator(Case(exact=exact))
        sim.case = replace(sim.case, exact=not exact)  # the truth's and the operators' alike
        request = sim.add(300)
        sim.step({request: 300})  # so this still agrees
        sim.ops = SimpleNamespace(
            **{name: getattr(reference, name) for name in ("store_blocks", "store_ring")},
            attend=lambda step, *args: reference.attend(
                replace(step, per_position=not step.per_position), *args
            ),
        )
        other = sim.add(300)
        with pytest.raises(AssertionError, match="are off by up to"):
            sim.step({other: 300})


def operators(**changed: Callable[..., None]) -> Any:
    names = ("store_blocks", "attend", "store_ring")
    return SimpleNamespace(**{name: getattr(reference, name) for name in names} | changed)


def nothing(*args: object) -> None:
    pass


def ring_first(step: Any, cache: Any, query: Any, key: Any, value: Any, *rest: Any) -> None:
    reference.store_ring(step, cache, key, value)
    reference.attend(step, cache, query, key, value, *rest)


def scrambled_heads(step: Any, cache: Any, query: Any, *rest: Any) -> None:
    reference.attend(step, cache, query.flip(1), *rest)


BROKEN = {
    "blocks-not-stored": operators(store_blocks=nothing),
    "ring-not-stored": operators(store_ring=nothing),
    "ring-stored-too-early": operators(attend=ring_first),
    "output-not-written": operators(attend=nothing),
    "heads-in-another-order": operators(attend=scrambled_heads),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_operators_are_noticed(name: str) -> None:
    sim = Simulator(Case(), ops=BROKEN[name])
    request = sim.add(400)
    with pytest.raises(AssertionError, match="are off by up to"):
        for n in (50, 240, 60):
            sim.step({request: n})


def test_drafts_that_no_operator_knows_of_are_noticed() -> None:
    """If they are rejected, a token of the block before them would be missing in the ring."""
    for decode_len in (5, 1):
        sim = Simulator(Case(drafts=4, model=torch.bfloat16), decode_len=decode_len)
        request = sim.add(200)
        sim.step({request: 126})
        sim.step({request: 5})
        sim.rewind(request, 126 + 1)
        if decode_len == 5:
            sim.step({request: 1})
        else:
            with pytest.raises(AssertionError, match="are off by up to"):
                sim.step({request: 1})


ASKED_FOR: dict[str, Any] = {
    "scale": 0.2,
    "soft_cap": 3.0,
    "alibi": True,
    "window": 299,
    "chunk": 128,
    "sink_logits": (2.0,),
}


@pytest.mark.parametrize("change", ASKED_FOR)
def test_ignored_parameter_is_noticed(change: str) -> None:
    case = replace(Case(), **{change: ASKED_FOR[change]})

    def ignoring(*args: Any) -> None:
        *before, _, output = args
        reference.attend(*before, Case().params, output)

    sim = Simulator(case, ops=operators(attend=ignoring))
    with pytest.raises(AssertionError, match="are off by up to"):
        sim.step({sim.add(300): 300})


def reading_all_pages(*args: Any) -> None:
    """Attention that reads the pages before a window too, and gives them no weight."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "first_visible", lambda *_: 0)
        reference.attend(*args)


def storing_everything(step: Any, *args: Any) -> None:
    """Storing that takes the null block for a page as any other."""
    table = step.block_table.where(step.block_table != 0, len(args[0].pages) - 1)
    reference.store_blocks(replace(step, block_table=table), *args)


@pytest.mark.parametrize("per_block", [1, 2])
def test_reading_what_has_left_the_window_is_noticed(per_block: int) -> None:
    for attend in (reference.attend, reading_all_pages):
        sim = Simulator(Case(window=100, per_block=per_block), ops=operators(attend=attend))
        request, other = sim.add(900), sim.add(500)
        sim.step({request: 600, other: 10})
        if attend is reference.attend:
            sim.run(request, other)
            assert sim.num_left >= 8 // per_block
        else:
            with pytest.raises(AssertionError, match="are off by up to nan"):
                sim.step({request: 100, other: 10})


def test_storing_what_has_no_page_is_noticed() -> None:
    for store in (reference.store_blocks, storing_everything):
        sim = Simulator(Case(window=100, exact=True), ops=operators(store_blocks=store))
        sim.step({sim.add(600): 600})
        if store is reference.store_blocks:
            assert sim.requests[0].blocks[:3] == [0, 0, 0] and sim.requests[0].blocks[3]
            sim.check_untouched()
        else:
            with pytest.raises(AssertionError):
                sim.check_untouched()


def test_writes_to_other_pages_are_noticed() -> None:
    sim = Simulator(Case())
    sim.run(sim.add(300))
    sim.check_untouched()
    sim.pool[0, 1, 5] = 0
    with pytest.raises(AssertionError):
        sim.check_untouched()
