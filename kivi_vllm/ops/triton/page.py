"""Reading a page: where its fields lie, and its keys and values dequantized.

The order of the bytes is `kivi_vllm.ops.format`'s.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.step import LayerCache
from kivi_vllm.ops.triton.codes import key_codes, top, value_codes, zero_step


class PageConstants(NamedTuple):
    """The forms of a layer's pages at compile time.

    Attributes:
        D, DP: head size, and the power of two that is not less.
        G: group size.
        PACKED: whether pages hold codes, or, `kivi_raw`'s, tokens as they are.
        TWO_LEVEL: whether they are those of recipe "best".
        K_BITS, V_BITS: as in `PageFormat`.
        K, V: byte offsets of the fields of K and of V, codes last.
        BYTES: of a page.
        PER_BLOCK: pages of a head in a block of the pool.
        RING, TAIL: tokens that a page of the ring, and of a tail, holds.
        SINKS: first tokens of a sequence that are read at full precision.
        RUN: channels that a rotation of values takes together, or 0: they are as they were.

    """

    D: int
    DP: int
    G: int
    PACKED: bool
    TWO_LEVEL: bool
    K_BITS: int
    V_BITS: int
    K: tuple[int, ...]
    V: tuple[int, ...]
    BYTES: int
    PER_BLOCK: int
    RING: int
    TAIL: int
    SINKS: int
    RUN: int


def page_constants(cache: LayerCache) -> PageConstants:
    """The constants of a layer's caches."""
    ring = cache.ring.cache.shape[2]
    return _page_constants(cache.fmt, cache.pages_per_block, ring, cache.tail_tokens)


@functools.cache
def _page_constants(fmt: PageFormat, per_block: int, ring: int, tail: int) -> PageConstants:
    k, v = (
        tuple(f.offset for name, f in fmt.fields.items() if name.startswith(side)) for side in "kv"
    )
    two_level = fmt.two_level and not fmt.is_raw
    return PageConstants(
        D=fmt.head_size,
        DP=triton.next_power_of_2(fmt.head_size),
        G=fmt.group_size,
        PACKED=not fmt.is_raw,
        TWO_LEVEL=two_level,
        K_BITS=fmt.k_bits,
        V_BITS=fmt.v_bits,
        K=k,
        V=v,
        BYTES=fmt.page_bytes,
        PER_BLOCK=per_block,
        RING=ring,
        TAIL=tail,
        SINKS=fmt.sink_tokens,
        RUN=fmt.head_size & -fmt.head_size if two_level else 0,
    )


PRECISION: tl.constexpr = tl.constexpr("tf32x3")
"""Of products of fp32 matrices: tensor cores, three times, for nearly all of fp32's bits."""


@triton.jit
def half_at(page, FIELD: tl.constexpr, at, live, C: tl.constexpr):
    """fp32 numbers of a fp16 field, 0 where not `live`: of channels that there are."""
    at = (page + FIELD).to(tl.pointer_type(tl.float16)) + at
    if C.D == C.DP:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=live, other=0)
    return x.to(tl.float32)


@triton.jit
def keys_of(page, half, C: tl.constexpr):
    """K of half a page's tokens, dequantized: [64, DP] fp32."""
    SHARED: tl.constexpr = 32 if C.G > 32 else C.G  # tokens that have the same ranges, at least
    RANGES: tl.constexpr = 64 // SHARED
    group = (64 * half + tl.arange(0, RANGES) * SHARED) // C.G
    scale, zero = _key_ranges(page, group[:, None], C)
    codes = tl.reshape(key_codes(page + C.K[-1], half, C.K_BITS, C.D, C.DP), (RANGES, SHARED, C.DP))
    return tl.reshape(codes * scale[:, None] + zero[:, None], (64, C.DP))


@triton.jit
def _key_ranges(page, group, C: tl.constexpr):
    """Scale and zero of K's groups [n, 1]: [n, DP] fp32."""
    d = tl.arange(0, C.DP)[None]
    mask = d < C.D
    at = group * C.D + d
    if C.TWO_LEVEL:
        low, step = half_at(page, C.K[0], d, mask, C), half_at(page, C.K[1], d, mask, C)
        ranges = tl.load(page + C.K[2] + at, mask=mask, other=0)
        scale = (ranges & 15).to(tl.float32) * step
        zero = low + (ranges >> 4).to(tl.float32) * (step * zero_step(C.K_BITS))
    else:
        scale, zero = half_at(page, C.K[0], at, mask, C), half_at(page, C.K[1], at, mask, C)
    return scale, zero


@triton.jit
def values_of(page, half, C: tl.constexpr):
    """V of half a page's tokens, dequantized: [64, DP] fp32."""
    UNITS: tl.constexpr = C.DP // 32
    codes = value_codes(page + C.V[-1], half, C.V_BITS, C.D, C.DP)  # [64, UNITS, 32]
    token, unit = 64 * half + tl.arange(0, 64)[:, None], tl.arange(0, UNITS)[None]
    if C.TWO_LEVEL:
        d = tl.reshape(tl.arange(0, C.DP), (1, UNITS, 32))
        mean = half_at(page, C.V[0], d, d < C.D, C)
        scale = half_at(page, C.V[1], token, token >= 0, C)
        values = (codes + (mean - top(C.V_BITS) / 2)) * scale[:, :, None]
    else:
        at, mask = unit * 32 // C.G * 128 + token, unit < C.D // 32
        scale, zero = half_at(page, C.V[0], at, mask, C), half_at(page, C.V[1], at, mask, C)
        values = codes * scale[:, :, None] + zero[:, :, None]
    return tl.reshape(values, (64, C.DP))
