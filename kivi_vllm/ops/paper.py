"""KIVI's quantization as published (arXiv 2402.02750, section 3.2): recipe "paper"."""

from __future__ import annotations

import torch

from kivi_vllm.ops.codes import top

FP16_MAX = 65504.0


def quantize(
    x: torch.Tensor, bits: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KIVI's asymmetric quantization over the groups along `dim` (paper, section 3.2).

    zero = min(x) and scale = (max(x) - min(x)) / (2^bits - 1), rounded to fp16 (saturating);
    code = round_half_even((x - zero) / scale), clamped. A group of scale 0 has code 0. A group
    with a NaN has scale NaN and codes 0.

    Returns:
        codes (uint8, shape of x), scale and zero (fp16, size 1 along `dim`).

    """
    x = x.float()
    low, _, scale = span_of(x, bits, dim)
    zero = low.clamp(-FP16_MAX, FP16_MAX).half()
    scale = scale.clamp(max=FP16_MAX).half()
    s = scale.float()
    codes = ((x - zero.float()) / torch.where(s > 0, s, 1.0)).round().clamp(0, top(bits))
    codes = torch.where(s > 0, codes, 0.0)  # scale 0 or NaN
    return codes.to(torch.uint8), scale, zero


def span_of(
    x: torch.Tensor, bits: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each group along `dim`: its least number, its span, and the scale of the whole span."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    spread = (high - low).masked_fill(high == low, 0.0)  # two infinities: 0, not NaN
    # By a tensor: devices may multiply by a number's reciprocal, which rounds differently.
    return low, spread, spread / torch.full_like(spread, top(bits))


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """fp32 `codes * scale + zero`, broadcast."""
    return codes.float() * scale.float() + zero.float()
