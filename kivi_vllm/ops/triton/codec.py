"""`kivi_vllm.ops.codec` on the device, to the bit: ranges, codes, and the rotation of values."""

from __future__ import annotations

import triton
import triton.language as tl

from kivi_vllm.ops import codec
from kivi_vllm.ops.triton.codes import top

FP16_MAX: tl.constexpr = tl.constexpr(codec.FP16_MAX)
FIT_STEPS: tl.constexpr = tl.constexpr(codec.FIT_STEPS)
FIT_ROUNDS: tl.constexpr = tl.constexpr(codec.FIT_ROUNDS)
ROUND: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds half to even


@triton.jit
def quantize(x, AXIS: tl.constexpr, BITS: tl.constexpr, CLIP: tl.constexpr):
    """Scale and zero, fp16, of the groups along AXIS of x."""
    bad = tl.max((x != x).to(tl.int32), AXIS) > 0
    low, high = tl.min(x, AXIS), tl.max(x, AXIS)
    spread = tl.where(high == low, 0.0, high - low)
    scale = tl.div_rn(spread, tl.full(spread.shape, top(BITS), tl.float32))
    zero = low
    if CLIP:
        scale, zero = _fit(x, low, spread, scale, AXIS, BITS)
    zero = tl.minimum(tl.maximum(zero, -FP16_MAX), FP16_MAX)
    scale = tl.minimum(scale, FP16_MAX)
    nan = float("nan")
    return tl.where(bad, nan, scale).to(tl.float16), tl.where(bad, nan, zero).to(tl.float16)


@triton.jit
def codes(x, scale, zero, BITS: tl.constexpr):
    """Codes, int32, of x, with the scale and zero (fp16) of its groups."""
    s, z = scale.to(tl.float32), zero.to(tl.float32)
    good = s > 0  # neither 0 nor NaN
    y = tl.div_rn(x - z, tl.broadcast_to(tl.where(good, s, 1.0), x.shape))
    return tl.where(good, _whole(y, top(BITS)), 0.0).to(tl.int32)


@triton.jit
def _whole(y, TOP: tl.constexpr):
    """The whole numbers next to y, half to even, that are 0 to TOP."""
    return (tl.minimum(tl.maximum(y, 0.0), TOP) + ROUND) - ROUND


@triton.jit
def _fit(x, low, spread, scale, AXIS: tl.constexpr, BITS: tl.constexpr):
    """`codec.fit`: sums of whole numbers, exact in any order, and quotients of them in fp64.

    All products but those that are cut to a range next are exact, so that nothing changes where
    the compiler fuses them into sums.
    """
    TOP: tl.constexpr = top(BITS)
    good = (spread > 1e-6) & (spread < FP16_MAX)
    span = tl.where(good, spread, 1.0)
    steps = tl.full(span.shape, FIT_STEPS, tl.float32)
    u = (x - tl.expand_dims(low, AXIS)) * tl.expand_dims(tl.div_rn(steps, span), AXIS)
    u = _whole(u, FIT_STEPS)
    far = 2 * u - FIT_STEPS  # from the middle of the span
    weight = 1 + ((far * far * 2.0**-18 + ROUND) - ROUND)
    n, total = tl.sum(weight, AXIS).to(tl.float64), tl.sum(weight * u, AXIS).to(tl.float64)
    slope, start = tl.full(span.shape, FIT_STEPS / TOP, tl.float32), tl.zeros_like(span)
    for _ in tl.static_range(FIT_ROUNDS):
        inverse = tl.div_rn(tl.full(span.shape, 1.0, tl.float32), slope)
        c = _whole((u - tl.expand_dims(start, AXIS)) * tl.expand_dims(inverse, AXIS), TOP)
        wc = weight * c
        c1, c2 = tl.sum(wc, AXIS).to(tl.float64), tl.sum(wc * c, AXIS).to(tl.float64)
        cu = tl.sum(wc * u, AXIS).to(tl.float64)
        d = n * c2 - c1 * c1
        several = d > 0
        d = tl.where(several, d, 1.0)
        slope = tl.where(several, ((n * cu - c1 * total) / d).to(tl.float32), slope)
        start = tl.where(several, ((total * c2 - c1 * cu) / d).to(tl.float32), start)
    step = tl.div_rn(span, steps)
    zero = (low.to(tl.float64) + start.to(tl.float64) * step.to(tl.float64)).to(tl.float32)
    return tl.where(good, slope * step, scale), tl.where(good, zero, low)


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
