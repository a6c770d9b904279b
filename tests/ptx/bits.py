"""Bits: logic, shifts, fields, bytes; as in `arithmetic`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.ptx.numbers import Array, Calculation, Maker, dtype_of, only
from tests.ptx.parse import bits_of

BOOLEANS: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def _bitwise(base: str, kind: str, modifiers: list[str]) -> Calculation:
    only(set(), modifiers)
    if base == "not":
        return Calculation(kind, (kind,), np.invert)
    return Calculation(kind, (kind, kind), BOOLEANS[base])


def _shift(base: str, kind: str, modifiers: list[str]) -> Calculation:
    """All bits go where the distance is larger than the number is wide."""
    only(set(), modifiers)
    bits, dtype = bits_of(kind), dtype_of(kind)

    def value(x: Array, distance: Array) -> Array:
        near = np.minimum(distance, bits - 1).astype(dtype)
        shifted = x << near if base == "shl" else x >> near
        if base == "shr" and kind[0] == "s":
            return shifted
        return np.where(distance < bits, shifted, np.zeros_like(x))

    return Calculation(kind, (kind, "u32"), value)


def _funnel(base: str, kind: str, modifiers: list[str]) -> Calculation:
    """`shf.l.wrap.b32`: the upper half of two words that are shifted, or the lower."""
    side, mode = modifiers
    distance_of = {"wrap": lambda n: n & 31, "clamp": lambda n: np.minimum(n, 32)}[mode]

    def value(low: Array, high: Array, n: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        n = distance_of(n).astype(np.uint64)
        both = (both << n) >> np.uint64(32) if side == "l" else both >> n
        return both.astype(np.uint32)

    return Calculation("b32", ("b32", "b32", "u32"), value)


def _extract(_: str, kind: str, modifiers: list[str]) -> Calculation:
    """`bfe`: some bits, from a position on."""
    bits = bits_of(kind)

    def value(x: Array, at: Array, count: Array) -> Array:
        at, count = np.minimum(at & 255, bits), np.minimum(count & 255, bits)
        if kind[0] == "u":
            ones = (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1)
            ones = np.where(count > 63, ~np.uint64(0), ones)
            found = np.where(at < 64, x.astype(np.uint64) >> np.minimum(at, 63), np.uint64(0))
            return (found & ones).astype(x.dtype)
        # Bits beyond the number are its sign's.
        top = np.minimum(at.astype(np.int64) + count, bits)
        kept = x.astype(np.int64) << (64 - top)
        return np.where(count > 0, kept >> np.minimum(64 - top + at, 63), 0).astype(x.dtype)

    return Calculation(kind, (kind, "u32", "u32"), value)


def _insert(_: str, kind: str, modifiers: list[str]) -> Calculation:
    """`bfi`: b with some bits of a, from a position on."""
    only(set(), modifiers)
    bits = bits_of(kind)

    def value(a: Array, b: Array, at: Array, count: Array) -> Array:
        at = np.minimum(at & 255, bits).astype(np.uint64)
        count = np.minimum(count & 255, bits).astype(np.uint64)
        ones = (np.uint64(1) << np.minimum(count, np.uint64(63))) - np.uint64(1)
        ones = np.where(count > 63, ~np.uint64(0), ones)
        mask = np.where(at < 64, ones << np.minimum(at, np.uint64(63)), np.uint64(0))
        moved = a.astype(np.uint64) << np.minimum(at, np.uint64(63))
        return ((moved & mask) | (b & ~mask)).astype(a.dtype)

    return Calculation(kind, (kind, kind, "u32", "u32"), value)


def _permute(_: str, kind: str, modifiers: list[str]) -> Calculation:
    """`prmt`: four of the eight bytes of two words, or their signs."""
    only(set(), modifiers)

    def value(x: Array, y: Array, which: Array) -> Array:
        both = x.astype(np.uint64) | (y.astype(np.uint64) << np.uint64(32))
        result = np.zeros_like(x)
        for i in range(4):
            choice = (which >> np.uint32(4 * i)) & np.uint32(15)
            byte = (both >> (np.uint64(8) * (choice & np.uint32(7)))).astype(np.uint8)
            sign = (byte.view(np.int8) >> np.int8(7)).view(np.uint8)
            byte = np.where(choice > 7, sign, byte).astype(np.uint32)
            result |= byte << np.uint32(8 * i)
        return result

    return Calculation("b32", ("b32", "b32", "b32"), value)


def _logic(_: str, kind: str, modifiers: list[str]) -> Calculation:
    """`lop3`: any function of three bits, by its table."""
    only(set(), modifiers)

    def value(x: Array, y: Array, z: Array, table: Array) -> Array:
        result = np.zeros_like(x)
        for i in range(8):
            term = (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
            result |= np.where((table >> np.uint32(i)) & np.uint32(1), term, np.uint32(0))
        return result

    return Calculation("b32", ("b32",) * 4, value)


def _count(base: str, kind: str, modifiers: list[str]) -> Calculation:
    """`popc`; `clz`: zeros before the first one."""
    only(set(), modifiers)
    bits = bits_of(kind)

    def value(x: Array) -> Array:
        if base == "popc":
            return np.bitwise_count(x).astype(np.uint32)
        for n in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
            x = x | (x >> x.dtype.type(n))
        return np.uint32(bits) - np.bitwise_count(x).astype(np.uint32)

    return Calculation("u32", (kind,), value)


MAKERS: dict[str, Maker] = {
    **dict.fromkeys([*BOOLEANS, "not"], _bitwise),
    **dict.fromkeys(["shl", "shr"], _shift),
    **dict.fromkeys(["popc", "clz"], _count),
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _logic,
}
