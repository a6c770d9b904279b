"""Storing into the ring: a step's last tokens, as they are.

One launch a layer, after attention (`reference` says why).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kivi_vllm.ops.step import DeviceStep, LayerCache
from kivi_vllm.ops.triton.page import page_constants
from kivi_vllm.ops.triton.tokens import (
    B,
    find_row,
    raw_arguments,
    ring_entry,
    ring_slot,
    row_of,
)


@triton.jit(do_not_specialize=["num_rows", "decode_len"])
def _store_ring(
    query_start_loc,
    seq_lens,
    num_rows,
    decode_len,
    raw,
    num_heads,
    C: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (tokens of the step + rows): all kv heads of a token."""
    row, i = find_row(query_start_loc, num_rows, tl.program_id(0), 1)
    q0, a, b = row_of(query_start_loc, seq_lens, row)
    s = a + i
    needed = tl.maximum(b - (decode_len - 1), 0) // B * B  # `residual.ring_start`
    if (s < b) & (s >= needed):
        page = tl.load(raw.table + row * raw.table_row + ring_entry(s, C)).to(tl.int64)
        to = raw.ring + page * raw.ring_page + ring_slot(s, C) * raw.ring_token
        token = (q0 + i).to(tl.int64)
        h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, C.DP)[None]
        mask = (h < num_heads) & (d < C.D)
        k = tl.load(raw.key + token * raw.key_token + h * raw.key_head + d, mask=mask, other=0)
        v = tl.load(
            raw.value + token * raw.value_token + h * raw.value_head + d, mask=mask, other=0
        )
        tl.store(to + h * raw.ring_head + d, k, mask=mask)
        tl.store(to + h * raw.ring_head + C.D + d, v, mask=mask)


def store_ring(step: DeviceStep, cache: LayerCache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write the step's last tokens of every request into its ring.

    As `reference.store_ring`, for a `DeviceStep`; one launch.
    """
    num_heads = key.shape[1]
    _store_ring[(step.num_tokens + step.num_reqs,)](
        step.query_start_loc,
        step.seq_lens,
        step.num_reqs,
        step.decode_len,
        raw_arguments(cache, key, value),
        num_heads,
        C=page_constants(cache),
        HEADS=triton.next_power_of_2(num_heads),
    )
