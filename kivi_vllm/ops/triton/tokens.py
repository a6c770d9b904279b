"""Finding things: the row of a program, the page of a block, the address of a token.

Device functions that the kernels share. Full-precision tokens come from four
places: the step's own keys and values, the ring, and the tails of the block before,
which `reference._raw_since` puts in a row; and the page of a sequence's first tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops.step import DeviceStep, LayerCache

B: tl.constexpr = tl.constexpr(BLOCK_SIZE)


class Pages(NamedTuple):
    """An argument of kernels: where quantized pages lie.

    Attributes:
        pages: their bytes, with the strides of a block, of a page in it, and of a head.
        table, table_row: the step's block table and its stride.

    """

    pages: torch.Tensor
    block_stride: int
    page_stride: int
    head_stride: int
    table: torch.Tensor
    table_row: int


class RawTokens(NamedTuple):
    """An argument of kernels: where full-precision tokens lie; strides in elements.

    Attributes:
        key, value: the step's own, with their strides of a token and of a head.
        ring: the ring's pages, with the strides of a page, of a head and of a token.
        table, table_row: the ring's table and its stride.
        tails: [n, 2] int64, the addresses of each tail's pages and table; strides as the ring's.
        tails_row: stride of those tables.
        sinks, sinks_table, sinks_row: as the ring's; where there are no sinks, the ring's.

    """

    key: torch.Tensor
    key_token: int
    key_head: int
    value: torch.Tensor
    value_token: int
    value_head: int
    ring: torch.Tensor
    ring_page: int
    ring_head: int
    ring_token: int
    table: torch.Tensor
    table_row: int
    tails: torch.Tensor
    tails_page: int
    tails_head: int
    tails_token: int
    tails_row: int
    sinks: torch.Tensor
    sinks_page: int
    sinks_head: int
    sinks_token: int
    sinks_table: torch.Tensor
    sinks_row: int


@triton.jit
def find_row(query_start_loc, num_rows, program, TOKENS: tl.constexpr):
    """Which row, and which TOKENS of it, a program serves.

    Row r owns the programs from start(r) // TOKENS + r on, start(r) being its first
    token: as many as its tokens may need. Returns (row, index of its tile).
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
def page_of(paged, row, block, head, C: tl.constexpr):
    """The pool's block that holds the page of a row's block, 0: none does; and its address."""
    entry = block
    if C.PER_BLOCK > 1:
        entry = block // C.PER_BLOCK
    held = tl.load(paged.table + row * paged.table_row + entry).to(tl.int64)
    page = paged.pages + held * paged.block_stride + head * paged.head_stride
    if C.PER_BLOCK > 1:
        page += block % C.PER_BLOCK * paged.page_stride
    return held, page


@triton.jit
def tail_page(raw, row, block, head, i, mask):
    """Page id and address of what tail i keeps of `block`; like mask, i is [n] or one."""
    cache = tl.load(raw.tails + i * 2, mask=mask, other=0).to(raw.ring.dtype)
    table = tl.load(raw.tails + i * 2 + 1, mask=mask, other=0).to(tl.pointer_type(tl.int32))
    page = tl.load(table + row * raw.tails_row + block, mask=mask, other=0).to(tl.int64)
    return page, cache + page * raw.tails_page + head * raw.tails_head


@triton.jit
def sinks_page(raw, row, head, mask):
    """Page id and address of a row's sinks; where not `mask`, it must not be read."""
    page = tl.load(raw.sinks_table + row * raw.sinks_row, mask=mask, other=0).to(tl.int64)
    return page, raw.sinks + page * raw.sinks_page + head * raw.sinks_head


@triton.jit
def raw_start(seen_from, oldest, C: tl.constexpr):
    """(first, lead): where the loop over full-precision tokens begins.

    A query with F(t) = seen_from that sees no position before `oldest`, and those after it,
    see the positions from max(seen_from, oldest) on, and before these, if they were left out
    and the window reaches them, `lead` sinks: they take the place of the last `lead` positions
    before, in the order of which `raw_position` knows what stands where.
    """
    lead = 0
    if C.SINKS > 0:
        lead = tl.where(oldest < C.SINKS, tl.minimum(seen_from, C.SINKS), 0)
    return tl.maximum(seen_from, oldest) - lead, lead


@triton.jit
def raw_position(s, first, lead, C: tl.constexpr):
    """Positions of the tokens that stand at places s in the order of `raw_start`."""
    if C.SINKS > 0:
        s = tl.where(s < first + lead, s - first, s)
    return s


@triton.jit
def at_full_precision(s, seen_from, C: tl.constexpr):
    """Whether queries with F(t) = seen_from see positions s at full precision."""
    whole = s >= seen_from
    if C.SINKS > 0:
        whole |= s < C.SINKS
    return whole


@triton.jit
def ring_entry(s, C: tl.constexpr):
    """`residual.ring_entry`."""
    PAGES: tl.constexpr = (B + C.RING - 1) // C.RING
    return s // B * PAGES + s % B // C.RING


@triton.jit
def ring_slot(s, C: tl.constexpr):
    """`residual.ring_slot`."""
    return s % B % C.RING


@triton.jit
def raw_bases(s, valid, row, q0, a, head, raw, C: tl.constexpr, R: tl.constexpr):
    """Addresses of K and V of the full-precision tokens at positions s [n].

    `raw` is `RawTokens`, C is `page.PageConstants`. Where not `valid`, the
    addresses must not be read.
    """
    own = s >= a
    token = (q0 + s - a).to(tl.int64)
    where = raw.table + row * raw.table_row + ring_entry(s, C)
    page = tl.load(where, mask=valid & (s < a), other=0).to(tl.int64)
    at = raw.ring + page * raw.ring_page + head * raw.ring_head
    at += ring_slot(s, C) * raw.ring_token
    start = a // B * B
    old = valid & (s < start)
    if C.SINKS > 0:  # from their page, if they are in no tail
        seen_from = first_raw(a, R)
        sink = valid & (s < tl.minimum(seen_from, C.SINKS))
        kept = sinks_page(raw, row, head, seen_from > 0)[1]
        at = tl.where(sink, kept + s * raw.sinks_token, at)
        old &= ~sink
    if R > 0:
        i = tl.where(old, s - (start - R), 0)
        tail = tail_page(raw, row, start // B - 1, head, i // C.TAIL, old)[1]
        at = tl.where(old, tail + i % C.TAIL * raw.tails_token, at)
    k = tl.where(own, raw.key + token * raw.key_token + head * raw.key_head, at)
    v = tl.where(own, raw.value + token * raw.value_token + head * raw.value_head, at + C.D)
    # D is a multiple of 32: with the contract of `operators`, all are multiples of 16 bytes.
    return tl.multiple_of(k, 16), tl.multiple_of(v, 16)


def pages_arguments(step: DeviceStep, cache: LayerCache) -> Pages:
    """Where `page_of` finds quantized pages."""
    block, page, head = cache.pages.stride()[:3]
    return Pages(cache.pages, block, page, head, step.block_table, step.block_table.stride(0))


def raw_arguments(cache: LayerCache, key: torch.Tensor, value: torch.Tensor) -> RawTokens:
    """Where `raw_bases` finds the step's own K and V, the ring, the tails and the sinks.

    Raises:
        ValueError: tails, or their tables, differ from each other in their strides.

    """
    ring, given = cache.ring, (key, value, cache.ring, cache.tails, cache.sinks)
    made, of = cache.native.get("raw", (None, ()))  # all launches of a step need the same
    if made and all(x is y for x, y in zip(of, given, strict=True)):
        return made
    sinks, tails = cache.sinks or ring, cache.tails or (ring,)
    strides = {(tail.cache.stride()[:3], tail.table.stride(0)) for tail in tails}
    if len(strides) > 1:
        raise ValueError("tails must have the same strides, and so must their tables")
    [((tails_page, tails_head, tails_token), tails_row)] = strides
    pairs = tuple((t.cache.data_ptr(), t.table.data_ptr()) for t in cache.tails)
    ring_page, ring_head, ring_token = ring.cache.stride()[:3]
    sinks_page, sinks_head, sinks_token = sinks.cache.stride()[:3]
    made = RawTokens(
        key=key,
        key_token=key.stride(0),
        key_head=key.stride(1),
        value=value,
        value_token=value.stride(0),
        value_head=value.stride(1),
        ring=ring.cache,
        ring_page=ring_page,
        ring_head=ring_head,
        ring_token=ring_token,
        table=ring.table,
        table_row=ring.table.stride(0),
        tails=_addresses(pairs, key.device),
        tails_page=tails_page,
        tails_head=tails_head,
        tails_token=tails_token,
        tails_row=tails_row,
        sinks=sinks.cache,
        sinks_page=sinks_page,
        sinks_head=sinks_head,
        sinks_token=sinks_token,
        sinks_table=sinks.table,
        sinks_row=sinks.table.stride(0),
    )
    cache.native["raw"] = made, given
    return made


@functools.cache
def _addresses(pairs: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """[n, 2] int64 on the device, kept for ever: a captured graph may refer to it."""
    return torch.tensor(pairs or [(0, 0)], dtype=torch.int64, device=device)
