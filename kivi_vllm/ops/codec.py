"""Numbers to codes to bytes and back: KIVI's quantization, the truth for every kernel."""

from __future__ import annotations

import torch

from kivi_vllm.ops.codes import pack, top, unpack
from kivi_vllm.ops.format import PageFormat

FP16_MAX = 65504.0


FIT_STEPS = 1023
"""Steps of a group's span in which `fit` counts: sums over a group are whole numbers below
2^24, exact in fp32 in any order, so that every kernel finds the same range."""

FIT_ROUNDS = 2


def quantize(
    x: torch.Tensor, bits: int, dim: int, clip: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KIVI's asymmetric quantization over the groups along `dim` (paper, section 3.2).

    zero = min(x) and scale = (max(x) - min(x)) / (2^bits - 1), or with `clip` those of
    `fit`, rounded to fp16 (saturating) first; code = round_half_even((x - zero) / scale),
    clamped. A group of scale 0 has code 0. A group with a NaN has scale NaN and codes 0.

    Returns:
        codes (uint8, shape of x), scale and zero (fp16, size 1 along `dim`).

    """
    x = x.float()
    most = top(bits)
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    spread = (high - low).masked_fill(high == low, 0.0)  # two infinities: 0, not NaN
    # By a tensor: devices may multiply by a number's reciprocal, which rounds differently.
    scale, zero = spread / torch.full_like(spread, most), low
    if clip:
        scale, zero = fit(x, low, spread, scale, bits, dim)
    zero = zero.clamp(-FP16_MAX, FP16_MAX).half()
    scale = scale.clamp(max=FP16_MAX).half()
    s = scale.float()
    codes = ((x - zero.float()) / torch.where(s > 0, s, 1.0)).round().clamp(0, most)
    codes = torch.where(s > 0, codes, 0.0)  # scale 0 or NaN
    return codes.to(torch.uint8), scale, zero


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


def rotate(x: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """A Hadamard matrix times each run of channels, fp32, shape of x.

    Runs are as long as the largest power of two n that divides the head size. The sums
    are those of the fast transform, neighbours first; the factor is the power of two next
    to 1 / sqrt(n), so that it rounds nothing, and the inverse's is what is left of 1 / n.
    """
    d = x.shape[-1]
    n = d & -d
    log_n = n.bit_length() - 1
    y = x.float()
    for i in range(log_n):
        a, b = y.unflatten(-1, (-1, 2, 2**i)).unbind(-2)
        y = torch.stack([a + b, a - b], -2).flatten(-3)
    return y * 2.0 ** -(log_n - log_n // 2 if inverse else log_n // 2)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """fp32 `codes * scale + zero`, broadcast."""
    return codes.float() * scale.float() + zero.float()


def encode_pages(k: torch.Tensor, v: torch.Tensor, fmt: PageFormat, sinks: int = 0) -> torch.Tensor:
    """Whole blocks k, v [..., B, D] -> pages [..., page_bytes] uint8.

    The first `sinks` tokens stay out of K's ranges; the next ones stand in for them.
    """
    g = fmt.group_size
    k = torch.cat([k[..., sinks : 2 * sinks, :], k[..., sinks:, :]], -2)
    if fmt.is_raw:
        parts = {"k_codes": k, "v_codes": v}
    else:
        v = rotate(v) if fmt.rotate_values else v
        kq, ks, kz = quantize(k.unflatten(-2, (-1, g)), fmt.k_bits, -2, fmt.clip)
        vq, vs, vz = quantize(v.unflatten(-1, (-1, g)), fmt.v_bits, -1, fmt.clip)
        parts = {
            "k_scale": ks.squeeze(-2),
            "k_zero": kz.squeeze(-2),
            "k_codes": pack(kq.flatten(-3, -2), fmt.k_bits, "k"),
            "v_scale": vs.squeeze(-1).mT,
            "v_zero": vz.squeeze(-1).mT,
            "v_codes": pack(vq.flatten(-2), fmt.v_bits, "v"),
        }
    lead = k.shape[:-2]
    ordered = [parts[name].to(f.dtype).reshape(*lead, -1) for name, f in fmt.fields.items()]
    return torch.cat([p.contiguous().view(torch.uint8) for p in ordered], -1)


def decode_pages(pages: torch.Tensor, fmt: PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages [..., page_bytes] uint8 -> k, v [..., B, D] fp32."""
    f = {name: field.of(pages) for name, field in fmt.fields.items()}
    if fmt.is_raw:
        return f["k_codes"].float(), f["v_codes"].float()
    g = fmt.group_size
    k_codes = unpack(f["k_codes"].flatten(-4), fmt.k_bits, "k").unflatten(-2, (-1, g))
    v_codes = unpack(f["v_codes"].flatten(-4), fmt.v_bits, "v").unflatten(-1, (-1, g))
    k = dequantize(k_codes, f["k_scale"].unsqueeze(-2), f["k_zero"].unsqueeze(-2))
    v = dequantize(v_codes, f["v_scale"].mT.unsqueeze(-1), f["v_zero"].mT.unsqueeze(-1))
    v = v.flatten(-2)
    return k.flatten(-3, -2), rotate(v, inverse=True) if fmt.rotate_values else v
