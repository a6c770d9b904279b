"""A step on the GPU, and what its attention must give."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.attention.cases import B, Shape
from benchmarks.attention.tokens import Tokens

Seen = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]
"""K and V [n, num_kv_heads, head_size] of positions start..end-1 of a sequence, as a cache
gives them back; `start` is a multiple of 128."""

CHUNK = 32 * B
"""Tokens whose K and V are in float64 at a time."""

CHECKED = 32
"""Queries of a prefill that are checked: the last."""


class Work:
    """One step of `new` tokens in each of `batch` sequences, behind `end - new` cached ones.

    Attributes:
        starts: [batch + 1] int32, first token of each sequence in the step.
        lens: [batch] int32, `end`.
        query, output: [batch * new, num_heads, head_size] bf16.
        key, value: [batch * new, num_kv_heads, head_size] bf16.

    """

    def __init__(self, shape: Shape, batch: int, new: int, end: int, device: torch.device) -> None:
        self.shape, self.batch, self.new, self.end, self.device = shape, batch, new, end, device
        tokens = Tokens(shape, batch * new, device)
        self.query, self.output = tokens.query, tokens.output
        self.key, self.value = tokens.key, tokens.value
        self.starts = torch.arange(0, batch * new + 1, new, dtype=torch.int32, device=device)
        self.lens = torch.full((batch,), end, dtype=torch.int32, device=device)
        self.scale = shape.head_size**-0.5

    def rows(self) -> list[int]:
        """The sequences that are checked: the first and the last."""
        return sorted({0, self.batch - 1})

    def exact(self, row: int, seen: Seen) -> torch.Tensor:
        """Attention in float64 of the last queries of a sequence: [n, num_heads, head_size]."""
        count, heads = min(self.new, CHECKED), self.shape.num_kv_heads
        query = self.last(self.query, row).double().unflatten(1, (heads, -1))
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

    def last(self, x: torch.Tensor, row: int) -> torch.Tensor:
        """Those tokens of x [batch * new, ...] that are checked of a sequence."""
        end = (row + 1) * self.new
        return x[end - min(self.new, CHECKED) : end]
