"""Numbers to codes to bytes and back: KIVI's quantization, the truth for every kernel."""

from __future__ import annotations

import torch

from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops.format import PageFormat, Side, code_index

FP16_MAX = 65504.0


def quantize(
    x: torch.Tensor, bits: int, dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KIVI's asymmetric quantization over the groups along `dim` (paper, section 3.2).

    zero = min(x) and scale = (max(x) - min(x)) / (2^bits - 1), rounded to fp16
    (saturating) first; code = round_half_even((x - zero) / scale), clamped. A group of
    scale 0 has code 0. A group with a NaN has scale NaN and codes 0.

    Returns:
        codes (uint8, shape of x), scale and zero (fp16, size 1 along `dim`).

    """
    x = x.float()
    top = 2**bits - 1
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    zero = low.clamp(-FP16_MAX, FP16_MAX).half()
    spread = (high - low).masked_fill(high == low, 0.0)  # two infinities: 0, not NaN
    # By a tensor: devices may multiply by a number's reciprocal, which rounds differently.
    scale = (spread / torch.full_like(spread, top)).clamp(max=FP16_MAX).half()
    s = scale.float()
    codes = ((x - zero.float()) / torch.where(s > 0, s, 1.0)).round().clamp(0, top)
    codes = torch.where(s > 0, codes, 0.0)  # scale 0 or NaN
    return codes.to(torch.uint8), scale, zero


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """fp32 `codes * scale + zero`, broadcast."""
    return codes.float() * scale.float() + zero.float()


def pack(codes: torch.Tensor, bits: int, side: Side) -> torch.Tensor:
    """Pack codes [..., 128, D] into the bytes [..., 16 * D * bits] of a page's k or v_codes."""
    index = code_index(side, bits, codes.shape[-1]).to(codes.device)
    shifts = torch.arange(8 // bits, device=codes.device, dtype=torch.uint8) * bits
    return (codes.flatten(-2)[..., index] << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, side: Side) -> torch.Tensor:
    """Inverse of `pack`."""
    d = packed.shape[-1] // (16 * bits)
    shifts = torch.arange(8 // bits, device=packed.device, dtype=torch.uint8) * bits
    slots = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    codes = torch.empty_like(slots.flatten(-2))
    codes[..., code_index(side, bits, d).flatten().to(packed.device)] = slots.flatten(-2)
    return codes.unflatten(-1, (BLOCK_SIZE, d))


def encode_pages(k: torch.Tensor, v: torch.Tensor, fmt: PageFormat) -> torch.Tensor:
    """Whole blocks k, v [..., B, D] -> pages [..., page_bytes] uint8."""
    g = fmt.group_size
    if fmt.is_raw:
        parts = {"k_codes": k, "v_codes": v}
    else:
        kq, ks, kz = quantize(k.unflatten(-2, (-1, g)), fmt.k_bits, -2)
        vq, vs, vz = quantize(v.unflatten(-1, (-1, g)), fmt.v_bits, -1)
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
    return k.flatten(-3, -2), v.flatten(-2)
