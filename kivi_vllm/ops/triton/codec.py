"""`kivi_vllm.ops.codec` on the device, to the bit: ranges, codes, and the rotation of values.

All products are exact, or cut to a range before they are added to anything, so that nothing
changes where the compiler fuses products into sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi_vllm.ops import two_level
from kivi_vllm.ops.paper import FP16_MAX as MAX
from kivi_vllm.ops.triton.codes import gauss_step, top, zero_step

FP16_MAX: tl.constexpr = tl.constexpr(MAX)
FIT_STEPS: tl.constexpr = tl.constexpr(two_level.FIT_STEPS)
FIT_ROUNDS: tl.constexpr = tl.constexpr(two_level.FIT_ROUNDS)
LEVELS: tl.constexpr = tl.constexpr(two_level.LEVELS)
LIMIT: tl.constexpr = tl.constexpr(two_level.LIMIT)
MOST_SCALE: tl.constexpr = tl.constexpr(two_level.MOST_SCALE)
MEAN_STEPS: tl.constexpr = tl.constexpr(two_level.MEAN_STEPS)
MOMENT_STEPS: tl.constexpr = tl.constexpr(two_level.MOMENT_STEPS)
SPARE_POWER: tl.constexpr = tl.constexpr(two_level.SPARE_POWER)
ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds half to even


@triton.jit
def _whole(y, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The whole numbers next to y, half to even, that are LOW to HIGH."""
    return (tl.minimum(tl.maximum(y, LOW), HIGH) + ROUND) - ROUND


@triton.jit
def _quotient(x, y):
    """x / y, rounded correctly; y is broadcast to x."""
    return tl.div_rn(x, tl.broadcast_to(y, x.shape))


@triton.jit
def _part_of(x, N: tl.constexpr):
    """x / N, likewise."""
    return tl.div_rn(x, tl.full(x.shape, N, tl.float32))


@triton.jit
def _inverse(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


# --------------------------------------------------------------- recipe "paper"


@triton.jit
def quantize(x, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Scale and zero, fp16, of the groups along AXIS of x."""
    bad = tl.max((x != x).to(tl.int32), AXIS) > 0
    zero, _, scale = _span(x, AXIS, BITS)
    zero = tl.minimum(tl.maximum(zero, -FP16_MAX), FP16_MAX)
    scale = tl.minimum(scale, FP16_MAX)
    nan = float("nan")
    return tl.where(bad, nan, scale).to(tl.float16), tl.where(bad, nan, zero).to(tl.float16)


@triton.jit
def codes(x, scale, zero, BITS: tl.constexpr):
    """Codes, int32, of x, with the scale and zero (fp16) of its groups."""
    s, z = scale.to(tl.float32), zero.to(tl.float32)
    good = s > 0  # neither 0 nor NaN
    y = _quotient(x - z, tl.where(good, s, 1.0))
    return tl.where(good, _whole(y, 0, top(BITS)), 0.0).to(tl.int32)


@triton.jit
def _span(x, AXIS: tl.constexpr, BITS: tl.constexpr):
    """Of the groups along AXIS of x: least number, span, and the scale of the whole span."""
    low, high = tl.min(x, AXIS), tl.max(x, AXIS)
    spread = tl.where(high == low, 0.0, high - low)
    return low, spread, _part_of(spread, top(BITS))


# ---------------------------------------------------------------- recipe "best"


@triton.jit
def encode_keys(x, BITS: tl.constexpr):
    """`two_level.encode_keys` of whole channels x [groups, G, n].

    Codes int32, shape of x; low and step fp16 [n]; ranges int32 [groups, n].
    """
    TOP: tl.constexpr = top(BITS)
    R: tl.constexpr = zero_step(BITS)
    bad = tl.max(tl.max((x != x).to(tl.int32), 1), 0) > 0
    scale, zero = _fit(x, BITS)
    scale = tl.minimum(scale, MOST_SCALE)
    zero = tl.minimum(tl.maximum(zero, -FP16_MAX), FP16_MAX)
    low = tl.min(zero, 0).to(tl.float16)
    start = low.to(tl.float32)[None]
    step = _part_of(tl.max(scale, 0), LEVELS)
    step = tl.maximum(step, _part_of(tl.max(zero - start, 0), LEVELS * R))
    step = tl.maximum(step, 2.0**-24).to(tl.float16)  # not 0
    unit = step.to(tl.float32)[None]
    u = _whole(_quotient(scale, unit), 1, LEVELS)
    middle = zero.to(tl.float64) + scale.to(tl.float64) * (TOP / 2)
    middle = middle - (u * unit).to(tl.float64) * (TOP / 2) - start.to(tl.float64)
    z = _whole(_quotient(middle.to(tl.float32), unit * R), 0, LEVELS)
    scale, zero = u * unit, start + z * (unit * R)
    c = _whole((x - zero[:, None]) * _inverse(scale)[:, None], 0, TOP)
    c = tl.where(bad[None, None], 0.0, c).to(tl.int32)
    ranges = tl.where(bad[None], 0.0, u + 16 * z).to(tl.int32)
    return c, tl.where(bad, float("nan"), low), tl.where(bad, 0.0, step), ranges


@triton.jit
def _fit(x, BITS: tl.constexpr):
    """`two_level.fit` along axis 1: sums of whole numbers, exact in any order; fp64 quotients."""
    TOP: tl.constexpr = top(BITS)
    low, spread, scale = _span(x, 1, BITS)
    good = (spread > 1e-6) & (spread < FP16_MAX)
    span = tl.where(good, spread, 1.0)
    steps = tl.full(span.shape, FIT_STEPS, tl.float32)
    u = (x - low[:, None]) * tl.div_rn(steps, span)[:, None]
    u = _whole(u, 0, FIT_STEPS)
    far = 2 * u - FIT_STEPS  # from the middle of the span
    weight = 1 + ((far * far * 2.0**-18 + ROUND) - ROUND)
    n, total = tl.sum(weight, 1).to(tl.float64), tl.sum(weight * u, 1).to(tl.float64)
    slope, start = tl.full(span.shape, FIT_STEPS / TOP, tl.float32), tl.zeros_like(span)
    for _ in tl.static_range(FIT_ROUNDS):
        c = _whole((u - start[:, None]) * _inverse(slope)[:, None], 0, TOP)
        wc = weight * c
        c1, c2 = tl.sum(wc, 1).to(tl.float64), tl.sum(wc * c, 1).to(tl.float64)
        cu = tl.sum(wc * u, 1).to(tl.float64)
        d = n * c2 - c1 * c1
        several = d > 0
        d = tl.where(several, d, 1.0)
        slope = tl.where(several, ((n * cu - c1 * total) / d).to(tl.float32), slope)
        start = tl.where(several, ((total * c2 - c1 * cu) / d).to(tl.float32), start)
    step = tl.div_rn(span, steps)
    zero = (low.to(tl.float64) + start.to(tl.float64) * step.to(tl.float64)).to(tl.float32)
    return tl.where(good, slope * step, scale), tl.where(good, zero, low)


@triton.jit
def in_steps(x):
    """Tokens x [D, n] in whole parts of their largest number: fp32 [D, n].

    With it, for each token, its largest number, or 1, whether it has one to be measured by,
    and whether it is finite.
    """
    nan = tl.max((x != x).to(tl.int32), 0) > 0
    size = tl.max(tl.abs(x), 0)
    finite = (size < float("inf")) & ~nan
    good = finite & (size > 2.0**-60)
    size = tl.where(good, size, 1.0)
    factor = tl.div_rn(tl.full(size.shape, FIT_STEPS, tl.float32), size)
    u = _whole(x * factor[None], -FIT_STEPS, FIT_STEPS)
    return tl.where(good[None], u, 0.0), size, good, finite


@triton.jit
def gaussian(u, good, BITS: tl.constexpr, D: tl.constexpr):
    """Power of tokens u [D, n], and the scale that a Gaussian of it would have: fp32 [n]."""
    whole = u.to(tl.int32)  # sums do not fit fp32
    power = tl.sum(whole * whole, 0).to(tl.float32)
    return power, tl.where(good, tl.sqrt_rn(power) * (gauss_step(BITS) / D**0.5), 1.0)


@triton.jit
def placed(u, scale):
    """Tokens u [D, n] in whole parts of a code."""
    factor = tl.div_rn(tl.full(scale.shape, MEAN_STEPS, tl.float32), scale)
    return _whole(u * factor[None], -LIMIT, LIMIT)


@triton.jit
def mean_of(total, counted, BITS: tl.constexpr, D: tl.constexpr):
    """From sums [D] of so many `placed` tokens: the mean, fp16, and what makes scales smaller."""
    m = _quotient(total, counted * (MEAN_STEPS * 1.0))
    parts = _whole(m * MOMENT_STEPS, -LIMIT, LIMIT).to(tl.int32)
    taken = tl.sum(parts * parts, 0).to(tl.float32)
    taken *= gauss_step(BITS) * gauss_step(BITS) / (MOMENT_STEPS * MOMENT_STEPS * D)
    left = (1 - tl.minimum(taken, 15 / 16)) * SPARE_POWER
    smaller = tl.sqrt_rn(tl.minimum(left, 1.0))
    return _quotient(m, smaller).to(tl.float16), smaller


@triton.jit
def encode_values(x, mean, smaller, live, BITS: tl.constexpr, D: tl.constexpr):
    """Codes int32 and scale fp16 [n] of tokens x [D, n], with what `mean_of` gives.

    live: which of the channels there are.
    """
    TOP: tl.constexpr = top(BITS)
    u, size, good, finite = in_steps(x)
    power, scale = gaussian(u, good, BITS, D)
    first = scale * smaller
    scale = first
    m = mean.to(tl.float32)[:, None]
    at = _whole(m * MEAN_STEPS, -LIMIT, LIMIT) - MEAN_STEPS * TOP / 2
    coarse = _whole(m * MOMENT_STEPS, -LIMIT, LIMIT) - MOMENT_STEPS * TOP / 2
    for _ in tl.static_range(FIT_ROUNDS):
        along, square = _moments(u, scale, at, coarse, live, TOP)
        fitted = tl.div_rn(along * MOMENT_STEPS, tl.where(square > 0, square, 1.0))
        scale = tl.where((along > 0) & (square > 0), fitted, scale)
        scale = tl.minimum(tl.maximum(scale, first / 4), first * 4)
    along = _moments(u, scale, at, coarse, live, TOP)[0] * scale
    ratio = tl.div_rn(power * MOMENT_STEPS, tl.where(along > 0, along, 1.0))
    longer = tl.minimum(tl.maximum(tl.where(along > 0, ratio, 1.0), 1.0), 1.5)
    scale = scale * longer * _part_of(size, FIT_STEPS)
    half = tl.where(good, tl.minimum(scale, FP16_MAX), 0.0).to(tl.float16)
    half = tl.where(finite, half, float("nan"))
    s = half.to(tl.float32)
    inverse = tl.where(s > 0, _inverse(tl.where(s > 0, s, 1.0)), 0.0)
    y = tl.minimum(tl.maximum(x * inverse[None], -LIMIT), LIMIT) - (m - TOP / 2)
    return tl.where((s > 0)[None], _whole(y, 0, TOP), 0.0).to(tl.int32), half


@triton.jit
def _moments(u, scale, at, coarse, live, TOP: tl.constexpr):
    """Sums over a token of u times what its codes stand for, and of the square of that."""
    c = _whole((placed(u, scale) - at) * (1 / MEAN_STEPS), 0, TOP)
    q = tl.where(live, MOMENT_STEPS * c + coarse, 0.0).to(tl.int32)
    along, square = tl.sum(u.to(tl.int32) * q, 0), tl.sum(q * q, 0)
    return along.to(tl.float32), square.to(tl.float32)


# -------------------------------------------------------------------- rotation


@triton.jit
def rotate(x, RUN: tl.constexpr, AFTER: tl.constexpr, INVERSE: tl.constexpr):
    """`codec.rotate` of fp32 numbers whose channels, AFTER numbers apart, are runs of RUN."""
    ROUNDS: tl.constexpr = _log2(RUN)
    SHAPE: tl.constexpr = (x.numel // (RUN * AFTER), RUN // 2, 2, AFTER)
    y = tl.reshape(x, SHAPE)
    for _ in tl.static_range(ROUNDS):
        a, b = tl.split(tl.permute(y, (0, 1, 3, 2)))
        # The last bit of a channel's index becomes its first: every bit comes last once, and
        # in the end they are in order again.
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 3, 1, 2)), SHAPE)
    return tl.reshape(y, x.shape) * 2.0 ** -(ROUNDS - ROUNDS // 2 if INVERSE else ROUNDS // 2)


@triton.constexpr_function
def _log2(n):
    return n.bit_length() - 1
