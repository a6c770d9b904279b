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

Codes of 3 bits lie as codes of 4 bits do, in the low bits of their slots. There is room for three
quarters of them: n = 0 to 2 of K, q = 0 to 23 of V. Their slots' highest bits are `SPARE` and hold
the last quarter, vectors `last` of which each three vectors have one: bit m of slot i of `last`
is the spare bit of slot i of

- n = m of k_codes, where `last` is n = 3;
- q = 3·r + m of v_codes, where `last` is q = 24 + r.

`code_index` is this rule in code. The kernels have it in files of the same name, with the
same names in them: `cpu/csrc/codes.h`, `triton/codes.py` and `cuda/codes.cuh`. All else asks these.
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


def spare(bits: int) -> int:
    """Bits of a slot above its code: of 3 bits one, for a part of the page's last quarter."""
    return 8 // (8 // bits) - bits


def zero_step(bits: int) -> int:
    """Steps of a channel's scale that are one of its zero, in ranges of two levels."""
    return {2: 1, 3: 4, 4: 8}[bits]


def gauss_step(bits: int) -> float:
    """The best distance between evenly spaced levels, for a Gaussian of variance 1."""
    return {2: 0.9957, 3: 0.5860, 4: 0.3352}[bits]


def pairs(bits: int) -> int:
    """Pairs of slots of a byte: a pair has 32 tokens of K, or 32 channels of V."""
    return 8 // bits // 2


def key_tokens(bits: int) -> int:
    """Tokens of K whose codes share vectors: those of one n."""
    return 16 * (8 // bits)


def key_units(bits: int) -> int:
    """So many times `key_tokens` are a page; of 3 bits, the last one is in spare bits."""
    return 8 // (8 // bits)


def value_tokens(bits: int) -> int:
    """Tokens of V that lie one after the other in one pair of slots."""
    return 128 // (8 // bits // 2)


def value_quads(bits: int) -> int:
    """Groups of four of them: vectors of one n; of 3 bits, the last eight are in spare bits."""
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
        [n, q, lane, j, slot] int64: `token * D + channel` of the code in each slot; of 3 bits,
        also for the vectors whose bits are spare ones of others.

    """
    d = head_size
    vectors = (key_units(bits), d // 4) if side == "k" else (d // 32, value_quads(bits))
    n, q, lane, j, i = torch.meshgrid(
        *(torch.arange(size) for size in (*vectors, 16, 4, slots(bits))), indexing="ij"
    )
    if side == "k":
        token, channel = key_tokens(bits) * n + 16 * i + lane, 4 * q + j
    else:
        token, channel = value_tokens(bits) * (i // 2) + 4 * q + j, 32 * n + 16 * (i % 2) + lane
    return token * d + channel


def _shifts(bits: int, device: torch.device) -> torch.Tensor:
    """Where the slots of a byte begin."""
    return torch.arange(slots(bits), device=device, dtype=torch.uint8) * pitch(bits)


_SPARE = 0x11
"""The lowest bit of both slots; three bits higher lie those that a code of 3 bits leaves."""


def _in_spare(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """The vectors of which the last quarter along `dim` becomes the spare bits of the others."""
    most, last = vectors.split([vectors.shape[dim] // 4 * 3, vectors.shape[dim] // 4], dim)
    parts = torch.stack([(last >> m & _SPARE) << 3 for m in range(3)], dim + 1)
    return most | parts.flatten(dim, dim + 1)


def _from_spare(vectors: torch.Tensor, dim: int) -> torch.Tensor:
    """Inverse of `_in_spare`."""
    parts = (vectors >> 3 & _SPARE).unflatten(dim, (-1, 3)).unbind(dim + 1)
    last = parts[0] | parts[1] << 1 | parts[2] << 2
    return torch.cat([vectors, last], dim)


def pack(codes: torch.Tensor, bits: int, side: Side) -> torch.Tensor:
    """Pack codes [..., 128, D] into the bytes [..., 16 * D * bits] of a page's k or v_codes."""
    index = code_index(side, bits, codes.shape[-1]).to(codes.device)
    packed = codes.flatten(-2)[..., index] << _shifts(bits, codes.device)
    packed = packed.sum(-1, dtype=torch.uint8)
    if spare(bits):
        packed = _in_spare(packed, packed.dim() - (4 if side == "k" else 3))
    return packed.flatten(-4)


def unpack(packed: torch.Tensor, bits: int, side: Side) -> torch.Tensor:
    """Inverse of `pack`."""
    d = packed.shape[-1] // (16 * bits)
    shape = key_shape(bits, d) if side == "k" else value_shape(bits, d)
    packed = packed.unflatten(-1, shape)
    if spare(bits):
        packed = _from_spare(packed, packed.dim() - (4 if side == "k" else 3))
    found = (packed.unsqueeze(-1) >> _shifts(bits, packed.device)) & top(bits)
    codes = torch.empty_like(found.flatten(-5))
    codes[..., code_index(side, bits, d).flatten().to(packed.device)] = found.flatten(-5)
    return codes.unflatten(-1, (BLOCK_SIZE, d))
