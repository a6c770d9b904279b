"""What is measured: the attention shapes of real models, and the cases. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from kivi_vllm.config import BLOCK_SIZE as B
from kivi_vllm.config import QUANTIZED_DTYPES

RESIDUAL = B // 2
"""Tokens past the last whole block at decode, the step's own included: the average."""

KIVI_DTYPES = {name: (name, "best") for name in QUANTIZED_DTYPES}
KIVI_DTYPES["kivi2_paper"] = ("kivi2", "paper")
"""Our names of the project's caches to their `--kv-cache-dtype` and recipe."""

VLLM_DTYPES = {"bf16": "auto", "fp8": "fp8"}
"""Our names of vLLM's caches to its own `--kv-cache-dtype`."""

SECTIONS = ("decode", "prefill", "store")

SELECTION = "selection"
"""Decode with a `token_budget`: a section that has the run to itself."""

SELECTED_CONTEXTS = (8192, 32768, 131072)


@dataclass(frozen=True)
class Shape:
    """One layer's attention: heads of queries, heads of keys and values, numbers per head."""

    num_heads: int
    num_kv_heads: int
    head_size: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V in 16 bits, all heads."""
        return self.num_kv_heads * 2 * self.head_size * 2


SHAPES = {
    "smollm2": Shape(9, 3, 64),
    "llama3-8b": Shape(32, 8, 128),
    "llama2-7b": Shape(32, 32, 128),
    "qwen3-8b": Shape(32, 8, 128),
    "tiny": Shape(4, 2, 32),
}


class Sizes(NamedTuple):
    """What is measured; what matters comes first.

    Decode has a case for each of `contexts` (cached tokens) and `batches` (sequences), prefill for
    each of `chunks` (new, cached tokens). `store` is context and batch of a decode, and the tokens
    of a chunk; `budget` seconds of timing a case.
    """

    shapes: Sequence[str]
    contexts: Sequence[int]
    batches: Sequence[int]
    chunks: Sequence[tuple[int, int]]
    store: tuple[int, int, int]
    budget: float


DEFAULTS = {
    "cpu": Sizes(
        ("smollm2", "llama3-8b", "llama2-7b"),
        (1024, 4096, 16384, 65536),
        (1, 8, 32),
        ((2048, 0), (8192, 0), (2048, 8192)),
        (4096, 8, 2048),
        5.0,
    ),
    "cuda": Sizes(
        ("llama3-8b", "llama2-7b", "smollm2", "qwen3-8b"),
        (32768, 65536, 1024, 4096, 16384, 131072),
        (32, 1, 8, 128),
        ((2048, 0), (2048, 8192), (2048, 32768)),
        (4096, 8, 2048),
        1.0,
    ),
    # The whole of "cuda" without a GPU, in Triton's interpreter: its times mean nothing.
    "smoke": Sizes(("tiny",), (256,), (1, 2), ((200, 0), (40, 256)), (256, 2, 256), 0.0),
}
"""By device, where the command line does not say."""


@dataclass(frozen=True)
class Case:
    """One measurement: a section, a key of `SHAPES`, and a step.

    The step has `new` tokens (1: decode) in each of `batch` sequences, behind `context` cached
    ones, a multiple of 128; at decode `RESIDUAL` more follow them.
    """

    section: str
    shape: str
    context: int
    batch: int = 1
    new: int = 1

    def __str__(self) -> str:
        step = f"batch {self.batch}" if self.new == 1 else f"{self.new} new tokens"
        return f"{self.section} {self.shape}, context {self.context}, {step}"

    @property
    def decodes(self) -> bool:
        """Whether the step is one of decode, amid a block."""
        return self.section != "prefill" and self.new == 1

    @property
    def end(self) -> int:
        """Tokens of each sequence after the step."""
        return self.context + (RESIDUAL if self.decodes else self.new)

    @property
    def fields(self) -> dict[str, Any]:
        """The case as the first columns of its row."""
        return asdict(self)


def plan_selection(sizes: Sizes) -> list[Case]:
    """The cases of `SELECTION`, for each shape, batch and context."""
    return [
        Case(SELECTION, shape, context, batch)
        for shape in sizes.shapes
        for batch in sizes.batches
        for context in sizes.contexts
    ]


def plan(sections: Sequence[str], sizes: Sizes) -> list[Case]:
    """All cases, so that a run that ends early has what matters.

    Shape by shape: the decodes of the first two batches, prefill, store, the other decodes.
    """
    context, batch, new = sizes.store
    early = 2 * len(sizes.contexts)
    cases: list[Case] = []
    for shape in sizes.shapes:
        decodes = [Case("decode", shape, c, b) for b in sizes.batches for c in sizes.contexts]
        others = [Case("prefill", shape, cached, new=n) for n, cached in sizes.chunks]
        others += [Case("store", shape, context, batch), Case("store", shape, 0, new=new)]
        cases += [*decodes[:early], *others, *decodes[early:]]
    return [case for case in cases if case.section in sections]
