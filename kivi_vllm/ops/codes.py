"""Where a code of b bits lies in a page, and what a code can be: all that depends on b.

The fields of a page lie in the order in which a decode kernel uses
them, and the codes so that 64 bytes are one vector register: 16 lanes of 4
bytes, where the 4 bytes of a lane are numbers that are summed over (channels of
K, tokens of V) and the lanes are numbers of the result (tokens of K, channels of
V). A byte holds 8/b codes ("slots", the lowest bits first), 16 lanes apart or
more, so that one AND gives a vector of codes:

- byte `(n, q, lane, j)` of k_codes, slot i: token (8/b)·16·n + 16·i + lane,
  channel 4·q + j;
- byte `(n, q, lane, j)` of v_codes, slot i: channel 32·n + 16·(i mod 2) + lane,
  token 64·⌊i/2⌋ + 4·q + j.

`code_index` is this rule in code. The kernels have it in files of the same name:
`cpu/csrc/codes.h` and `triton/codes.py`.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch

from kivi_vllm.config import BLOCK_SIZE

Side = Literal["k", "v"]


@functools.cache
def code_index(side: Side, bits: int, head_size: int) -> torch.Tensor:
    """Where the codes of a page lie: the rule of "Order of the codes" above.

    Args:
        side: k_codes or v_codes.
        bits: of a code.
        head_size: D.

    Returns:
        [16·D·bits, 8 / bits] int64: for each byte of the field and each of its
        slots, `token * D + channel` of the code there.

    """
    slots, d = 8 // bits, head_size
    quads = d // 4 if side == "k" else 8 * bits
    n = torch.arange(bits if side == "k" else d // 32)[:, None, None, None, None]
    q = torch.arange(quads)[:, None, None, None]
    lane = torch.arange(16)[:, None, None]
    j, i = torch.arange(4)[:, None], torch.arange(slots)
    if side == "k":
        token, channel = slots * 16 * n + 16 * i + lane, 4 * q + j
    else:
        channel, token = 32 * n + 16 * (i % 2) + lane, 64 * (i // 2) + 4 * q + j
    return (token * d + channel).reshape(-1, slots)


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
