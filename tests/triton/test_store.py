"""Pages, rings and tails that the Triton kernels write: bit for bit the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kivi_vllm.config import QUANTIZED_DTYPES, Recipe
from kivi_vllm.ops import reference
from kivi_vllm.ops.step import LayerCache, Raw, Row, Step
from tests.choice import some
from tests.triton.device import BF16, DEVICE, FP16, FP32, Triton, simulator
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
    Case("kivi3", residual=32, heads=(3, 3), model=BF16),
    Case("kivi_k4v3", head_size=96, model=BF16, drafts=4),
    Case(residual=32, heads=(2, 2), head_size=128, model=BF16),
    Case("kivi4", residual=64),
    Case("kivi_k3v2", head_size=256, heads=(1, 1), model=BF16),
    Case("kivi_k3v2", sinks=16, heads=(1, 1), model=BF16),
    Case("kivi_raw", residual=32, model=BF16),
    Case(per_block=3, residual=128, raw=(20, 50, 8), sinks=8, heads=(1, 1), model=BF16),
    Case("kivi_raw", exact=True, per_block=2, window=40, sinks=0, heads=(1, 1), model=BF16),
    Case(recipe="paper", residual=32, heads=(3, 3), model=BF16),
    Case("kivi4", "paper", head_size=96, model=BF16, drafts=4),
    Case(recipe="paper", group=64, head_size=128, model=FP16, residual=64),
    Case(recipe="paper", group=128, head_size=256, heads=(1, 1)),
    Case("kivi4", "paper", group=128, head_size=128, model=FP16, residual=128, heads=(1, 1)),
    Case(recipe="paper", sinks=16, heads=(1, 1), model=BF16),
]


@pytest.mark.parametrize("case", some(CASES, [0, 1, 6, 7, 8, 9]), ids=str)
def test_bytes_equal_the_reference(case: Case) -> None:
    ops = Both()
    sim = simulator(case, ops)
    sim.run(sim.add(300), sim.add(128), sim.add(3))
    assert ops.compared > 5
    sim.check_untouched()


SHAPES: list[tuple[int, torch.dtype]] = [
    (64, FP32),
    (96, BF16),
    (128, FP16),
    (32, BF16),
    (192, FP16),
    (256, BF16),
]


@pytest.mark.parametrize(("head_size", "model"), some(SHAPES, [1]))
@pytest.mark.parametrize(
    ("dtype", "recipe"),
    [(name, "best") for name in QUANTIZED_DTYPES] + [("kivi2", "paper"), ("kivi4", "paper")],
)
def test_all_pages_are_the_references(
    dtype: str, recipe: Recipe, head_size: int, model: torch.dtype
) -> None:
    """A sequence's first block, of which the sinks are told apart, and another one."""
    case = Case(dtype, recipe, sinks=4, heads=(1, 1), head_size=head_size, model=model)
    for start in (0, 128):
        x = np.random.default_rng(start).standard_t(3, (2, 128, 1, head_size))
        k, v = torch.from_numpy(x).to(DEVICE, model)
        pages = [_page(ops, case, k, v, start=start) for ops in (reference, Triton)]
        assert torch.equal(*pages)
        # The negative control: all that is asked for is in the page.
        v[127, 0] *= 1.25
        assert not torch.equal(_page(Triton, case, k, v, start=start), pages[0])


def test_the_sinks_page() -> None:
    """The first tokens as they were, in the first block's step only, and nothing else."""
    case = Case(model=BF16)
    fmt, sinks = case.fmt, case.fmt.sink_tokens
    k, v = torch.randn(2, 256, 2, case.head_size).to(DEVICE, case.model)
    pool = _page(Triton, case, k[:128], v[:128])
    kept = fmt.as_raw(pool[-1])
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
    "mostly one channel": lambda x: x * np.where(np.arange(x.shape[-1]) == 7, 3e4, 1),
    "with a mean": lambda x: x * 0.3 + np.sin(np.arange(x.shape[-1]) + 1),
    "some tokens zero": lambda x: np.where((np.arange(len(x)) % 3 > 0)[:, None, None], x, 0),
}


@pytest.mark.parametrize(
    ("dtype", "recipe"),
    some(
        [("kivi2", "paper"), ("kivi4", "paper"), ("kivi2", "best"), ("kivi_k4v3", "best")],
        [0, 2, 3],
    ),
)
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_numbers(kind: str, dtype: str, recipe: Recipe) -> None:
    """Codes of constants, ties, and of numbers that fp16 scales do not reach."""
    rng = np.random.default_rng(0)
    x = SPECIAL[kind](rng.uniform(-1, 1, (128, 2, 64)).astype(np.float32))
    k, v = (torch.from_numpy(x.astype(np.float32)).to(DEVICE) for x in (x, x[::-1].copy()))
    pages = [_page(ops, Case(dtype, recipe), k, v) for ops in (reference, Triton)]
    assert torch.equal(*pages)


@pytest.mark.parametrize("recipe", ["paper", "best"])
def test_nan_spoils_its_range_only(recipe: Recipe) -> None:
    """A group of a paper page; else a channel of K, and a token of V."""
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(128, 2, 64)).astype(np.float32))
    x[40, 0, 3] = torch.nan
    x = x.to(DEVICE)
    case = Case(recipe=recipe)
    ours, wanted = (_page(ops, case, x, x) for ops in (Triton, reference))
    for name, field in case.fmt.fields.items():
        a, b = field.of(ours[1]), field.of(wanted[1])
        if field.dtype == torch.float16:
            assert a.isnan().sum() == (name not in ("k_step", "v_mean"))
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
    raw = fmt.as_raw(pool)
    table = torch.arange(ring_pages + 1, dtype=torch.int32, device=DEVICE)[None] + 2
    sinks = Raw(raw, table[:, ring_pages:]) if fmt.sink_tokens else None
    cache = LayerCache(fmt, pool[:, None], Raw(raw, table), sinks=sinks)
    blocks = torch.tensor([[0] * (start // 128) + [1]], dtype=torch.int32, device=DEVICE)
    step = Step([Row(0, 0, 128, start, start + 128)], blocks)
    ops.store_blocks(step, cache, k, v)
    return pool
