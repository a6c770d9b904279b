"""Pages, rings and tails that the Triton kernels write: bit for bit the reference's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kivi_vllm.ops import reference
from kivi_vllm.ops.step import LayerCache, Raw, Row, Step
from tests.choice import some
from tests.triton.device import BEST, BF16, DEVICE, FP16, Triton, simulator
from tests.unit.simulator import Case


class Both:
    """Runs the reference and the kernels on the same cache, and compares all bytes."""

    attend = staticmethod(reference.attend)

    def __init__(self) -> None:
        self.compared = 0

    def _both(self, name: str, step: Step, cache: LayerCache, k: Any, v: Any) -> None:
        pool = cache.pages._base
        before = pool.clone()
        getattr(reference, name)(step, cache, k, v)
        wanted = pool.clone()
        pool.copy_(before)
        getattr(Triton, name)(step, cache, k, v)
        assert torch.equal(pool, wanted), f"{name} wrote other bytes"
        self.compared += not torch.equal(wanted, before)

    def store_blocks(self, *args: Any) -> None:
        self._both("store_blocks", *args)

    def store_ring(self, *args: Any) -> None:
        self._both("store_ring", *args)


CASES = [
    Case(),
    Case(model=BF16, residual=32, heads=(3, 3)),
    Case("kivi_k4v2", group=64, head_size=128, model=FP16, residual=64),
    Case("kivi4", head_size=96, model=BF16, drafts=4),
    Case("kivi_raw", residual=32, model=BF16),
    Case(group=128, head_size=256, heads=(1, 1)),
    Case("kivi4", group=128, head_size=128, model=FP16, residual=128, heads=(1, 1)),
    Case(sinks=16, heads=(1, 1), model=BF16),
    Case("kivi_k4v2", rotate=True, heads=(1, 1), head_size=96, model=FP16),
    Case(**BEST, residual=32, heads=(2, 2), head_size=128, model=BF16),
    Case("kivi4", **BEST, group=64, residual=64),
    Case("kivi_k4v2", **BEST, group=32, head_size=256, heads=(1, 1), model=BF16),
]


@pytest.mark.parametrize("case", some(CASES, [0, 2, 9]), ids=str)
def test_bytes_equal_the_reference(case: Case) -> None:
    ops = Both()
    sim = simulator(case, ops)
    sim.run(sim.add(300), sim.add(128), sim.add(3))
    assert ops.compared > 5
    sim.check_untouched()


SHAPES = [
    Case(heads=(1, 1)),
    Case("kivi4", heads=(1, 1), head_size=96, model=BF16),
    Case("kivi_k4v2", heads=(1, 1), head_size=192, group=64, model=FP16),
    Case(heads=(1, 1), head_size=128, group=128, model=BF16),
    Case("kivi4", heads=(1, 1), head_size=256, group=128, model=BF16),
]


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("case", some(SHAPES, [1]), ids=str)
def test_all_recipes_give_the_references_pages(
    case: Case, clip: bool, rotate: bool, sinks: int
) -> None:
    case = replace(case, clip=clip, rotate=rotate, sinks=sinks)
    rng = np.random.default_rng(1)
    k, v = (
        torch.from_numpy(rng.standard_t(3, (128, 1, case.head_size))).to(DEVICE, case.model)
        for _ in "kv"
    )
    assert torch.equal(*(_page(ops, case, k, v) for ops in (reference, Triton)))


def test_the_sinks_page() -> None:
    """The first tokens as they were, in the first block's step only, and nothing else."""
    case = Case(**BEST, model=BF16)
    fmt, sinks = case.fmt, case.sinks
    k, v = torch.randn(2, 256, 2, case.head_size).to(DEVICE, case.model)
    pool = _page(Triton, case, k[:128], v[:128])
    kept = pool[-1].unflatten(1, (fmt.raw_tokens, -1)).view(case.model)
    assert torch.equal(kept[:, :sinks], torch.cat([k[:sinks], v[:sinks]], -1).transpose(0, 1))
    assert (kept[:, sinks:].view(torch.uint8) == 255).all()
    before = pool[-1].clone()
    assert torch.equal(_page(Triton, case, k[128:], v[128:], pool, 128)[-1], before)


SPECIAL = {
    "constant": lambda x: np.full_like(x, 3.25),
    "zero": np.zeros_like,
    "huge": lambda x: x * 3e38,
    "beyond fp16": lambda x: x * 1e5,
    "tiny": lambda x: x * 1e-7,
    "subnormal scales": lambda x: x * 3e-5,
    "infinite": lambda x: np.where(np.arange(x.size).reshape(x.shape) % 37 == 5, np.inf, x),
    "ties": lambda x: np.round(x * 3) / 2,
}


@pytest.mark.parametrize("recipe", [{}, BEST], ids=["paper", "best"])
@pytest.mark.parametrize("dtype", some(["kivi2", "kivi4"], [0]))
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_numbers(kind: str, dtype: str, recipe: dict[str, Any]) -> None:
    """Codes of constants, ties, and of numbers that fp16 scales do not reach."""
    rng = np.random.default_rng(0)
    x = SPECIAL[kind](rng.uniform(-1, 1, (128, 2, 64)).astype(np.float32))
    k, v = (torch.from_numpy(x.astype(np.float32)).to(DEVICE) for x in (x, x[::-1].copy()))
    pages = [_page(ops, Case(dtype, **recipe), k, v) for ops in (reference, Triton)]
    assert torch.equal(*pages)


@pytest.mark.parametrize("recipe", [{}, {"sinks": 4, "clip": True}], ids=["paper", "clip"])
def test_nan_spoils_its_group_only(recipe: dict[str, Any]) -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(128, 2, 64)).astype(np.float32))
    x[40, 0, 3] = torch.nan
    x = x.to(DEVICE)
    case = Case(**recipe)
    ours, wanted = (_page(ops, case, x, x) for ops in (Triton, reference))
    fmt = case.fmt
    for name, field in fmt.fields.items():
        a, b = field.of(ours[1]), field.of(wanted[1])
        if field.dtype == torch.float16:
            assert a.isnan().sum() == 1
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name


def _page(
    ops: Any,
    case: Case,
    k: torch.Tensor,
    v: torch.Tensor,
    pool: torch.Tensor | None = None,
    start: int = 0,
) -> torch.Tensor:
    """The pool after storing one block of k, v [128, num_kv_heads, D] in page 1.

    The block's first position is `start`. The sinks' page is the last one.
    """
    fmt, heads = case.fmt, k.shape[1]
    ring_pages = -(-128 // fmt.raw_tokens)
    if pool is None:
        shape = (3 + ring_pages, heads, fmt.page_bytes)
        pool = torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)
    raw = pool[..., : fmt.raw_tokens * 2 * case.head_size * case.model.itemsize]
    raw = raw.unflatten(2, (fmt.raw_tokens, -1)).view(case.model)
    table = torch.arange(ring_pages + 1, dtype=torch.int32, device=DEVICE)[None] + 2
    sinks = Raw(raw, table[:, ring_pages:]) if fmt.sink_tokens else None
    cache = LayerCache(fmt, pool, Raw(raw, table), sinks=sinks)
    blocks = torch.tensor([[0] * (start // 128) + [1]], dtype=torch.int32, device=DEVICE)
    step = Step([Row(0, 0, 128, start, start + 128)], blocks)
    ops.store_blocks(step, cache, k, v)
    return pool
