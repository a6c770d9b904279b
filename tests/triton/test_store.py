"""Pages, rings and tails that the Triton kernels write: bit for bit the reference's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kivi_vllm.ops import reference
from kivi_vllm.ops.reference import LayerCache, Raw, Row, Step
from tests.triton.device import BF16, DEVICE, FP16, Triton, simulator
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


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(model=BF16, residual=32, heads=(3, 3)),
        Case("kivi_k4v2", group=64, head_size=128, model=FP16, residual=64),
        Case("kivi4", head_size=96, model=BF16, drafts=4),
        Case("kivi_raw", residual=32, model=BF16),
        Case(group=128, head_size=256, heads=(1, 1)),
        Case("kivi4", group=128, head_size=128, model=FP16, residual=128, heads=(1, 1)),
    ],
    ids=str,
)
def test_bytes_equal_the_reference(case: Case) -> None:
    ops = Both()
    sim = simulator(case, ops)
    sim.run(sim.add(300), sim.add(128), sim.add(3))
    assert ops.compared > 5
    sim.check_untouched()


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


@pytest.mark.parametrize("dtype", ["kivi2", "kivi4"])
@pytest.mark.parametrize("kind", SPECIAL)
def test_special_numbers(kind: str, dtype: str) -> None:
    """Codes of constants, ties, and of numbers that fp16 scales do not reach."""
    rng = np.random.default_rng(0)
    x = SPECIAL[kind](rng.uniform(-1, 1, (128, 2, 64)).astype(np.float32))
    k, v = (torch.from_numpy(x.astype(np.float32)).to(DEVICE) for x in (x, x[::-1].copy()))
    pages = [_page(ops, dtype, k, v) for ops in (reference, Triton)]
    assert torch.equal(*pages)


def test_nan_spoils_its_group_only() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(128, 2, 64)).astype(np.float32))
    x[40, 0, 3] = torch.nan
    x = x.to(DEVICE)
    ours, wanted = (_page(ops, "kivi2", x, x) for ops in (Triton, reference))
    fmt = Case().fmt
    for name, field in fmt.fields.items():
        a, b = field.of(ours[1]), field.of(wanted[1])
        if field.dtype == torch.float16:
            assert a.isnan().sum() == 1
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name


def _page(ops: Any, dtype: str, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The pool after storing one block of k, v [128, num_kv_heads, 64] in page 1."""
    fmt = Case(dtype).fmt
    ring_pages = -(-128 // fmt.raw_tokens)
    shape = (2 + ring_pages, 2, fmt.page_bytes)
    pool = torch.full(shape, 255, dtype=torch.uint8, device=DEVICE)
    raw = pool[2:].unflatten(2, (fmt.raw_tokens, -1)).view(torch.float32)
    table = torch.arange(ring_pages, dtype=torch.int32, device=DEVICE)[None]
    cache = LayerCache(fmt, pool, Raw(raw, table), 128)
    step = Step([Row(0, 0, 128, 0, 128)], torch.tensor([[1]], dtype=torch.int32, device=DEVICE))
    ops.store_blocks(step, cache, k, v)
    return pool
