"""The native kernels' pages, rings and tails: bit for bit those of the reference."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kivi_vllm.config import QUANTIZED_DTYPES, Recipe
from kivi_vllm.ops import reference
from kivi_vllm.ops.cpu import library, operators
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.step import LayerCache, Raw, Row, Step
from tests.choice import some
from tests.unit import kivi_numpy
from tests.unit.native import INSTRUCTION_SETS
from tests.unit.simulator import Case, Simulator
from tests.unit.test_attend import BF16
from tests.unit.test_codec import blocks, formats


def stored(ops: Any, fmt: PageFormat, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The page that `ops` makes of one block of which 100 tokens were in the ring."""
    pages = torch.full((3, 1, 1, fmt.page_bytes), 255, dtype=torch.uint8)
    shape = (-(-128 // fmt.raw_tokens), 1, fmt.raw_tokens, 2 * fmt.head_size)
    ring = torch.full(shape, torch.nan).to(fmt.raw_dtype)
    table = torch.arange(len(ring), dtype=torch.int32)[None]
    kept = torch.full((2, *shape[1:]), torch.nan).to(fmt.raw_dtype)
    sinks = Raw(kept, torch.ones(1, 1, dtype=torch.int32)) if fmt.sink_tokens else None
    cache = LayerCache(fmt, pages, Raw(ring, table), sinks=sinks)
    key, value = k[:, None], v[:, None]
    block_table = torch.tensor([[1]], dtype=torch.int32)
    for a, b in ((0, 100), (100, 128)):
        step = Step([Row(0, 0, b - a, a, b)], block_table)
        ops.store_blocks(step, cache, key[a:b], value[a:b])
        ops.store_ring(step, cache, key[a:b], value[a:b])
    assert (pages[0] == 255).all() and (pages[2] == 255).all()
    if sinks:
        wanted = torch.cat([k, v], -1)[: fmt.sink_tokens]
        same = [x.contiguous().view(torch.uint8) for x in (kept[1, 0, : fmt.sink_tokens], wanted)]
        assert torch.equal(*same) and kept[1, 0, fmt.sink_tokens :].isnan().all()
        assert kept[0].isnan().all()
    return pages[1, 0, 0]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@given(st.data(), formats)
@settings(max_examples=60, deadline=None)
def test_pages_equal_the_reference(name: str, data: st.DataObject, fmt: PageFormat) -> None:
    """Bit for bit, but for the bits of a NaN and the sign of a zero."""
    library.load().select(name)
    k, v = data.draw(blocks(fmt)), data.draw(blocks(fmt))
    ours, theirs = (
        kivi_numpy.canonical(stored(ops, fmt, k, v).numpy(), fmt) for ops in (operators, reference)
    )
    library.load().select(None)
    assert torch.equal(torch.from_numpy(ours), torch.from_numpy(theirs))


@pytest.mark.parametrize("bits", [2, 4])
def test_ties_and_their_neighbours(isa: str, bits: int) -> None:
    """Numbers halfway between two codes, and those next to them in fp32."""
    fmt = PageFormat(bits, bits, 32, 64, torch.float32, two_level=False)
    top = 2**bits - 1
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        # Scales from fp16's smallest, subnormal ones too, to 2^11, with zeros of 0.
        scale = torch.rand(128, 64, generator=generator) * 2.0 ** (seed * 30 // 20 - 17)
        scale = scale.half().clamp(2.0**-24, 65504 / top).float()
        codes = torch.randint(0, top, scale.shape, generator=generator) + 0.5
        steps = torch.randint(-2, 3, scale.shape, generator=generator, dtype=torch.int32)
        blocks = []
        for dim in (0, 1):  # the groups of K, of V
            s = scale.unflatten(dim, (-1, 32)).narrow(dim + 1, 0, 1)
            x = codes.unflatten(dim, (-1, 32)) * s
            x = (x.view(torch.int32) + steps.unflatten(dim, (-1, 32))).view(torch.float32)
            x.narrow(dim + 1, 0, 1).zero_()
            x.narrow(dim + 1, 1, 1).copy_(top * s)
            blocks.append(x.flatten(dim, dim + 1))
        ours, theirs = (stored(ops, fmt, *blocks) for ops in (operators, reference))
        assert torch.equal(ours, theirs)
        field = fmt.fields["k_scale"].of(theirs)
        assert torch.equal(field.float(), scale[::32])  # the ties are where they were meant to be


@pytest.mark.parametrize(
    ("dtype", "recipe"),
    [
        *((name, "best") for name in QUANTIZED_DTYPES),
        *((name, "paper") for name in ("kivi2", "kivi4", "kivi_raw")),
    ],
)
@pytest.mark.parametrize("residual", some([0, 32, 128], [1]))
def test_pools_equal_the_reference(isa: str, dtype: str, residual: int, recipe: Recipe) -> None:
    """Pages, ring, tails and sinks of many requests, chunks and block boundaries."""
    sinks = 8 if recipe == "best" else None
    case = Case(dtype, recipe, residual, model=BF16, head_size=96, sinks=sinks)
    for ours, theirs in zip(pools(operators, case), of_the_reference(case), strict=True):
        assert torch.equal(ours, theirs)


def pools(ops: Any, case: Case) -> list[torch.Tensor]:
    """The pool after every step. What attention makes of it is for other tests."""
    found = []

    def store_ring(*args: Any) -> None:
        ops.store_ring(*args)
        found.append(sim.pool.clone())

    stores = SimpleNamespace(
        store_blocks=ops.store_blocks, attend=lambda *_: None, store_ring=store_ring
    )
    sim = Simulator(case, ops=stores, seed=5, sparse=case.residual == 32)
    sim.check = lambda request, a, b: None  # type: ignore[method-assign]
    sim.run(sim.add(500), sim.add(270), sim.add(130), longest=400)
    sim.check_untouched()
    assert len(found) > 2 and not torch.equal(found[0], found[-1])
    return found


of_the_reference = functools.cache(functools.partial(pools, reference))
