"""What is measured: the attention shapes of real models, and the cases. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kivi_vllm.config import BLOCK_SIZE as B

RESIDUAL = B // 2
"""Tokens past the last whole block at decode, the step's own included: the average."""

KIVI_DTYPES = ("kivi2", "kivi_k4v2", "kivi4")
VLLM_DTYPES = {"bf16": "auto", "fp8": "fp8"}
"""Our names of vLLM's caches to its own `--kv-cache-dtype`."""

CONTEXTS = (1024, 4096, 16384, 65536)
BATCHES = (1, 8, 32)
CHUNKS = ((2048, 0), (8192, 0), (2048, 8192))
"""Prefill: (new tokens, cached tokens)."""

STORE_CONTEXT, STORE_BATCH, STORE_CHUNK = 4096, 8, 2048

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
}


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
) -> list[Case]:
    """All cases, section by section, in the order of the tables."""
    return [
        case
        for section in sections
        for shape in shapes
        for case in _of(section, shape, contexts, batches, chunks)
    ]


def _of(
    section: str,
    shape: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    chunks: Sequence[tuple[int, int]],
) -> Iterator[Case]:
    if section == "decode":
        for context in contexts:
            for batch in batches:
                yield Case(section, shape, context, batch)
    elif section == "prefill":
        for new, cached in chunks:
            yield Case(section, shape, cached, new=new)
    else:
        yield Case(section, shape, STORE_CONTEXT, STORE_BATCH)
        yield Case(section, shape, 0, new=STORE_CHUNK)
