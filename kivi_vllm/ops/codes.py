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

`code_index` is this rule in code. The kernels have it in files of the same name, with the
same names in them: `cpu/csrc/codes.h` and `triton/codes.py`. All else asks these three.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch

from kivi_vllm.config import BLOCK_SIZE

Side = Literal["k", "v"]


# The functions of a number of bits stand alone, so that Triton can call them when it compiles.


def top(bits: int) -> int:
    """The largest code."""
    return 2**bits - 1


def slots(bits: int) -> int:
    """Codes of a byte."""
    return 8 // bits


def pitch(bits: int) -> int:
    """Bits from the beginning of one slot to that of the next."""
    return 8 // (8 // bits)


def pairs(bits: int) -> int:
    """Pairs of slots of a byte: a pair has 32 tokens of K, or 32 channels of V."""
    return 8 // bits // 2


def key_tokens(bits: int) -> int:
    """Tokens of K whose codes share vectors: those of one n."""
    return 16 * (8 // bits)


def key_units(bits: int) -> int:
    """So many times `key_tokens` are a page."""
    return 8 // (8 // bits)


def value_tokens(bits: int) -> int:
    """Tokens of V that lie one after the other in one pair of slots."""
    return 128 // (8 // bits // 2)


def value_quads(bits: int) -> int:
    """Groups of four of them: vectors of one n."""
    return 32 // (8 // bits // 2)


def key_shape(bits: int, head_size: int) -> tuple[int, int, int, int]:
    """k_codes as [n, q, lane, j]."""
    return bits, head_size // 4, 16, 4


def value_shape(bits: int, head_size: int) -> tuple[int, int, int, int]:
    """v_codes as [n, q, lane, j]."""
    return head_size // 32, 8 * bits, 16, 4


@functools.cache
def code_index(side: Side, bits: int, head_size: int) -> torch.Tensor:
    """Where the codes of a page lie: the rule above.

    Args:
        side: k_codes or v_codes.
        bits: of a code.
        head_size: D.

    Returns:
        [16·D·bits, 8 / bits] int64: for each byte of the field and each of its
        slots, `token * D + channel` of the code there.

    """
    d = head_size
    shape = key_shape(bits, d) if side == "k" else value_shape(bits, d)
    n, q, lane, j, i = torch.meshgrid(
        *(torch.arange(size) for size in (*shape, slots(bits))), indexing="ij"
    )
    if side == "k":
        token, channel = key_tokens(bits) * n + 16 * i + lane, 4 * q + j
    else:
        token, channel = value_tokens(bits) * (i // 2) + 4 * q + j, 32 * n + 16 * (i % 2) + lane
    return (token * d + channel).reshape(-1, slots(bits))


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    """Where the slots of a byte begin."""
    return torch.arange(slots(bits), device=device, dtype=torch.uint8) * pitch(bits)


def pack(codes: torch.Tensor, bits: int, side: Side) -> torch.Tensor:
    """Pack codes [..., 128, D] into the bytes [..., 16 * D * bits] of a page's k or v_codes."""
    index = code_index(side, bits, codes.shape[-1]).to(codes.device)
    return (codes.flatten(-2)[..., index] << _shifts(bits, codes.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, bits: int, side: Side) -> torch.Tensor:
    """Inverse of `pack`."""
    d = packed.shape[-1] // (16 * bits)
    found = (packed.unsqueeze(-1) >> _shifts(bits, packed.device)) & top(bits)
    codes = torch.empty_like(found.flatten(-2))
    codes[..., code_index(side, bits, d).flatten().to(packed.device)] = found.flatten(-2)
    return codes.unflatten(-1, (BLOCK_SIZE, d))
