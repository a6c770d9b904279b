"""Reading a page: where its fields lie, and its keys and values dequantized.

The order of the bytes is `kivi_vllm.ops.format`'s.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.triton.codes import key_codes, value_codes


class PageConstants(NamedTuple):
    """A page format at compile time.

    Attributes:
        D, DP: head size, and the power of two that is not less.
        G: group size.
        PACKED: whether pages hold codes, or, `kivi_raw`'s, tokens as they are.
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
    PACKED: bool
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
        PACKED=not fmt.is_raw,
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
def keys_of(page, half, C: tl.constexpr):
    """K of half a page's tokens, dequantized: [64, DP] fp32."""
    codes = key_codes(page + C.K[2], half, C.K_BITS, C.D, C.DP)
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
    codes = value_codes(page + C.V[2], half, C.V_BITS, C.D, C.DP)
    unit = tl.arange(0, UNITS)[None]
    at = (page + C.V[0]).to(tl.pointer_type(tl.float16))
    at += unit * 32 // C.G * 128 + 64 * half + tl.arange(0, 64)[:, None]
    mask = unit < C.D // 32
    scale = tl.load(at, mask=mask, other=0).to(tl.float32)
    zero = tl.load(at + (C.V[1] - C.V[0]) // 2, mask=mask, other=0).to(tl.float32)
    return tl.reshape(codes * scale[:, :, None] + zero[:, :, None], (64, C.DP))
