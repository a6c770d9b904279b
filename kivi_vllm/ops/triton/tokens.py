"""Finding things: the row of a program, the page of a block, the address of a token.

Device functions that the kernels share. Full-precision tokens come from three
places, which `reference._raw_since` puts in a row: the step's own keys and values,
the ring, and the tails of the block before.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops.reference import LayerCache

B: tl.constexpr = tl.constexpr(BLOCK_SIZE)


@triton.jit
def find_row(query_start_loc, num_rows, program, TOKENS: tl.constexpr):
    """Which row, and which TOKENS of it, a program serves.

    Row r owns the programs from start(r) // TOKENS + r on, start(r) being its first
    token: as many as its tokens may need. Returns (row, its how-manieth).
    """
    base = tl.load(query_start_loc)
    low, high = 0, num_rows
    while high - low > 1:
        middle = (low + high) // 2
        first = (tl.load(query_start_loc + middle) - base) // TOKENS + middle
        if first <= program:
            low = middle
        else:
            high = middle
    return low, program - (tl.load(query_start_loc + low) - base) // TOKENS - low


@triton.jit
def row_of(query_start_loc, seq_lens, row):
    """(q0, a, b): the row's first token in the step, its positions a..b-1."""
    q0 = tl.load(query_start_loc + row)
    b = tl.load(seq_lens + row)
    return q0, b - (tl.load(query_start_loc + row + 1) - q0), b


@triton.jit
def first_raw(t, R: tl.constexpr):
    """F(t): position t sees s at full precision iff s >= F(t)."""
    return tl.maximum(t // B * B - R, 0)


@triton.jit
def tail_page(raw, row, block, i, mask):
    """Page id and cache of the tokens of `block` that tail i keeps; like mask, i is [n] or one."""
    ring, (tails, tail_row) = raw[6], raw[13:]
    cache = tl.load(tails + i * 2, mask=mask, other=0).to(tl.pointer_type(ring.dtype.element_ty))
    table = tl.load(tails + i * 2 + 1, mask=mask, other=0).to(tl.pointer_type(tl.int32))
    return tl.load(table + row * tail_row + block, mask=mask, other=0).to(tl.int64), cache


@triton.jit
def raw_bases(s, valid, row, q0, a, head, raw, C: tl.constexpr, R: tl.constexpr):
    """Addresses of K and V of the full-precision tokens at positions s [n].

    `raw` is made by `raw_arguments`, C is `page.PageConstants`. Where not `valid`, the
    addresses must not be read.
    """
    key, key_token, key_head, value, value_token, value_head = raw[:6]
    ring, ring_page, ring_head, ring_token, ring_table, ring_row, capacity = raw[6:13]
    own = s >= a
    token = (q0 + s - a).to(tl.int64)
    slot = s % capacity
    page = tl.load(ring_table + row * ring_row + slot // C.RAW, mask=valid & (s < a), other=0).to(
        tl.int64
    )
    at = ring + page * ring_page + head * ring_head + slot % C.RAW * ring_token
    if R > 0:
        start = a // B * B
        old = valid & (s < start)
        i = tl.where(old, s - (start - R), 0)
        page, tail = tail_page(raw, row, start // B - 1, i // C.RAW, old)
        at = tl.where(old, tail + page * ring_page + head * ring_head + i % C.RAW * ring_token, at)
    k = tl.where(own, key + token * key_token + head * key_head, at)
    v = tl.where(own, value + token * value_token + head * value_head, at + C.D)
    # D is a multiple of 32: with the contract of `operators`, all are multiples of 16 bytes.
    return tl.multiple_of(k, 16), tl.multiple_of(v, 16)


def raw_arguments(cache: LayerCache, key: torch.Tensor, value: torch.Tensor) -> tuple:
    """What `raw_bases` needs: the step's own K and V, the ring, and the tails.

    Raises:
        ValueError: the tails differ from the ring in their strides, or in those of
            their tables from each other.

    """
    ring = cache.ring
    rows = {tail.table.stride(0) for tail in cache.tails}
    if len(rows) > 1 or any(t.cache.stride() != ring.cache.stride() for t in cache.tails):
        raise ValueError("ring and tails must have the same strides, and all tails' tables")
    tails = _addresses(
        tuple((t.cache.data_ptr(), t.table.data_ptr()) for t in cache.tails), key.device
    )
    return (
        *(key, *key.stride()[:2], value, *value.stride()[:2]),
        *(ring.cache, *ring.cache.stride()[:3], ring.table, ring.table.stride(0)),
        *(cache.ring_capacity, tails, rows.pop() if rows else 0),
    )


@functools.cache
def _addresses(pairs: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """[n, 2] int64 on the device, kept for ever: a captured graph may refer to it."""
    return torch.tensor(pairs or [(0, 0)], dtype=torch.int64, device=device)
