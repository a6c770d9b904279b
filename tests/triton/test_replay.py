"""A step replayed for other lengths must compute what the step of those lengths does.

On a GPU it is a CUDA graph, as in vLLM's decode; interpreted, the step's tensors are written anew.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.attention.cases import KIVI_DTYPES, SHAPES, B
from benchmarks.attention.kivi import KiviPool, Place
from benchmarks.attention.work import TEMPLATE, Work
from kivi_vllm.ops.step import Row
from tests.triton.device import DEVICE, INTERPRETED

BLOCKS = 3
LENGTHS = (BLOCKS * B, B + 1, 2 * B + 60)
"""Tokens after the replayed step: one completes a block, one begins one, one is amid."""


def filled(dtype: str) -> KiviPool:
    assert DEVICE is not None
    device = torch.device(DEVICE)
    allocate = partial(torch.empty, dtype=torch.uint8, device=device)
    pool = KiviPool(
        SHAPES["tiny"], dtype, 1, len(LENGTHS), BLOCKS, Place("cuda", device, allocate, 16)
    )
    pool.prepare()
    return pool


def run(pool: KiviPool, layer: tuple[Any, Any], of: Work) -> None:
    operators = pool.place.operators
    operators.store_blocks(*layer, of.key, of.value)
    operators.attend(*layer, of.query, of.key, of.value, pool.params, of.output)
    operators.store_ring(*layer, of.key, of.value)


def layer(pool: KiviPool, lengths: tuple[int, ...]) -> tuple[Any, Any]:
    return pool.layer(0, [Row(i, i, i + 1, n - 1, n) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("dtype", ["kivi2"] if INTERPRETED else KIVI_DTYPES)
def test_a_replayed_step_is_the_step_itself(dtype: str) -> None:
    replayed, plain = filled(dtype), filled(dtype)
    batch, device = len(LENGTHS), replayed.place.device
    work, others = (Work(replayed.shape, n, 1, 1, device) for n in (batch, batch + 1))
    graph_layer = layer(replayed, (B + 5,) * batch)
    call = partial(run, replayed, graph_layer, work)
    call()
    if not INTERPRETED:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        call = graph.replay
    first = work.output.clone()
    template = Work(replayed.shape, 1, TEMPLATE, TEMPLATE, device)
    replayed.fill(template.key, template.value)  # the graph holds the addresses
    graph_layer[0].seq_lens.copy_(torch.tensor(LENGTHS, dtype=torch.int32))
    for name in ("query", "key", "value"):
        getattr(work, name).copy_(getattr(others, name)[1:])
    work.output.fill_(float("nan"))
    call()
    expected = Work(replayed.shape, batch, 1, 1, device)
    for name in ("query", "key", "value"):
        getattr(expected, name).copy_(getattr(others, name)[1:])
    run(plain, layer(plain, LENGTHS), expected)
    torch.testing.assert_close(work.output, expected.output, rtol=1e-3, atol=1e-3)
    # The negative control: the captured lengths give something else.
    assert (work.output - first).abs().max() > 0.05
    for name, first in (("pages", 1), ("ring", 0)):  # page 0 holds anything
        ours, theirs = (getattr(pool, name)[first:].view(torch.uint8) for pool in (replayed, plain))
        assert torch.equal(ours, theirs), name
