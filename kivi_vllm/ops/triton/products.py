"""Matrix products of decode: q·k and sums of p * v, over packed pages and over raw tokens.

Columns of all matrices are queries, N of them. Pages are never dequantized: codes go into the
matrix products as they lie (`codes.codes_of`), and what is beside them in a page is folded into
their other side. Of pages of recipe "best", with u_s and u_z the halves of a byte of k_range,

    q·k = (q * step * u_s)·codes + q·low + r * (q * step)·u_z,
    sum of p * v = (p * scale)·codes + (mean - (2^b - 1)/2) * sum of p * scale;

of those of recipe "paper",

    q·k = (q * scale)·codes + q·zero,    sum of p * v = (p * scale)·codes + p·zero.

So that all factors fit fp16, q comes divided by its largest number, and V's scales are divided by
the largest of those that share a product, which comes back as an fp32 factor of the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi_vllm.ops.triton.codes import (
    codes_of,
    key_units,
    key_words,
    low_high,
    pairs,
    top,
    unit_of,
    value_quads,
    value_tokens,
    value_words,
)
from kivi_vllm.ops.triton.page import PRECISION, half_at, zero_step
from kivi_vllm.ops.triton.tokens import B


@triton.jit
def packed_scores(page, q_even, q_odd, factor, C: tl.constexpr):
    """q·k times factor [N]: [128, N], over a page's K; q [DP / 2, N], even and odd channels."""
    T: tl.constexpr = q_even.dtype
    N: tl.constexpr = q_even.shape[1]
    PAIRS: tl.constexpr = pairs(C.K_BITS)  # of 32 tokens in a unit
    UNITS: tl.constexpr = key_units(C.K_BITS)
    SHARED: tl.constexpr = 2 if C.G >= 32 else 1  # slots of a pair that have the same ranges
    even = key_words(page + C.K[-1], 0, UNITS, C.K_BITS, C.D, C.DP)
    odd = even >> 8
    if C.TWO_LEVEL:
        q_even, q_odd, zeros = _two_level_queries(page, q_even, q_odd, C)
    else:
        zeros = _paper_zeros(page, q_even, q_odd, C)
    parts = ()
    for i in tl.static_range(2 * PAIRS):
        if i % SHARED == 0:
            group = (tl.arange(0, UNITS) * (2 * PAIRS) + i) * 16 // C.G
            if C.TWO_LEVEL:
                x, y = _two_level_scales(page, group, C, T)
            else:
                x, y = _k_halves(page, C.K[0], group, C, T)
            x, y = q_even[None] * x[:, :, None], q_odd[None] * y[:, :, None]
        s = tl.dot(codes_of(even, i, C.K_BITS, T), x, input_precision=PRECISION)
        s = tl.dot(codes_of(odd, i, C.K_BITS, T), y, s, input_precision=PRECISION)
        parts += (s * (factor * (1 / unit_of(i, C.K_BITS, T)))[None, None],)  # [UNITS, 16, N]
    if PAIRS == 2:
        first, second = tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3])
    else:
        first, second = parts[0][:, :, :, None], parts[1][:, :, :, None]
    zeros = tl.reshape(zeros * factor[None], (UNITS, PAIRS, 2 // SHARED, N))
    zeros = tl.permute(zeros, (0, 3, 1, 2))[:, None]
    scores = tl.join(first, second) + zeros  # [UNITS, 16, N, PAIRS, 2]
    return tl.reshape(tl.permute(scores, (0, 3, 4, 1, 2)), (B, N))


@triton.jit
def _groups(C: tl.constexpr):
    """K's groups of each 32 tokens, or of 16 where so many are one: [4] or [8]."""
    EACH: tl.constexpr = 32 if C.G >= 32 else 16
    return tl.arange(0, 128 // EACH) * EACH // C.G


@triton.jit
def _k_halves(page, FIELD: tl.constexpr, group, C: tl.constexpr, T: tl.constexpr):
    """Of a fp16 field of K and groups [n], even and odd channels: two of [n, DP / 2]."""
    words = _k_words(page, FIELD, group, C.D // 2, C.DP // 2)
    x, y = low_high(words, tl.float16)
    return x.to(T), y.to(T)


@triton.jit
def _k_words(page, FIELD: tl.constexpr, group, COUNT: tl.constexpr, PADDED: tl.constexpr):
    """Words of a field of K, COUNT of a group: [n, PADDED]."""
    i = tl.arange(0, PADDED)[None]
    at = (page + FIELD).to(tl.pointer_type(tl.int32)) + group[:, None] * COUNT + i
    if COUNT == PADDED:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=i < COUNT, other=0)
    return words


@triton.jit
def _paper_zeros(page, q_even, q_odd, C: tl.constexpr):
    """What zeros add to scores of the tokens of `_groups`: [.., N]."""
    even, odd = _k_halves(page, C.K[1], _groups(C), C, q_even.dtype)
    zeros = tl.dot(even, q_even, input_precision=PRECISION)
    return tl.dot(odd, q_odd, zeros, input_precision=PRECISION)


@triton.jit
def _two_level_queries(page, q_even, q_odd, C: tl.constexpr):
    """q times steps, even and odd channels, and what `_paper_zeros` gives."""
    T: tl.constexpr = q_even.dtype
    group = _groups(C)
    even, odd = _k_halves(page, C.K[1], tl.zeros((1,), tl.int32), C, T)
    x, y = q_even * tl.trans(even), q_odd * tl.trans(odd)
    words = _k_words(page, C.K[2], group, C.D // 4, C.DP // 4)
    zeros = tl.dot(codes_of(words, 1, 4, T), x, input_precision=PRECISION)
    zeros = tl.dot(codes_of(words >> 8, 1, 4, T), y, zeros, input_precision=PRECISION)
    zeros *= zero_step(C.K_BITS) / unit_of(1, 4, T)
    even, odd = _k_halves(page, C.K[0], group * 0, C, T)
    zeros = tl.dot(even, q_even, zeros, input_precision=PRECISION)
    return x, y, tl.dot(odd, q_odd, zeros, input_precision=PRECISION)


@triton.jit
def _two_level_scales(page, group, C: tl.constexpr, T: tl.constexpr):
    """Scales of K's groups [n] in steps, even and odd channels: two of [n, DP / 2]."""
    words = _k_words(page, C.K[2], group, C.D // 4, C.DP // 4)
    # The factor makes normal numbers of them; itself, it would not fit fp16.
    ROOT: tl.constexpr = unit_of(0, 4, T) ** -0.5
    x, y = codes_of(words, 0, 4, T), codes_of(words >> 8, 0, 4, T)
    return x * ROOT * ROOT, y * ROOT * ROOT


@triton.jit
def packed_values(page, p, C: tl.constexpr):
    """Sum of p * v over a page's V, p [128, N]: two [DP / 32, 16, N], halves of 32 channels."""
    T: tl.constexpr = p.dtype
    N: tl.constexpr = p.shape[1]
    UNITS: tl.constexpr = C.DP // 32
    PAIRS: tl.constexpr = pairs(C.V_BITS)  # each some of the tokens
    TOKENS: tl.constexpr = value_tokens(C.V_BITS)
    QUADS: tl.constexpr = value_quads(C.V_BITS)
    even = value_words(page + C.V[-1], 0, QUADS, C.V_BITS, C.D, C.DP)
    if C.TWO_LEVEL:
        even = tl.reshape(even, (UNITS * 16, QUADS))
        p_even, p_odd, largest, zeros = _two_level_weights(page, p, (TOKENS // 2, N), PAIRS, C)
    else:
        x, largest, zeros = _paper_weights(page, p, C)
        p_even, p_odd = _even_odd(x, (UNITS, TOKENS // 2, N), PAIRS)
    odd = even >> 8
    out = ()
    for side in tl.static_range(2):
        total = tl.zeros((UNITS, 16, N), tl.float32)
        for pair in tl.static_range(PAIRS):
            x = codes_of(even, 2 * pair + side, C.V_BITS, T)
            y = codes_of(odd, 2 * pair + side, C.V_BITS, T)
            part = tl.dot(x, p_even[pair], input_precision=PRECISION)
            part = tl.dot(y, p_odd[pair], part, input_precision=PRECISION)
            part = tl.reshape(part, (UNITS, 16, N))
            total += part * (1 / unit_of(2 * pair + side, C.V_BITS, T))
        out += (total * largest + zeros[side],)
    return out


@triton.jit
def _even_odd(x, SHAPE: tl.constexpr, PAIRS: tl.constexpr):
    """x [n, 128, N] of the even and odd tokens of each pair of slots, of SHAPE: two tuples."""
    N: tl.constexpr = x.shape[2]
    x = tl.reshape(x, (x.shape[0], PAIRS, B // PAIRS // 2, 2, N))
    even, odd = tl.split(tl.permute(x, (0, 2, 4, 1, 3)))  # [n, .., N, PAIRS]
    if PAIRS == 2:
        even, odd = tl.split(even), tl.split(odd)
        even = tl.reshape(even[0], SHAPE), tl.reshape(even[1], SHAPE)
        odd = tl.reshape(odd[0], SHAPE), tl.reshape(odd[1], SHAPE)
    else:
        even, odd = (tl.reshape(even, SHAPE),), (tl.reshape(odd, SHAPE),)
    return even, odd


@triton.jit
def _inverse(largest):
    """1 / largest, or 0."""
    return tl.where(largest > 0, 1 / largest, 0.0)


@triton.jit
def _paper_weights(page, p, C: tl.constexpr):
    """p times scales, for every 32 channels [DP / 32, 128, N], and what to make of products.

    These are to be multiplied by the second, and the third, of each half, is to be added.
    """
    T: tl.constexpr = p.dtype
    unit = tl.arange(0, C.DP // 32)[:, None]
    at, mask = unit * 32 // C.G * B + tl.arange(0, B)[None], unit < C.D // 32
    scale = half_at(page, C.V[0], at, mask, C)
    largest = tl.max(scale, 1)
    scale *= _inverse(largest)[:, None]
    zeros = half_at(page, C.V[1], at, mask, C).to(T)
    zeros = tl.dot(zeros, p, input_precision=PRECISION)[:, None]
    return p[None] * scale.to(T)[:, :, None], largest[:, None, None], (zeros, zeros)


@triton.jit
def _two_level_weights(page, p, SHAPE: tl.constexpr, PAIRS: tl.constexpr, C: tl.constexpr):
    """p times scales, of even and odd tokens as `_even_odd` has them, and as `_paper_weights`."""
    words = tl.load((page + C.V[1]).to(tl.pointer_type(tl.int32)) + tl.arange(0, B // 2))
    even, odd = low_high(words, tl.float16)
    largest = tl.max(tl.maximum(even, odd).to(tl.float32), 0)
    inverse = _inverse(largest)
    even = (even.to(tl.float32) * inverse).to(p.dtype)
    odd = (odd.to(tl.float32) * inverse).to(p.dtype)
    x = tl.reshape(p, (B // 2, 2, p.shape[1]))
    x, y = tl.split(tl.permute(x, (0, 2, 1)))
    x, y = x * even[:, None], y * odd[:, None]
    total = tl.sum(x.to(tl.float32) + y.to(tl.float32), 0) * largest
    x, y = _by_pair(x, SHAPE, PAIRS), _by_pair(y, SHAPE, PAIRS)
    words = _k_words(page, C.V[0], tl.zeros((1,), tl.int32), C.D // 2, C.DP // 2)
    first, second = low_high(words, tl.float16)
    means = tl.reshape(tl.join(first, second), (C.DP // 32, 2, 16)).to(tl.float32)
    first, second = tl.split(tl.permute(means - top(C.V_BITS) / 2, (0, 2, 1)))
    total = total[None, None]
    return x, y, largest, (first[:, :, None] * total, second[:, :, None] * total)


@triton.jit
def _by_pair(x, SHAPE: tl.constexpr, PAIRS: tl.constexpr):
    """x [64, N] of the tokens of each pair of slots, of SHAPE: a tuple."""
    if PAIRS == 2:
        x = tl.split(tl.permute(tl.reshape(x, (2, SHAPE[0], SHAPE[1])), (1, 2, 0)))
    else:
        x = (x,)
    return x


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
