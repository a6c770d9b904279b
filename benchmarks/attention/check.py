"""Both sides against attention in float64 on small steps, before anything is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.attention.cases import RESIDUAL, B, Shape
from benchmarks.attention.kivi import CPU, KiviPool, Place
from benchmarks.attention.work import Work, rows
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

KeyValue = tuple[torch.Tensor, torch.Tensor]
Variant = Callable[[Work, int, torch.Tensor, torch.Tensor], KeyValue]
"""Writes a step's output, given how many tokens are cached in whole blocks, and the key and value
[BATCH, tokens, num_kv_heads, head_size] of the sequences; returns those as its cache holds them."""


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
    errors = dict.fromkeys(variants, 0.0)
    generator = torch.Generator().manual_seed(7)
    for cached, residual, new in steps:
        work = Work(shape, BATCH, new, cached + max(residual, new), device)
        size = (BATCH, work.end - new, shape.num_kv_heads, shape.head_size)
        key, value = (
            torch.cat([torch.randn(size, generator=generator).bfloat16().to(device), own], 1)
            for own in (x.unflatten(0, (BATCH, new)) for x in (work.key, work.value))
        )
        for name, variant in variants.items():
            work.output.fill_(float("nan"))
            k, v = variant(work, cached, key, value)
            for row in range(BATCH):
                exact = work.exact(row, lambda a, b, x=k[row], y=v[row]: (x[a:b], y[a:b]), new)  # type: ignore[misc]
                error = work.error(row, exact, new)
                if not error <= (limit := LIMITS.get(name, LIMIT)):  # NaN too
                    raise UserError(
                        f"the attention over {name} is wrong: its relative error against float64 "
                        f"is {error:.4g}, the limit is {limit}",
                        "nothing was timed: run the tests of the operators",
                        status=1,
                    )
                errors[name] = max(errors[name], error)
    return errors


def kivi(
    shape: Shape,
    dtype: str,
    work: Work,
    cached: int,
    key: torch.Tensor,
    value: torch.Tensor,
    place: Place = CPU,
) -> KeyValue:
    """A `Variant` of ours, through all three operators."""
    pool = KiviPool(shape, dtype, 1, BATCH, -(-work.end // B), place)
    pool.allocate()
    if old := work.end - work.new:
        before = (rows(BATCH, old, old), key[:, :old].flatten(0, 1), value[:, :old].flatten(0, 1))
        pool.store("store_blocks", 0, *before)()
        pool.store("store_ring", 0, *before)()
    pool.store("store_blocks", 0, work.rows, work.key, work.value)()
    pool.attention(0, work)()
    seen = key.float(), value.float()
    for row in range(BATCH if cached else 0):
        blocks = [
            x[row, :cached].unflatten(0, (-1, B)).transpose(1, 2)  # [blocks, num_kv_heads, B, D]
            for x in (key, value)
        ]
        for x, pages in zip(seen, _as_read(blocks[0], blocks[1], pool.fmt), strict=True):
            x[row, :cached] = pages.transpose(1, 2).flatten(0, 1)
    return seen


def _as_read(k: torch.Tensor, v: torch.Tensor, fmt: PageFormat) -> KeyValue:
    """Blocks [n, num_kv_heads, 128, D] of a sequence from its first, as attention reads them."""
    read = decode_pages(encode_pages(k, v, fmt), fmt)
    n = fmt.sink_tokens
    first = decode_pages(encode_pages(k[0], v[0], fmt, n), fmt)
    for x, y, raw in zip(read, first, (k, v), strict=True):
        x[0, :, n:], x[0, :, :n] = y[:, n:], raw[0, :, :n]
    return read
