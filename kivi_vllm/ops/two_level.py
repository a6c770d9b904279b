"""Keys and values of a page of recipe "best": fitted ranges in two levels, and means.

Fits count in whole numbers that the arithmetic holds exactly, and what is rounded is cut to a range
before. So sums may be taken in any order and products may be fused, and every kernel writes
the same bytes. docs/format.md has the rules in words, with every rounding.
"""

from __future__ import annotations

import torch

from kivi_vllm.ops.codes import gauss_step, top, zero_step
from kivi_vllm.ops.paper import FP16_MAX, span_of

FIT_STEPS = 1023
"""Whole steps in which the fits count a key's place in its group's span, and a value's size: sums
of them are whole numbers that fit the arithmetic exactly, in any order, so that every kernel
finds the same ranges."""

FIT_ROUNDS = 2

LEVELS = 15
"""The largest scale and the largest zero of a group, in steps of its channel."""

MOST_SCALE = 60000.0
"""Of a key's range: rounded to steps, it still is a number in fp16, as kernels on GPUs take it."""

MEAN_STEPS = 1024
"""Parts of a code in which `encode_values` places a value and the mean of its channel."""

MOMENT_STEPS = 8
"""Those in which it takes the mean for the scale: fewer, so that sums fit 32 bits."""

SPARE_POWER = 1.5
"""Scales become smaller where a mean leaves less than 1 / 1.5 of the values' power."""


LIMIT = 2.0**20
"""Products are cut to it before they are rounded, so that no compiler fuses the two."""


def fit(
    x: torch.Tensor,
    low: torch.Tensor,
    spread: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    dim: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of a smaller squared error than those of the whole span.

    From the span [low, low + spread], `FIT_ROUNDS` times: codes, then the line through
    the numbers over their codes by least squares (Lloyd's algorithm with evenly spaced
    levels). A number at the span's end weighs five times one in its middle: those are the
    keys that attention looks for (docs/quality.md). Groups whose numbers are all but
    equal, not finite or beyond fp16 keep theirs.

    Returns:
        fp32 scale and zero, size 1 along `dim`.

    """
    most = top(bits)
    good = (spread > 1e-6) & (spread < FP16_MAX)
    span = torch.where(good, spread, 1.0)
    u = ((x - low) * (torch.full_like(span, FIT_STEPS) / span)).clamp(0, FIT_STEPS).round()
    slope, start = torch.full_like(span, FIT_STEPS / most), torch.zeros_like(span)
    weight = 1 + ((2 * u - FIT_STEPS).square() * 2.0**-18).round()
    n, total = (y.sum(dim, keepdim=True).double() for y in (weight, weight * u))
    for _ in range(FIT_ROUNDS):
        inverse = torch.ones_like(slope) / slope
        c = ((u - start) * inverse).clamp(0, most).round()
        # Whole numbers below 2^53 from here on, until a quotient is rounded.
        c1, c2, cu = ((weight * y).sum(dim, keepdim=True).double() for y in (c, c * c, c * u))
        d = n * c2 - c1 * c1
        several = d > 0  # codes, not all the same
        d = torch.where(several, d, 1.0)
        slope = torch.where(several, ((n * cu - c1 * total) / d).float(), slope)
        start = torch.where(several, ((total * c2 - c1 * cu) / d).float(), start)
    step = span / torch.full_like(span, FIT_STEPS)
    zero = (low.double() + start.double() * step.double()).float()
    return torch.where(good, slope * step, scale), torch.where(good, zero, low)


def encode_keys(
    k: torch.Tensor, bits: int, group_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys of whole blocks, with ranges of two levels.

    The range of each group of tokens of a channel is that of `fit`, then rounded: its scale to
    1 to 15 `step`s, and its zero, so that the middle of the range stays, to 0 to 15 times
    `zero_step` of them above `low`. A channel with a NaN has `low` NaN, and all else is 0.

    Args:
        k: [..., B, D].
        bits: of a code.
        group_size: tokens of a range.

    Returns:
        codes uint8 [..., B, D]; low, step fp16 [..., D]; ranges uint8 [..., B / group_size, D]:
        scale + 16 * zero.

    """
    x = k.float().unflatten(-2, (-1, group_size))  # [..., groups, G, D]
    most, r = top(bits), zero_step(bits)
    scale, zero = (y.squeeze(-2) for y in fit(x, *span_of(x, bits, -2), bits, -2))
    scale, zero = scale.clamp(max=MOST_SCALE), zero.clamp(-FP16_MAX, FP16_MAX)
    nan = (scale + zero).isnan().any(-2)
    low = zero.amin(-2).half()
    start = low.float().unsqueeze(-2)
    ones = torch.ones_like(low, dtype=torch.float32)
    step = torch.maximum(
        scale.amax(-2) / (ones * LEVELS), (zero - start).amax(-2) / (ones * LEVELS * r)
    )
    step = step.clamp(min=2.0**-24).half()  # not 0
    unit = step.float().unsqueeze(-2)
    u = (scale / unit).round().clamp(1, LEVELS)
    # Products are exact in fp64, and their sums do not depend on whether they are fused.
    middle = zero.double() + scale.double() * (most / 2) - (u * unit).double() * (most / 2)
    z = ((middle - start.double()).float() / (unit * r)).round().clamp(0, LEVELS)
    scale, zero = (y.unsqueeze(-2) for y in (u * unit, start + z * (unit * r)))
    codes = ((x - zero) * (torch.ones_like(scale) / scale)).clamp(0, most).round()
    nan = nan.unsqueeze(-2)
    codes = codes.flatten(-3, -2).masked_fill(nan, 0)
    ranges = (u + 16 * z).masked_fill(nan, 0)
    low, step = low.masked_fill(nan.squeeze(-2), torch.nan), step.masked_fill(nan.squeeze(-2), 0)
    return codes.to(torch.uint8), low, step, ranges.to(torch.uint8)


def decode_keys(
    codes: torch.Tensor, low: torch.Tensor, step: torch.Tensor, ranges: torch.Tensor, bits: int
) -> torch.Tensor:
    """Inverse of `encode_keys`, fp32 [..., B, D]."""
    step = step.float().unsqueeze(-2)
    scale = (ranges & 15) * step
    zero = low.float().unsqueeze(-2) + (ranges >> 4) * (step * zero_step(bits))
    codes = codes.unflatten(-2, (ranges.shape[-2], -1))
    return (codes.float() * scale.unsqueeze(-2) + zero.unsqueeze(-2)).flatten(-3, -2)


def encode_values(
    v: torch.Tensor, bits: int, sinks: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotated values of whole blocks: a scale a token, and a mean of directions a channel.

    The direction of a token's values is what they are in units of its scale. Scales begin as
    those of a Gaussian of the same power, smaller by `smaller` where the mean of the directions
    takes much of the power out. They are then fitted to what the codes stand for by least
    squares, and at last made so that a token's values keep their size along themselves (least
    squares shrinks). The first `sinks` tokens count in no mean. Tokens that are not finite count
    as 0 there, and have scale NaN and codes 0.

    Args:
        v: [..., B, D], rotated.
        bits: of a code.
        sinks: tokens that are read elsewhere.

    Returns:
        codes uint8 [..., B, D], scale fp16 [..., B], mean fp16 [..., D].

    """
    x, d = v.float(), v.shape[-1]
    most = top(bits)
    size = x.abs().amax(-1, keepdim=True)
    finite = size < torch.inf  # nor NaN
    good = finite & (size > 2.0**-60)
    size = torch.where(good, size, 1.0)
    steps = torch.full_like(size, FIT_STEPS)
    u = torch.where(good, (x * (steps / size)).clamp(-FIT_STEPS, FIT_STEPS).round(), 0.0)
    power = u.double().square().sum(-1, keepdim=True).float()
    # In fp64, since fp32 roots are not rounded correctly everywhere.
    scale = power.double().sqrt().float() * (gauss_step(bits) / d**0.5)
    scale = torch.where(good, scale, 1.0)

    def placed(scale: torch.Tensor) -> torch.Tensor:  # whole parts of a code
        factor = torch.full_like(scale, MEAN_STEPS) / scale
        return (u * factor).clamp(-LIMIT, LIMIT).round()

    counted = x.shape[-2] - sinks
    total = placed(scale)[..., sinks:, :].sum(-2, keepdim=True)
    m = total / torch.full_like(total, MEAN_STEPS * counted)
    # What the mean leaves of the directions' power, which was D / GAUSS_STEP^2 for every token.
    taken = (m * MOMENT_STEPS).clamp(-LIMIT, LIMIT).round().double().square().sum(-1, keepdim=True)
    taken = taken.float() * (gauss_step(bits) ** 2 / (MOMENT_STEPS**2 * d))
    smaller = ((1 - taken.clamp(max=15 / 16)) * SPARE_POWER).clamp(max=1).double().sqrt().float()
    first = scale = scale * smaller
    mean = (m / smaller).half()
    m = mean.float()
    at = (m * MEAN_STEPS).clamp(-LIMIT, LIMIT).round() - MEAN_STEPS * most / 2
    coarse = (m * MOMENT_STEPS).clamp(-LIMIT, LIMIT).round() - MOMENT_STEPS * most / 2

    def moments(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over a token of u times what its codes stand for, and of the square of that."""
        codes = ((placed(scale) - at) / MEAN_STEPS).clamp(0, most).round()
        q = (MOMENT_STEPS * codes + coarse).double()
        return (u * q).sum(-1, keepdim=True).float(), (q * q).sum(-1, keepdim=True).float()

    for _ in range(FIT_ROUNDS):
        along, square = moments(scale)
        fitted = along * MOMENT_STEPS / torch.where(square > 0, square, 1.0)
        scale = torch.where((along > 0) & (square > 0), fitted, scale)
        scale = torch.minimum(torch.maximum(scale, first / 4), first * 4)
    along, _ = moments(scale)
    along = along * scale
    ratio = power * MOMENT_STEPS / torch.where(along > 0, along, 1.0)
    scale = scale * torch.where(along > 0, ratio, 1.0).clamp(1, 1.5) * (size / steps)
    half = torch.where(good, scale.clamp(max=FP16_MAX), 0.0).half()
    half = half.masked_fill(~finite, torch.nan)
    s = half.float()
    inverse = torch.where(s > 0, torch.ones_like(s) / s, 0.0)
    codes = ((x * inverse).clamp(-LIMIT, LIMIT) - (m - most / 2)).clamp(0, most).round()
    return torch.where(s > 0, codes, 0.0).to(torch.uint8), half.squeeze(-1), mean.squeeze(-2)


def decode_values(
    codes: torch.Tensor, scale: torch.Tensor, mean: torch.Tensor, bits: int
) -> torch.Tensor:
    """Inverse of `encode_values`, fp32 [..., B, D], rotated."""
    direction = codes.float() + (mean.float() - top(bits) / 2).unsqueeze(-2)
    return scale.float().unsqueeze(-1) * direction
