"""The Triton kernels compile ahead of time for the GPUs that are supported, and fit them.

`pytest -rP tests/unit/test_compile.py` shows what each takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kivi_vllm.config import DTYPES, RECIPES
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.step import AttentionParams, DeviceStep, LayerCache, Raw
from kivi_vllm.ops.triton import operators
from tests.unit.ahead import Binary, compiled, inspect

CAPABILITIES = (80, 90, 100)
slow = pytest.mark.slow
SHARED = 99 << 10
"""Bytes of shared memory that a program can have on every GPU since sm_80."""


@dataclass(frozen=True)
class Layer:
    """A layer and a step of it; `tokens` a request."""

    dtype: str = "kivi2"
    heads: tuple[int, int] = (32, 8)
    head_size: int = 128
    group: int = 32
    model: torch.dtype = torch.bfloat16
    tokens: int = 1
    residual: int = 0
    rows: int = 4
    best: bool = False

    def __str__(self) -> str:
        hq, hkv = self.heads
        name = f"{self.dtype}-H{hq}x{hkv}-D{self.head_size}-G{self.group}-T{self.tokens}"
        return name + (f"-R{self.residual}" if self.residual else "") + "-best" * self.best

    def arguments(self, *, decode: bool) -> tuple[Any, ...]:
        """Of the operators, as a model would call them."""
        (hq, hkv), d = self.heads, self.head_size
        recipe = RECIPES["best"] if self.best else {}
        fmt = PageFormat(*DTYPES[self.dtype], self.group, d, self.model, **recipe)
        pool = torch.zeros(2, hkv, fmt.page_bytes, dtype=torch.uint8)
        raw = pool[..., : fmt.raw_tokens * 2 * d * self.model.itemsize]
        raw = raw.unflatten(2, (fmt.raw_tokens, -1)).view(self.model)
        table = torch.zeros(self.rows, 64, dtype=torch.int32)
        tails = tuple(Raw(raw, table) for _ in range(-(-self.residual // fmt.raw_tokens)))
        sinks = Raw(raw, table) if self.best else None
        cache = LayerCache(fmt, pool, Raw(raw, table), tails, self.residual, sinks)
        n = self.rows * self.tokens
        q, k, v = torch.zeros(n, hq + 2 * hkv, d, dtype=self.model).split([hq, hkv, hkv], 1)
        lens = torch.zeros(self.rows, dtype=torch.int32)
        step = DeviceStep(
            query_start_loc=torch.zeros(self.rows + 1, dtype=torch.int32),
            seq_lens=lens,
            block_table=table,
            num_decodes=self.rows if decode else 0,
            num_decode_tokens=n if decode else 0,
            num_tokens=n,
            max_query_len=self.tokens,
            decode_len=self.tokens if decode else 1,
            per_position=False,
        )
        return step, cache, q, k, v, AttentionParams(d**-0.5), torch.zeros_like(q)


LAYERS = [
    Layer(),
    Layer(heads=(32, 32)),
    Layer(heads=(9, 3), head_size=64),
    Layer(heads=(32, 1)),
    Layer(tokens=4),
    Layer("kivi_k4v2", head_size=96, heads=(8, 8)),
    Layer("kivi4"),
    Layer("kivi4", head_size=64, group=64),
    Layer(head_size=256, heads=(8, 4), model=torch.float16),
    Layer("kivi_raw"),
    Layer(best=True),
    Layer(heads=(9, 3), head_size=64, best=True),
    Layer("kivi_k4v2", tokens=4, head_size=96, heads=(8, 8), residual=32, best=True),
    Layer(head_size=256, heads=(8, 4), model=torch.float16, best=True),
    Layer("kivi4", best=True),
]


def taken(kernels: list[Any]) -> list[Binary]:
    """What they take; printed."""
    binaries = [inspect(kernel) for kernel in kernels]
    for binary in binaries:
        print(binary)
    return binaries


def targets(layers: list[Layer], thorough: Sequence[int], quick: Sequence[int]) -> list[Any]:
    """Each layer for one of the GPUs in turn, and those at `thorough` for all three.

    A layer decides what a program holds, a target how it is laid out: every layer sees a target,
    and the hungriest see all of them. All but those at `quick` are `slow`.
    """
    pairs = [(layer, CAPABILITIES[i % 3]) for i, layer in enumerate(layers)]
    more = [(layers[i], c) for i in thorough for c in CAPABILITIES]
    return [
        pytest.param(*pair, marks=[slow] * (i not in quick), id=f"{pair[0]}-{pair[1]}")
        for i, pair in enumerate([*pairs, *(pair for pair in more if pair not in pairs)])
    ]


@pytest.mark.parametrize(("layer", "capability"), targets(LAYERS, (10, 12, 13), (0, 5, 10)))
def test_decode_neither_spills_nor_overflows(layer: Layer, capability: int) -> None:
    with compiled(capability) as kernels:
        operators.attend(*layer.arguments(decode=True))
    decode, combine = taken(kernels)
    assert (decode.name, combine.name) == ("_decode", "_combine")
    assert decode.spills == combine.spills == 0
    assert decode.shared <= SHARED


PREFILLS = [
    Layer(tokens=64, best=True),
    Layer("kivi4", heads=(9, 3), head_size=64, tokens=64, residual=32),
    Layer(head_size=256, heads=(8, 4), tokens=64),
    Layer(tokens=64),
    Layer("kivi4", head_size=96, heads=(8, 8), tokens=64, residual=32, best=True),
    Layer(head_size=256, heads=(8, 4), group=128, tokens=64, best=True),
]


@pytest.mark.parametrize(("layer", "capability"), targets(PREFILLS, (0, 5), (0,)))
def test_prefill_and_store_fit(layer: Layer, capability: int) -> None:
    step, cache, query, key, value, params, output = layer.arguments(decode=False)
    with compiled(capability) as kernels:
        operators.store_blocks(step, cache, key, value)
        operators.attend(step, cache, query, key, value, params, output)
        operators.store_ring(step, cache, key, value)
    binaries = taken(kernels)
    assert [b.name for b in binaries] == ["_store_blocks", "_prefill", "_store_ring"]
    assert all(b.shared <= SHARED for b in binaries)


def test_a_target_of_its_own() -> None:
    """Kernels compiled for one GPU are not taken for another's."""
    code = []
    for capability in CAPABILITIES:
        with compiled(capability) as kernels:
            operators.store_ring(*Layer().arguments(decode=True)[:2], *_keys())
        [kernel] = kernels
        assert kernel.metadata.target.arch == capability
        code.append(kernel.asm["cubin"])
    assert len(set(code)) == len(CAPABILITIES)


def _keys() -> tuple[torch.Tensor, torch.Tensor]:
    return Layer().arguments(decode=True)[3:5]
