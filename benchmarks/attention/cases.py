"""What is measured: the attention shapes of real models, and the cases. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kivi_vllm.config import BLOCK_SIZE as B

RESIDUAL = B // 2
"""Tokens past the last whole block at decode, the step's own included: the average."""

KIVI_DTYPES = {
    "kivi2": ("kivi2", "best"),
    "kivi2_paper": ("kivi2", "paper"),
    "kivi_k4v2": ("kivi_k4v2", "best"),
    "kivi4": ("kivi4", "best"),
}
"""Our names of the project's caches to their `--kv-cache-dtype` and recipe."""

VLLM_DTYPES = {"bf16": "auto", "fp8": "fp8"}
"""Our names of vLLM's caches to its own `--kv-cache-dtype`."""

SECTIONS = ("decode", "prefill", "store")


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


@dataclass(frozen=True)
class Defaults:
    """What is measured on a kind of device where the command line does not say.

    Attributes:
        shapes: keys of `SHAPES`, the most important first.
        contexts: cached tokens at decode.
        batches: sequences at decode, the most important first.
        chunks: prefill: (new tokens, cached tokens).
        store: context and batch at decode, new tokens of a chunk.
        budget: seconds of timing per case.

    """

    shapes: tuple[str, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    chunks: tuple[tuple[int, int], ...]
    store: tuple[int, int, int]
    budget: float


DEFAULTS = {
    "cpu": Defaults(
        ("smollm2", "llama3-8b", "llama2-7b"),
        (1024, 4096, 16384, 65536),
        (1, 8, 32),
        ((2048, 0), (8192, 0), (2048, 8192)),
        (4096, 8, 2048),
        5.0,
    ),
    "cuda": Defaults(
        ("llama3-8b", "llama2-7b", "smollm2", "qwen3-8b"),
        (1024, 4096, 16384, 32768, 65536, 131072),
        (32, 1, 8, 128),
        ((2048, 0), (2048, 8192), (2048, 32768)),
        (4096, 8, 2048),
        1.0,
    ),
    # The whole of "cuda" without a GPU, in Triton's interpreter: its times mean nothing.
    "smoke": Defaults(("tiny",), (256,), (1, 2), ((200, 0), (40, 256)), (256, 2, 256), 0.0),
}

FIRST = (("llama3-8b", 32768, 32), ("llama3-8b", 65536, 1))
"""Decodes that come before all others where time may run out: shape, context, batch."""


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        section: one of `SECTIONS`.
        shape: a key of `SHAPES`.
        context: cached tokens per sequence, a multiple of 128; at decode
            `RESIDUAL` more follow them.
        batch: sequences.
        new: tokens per sequence in the step; 1: decode.

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
    def fields(self) -> dict[str, Any]:
        """The case as the first columns of its row."""
        return asdict(self)


def plan(
    sections: Sequence[str],
    shapes: Sequence[str],
    contexts: Sequence[int],
    batches: Sequence[int],
    chunks: Sequence[tuple[int, int]],
    store: tuple[int, int, int],
) -> list[Case]:
    """All cases, section by section, in the order of the tables."""
    cases: list[Case] = []
    context, batch, new = store
    for section in sections:
        for shape in shapes:
            if section == "decode":
                cases += [Case(section, shape, c, b) for c in contexts for b in batches]
            elif section == "prefill":
                cases += [Case(section, shape, cached, new=n) for n, cached in chunks]
            else:
                cases += [Case(section, shape, context, batch), Case(section, shape, 0, new=new)]
    return cases


def by_importance(cases: Sequence[Case], defaults: Defaults) -> list[Case]:
    """The cases so that a run that ends early has what matters: `FIRST`, then shape by shape.

    Of a shape first the decodes of the two most important batches, whole curves over the
    contexts; then prefill and store; then the other batches.
    """

    def rank(case: Case) -> tuple[int, ...]:
        key = (case.shape, case.context, case.batch)
        first = FIRST.index(key) if case.section == "decode" and key in FIRST else len(FIRST)
        shape = _index(defaults.shapes, case.shape)
        if case.section != "decode":
            return first, shape, 2, SECTIONS.index(case.section)
        batch = _index(defaults.batches, case.batch)
        return first, shape, batch + (batch > 1), case.context

    return sorted(cases, key=rank)


def _index(known: Sequence[Any], what: Any) -> int:
    return known.index(what) if what in known else len(known)
