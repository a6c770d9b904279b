"""A step captured once and replayed with other lengths must compute what the step itself does."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.attention.cases import B, Shape
from benchmarks.attention.check import relative
from benchmarks.attention.gpu.device import Gpu
from benchmarks.attention.gpu.pools import QuantizedPool
from benchmarks.attention.kivi import Row
from benchmarks.attention.tokens import TEMPLATE_BLOCKS, Tokens

BLOCKS = 9
LENGTHS = (BLOCKS * B, 2 * B + 1, 700)
"""Tokens after the replayed step: one completes a block, one begins one, one is amid."""


def replayed(gpu: Gpu, shape: Shape, dtype: str) -> dict[str, Any]:
    """Capture a decode step of all three operators, replay another, and compare.

    Returns:
        whether it was a graph, the relative difference of the outputs from a call
        without graph, and whether pages and rings are the same.

    Raises:
        RuntimeError: they are not.

    """
    batch = len(LENGTHS)
    tokens, others = Tokens(shape, batch, gpu.device), Tokens(shape, batch + 1, gpu.device)
    template = Tokens(shape, TEMPLATE_BLOCKS * B, gpu.device)
    pools = [QuantizedPool(shape, dtype, 1, batch, BLOCKS, gpu) for _ in range(2)]
    for pool in pools:
        pool.allocate()
        pool.fill(template.key, template.value)
    operators = pools[0].place.operators

    def run(pool: QuantizedPool, step: Any, of: Tokens) -> None:
        cache = pool.cache(0)
        operators.store_blocks(step, cache, of.key, of.value)
        operators.attend(step, cache, of.query, of.key, of.value, pool.params, of.output)
        operators.store_ring(step, cache, of.key, of.value)

    def step(pool: QuantizedPool, lengths: tuple[int, ...]) -> Any:
        return pool.step(0, [Row(i, i, i + 1, n - 1, n) for i, n in enumerate(lengths)])

    graph_step = step(pools[0], (B + 5,) * batch)
    call, why = gpu.captured([lambda: run(pools[0], graph_step, tokens)])
    pools[0].fill(template.key, template.value)
    graph_step.seq_lens.copy_(torch.tensor(LENGTHS, dtype=torch.int32))
    for x, y in (
        (tokens.query, others.query),
        (tokens.key, others.key),
        (tokens.value, others.value),
    ):
        x.copy_(y[1:])
    tokens.output.fill_(float("nan"))
    call()
    plain = Tokens(shape, batch, gpu.device)
    for x, y in ((plain.query, tokens.query), (plain.key, tokens.key), (plain.value, tokens.value)):
        x.copy_(y)
    run(pools[1], step(pools[1], LENGTHS), plain)
    gpu.finish()
    difference = relative(tokens.output, plain.output.double())
    same = all(
        torch.equal(*(getattr(pool, name).view(torch.uint8) for pool in pools))
        for name in ("pages", "ring")
    )
    found = {"captured": not why, "why_not": why, "difference": difference, "caches_equal": same}
    if not (difference <= 1e-3 and same):  # NaN too
        raise RuntimeError(f"its graph replays another step: {found}")
    return found
