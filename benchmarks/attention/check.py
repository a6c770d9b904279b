"""Both sides against attention in float64, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.attention.cases import RESIDUAL, B, Shape
from benchmarks.attention.kivi import CPU, KiviPool, Place, rows
from kivi_vllm.cli.errors import UserError
from kivi_vllm.ops.codec import decode_pages, encode_pages
from kivi_vllm.ops.format import PageFormat

LIMITS = {"fp8": 0.15}
LIMIT = 0.01
"""Largest relative error; rounding the output to bf16 makes about 0.002. All are judged by what
their cache should hold, but fp8 by the numbers themselves: how vLLM rounds to it is its affair."""

BATCH = 2
STEPS = ((2 * B, RESIDUAL, 1), (0, 0, 3 * B - 40), (2 * B, 0, B + 72))
"""Cached tokens in whole blocks, tokens after those, new tokens (of the latter at decode)."""

Outputs = tuple[torch.Tensor, torch.Tensor]
"""What came out and what it should be, both [BATCH, new, num_heads, head_size]."""

Variant = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], Outputs]
"""Of cached tokens in whole blocks, query [BATCH, new, num_heads, head_size], key and value
[BATCH, tokens, num_kv_heads, head_size]."""


def truth(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention in float64 of the last tokens of one sequence.

    Args:
        query: [new, num_heads, head_size].
        key, value: [tokens, num_kv_heads, head_size].

    """
    group = query.shape[1] // key.shape[1]
    q = query.double().transpose(0, 1)  # [num_heads, new, D]
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (key, value))
    scores = q @ k.transpose(1, 2) * query.shape[-1] ** -0.5
    ones = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
    hidden = ones.triu(len(key) - len(query) + 1)
    return (scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1)


def relative(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return float((output.double() - expected).norm() / expected.norm())


def check(
    shape: Shape,
    variants: Mapping[str, Variant],
    device: torch.device,
    steps: Sequence[tuple[int, int, int]] = STEPS,
) -> dict[str, float]:
    """The largest relative error of each variant on small steps of this shape.

    Raises:
        UserError: one is larger than its limit.

    """
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(7)

    def random(tokens: int, heads: int) -> torch.Tensor:
        numbers = torch.randn(BATCH, tokens, heads, shape.head_size, generator=generator)
        return numbers.bfloat16().to(device)

    for cached, residual, new in steps:
        total = cached + max(residual, new)
        key, value = (random(total, shape.num_kv_heads) for _ in range(2))
        query = random(new, shape.num_heads)
        for name, variant in variants.items():
            _note(errors, name, *variant(cached, query, key, value))
    return errors


def _note(
    errors: dict[str, float], name: str, output: torch.Tensor, expected: torch.Tensor
) -> None:
    error = relative(output, expected)
    limit = LIMITS.get(name, LIMIT)
    if not error <= limit:  # NaN too
        raise UserError(
            f"the attention over {name} is wrong: its relative error against float64 is "
            f"{error:.4g}, the limit is {limit}",
            "nothing was timed: run the tests of the operators",
            status=1,
        )
    errors[name] = max(errors.get(name, 0.0), error)


def kivi(
    shape: Shape,
    dtype: str,
    cached: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    place: Place = CPU,
) -> Outputs:
    """A `Variant` of ours, through all three operators."""
    new, total = query.shape[1], key.shape[1]
    pool = KiviPool(shape, dtype, 1, BATCH, -(-total // B), place)
    pool.allocate(False)
    old = total - new
    if old:
        step = (rows(BATCH, old, old), key[:, :old].flatten(0, 1), value[:, :old].flatten(0, 1))
        pool.store("store_blocks", 0, *step)()
        pool.store("store_ring", 0, *step)()
    own = (key[:, old:].flatten(0, 1), value[:, old:].flatten(0, 1))
    output = torch.full_like(query, float("nan"))
    of = rows(BATCH, new, total)
    pool.store("store_blocks", 0, of, *own)()
    pool.attention(0, of, query.flatten(0, 1), *own, output.flatten(0, 1))()
    seen_k, seen_v = (x.float() for x in (key, value))
    for row in range(BATCH):
        blocks = [
            x[row, :cached].unflatten(0, (-1, B)).transpose(1, 2)  # [blocks, num_kv_heads, B, D]
            for x in (key, value)
        ]
        if cached:
            pages = _as_read(blocks[0], blocks[1], pool.fmt)
            seen_k[row, :cached], seen_v[row, :cached] = (
                x.transpose(1, 2).flatten(0, 1) for x in pages
            )
    return output, torch.stack([truth(*row) for row in zip(query, seen_k, seen_v, strict=True)])


def _as_read(
    k: torch.Tensor, v: torch.Tensor, fmt: PageFormat
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks [n, num_kv_heads, 128, D] of a sequence from its first, as attention reads them."""
    read = decode_pages(encode_pages(k, v, fmt), fmt)
    n = fmt.sink_tokens
    first = decode_pages(encode_pages(k[0], v[0], fmt, n), fmt)
    for x, y, raw in zip(read, first, (k, v), strict=True):
        x[0, :, n:], x[0, :, :n] = y[:, n:], raw[0, :, :n]
    return read
