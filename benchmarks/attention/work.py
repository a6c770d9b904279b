"""A step of the benchmark: what it computes on, and what its attention must give."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.attention.cases import B, Shape
from kivi_vllm.ops.step import Row

Seen = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""K and V [n, num_kv_heads, head_size] of positions start..end-1 of a sequence, as a cache
gives them back; `start` is a multiple of 128."""

CHUNK = 32 * B
"""Tokens whose K and V are in float64 at a time."""

CHECKED = 32
"""Queries of a prefill that are checked: the last."""

TEMPLATE = 4 * B
"""Different random tokens of which a pool is made."""


def rows(batch: int, new: int, end: int, generated: bool = False) -> list[Row]:
    """A step of `new` tokens in each of `batch` sequences, which then have `end`."""
    return [Row(i, i * new, (i + 1) * new, end - new, end, generated) for i in range(batch)]


class Work:
    """One step of `new` tokens in each of `batch` sequences, behind `end - new` cached ones.

    `generated`: they may choose what they read.

    Attributes:
        starts: [batch + 1] int32, first token of each sequence in the step.
        lens: [batch] int32, `end`.
        query, output: [batch * new, num_heads, head_size] bf16.
        key, value: [batch * new, num_kv_heads, head_size] bf16.

    """

    def __init__(
        self,
        shape: Shape,
        batch: int,
        new: int,
        end: int,
        device: torch.device | str = "cpu",
        generated: bool = False,
    ) -> None:
        self.shape, self.batch, self.new, self.end, self.device = shape, batch, new, end, device
        generator = torch.Generator().manual_seed(3)
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.query, self.key, self.value = (
            torch.randn(batch * new, n, shape.head_size, generator=generator).bfloat16().to(device)
            for n in heads
        )
        self.output = torch.zeros_like(self.query)
        self.starts = torch.arange(0, batch * new + 1, new, dtype=torch.int32, device=device)
        self.lens = torch.full((batch,), end, dtype=torch.int32, device=device)
        self.scale = shape.head_size**-0.5
        self.rows = rows(batch, new, end, generated)

    def exact(self, row: int, seen: Seen, most: int = CHECKED) -> torch.Tensor:
        """Attention in float64 of the last queries of a sequence: [n, num_heads, head_size]."""
        count, heads = min(self.new, most), self.shape.num_kv_heads
        query = self.last(self.query, row, most).double().unflatten(1, (heads, -1))
        query = query.permute(1, 2, 0, 3).flatten(1, 2)  # [num_kv_heads, group * count, D]
        spans = [(at, min(at + CHUNK, self.end)) for at in range(0, self.end, CHUNK)]
        scores = torch.cat([query @ seen(*span)[0].double().permute(1, 2, 0) for span in spans], -1)
        scores = (scores * self.scale).unflatten(1, (-1, count))
        at = torch.arange(self.end, device=self.device)
        hidden = at[None] > at[-count:, None]
        weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1).flatten(1, 2)
        out = torch.zeros_like(query)
        for start, end in spans:
            out += weights[..., start:end] @ seen(start, end)[1].double().transpose(0, 1)
        return out.unflatten(1, (-1, count)).permute(2, 0, 1, 3).flatten(1, 2)

    def last(self, x: torch.Tensor, row: int, most: int = CHECKED) -> torch.Tensor:
        """Those tokens of x [batch * new, ...] that are checked of a sequence."""
        end = (row + 1) * self.new
        return x[end - min(self.new, most) : end]

    def error(self, row: int, exact: torch.Tensor, most: int = CHECKED) -> float:
        """The relative error of a sequence's output in the Frobenius norm."""
        return float((self.last(self.output, row, most).double() - exact).norm() / exact.norm())
