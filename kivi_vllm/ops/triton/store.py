"""Storing: completed blocks are quantized into pages, the step's last tokens go into the ring.

Two launches a layer, before and after attention (`reference` says why). A program of
`_store_blocks` makes one part of one block of one kv head: some groups of K, one group
of channels of V, or the tokens that one tail keeps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kivi_vllm.ops.reference import LayerCache
from kivi_vllm.ops.triton.page import page_constants
from kivi_vllm.ops.triton.step import DeviceStep
from kivi_vllm.ops.triton.tokens import B, find_row, raw_arguments, raw_bases, row_of, tail_page

FP16_MAX: tl.constexpr = tl.constexpr(65504.0)
ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds half to even


@triton.jit
def _quantize(x, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Scale and zero, fp16, of the groups along AXIS of x: `codec.quantize` to the bit."""
    bad = tl.max((x != x).to(tl.int32), AXIS) > 0
    low, high = tl.min(x, AXIS), tl.max(x, AXIS)
    zero = tl.minimum(tl.maximum(low, -FP16_MAX), FP16_MAX)
    spread = tl.where(high == low, 0.0, high - low)
    scale = tl.minimum(tl.div_rn(spread, tl.full(spread.shape, 2**BITS - 1, tl.float32)), FP16_MAX)
    nan = float("nan")
    return tl.where(bad, nan, scale).to(tl.float16), tl.where(bad, nan, zero).to(tl.float16)


@triton.jit
def _codes(x, scale, zero, BITS: tl.constexpr):
    """Codes, int32, of x, with the scale and zero (fp16) of its groups."""
    s, z = scale.to(tl.float32), zero.to(tl.float32)
    good = s > 0  # neither 0 nor NaN
    y = tl.div_rn(x - z, tl.broadcast_to(tl.where(good, s, 1.0), x.shape))
    y = tl.minimum(tl.maximum(y, 0.0), 2**BITS - 1.0)
    return tl.where(good, (y + ROUND) - ROUND, 0.0).to(tl.int32)


@triton.jit
def _store_k(page, bases, part, C: tl.constexpr, TOKENS: tl.constexpr):
    """Part `part` of a page's K, TOKENS tokens at addresses `bases` [TOKENS]."""
    GROUPS: tl.constexpr = TOKENS // C.G
    SLOTS: tl.constexpr = 8 // C.K_BITS
    N: tl.constexpr = TOKENS // (16 * SLOTS)
    d = tl.arange(0, C.DP)
    live = d < C.D
    x = tl.load(bases[:, None] + d[None], mask=live[None], other=0).to(tl.float32)
    x = tl.reshape(x, (GROUPS, C.G, C.DP))
    scale, zero = _quantize(x, 1, C.K_BITS)  # [GROUPS, DP]
    at = (part * GROUPS + tl.arange(0, GROUPS))[:, None] * C.D + d[None]
    tl.store((page + C.K[0]).to(tl.pointer_type(tl.float16)) + at, scale, mask=live[None])
    tl.store((page + C.K[1]).to(tl.pointer_type(tl.float16)) + at, zero, mask=live[None])
    codes = _codes(x, scale[:, None], zero[:, None], C.K_BITS)
    codes = tl.reshape(codes, (N, SLOTS, 16, C.DP)) << _shifts(C.K_BITS)[None, :, None, None]
    n = (part * N + tl.arange(0, N))[:, None, None]
    lane, channel = tl.arange(0, 16)[None, :, None], d[None, None]
    at = (n * (C.D // 4) + channel // 4) * 64 + lane * 4 + channel % 4
    tl.store(page + C.K[2] + at, tl.sum(codes, 1).to(tl.uint8), mask=live[None, None])


@triton.jit
def _store_v(page, bases, part, C: tl.constexpr):
    """Part `part` of a page's V, G channels of all tokens, at addresses `bases` [128]."""
    HALVES: tl.constexpr = 4 // C.V_BITS
    TOKENS: tl.constexpr = B // HALVES
    UNITS: tl.constexpr = C.G // 32
    channel = part * C.G + tl.arange(0, C.G)
    x = tl.load(bases[:, None] + channel[None]).to(tl.float32)
    scale, zero = _quantize(x, 1, C.V_BITS)  # [128]
    at = part * B + tl.arange(0, B)
    tl.store((page + C.V[0]).to(tl.pointer_type(tl.float16)) + at, scale)
    tl.store((page + C.V[1]).to(tl.pointer_type(tl.float16)) + at, zero)
    codes = _codes(x, scale[:, None], zero[:, None], C.V_BITS)
    # Slot i is half i // 2 of the tokens, and half i % 2 of the unit's 32 channels.
    codes = tl.reshape(codes, (HALVES, TOKENS, UNITS, 2, 16))
    shift = tl.reshape(_shifts(C.V_BITS), (HALVES, 1, 1, 2, 1))
    codes = tl.sum(tl.sum(codes << shift, 3), 0)  # [TOKENS, UNITS, 16]
    token = tl.arange(0, TOKENS)[:, None, None]
    n = (part * UNITS + tl.arange(0, UNITS))[None, :, None]
    lane = tl.arange(0, 16)[None, None]
    at = (n * (TOKENS // 4) + token // 4) * 64 + lane * 4 + token % 4
    tl.store(page + C.V[2] + at, codes.to(tl.uint8))


@triton.jit
def _shifts(BITS: tl.constexpr):
    """Where the slots of a byte begin."""
    return tl.arange(0, 8 // BITS) * BITS


@triton.jit
def _copy(to, stride, bases, count, C: tl.constexpr, N: tl.constexpr):
    """The first `count` of N tokens at addresses `bases` [N] go to `to`, `stride` apart."""
    n, d = tl.arange(0, N)[:, None], tl.arange(0, C.DP)[None]
    mask = (n < count) & (d < C.D)
    tl.store(to + n * stride + d, tl.load(bases[:, None] + d, mask=mask, other=0), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _store_blocks(
    query_start_loc,
    seq_lens,
    num_rows,
    pages,
    page_block,
    page_head,
    table,
    table_row,
    raw,
    C: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    K_TOKENS: tl.constexpr,
    RAW_TOKENS: tl.constexpr,
):
    """Grid (blocks that the step may complete, num_kv_heads, K parts + V parts + tails)."""
    row, j = find_row(query_start_loc, num_rows, tl.program_id(0), B)
    head, part = tl.program_id(1), tl.program_id(2)
    q0, a, b = row_of(query_start_loc, seq_lens, row)
    block = a // B + j
    if (a < b) & (block < b // B):
        if part < PARTS[0] + PARTS[1]:
            page = tl.load(table + row * table_row + block).to(tl.int64)
            page = pages + page * page_block + head * page_head
            if part < PARTS[0]:
                s = block * B + part * K_TOKENS + tl.arange(0, K_TOKENS)
                k_at = raw_bases(s, True, row, q0, a, head, raw, C, 0)[0]
                if C.K_BITS == 0:
                    to = (page + C.K[2]).to(raw.key.dtype) + part * K_TOKENS * C.D
                    _copy(to, C.D, k_at, K_TOKENS, C, K_TOKENS)
                else:
                    _store_k(page, k_at, part, C, K_TOKENS)
            else:
                v_at = raw_bases(block * B + tl.arange(0, B), True, row, q0, a, head, raw, C, 0)[1]
                if C.V_BITS == 0:
                    _copy((page + C.V[2]).to(raw.key.dtype), C.D, v_at, B, C, B)
                else:
                    _store_v(page, v_at, part - PARTS[0], C)
        elif R > 0:
            i = part - PARTS[0] - PARTS[1]
            n = tl.arange(0, RAW_TOKENS)
            count = tl.minimum(C.RAW, R - i * C.RAW)
            position = (block + 1) * B - R + i * C.RAW + n
            k, v = raw_bases(position, n < count, row, q0, a, head, raw, C, 0)
            tail_id, tail = tail_page(raw, row, block, i, True)
            kept = tail + tail_id * raw.page_stride + head * raw.head_stride
            _copy(kept, raw.token_stride, k, count, C, RAW_TOKENS)
            _copy(kept + C.D, raw.token_stride, v, count, C, RAW_TOKENS)


@triton.jit(do_not_specialize=["num_rows"])
def _store_ring(
    query_start_loc,
    seq_lens,
    num_rows,
    raw,
    num_heads,
    C: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Grid (tokens of the step + rows): all kv heads of a token."""
    row, i = find_row(query_start_loc, num_rows, tl.program_id(0), 1)
    q0, a, b = row_of(query_start_loc, seq_lens, row)
    s = a + i
    if (s < b) & (s >= b - raw.capacity):
        slot = s % raw.capacity
        page = tl.load(raw.table + row * raw.table_row + slot // C.RAW).to(tl.int64)
        to = raw.ring + page * raw.page_stride + slot % C.RAW * raw.token_stride
        token = (q0 + i).to(tl.int64)
        h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, C.DP)[None]
        mask = (h < num_heads) & (d < C.D)
        k = tl.load(raw.key + token * raw.key_token + h * raw.key_head + d, mask=mask, other=0)
        v = tl.load(
            raw.value + token * raw.value_token + h * raw.value_head + d, mask=mask, other=0
        )
        tl.store(to + h * raw.head_stride + d, k, mask=mask)
        tl.store(to + h * raw.head_stride + C.D + d, v, mask=mask)


def store_blocks(
    step: DeviceStep, cache: LayerCache, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Quantize the blocks that this step completes; keep their last R tokens raw.

    As `reference.store_blocks`, for a `DeviceStep`; one launch.
    """
    fmt, constants = cache.fmt, page_constants(cache.fmt)
    k_tokens = 32 if fmt.is_raw else max(fmt.group_size, 128 // fmt.k_bits)
    parts = (B.value // k_tokens, 1 if fmt.is_raw else fmt.head_size // fmt.group_size)
    slots = step.num_tokens // B.value + step.num_reqs
    _store_blocks[(slots, cache.pages.shape[1], sum(parts) + len(cache.tails))](
        step.query_start_loc,
        step.seq_lens,
        step.num_reqs,
        cache.pages,
        *cache.pages.stride()[:2],
        step.block_table,
        step.block_table.stride(0),
        raw_arguments(cache, key, value),
        C=constants,
        R=cache.residual_length,
        PARTS=parts,
        K_TOKENS=k_tokens,
        RAW_TOKENS=triton.next_power_of_2(fmt.raw_tokens),
    )


def store_ring(step: DeviceStep, cache: LayerCache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write the step's last tokens of every request into its ring.

    As `reference.store_ring`, for a `DeviceStep`; one launch.
    """
    num_heads = key.shape[1]
    _store_ring[(step.num_tokens + step.num_reqs,)](
        step.query_start_loc,
        step.seq_lens,
        step.num_reqs,
        raw_arguments(cache, key, value),
        num_heads,
        C=page_constants(cache.fmt),
        HEADS=triton.next_power_of_2(num_heads),
    )
