"""Storing completed blocks: they are quantized into pages, and their tails and sinks are kept.

One launch a layer, before attention (`reference` says why). A program of `_store_blocks` makes one
part of one block of one kv head: some of K, some of V, the tokens that one tail keeps, or the
sinks. Under recipe "best", K's parts are channels, and V is one part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kivi_vllm.ops.step import DeviceStep, LayerCache
from kivi_vllm.ops.triton.codec import (
    codes,
    encode_keys,
    encode_values,
    gaussian,
    in_steps,
    mean_of,
    placed,
    quantize,
    rotate,
)
from kivi_vllm.ops.triton.codes import key_tokens, store_keys, store_values, tokens_of
from kivi_vllm.ops.triton.page import PageConstants, page_constants
from kivi_vllm.ops.triton.tokens import (
    B,
    find_row,
    page_of,
    pages_arguments,
    raw_arguments,
    raw_bases,
    row_of,
    sinks_page,
    tail_page,
)


@triton.jit
def _half_field(page, FIELD: tl.constexpr):
    return (page + FIELD).to(tl.pointer_type(tl.float16))


@triton.jit
def _paper_k(page, bases, part, C: tl.constexpr, TOKENS: tl.constexpr):
    """Part `part` of a page's K, at addresses `bases` [TOKENS]."""
    GROUPS: tl.constexpr = TOKENS // C.G
    d = tl.arange(0, C.DP)
    live = d < C.D
    x = tl.load(bases[:, None] + d[None], mask=live[None], other=0).to(tl.float32)
    x = tl.reshape(x, (GROUPS, C.G, C.DP))
    scale, zero = quantize(x, 1, C.K_BITS)  # [GROUPS, DP]
    at = (part * GROUPS + tl.arange(0, GROUPS))[:, None] * C.D + d[None]
    tl.store(_half_field(page, C.K[0]) + at, scale, mask=live[None])
    tl.store(_half_field(page, C.K[1]) + at, zero, mask=live[None])
    c = tl.reshape(codes(x, scale[:, None], zero[:, None], C.K_BITS), (TOKENS, C.DP))
    store_keys(page + C.K[-1], c, part, d, live, C.K_BITS, C.D)


@triton.jit
def _paper_v(page, bases, run, C: tl.constexpr, WIDTH: tl.constexpr):
    """Run `run` of the channels of a page's V, at addresses `bases` [128]; likewise."""
    GROUPS: tl.constexpr = WIDTH // C.G
    channel = run * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(bases[None] + channel[:, None]).to(tl.float32)
    x = tl.reshape(x, (GROUPS, C.G, B))
    scale, zero = quantize(x, 1, C.V_BITS)  # [GROUPS, 128]
    at = (run * GROUPS + tl.arange(0, GROUPS))[:, None] * B + tl.arange(0, B)[None]
    tl.store(_half_field(page, C.V[0]) + at, scale)
    tl.store(_half_field(page, C.V[1]) + at, zero)
    c = tl.reshape(codes(x, scale[:, None], zero[:, None], C.V_BITS), (WIDTH, B))
    store_values(page + C.V[-1], c, 0, run, C.V_BITS, C.D)


@triton.jit
def _best_k(page, bases, run, C: tl.constexpr, WIDTH: tl.constexpr):
    """Run `run` of the channels of a page's K, at addresses `bases` [128]."""
    GROUPS: tl.constexpr = B // C.G
    d = run * WIDTH + tl.arange(0, WIDTH)
    live = d < C.D
    # `fit` has much to do for every group, so a thread should have few of them, not the eight
    # of as many neighbours: told that they are none, the compiler deals the channels out singly.
    own = tl.max_contiguous(d, 1)
    x = tl.load(bases[:, None] + own[None], mask=live[None], other=0).to(tl.float32)
    c, low, step, ranges = encode_keys(tl.reshape(x, (GROUPS, C.G, WIDTH)), C.K_BITS)
    tl.store(_half_field(page, C.K[0]) + d, low, mask=live)
    tl.store(_half_field(page, C.K[1]) + d, step, mask=live)
    at = tl.arange(0, GROUPS)[:, None] * C.D + d[None]
    tl.store(page + C.K[2] + at, ranges.to(tl.uint8), mask=live[None])
    c = tl.reshape(c, (B, WIDTH))
    store_keys(page + C.K[-1], c, 0, d, live, C.K_BITS, C.D)


@triton.jit
def _rotated(start, part, row, q0, a, head, raw, C: tl.constexpr, TOKENS: tl.constexpr):
    """The tokens `tokens_of(part)` of the block from position `start` on: [DP, TOKENS], rotated."""
    s = start + tokens_of(part, C.V_BITS, TOKENS)
    bases = raw_bases(s, True, row, q0, a, head, raw, C, 0)[1]
    d = tl.arange(0, C.DP)[:, None]
    x = tl.load(bases[None] + d, mask=d < C.D, other=0).to(tl.float32)
    return rotate(x, C.RUN, TOKENS, False)


@triton.jit
def _best_v(page, start, row, q0, a, head, raw, C: tl.constexpr, TOKENS: tl.constexpr):
    """A page's V, TOKENS at a time: the mean of all comes first, then codes."""
    PARTS: tl.constexpr = B // TOKENS
    d = tl.arange(0, C.DP)
    live = d < C.D
    sinks = tl.where(start == 0, C.SINKS, 0)
    total = tl.zeros(d.shape, tl.float32)
    for part in range(PARTS):
        x = _rotated(start, part, row, q0, a, head, raw, C, TOKENS)
        u, _, good, _ = in_steps(x)
        counted = tokens_of(part, C.V_BITS, TOKENS) >= sinks
        y = placed(u, gaussian(u, good, C.V_BITS, C.D)[1])
        total += tl.sum(tl.where(counted[None], y, 0.0), 1)
    mean, smaller = mean_of(total, -(sinks - B).to(tl.float32), C.V_BITS, C.D)
    tl.store(_half_field(page, C.V[0]) + d, mean, mask=live)
    for part in range(PARTS):
        x = _rotated(start, part, row, q0, a, head, raw, C, TOKENS)
        c, scale = encode_values(x, mean, smaller, live[:, None], C.V_BITS, C.D)
        token = tokens_of(part, C.V_BITS, TOKENS)
        tl.store(_half_field(page, C.V[1]) + token, scale)
        store_values(page + C.V[-1], c, part, 0, C.V_BITS, C.D)
    END: tl.constexpr = C.V[-1] + 16 * C.D * C.V_BITS
    if END < C.BYTES:
        at = END + tl.arange(0, B)
        tl.store(page + at, tl.zeros((B,), tl.uint8), mask=at < C.BYTES)


@triton.jit
def _copy(to, stride, bases, count, C: tl.constexpr, N: tl.constexpr):
    """The first `count` of N tokens at addresses `bases` [N] go to `to`, `stride` apart."""
    n, d = tl.arange(0, N)[:, None], tl.arange(0, C.DP)[None]
    mask = (n < count) & (d < C.D)
    tl.store(to + n * stride + d, tl.load(bases[:, None] + d, mask=mask, other=0), mask=mask)


@triton.jit
def _keep(to, stride, position, count, row, q0, a, head, raw, C: tl.constexpr, N: tl.constexpr):
    """`count` tokens from `position` on, N at a time, go to a page at `to`, `stride` apart."""
    for first in range(0, count, N):
        n = first + tl.arange(0, N)
        k, v = raw_bases(position + n, n < count, row, q0, a, head, raw, C, 0)
        _copy(to + first * stride, stride, k, count - first, C, N)
        _copy(to + first * stride + C.D, stride, v, count - first, C, N)


@triton.jit
def _quantize(
    page,
    block,
    part,
    row,
    q0,
    a,
    head,
    raw,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    """One part of K or V of a page; see `_store_blocks`."""
    if part < PARTS[0]:
        run, part = part // (B // K[0]), part % (B // K[0])
        s = block * B + part * K[0] + tl.arange(0, K[0])
        if C.SINKS > 0:  # no part in the ranges: the next ones stand in for them
            s = tl.where(s < C.SINKS, s + C.SINKS, s)
        k_at = raw_bases(s, True, row, q0, a, head, raw, C, 0)[0]
        if C.TWO_LEVEL:
            _best_k(page, k_at, run, C, K[1])
        elif C.PACKED:
            _paper_k(page, k_at, part, C, K[0])
        else:
            to = (page + C.K[-1]).to(raw.key.dtype) + part * K[0] * C.D
            _copy(to, C.D, k_at, K[0], C, K[0])
    elif C.TWO_LEVEL:
        _best_v(page, block * B, row, q0, a, head, raw, C, V[0])
    else:
        position = block * B + tl.arange(0, B)
        v_at = raw_bases(position, True, row, q0, a, head, raw, C, 0)[1]
        if C.PACKED:
            _paper_v(page, v_at, part - PARTS[0], C, V[1])
        else:
            _copy((page + C.V[-1]).to(raw.key.dtype), C.D, v_at, B, C, B)


@triton.jit(do_not_specialize=["num_rows"])
def _store_blocks(
    query_start_loc,
    seq_lens,
    num_rows,
    paged,
    raw,
    C: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KEPT: tl.constexpr,
):
    """Grid (blocks that the step may complete, num_kv_heads, K parts + V parts + tails + sinks).

    PARTS: how many of K, V, and tails. K, V: (tokens, channels) of one part of theirs. KEPT: tokens
    of a tail or of the sinks at a time.
    """
    row, j = find_row(query_start_loc, num_rows, tl.program_id(0), B)
    head, part = tl.program_id(1), tl.program_id(2)
    q0, a, b = row_of(query_start_loc, seq_lens, row)
    block = a // B + j
    if (a < b) & (block < b // B):
        if part < PARTS[0] + PARTS[1]:
            held, page = page_of(paged, row, block, head, C)
            if held != 0:
                _quantize(page, block, part, row, q0, a, head, raw, C, PARTS, K, V)
        elif part < PARTS[0] + PARTS[1] + PARTS[2]:
            if R > 0:
                i = part - PARTS[0] - PARTS[1]
                held, to = tail_page(raw, row, block, head, i, True)
                if held != 0:
                    start = (block + 1) * B - R + i * C.TAIL
                    count = tl.minimum(C.TAIL, R - i * C.TAIL)
                    _keep(to, raw.tails_token, start, count, row, q0, a, head, raw, C, KEPT)
        elif C.SINKS > 0:  # noqa: SIM102 - known when it is compiled
            if block == 0:
                held, to = sinks_page(raw, row, head, True)
                if held != 0:
                    _keep(to, raw.sinks_token, 0, C.SINKS, row, q0, a, head, raw, C, KEPT)


def _parts(c: PageConstants) -> tuple[tuple[int, int], tuple[int, int]]:
    """(tokens, channels) of K and of V that a program of `_store_blocks` takes; V's at a time."""
    if not c.PACKED:
        return (32, c.DP), (B.value, c.DP)
    if c.TWO_LEVEL:  # more is done with every number: so many numbers fit the registers
        return (B.value, 4096 // B.value), (4096 // c.DP, c.DP)
    return (max(c.G, key_tokens(c.K_BITS)), c.DP), (B.value, c.G)


def store_blocks(
    step: DeviceStep, cache: LayerCache, key: torch.Tensor, value: torch.Tensor
) -> None:
    """Quantize the blocks that this step completes; keep their last R tokens raw.

    As `reference.store_blocks`, for a `DeviceStep`; one launch.
    """
    fmt, residual, constants = cache.fmt, cache.residual_length, page_constants(cache)
    k, v = _parts(constants)
    parts = [B.value // k[0] * -(-fmt.head_size // k[1]), -(-fmt.head_size // v[1])]
    parts.append(len(cache.tails))
    slots = step.num_tokens // B.value + step.num_reqs
    _store_blocks[(slots, cache.num_kv_heads, sum(parts) + (fmt.sink_tokens > 0))](
        step.query_start_loc,
        step.seq_lens,
        step.num_reqs,
        pages_arguments(step, cache),
        raw_arguments(cache, key, value),
        C=constants,
        R=residual,
        PARTS=tuple(parts),
        K=k,
        V=v,
        KEPT=16 if constants.DP > 128 else 32,
    )
