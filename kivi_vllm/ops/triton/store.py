"""Storing: completed blocks are quantized into pages, the step's last tokens go into the ring.

Two launches a layer, before and after attention (`reference` says why). A program of
`_store_blocks` makes one part of one block of one kv head: some groups of K, some of V,
the tokens that one tail keeps, or the sinks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kivi_vllm.ops.step import DeviceStep, LayerCache
from kivi_vllm.ops.triton.codec import codes, quantize, rotate
from kivi_vllm.ops.triton.codes import key_tokens, store_keys, store_values, tokens_of
from kivi_vllm.ops.triton.page import PageConstants, page_constants
from kivi_vllm.ops.triton.tokens import (
    B,
    find_row,
    raw_arguments,
    raw_bases,
    row_of,
    sinks_page,
    tail_page,
)


@triton.jit
def _store_k(page, bases, part, run, C: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Part `part` of a page's K, at addresses `bases` [TOKENS]; run `run` of WIDTH channels."""
    GROUPS: tl.constexpr = TOKENS // C.G
    d = run * WIDTH + tl.arange(0, WIDTH)
    live = d < C.D
    # `fit` has much to do for every group, so a thread should have few of them, not the eight
    # of as many neighbours: told that they are none, the compiler deals the channels out singly.
    own = tl.max_contiguous(d, 1) if C.CLIP else d
    x = tl.load(bases[:, None] + own[None], mask=live[None], other=0).to(tl.float32)
    x = tl.reshape(x, (GROUPS, C.G, WIDTH))
    scale, zero = quantize(x, 1, C.K_BITS, C.CLIP)  # [GROUPS, WIDTH]
    at = (part * GROUPS + tl.arange(0, GROUPS))[:, None] * C.D + d[None]
    tl.store((page + C.K[0]).to(tl.pointer_type(tl.float16)) + at, scale, mask=live[None])
    tl.store((page + C.K[1]).to(tl.pointer_type(tl.float16)) + at, zero, mask=live[None])
    c = codes(x, scale[:, None], zero[:, None], C.K_BITS)
    c = tl.reshape(c, (TOKENS, WIDTH))
    store_keys(page + C.K[2], c, part, d, live, C.K_BITS, C.D)


@triton.jit
def _store_v(page, bases, part, run, C: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr):
    """Part `part` (`tokens_of`) of a page's V, at addresses `bases` [TOKENS]; likewise."""
    GROUPS: tl.constexpr = WIDTH // C.G
    channel = run * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(bases[None] + channel[:, None]).to(tl.float32)
    if C.RUN > 0:
        x = rotate(x, C.RUN, TOKENS, False)
    x = tl.reshape(x, (GROUPS, C.G, TOKENS))
    scale, zero = quantize(x, 1, C.V_BITS, C.CLIP)  # [GROUPS, TOKENS]
    at = (run * GROUPS + tl.arange(0, GROUPS))[:, None] * B + tokens_of(part, C.V_BITS, TOKENS)[
        None
    ]
    tl.store((page + C.V[0]).to(tl.pointer_type(tl.float16)) + at, scale)
    tl.store((page + C.V[1]).to(tl.pointer_type(tl.float16)) + at, zero)
    c = codes(x, scale[:, None], zero[:, None], C.V_BITS)
    c = tl.reshape(c, (WIDTH, TOKENS))
    store_values(page + C.V[2], c, part, run, C.V_BITS)


@triton.jit
def _copy(to, stride, bases, count, C: tl.constexpr, N: tl.constexpr):
    """The first `count` of N tokens at addresses `bases` [N] go to `to`, `stride` apart."""
    n, d = tl.arange(0, N)[:, None], tl.arange(0, C.DP)[None]
    mask = (n < count) & (d < C.D)
    tl.store(to + n * stride + d, tl.load(bases[:, None] + d, mask=mask, other=0), mask=mask)


@triton.jit
def _keep(to, position, count, row, q0, a, head, raw, C: tl.constexpr, N: tl.constexpr):
    """The first `count` of N tokens from `position` on go to a full-precision page at `to`."""
    n = tl.arange(0, N)
    k, v = raw_bases(position + n, n < count, row, q0, a, head, raw, C, 0)
    _copy(to, raw.token_stride, k, count, C, N)
    _copy(to + C.D, raw.token_stride, v, count, C, N)


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
    K: tl.constexpr,
    V: tl.constexpr,
    RAW_TOKENS: tl.constexpr,
):
    """Grid (blocks that the step may complete, num_kv_heads, K parts + V parts + tails + sinks).

    PARTS: how many of K, V, and tails. K, V: (tokens, channels) of one part of theirs.
    """
    row, j = find_row(query_start_loc, num_rows, tl.program_id(0), B)
    head, part = tl.program_id(1), tl.program_id(2)
    q0, a, b = row_of(query_start_loc, seq_lens, row)
    block = a // B + j
    if (a < b) & (block < b // B):
        if part < PARTS[0] + PARTS[1]:
            page = tl.load(table + row * table_row + block).to(tl.int64)
            page = pages + page * page_block + head * page_head
            if part < PARTS[0]:
                run, part = part // (B // K[0]), part % (B // K[0])
                s = block * B + part * K[0] + tl.arange(0, K[0])
                if C.SINKS > 0:  # no part in the ranges: the next ones stand in for them
                    s = tl.where(s < C.SINKS, s + C.SINKS, s)
                k_at = raw_bases(s, True, row, q0, a, head, raw, C, 0)[0]
                if C.PACKED:
                    _store_k(page, k_at, part, run, C, K[0], K[1])
                else:
                    to = (page + C.K[2]).to(raw.key.dtype) + part * K[0] * C.D
                    _copy(to, C.D, k_at, K[0], C, K[0])
            else:
                part -= PARTS[0]
                run, part = part // (B // V[0]), part % (B // V[0])
                position = block * B + tokens_of(part, C.V_BITS, V[0])
                v_at = raw_bases(position, True, row, q0, a, head, raw, C, 0)[1]
                if C.PACKED:
                    _store_v(page, v_at, part, run, C, V[0], V[1])
                else:
                    _copy((page + C.V[2]).to(raw.key.dtype), C.D, v_at, B, C, B)
        elif part < PARTS[0] + PARTS[1] + PARTS[2]:
            if R > 0:
                i = part - PARTS[0] - PARTS[1]
                tail_id, tail = tail_page(raw, row, block, i, True)
                if tail_id != 0:  # vLLM's null page
                    to = tail + tail_id * raw.page_stride + head * raw.head_stride
                    start = (block + 1) * B - R + i * C.RAW
                    count = tl.minimum(C.RAW, R - i * C.RAW)
                    _keep(to, start, count, row, q0, a, head, raw, C, RAW_TOKENS)
        elif C.SINKS > 0:  # noqa: SIM102 - known when it is compiled
            if block == 0:
                to = sinks_page(raw, row, head, True)
                _keep(to, 0, C.SINKS, row, q0, a, head, raw, C, RAW_TOKENS)


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
        page = tl.load(raw.table + row * raw.table_row + s // C.RAW).to(tl.int64)
        to = raw.ring + page * raw.page_stride + s % C.RAW * raw.token_stride
        token = (q0 + i).to(tl.int64)
        h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, C.DP)[None]
        mask = (h < num_heads) & (d < C.D)
        k = tl.load(raw.key + token * raw.key_token + h * raw.key_head + d, mask=mask, other=0)
        v = tl.load(
            raw.value + token * raw.value_token + h * raw.value_head + d, mask=mask, other=0
        )
        tl.store(to + h * raw.head_stride + d, k, mask=mask)
        tl.store(to + h * raw.head_stride + C.D + d, v, mask=mask)


def _parts(c: PageConstants) -> tuple[tuple[int, int], tuple[int, int]]:
    """(tokens, channels) of K and of V that a program of `_store_blocks` takes."""
    if not c.PACKED:
        return (32, c.DP), (B.value, c.DP)
    k_tokens, v_width = max(c.G, key_tokens(c.K_BITS)), max(c.G, c.RUN)
    if c.CLIP or c.RUN:  # more is done with every number: so many numbers fit the registers
        return (k_tokens, min(c.DP, 4096 // k_tokens)), (min(B.value, 4096 // v_width), v_width)
    return (k_tokens, c.DP), (B.value, v_width)


def store_blocks(
    step: DeviceStep, cache: LayerCache, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Quantize the blocks that this step completes; keep their last R tokens raw.

    As `reference.store_blocks`, for a `DeviceStep`; one launch.
    """
    fmt, constants = cache.fmt, page_constants(cache.fmt)
    k, v = _parts(constants)
    parts = [B.value // tokens * -(-fmt.head_size // width) for tokens, width in (k, v)]
    parts.append(len(cache.tails))
    slots = step.num_tokens // B.value + step.num_reqs
    _store_blocks[(slots, cache.pages.shape[1], sum(parts) + (fmt.sink_tokens > 0))](
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
        PARTS=tuple(parts),
        K=k,
        V=v,
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
        step.decode_len,
        raw_arguments(cache, key, value),
        num_heads,
        C=page_constants(cache.fmt),
        HEADS=triton.next_power_of_2(num_heads),
    )
