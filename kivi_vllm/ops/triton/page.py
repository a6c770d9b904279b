"""Reading a page: where its fields lie, and codes as numbers that a matrix product takes.

The order of the bytes is `kivi_vllm.ops.format`'s. An int32 word holds 4 bytes, j = 0 to
3, of one lane; a byte holds slots i of `bits` each. With one AND, a word becomes two
16-bit numbers: the codes in slot i of bytes 0 and 2, or after a shift by 8, of bytes 1
and 3. **They are never converted**: the bits of code c, in place at bit i * bits of a
16-bit word, are already the fp16 subnormal number c * 2^(i * bits - 24), which tensor
cores multiply exactly and at full speed. The power of two goes into the result.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from kivi_vllm.ops.format import PageFormat


class PageConstants(NamedTuple):
    """A page format at compile time.

    Attributes:
        D, DP: head size, and the power of two that is not less.
        G: group size.
        K_BITS, V_BITS: as in `PageFormat`.
        K, V: byte offsets of scale, zero and codes; of `kivi_raw`, (0, 0, codes).
        RAW: tokens that a page of the ring or a tail holds.
        SINKS: first tokens of a sequence that are read at full precision.
        RUN: channels that a rotation of values takes together, or 0: they are as they were.
        CLIP: as in `PageFormat`.

    """

    D: int
    DP: int
    G: int
    K_BITS: int
    V_BITS: int
    K: tuple[int, int, int]
    V: tuple[int, int, int]
    RAW: int
    SINKS: int
    RUN: int
    CLIP: bool


@functools.cache
def page_constants(fmt: PageFormat) -> PageConstants:
    """The constants of `fmt`."""
    offset = {name: field.offset for name, field in fmt.fields.items()}
    k, v = (
        (offset.get(f"{x}_scale", 0), offset.get(f"{x}_zero", 0), offset[f"{x}_codes"])
        for x in "kv"
    )
    power = triton.next_power_of_2(fmt.head_size)
    run = fmt.head_size & -fmt.head_size if fmt.rotate_values else 0
    return PageConstants(
        D=fmt.head_size,
        DP=power,
        G=fmt.group_size,
        K_BITS=fmt.k_bits,
        V_BITS=fmt.v_bits,
        K=k,
        V=v,
        RAW=fmt.raw_tokens,
        SINKS=fmt.sink_tokens,
        RUN=run,
        CLIP=fmt.clip,
    )


PRECISION: tl.constexpr = tl.constexpr("tf32x3")
"""Of products of fp32 matrices: tensor cores, three times, for nearly all of fp32's bits."""


@triton.jit
def codes_of(words, SLOT: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """Codes of one slot, times `unit_of(SLOT, BITS, T)`: words [b, 16, n] -> T [b, 16, 2n]."""
    AT: tl.constexpr = SLOT * BITS
    both = words & (((1 << BITS) - 1) << AT) * 0x10001
    low, high = both.to(tl.int16), (both >> 16).to(tl.int16)
    if T.primitive_bitwidth == 16:
        low, high = low.to(T, bitcast=True), high.to(T, bitcast=True)
    else:
        low, high = low.to(T), high.to(T)
    return tl.reshape(tl.join(low, high), (words.shape[0], words.shape[1], 2 * words.shape[2]))


@triton.constexpr_function
def unit_of(slot, bits, t):
    """What code 1 is in `codes_of`."""
    return 2.0 ** (slot * bits - (24 if t == tl.float16 else 0))


@triton.jit
def words_of(field, SHAPE: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr):
    """The words [n, 16, q] from address `field` on: of SHAPE (n, q), with 0 up to PADDED.

    UNIT: quads of a unit n in the page, where not all of them are wanted.
    """
    n, q = tl.arange(0, PADDED[0])[:, None, None], tl.arange(0, PADDED[1])[None, None]
    lane = tl.arange(0, 16)[None, :, None]
    at = field.to(tl.pointer_type(tl.int32)) + (n * UNIT + q) * 16 + lane
    if SHAPE == PADDED:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=(n < SHAPE[0]) & (q < SHAPE[1]) & (lane >= 0), other=0)
    return words


@triton.jit
def _numbers(words, SLOT: tl.constexpr, BITS: tl.constexpr):
    """Codes of one slot of all 4 bytes, fp32: words [n, 16, q] -> [n, 16, 4q]."""
    even = codes_of(words, SLOT, BITS, tl.float32)
    odd = codes_of(words >> 8, SLOT, BITS, tl.float32)
    x = tl.reshape(tl.join(even, odd), (words.shape[0], 16, 4 * words.shape[2]))
    return x * (1 / unit_of(SLOT, BITS, tl.float32))


@triton.jit
def keys_of(page, half, C: tl.constexpr):
    """K of half a page's tokens, dequantized: [64, DP] fp32."""
    UNITS: tl.constexpr = C.K_BITS // 2
    Q: tl.constexpr = C.D // 4
    field = page + C.K[2] + half * (UNITS * Q * 64)
    words = words_of(field, (UNITS, Q), (UNITS, C.DP // 4), Q)
    x, y = _numbers(words, 0, C.K_BITS), _numbers(words, 1, C.K_BITS)
    if C.K_BITS == 2:
        x, y = tl.join(x, _numbers(words, 2, 2)), tl.join(y, _numbers(words, 3, 2))
    else:
        x, y = tl.expand_dims(x, 3), tl.expand_dims(y, 3)
    codes = tl.permute(tl.join(x, y), (0, 3, 4, 1, 2))  # [units, groups, 2, 16, DP]
    codes = tl.reshape(codes, (2, 32, C.DP))
    d = tl.arange(0, C.DP)
    at = (page + C.K[0]).to(tl.pointer_type(tl.float16))
    at += ((2 * half + tl.arange(0, 2)) * 32 // C.G)[:, None] * C.D + d[None]
    mask = (d < C.D)[None]
    scale = tl.load(at, mask=mask, other=0).to(tl.float32)
    zero = tl.load(at + (C.K[1] - C.K[0]) // 2, mask=mask, other=0).to(tl.float32)
    return tl.reshape(codes * scale[:, None] + zero[:, None], (64, C.DP))


@triton.jit
def values_of(page, half, C: tl.constexpr):
    """V of half a page's tokens, dequantized: [64, DP] fp32."""
    UNITS: tl.constexpr = C.DP // 32
    field = page + C.V[2] + (half * 1024 if C.V_BITS == 4 else 0)
    words = words_of(field, (C.D // 32, 16), (UNITS, 16), 8 * C.V_BITS)
    if C.V_BITS == 2:
        words = words >> 4 * half
    codes = tl.join(_numbers(words, 0, C.V_BITS), _numbers(words, 1, C.V_BITS))
    # [units, 16 channels, tokens, halves of the unit's channels]
    codes = tl.reshape(tl.permute(codes, (2, 0, 3, 1)), (64, UNITS, 32))
    unit = tl.arange(0, UNITS)[None]
    at = (page + C.V[0]).to(tl.pointer_type(tl.float16))
    at += unit * 32 // C.G * 128 + 64 * half + tl.arange(0, 64)[:, None]
    mask = unit < C.D // 32
    scale = tl.load(at, mask=mask, other=0).to(tl.float32)
    zero = tl.load(at + (C.V[1] - C.V[0]) // 2, mask=mask, other=0).to(tl.float32)
    return tl.reshape(codes * scale[:, :, None] + zero[:, :, None], (64, C.DP))
