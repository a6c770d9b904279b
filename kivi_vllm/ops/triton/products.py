"""Matrix products of decode: q·k and sums of p * v, over packed pages and over raw tokens.

Columns of all matrices are queries, N of them. Pages are never dequantized. With
x = code * scale + zero in every group,

    q·k = (q * scale)·codes + q·zero,    sum of p * v = (p * scale)·codes + p·zero,

and codes go into the matrix products as they lie (`codes.codes_of`). So that all
factors fit fp16, q comes divided by its largest number, and V's scales are divided by
the largest of their page and unit, which comes back as an fp32 factor of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi_vllm.ops.triton.codes import (
    codes_of,
    key_units,
    key_words,
    pairs,
    unit_of,
    value_tokens,
    value_words,
)
from kivi_vllm.ops.triton.page import PRECISION
from kivi_vllm.ops.triton.tokens import B


@triton.jit
def _fold(q, page, group, FIELD: tl.constexpr, ODD: tl.constexpr, C: tl.constexpr):
    """q [DP / 2, N], even or odd channels, times the scales of K's groups [n]: [n, DP / 2, N]."""
    return q[None] * _k_field(page, group, FIELD, ODD, C, q.dtype)[:, :, None]


@triton.jit
def _k_field(page, group, FIELD: tl.constexpr, ODD: tl.constexpr, C: tl.constexpr, T: tl.constexpr):
    """Scales or zeros of K's groups [n] in even or odd channels: [n, DP / 2]."""
    d = 2 * tl.arange(0, C.DP // 2) + ODD
    at = (page + FIELD).to(tl.pointer_type(tl.float16)) + group[:, None] * C.D + d[None]
    if C.D == C.DP:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(d < C.D)[None], other=0)
    return x.to(T)


@triton.jit
def packed_scores(page, q_even, q_odd, C: tl.constexpr):
    """q·k [128, N] over a page's K; q [DP / 2, N], the even and odd channels."""
    T: tl.constexpr = q_even.dtype
    N: tl.constexpr = q_even.shape[1]
    PAIRS: tl.constexpr = pairs(C.K_BITS)  # of 32 tokens in a unit
    UNITS: tl.constexpr = key_units(C.K_BITS)
    even = key_words(page + C.K[2], C.K_BITS, C.D, C.DP)
    odd = even >> 8
    unit = tl.arange(0, UNITS)
    group = tl.arange(0, 4) * 32 // C.G
    zero = tl.dot(_k_field(page, group, C.K[1], 0, C, T), q_even, input_precision=PRECISION)
    zero = tl.dot(_k_field(page, group, C.K[1], 1, C, T), q_odd, zero, input_precision=PRECISION)
    parts = ()
    for pair in tl.static_range(PAIRS):
        group = (unit * PAIRS + pair) * 32 // C.G
        x = _fold(q_even, page, group, C.K[0], 0, C)
        y = _fold(q_odd, page, group, C.K[0], 1, C)
        for i in tl.static_range(2 * pair, 2 * pair + 2):
            s = tl.dot(codes_of(even, i, C.K_BITS, T), x, input_precision=PRECISION)
            s = tl.dot(codes_of(odd, i, C.K_BITS, T), y, s, input_precision=PRECISION)
            parts += (s * (1 / unit_of(i, C.K_BITS, T)),)  # [UNITS, 16, N]
    if PAIRS == 2:
        first, second = tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])
    else:
        first, second = parts[0][:, :, :, None], parts[1][:, :, :, None]
    zero = tl.permute(tl.reshape(zero, (UNITS, 1, PAIRS, N)), (0, 1, 3, 2))
    scores = tl.join(first + zero, second + zero)  # [UNITS, 16, N, PAIRS, 2]
    return tl.reshape(tl.permute(scores, (0, 3, 4, 1, 2)), (B, N))


@triton.jit
def _v_field(page, FIELD: tl.constexpr, C: tl.constexpr):
    """Scales or zeros of V's groups, one row for every 32 channels: [DP / 32, 128]."""
    unit = tl.arange(0, C.DP // 32)
    at = (unit * 32 // C.G)[:, None] * B + tl.arange(0, B)[None]
    at += (page + FIELD).to(tl.pointer_type(tl.float16))
    if C.D == C.DP:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=(unit < C.D // 32)[:, None], other=0)
    return x


@triton.jit
def packed_values(page, p, C: tl.constexpr):
    """Sum of p * v over a page's V, p [128, N]: two [DP / 32, 16, N], halves of 32 channels."""
    T: tl.constexpr = p.dtype
    N: tl.constexpr = p.shape[1]
    UNITS: tl.constexpr = C.DP // 32
    PAIRS: tl.constexpr = pairs(C.V_BITS)  # each some of the tokens
    TOKENS: tl.constexpr = value_tokens(C.V_BITS)
    scale = _v_field(page, C.V[0], C).to(tl.float32)
    largest = tl.max(scale, 1)
    scale *= tl.where(largest > 0, 1 / largest, 0.0)[:, None]
    zero = tl.dot(_v_field(page, C.V[1], C).to(T), p, input_precision=PRECISION)[:, None]
    x = p[None] * scale.to(T)[:, :, None]  # [UNITS, 128, N]
    x = tl.reshape(x, (UNITS, PAIRS, TOKENS // 2, 2, N))
    p_even, p_odd = tl.split(tl.permute(x, (0, 2, 4, 1, 3)))  # [UNITS, .., N, PAIRS]
    if PAIRS == 2:
        p_even, p_odd = tl.split(p_even), tl.split(p_odd)
    else:
        SHAPE: tl.constexpr = (UNITS, B // 2, N)
        p_even, p_odd = (tl.reshape(p_even, SHAPE),), (tl.reshape(p_odd, SHAPE),)
    even = value_words(page + C.V[2], C.V_BITS, C.D, C.DP)
    odd = even >> 8
    out = ()
    for side in tl.static_range(2):
        total = tl.zeros((UNITS, 16, N), tl.float32)
        for pair in tl.static_range(PAIRS):
            x = codes_of(even, 2 * pair + side, C.V_BITS, T)
            y = codes_of(odd, 2 * pair + side, C.V_BITS, T)
            part = tl.dot(x, p_even[pair], input_precision=PRECISION)
            part = tl.dot(y, p_odd[pair], part, input_precision=PRECISION)
            total += part * (1 / unit_of(2 * pair + side, C.V_BITS, T))
        out += (total * largest[:, None, None] + zero,)
    return out


@triton.jit
def raw_values(bases, valid, p, C: tl.constexpr):
    """As `packed_values`, over raw tokens at addresses `bases` [n]; p [n, N]."""
    UNITS: tl.constexpr = C.DP // 32
    x = tl.broadcast_to(p[None], (UNITS, p.shape[0], p.shape[1]))
    channel = tl.arange(0, UNITS)[:, None, None] * 32 + tl.arange(0, 16)[None, :, None]
    out = ()
    for side in tl.static_range(2):
        d = channel + 16 * side
        v = tl.load(bases[None, None] + d, mask=valid[None, None] & (d < C.D), other=0)
        out += (tl.dot(v, x, input_precision=PRECISION),)
    return out


@triton.jit
def raw_scores(bases, valid, q, C: tl.constexpr):
    """As `packed_scores`, over raw tokens at addresses `bases` [n]; q [DP, N]."""
    d = tl.arange(0, C.DP)[None]
    k = tl.load(bases[:, None] + d, mask=valid[:, None] & (d < C.D), other=0)
    return tl.dot(k, q, input_precision=PRECISION)
