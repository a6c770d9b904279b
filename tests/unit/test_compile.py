"""The Triton kernels compile ahead of time for the GPUs that are supported, and fit them.

`pytest -rP tests/unit/test_compile.py` shows what each takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kivi_vllm.config import KiviConfig, Recipe
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
    recipe: Recipe = "best"
    heads: tuple[int, int] = (32, 8)
    head_size: int = 128
    group: int | None = None
    model: torch.dtype = torch.bfloat16
    tokens: int = 1
    residual: int = 0
    rows: int = 4
    per_block: int = 1
    raw: int = 0  # tokens of a full-precision page; 0: as many as fit a page
    sink_logits: bool = False
    images: bool = False  # whose tokens see each other

    def __str__(self) -> str:
        hq, hkv = self.heads
        name = f"{self.dtype}-{self.recipe}-H{hq}x{hkv}-D{self.head_size}-T{self.tokens}"
        more = {"R": self.residual, "G": self.group or 0, "k": self.per_block, "raw": self.raw}
        words = [f"{k}{n}" for k, n in more.items() if n > (k == "k")]
        words += ["logits"] * self.sink_logits + ["images"] * self.images
        return "-".join([name, *words])

    def arguments(self, *, decode: bool) -> tuple[Any, ...]:
        """Of the operators, as a model would call them."""
        (hq, hkv), d = self.heads, self.head_size
        options = {"recipe": self.recipe} | ({"group_size": self.group} if self.group else {})
        fmt = PageFormat.of(KiviConfig.from_options(self.dtype, options), d, self.model)
        pool = torch.zeros(2, hkv, self.per_block, fmt.page_bytes, dtype=torch.uint8)
        raw_tokens = self.raw or fmt.raw_tokens
        raw = torch.zeros(2, hkv, raw_tokens, 2 * d, dtype=self.model)
        table = torch.zeros(self.rows, 64, dtype=torch.int32)
        tails = tuple(Raw(raw, table) for _ in range(-(-self.residual // raw_tokens)))
        sinks = Raw(raw, table) if fmt.sink_tokens else None
        cache = LayerCache(fmt, pool.transpose(1, 2), Raw(raw, table), tails, self.residual, sinks)
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
            last_visible=torch.zeros(n, dtype=torch.int32) if self.images else None,
        )
        logits = torch.zeros(hq) if self.sink_logits else None
        params = AttentionParams(d**-0.5, sink_logits=logits)
        return step, cache, q, k, v, params, torch.zeros_like(q)


LAYERS = [
    Layer(),
    Layer(heads=(32, 32)),
    Layer(heads=(9, 3), head_size=64),
    Layer(tokens=4),
    Layer(head_size=256, heads=(8, 4), model=torch.float16),
    Layer("kivi_k3v2"),
    Layer("kivi_k3v2", heads=(9, 3), head_size=64),
    Layer("kivi_k3v2", heads=(32, 1)),
    Layer("kivi3"),
    Layer("kivi3", head_size=256, heads=(8, 4), model=torch.float16),
    Layer("kivi_k4v3"),
    Layer("kivi_k4v3", tokens=4, head_size=96, heads=(8, 8), residual=32),
    Layer("kivi4"),
    Layer("kivi_raw"),
    Layer(recipe="paper"),
    Layer("kivi4", "paper", head_size=64, group=64),
    Layer("kivi4", "paper"),
    Layer(recipe="paper", head_size=256, heads=(8, 4), model=torch.float16),
    Layer(per_block=5, raw=120, residual=64),
    Layer(heads=(64, 8), head_size=64, sink_logits=True),
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


@pytest.mark.parametrize(("layer", "capability"), targets(LAYERS, (0, 5, 11), (0, 5, 11)))
def test_decode_neither_spills_nor_overflows(layer: Layer, capability: int) -> None:
    with compiled(capability) as kernels:
        operators.attend(*layer.arguments(decode=True))
    decode, combine = taken(kernels)
    assert (decode.name, combine.name) == ("_decode", "_combine")
    assert decode.spills == combine.spills == 0
    assert decode.shared <= SHARED


PREFILLS = [
    Layer("kivi_k3v2", tokens=64),
    Layer(heads=(9, 3), head_size=64, tokens=64, residual=32),
    Layer("kivi3", head_size=256, heads=(8, 4), tokens=64),
    Layer("kivi_k4v3", head_size=96, heads=(8, 8), tokens=64, residual=32),
    Layer("kivi4", tokens=64),
    Layer(recipe="paper", tokens=64),
    Layer("kivi4", "paper", head_size=256, heads=(8, 4), group=128, tokens=64),
    Layer(head_size=256, heads=(8, 4), tokens=64, per_block=3, raw=128, residual=128),
    Layer(heads=(64, 8), head_size=64, tokens=64, sink_logits=True),
    Layer(head_size=256, heads=(16, 8), tokens=64, images=True),
]


@pytest.mark.parametrize(("layer", "capability"), targets(PREFILLS, (0, 2), (0,)))
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
