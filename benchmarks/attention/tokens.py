"""What a step computes on: random queries, keys and values."""

from __future__ import annotations

import torch

from benchmarks.attention.cases import Shape

TEMPLATE_BLOCKS = 4
"""Different random blocks of which a pool is made."""


class Tokens:
    """Random queries, keys and values of one step, bf16, and room for the output."""

    def __init__(self, shape: Shape, tokens: int, device: torch.device | str = "cpu") -> None:
        generator = torch.Generator().manual_seed(3)

        def random(heads: int) -> torch.Tensor:
            numbers = torch.randn(tokens, heads, shape.head_size, generator=generator)
            return numbers.bfloat16().to(device)

        self.query = random(shape.num_heads)
        self.key, self.value = random(shape.num_kv_heads), random(shape.num_kv_heads)
        self.output = torch.zeros_like(self.query)
