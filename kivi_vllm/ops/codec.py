"""Keys and values to pages and back: the truth for every kernel.

docs/format.md has the rules in words, with every rounding.
"""

from __future__ import annotations

import torch

from kivi_vllm.ops.codes import pack, unpack
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.paper import dequantize, quantize
from kivi_vllm.ops.two_level import decode_keys, decode_values, encode_keys, encode_values


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


def encode_pages(k: torch.Tensor, v: torch.Tensor, fmt: PageFormat, sinks: int = 0) -> torch.Tensor:
    """Whole blocks k, v [..., B, D] -> pages [..., page_bytes] uint8.

    The first `sinks` tokens stay out of K's ranges, where the next ones stand in for them, and
    of the means of V.
    """
    k = torch.cat([k[..., sinks : 2 * sinks, :], k[..., sinks:, :]], -2)
    lead = k.shape[:-2]
    if fmt.is_raw:
        parts = {"k_codes": k, "v_codes": v}
    else:
        parts = _best(k, v, fmt, sinks) if fmt.two_level else _paper(k, v, fmt)
    ordered = [parts[name].to(f.dtype).reshape(*lead, -1) for name, f in fmt.fields.items()]
    page = torch.cat([p.contiguous().view(torch.uint8) for p in ordered], -1)
    return torch.nn.functional.pad(page, (0, fmt.page_bytes - page.shape[-1]))


def _best(k: torch.Tensor, v: torch.Tensor, fmt: PageFormat, sinks: int) -> dict[str, torch.Tensor]:
    """The fields of pages of recipe "best"."""
    k_codes, low, step, ranges = encode_keys(k, fmt.k_bits, fmt.group_size)
    v_codes, scale, mean = encode_values(rotate(v), fmt.v_bits, sinks)
    return {
        "k_low": low,
        "k_step": step,
        "k_range": ranges,
        "k_codes": pack(k_codes, fmt.k_bits, "k"),
        "v_mean": mean,
        "v_scale": scale,
        "v_codes": pack(v_codes, fmt.v_bits, "v"),
    }


def _paper(k: torch.Tensor, v: torch.Tensor, fmt: PageFormat) -> dict[str, torch.Tensor]:
    """The fields of pages of recipe "paper"."""
    g = fmt.group_size
    kq, ks, kz = quantize(k.unflatten(-2, (-1, g)), fmt.k_bits, -2)
    vq, vs, vz = quantize(v.unflatten(-1, (-1, g)), fmt.v_bits, -1)
    return {
        "k_scale": ks.squeeze(-2),
        "k_zero": kz.squeeze(-2),
        "k_codes": pack(kq.flatten(-3, -2), fmt.k_bits, "k"),
        "v_scale": vs.squeeze(-1).mT,
        "v_zero": vz.squeeze(-1).mT,
        "v_codes": pack(vq.flatten(-2), fmt.v_bits, "v"),
    }


def decode_pages(pages: torch.Tensor, fmt: PageFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages [..., page_bytes] uint8 -> k, v [..., B, D] fp32."""
    f = {name: field.of(pages) for name, field in fmt.fields.items()}
    if fmt.is_raw:
        return f["k_codes"].float(), f["v_codes"].float()
    k_codes = unpack(f["k_codes"].flatten(-4), fmt.k_bits, "k")
    v_codes = unpack(f["v_codes"].flatten(-4), fmt.v_bits, "v")
    if fmt.two_level:
        k = decode_keys(k_codes, f["k_low"], f["k_step"], f["k_range"], fmt.k_bits)
        v = decode_values(v_codes, f["v_scale"], f["v_mean"], fmt.v_bits)
        return k, rotate(v, inverse=True)
    k_codes, v_codes = (
        k_codes.unflatten(-2, (-1, fmt.group_size)),
        v_codes.unflatten(-1, (-1, fmt.group_size)),
    )
    k = dequantize(k_codes, f["k_scale"].unsqueeze(-2), f["k_zero"].unsqueeze(-2))
    v = dequantize(v_codes, f["v_scale"].mT.unsqueeze(-1), f["v_zero"].mT.unsqueeze(-1))
    return k.flatten(-3, -2), v.flatten(-2)
