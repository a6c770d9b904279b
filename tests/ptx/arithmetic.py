"""What each lane does for itself: the value of an instruction from the values of its operands.

`find` knows an instruction by its name. Modifiers that it does not know are a fault, so that
none is passed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tests.ptx.numbers import SIGNED, UNSIGNED, Array, dtype_of, is_float
from tests.ptx.parse import Fault, bits_of


@dataclass(frozen=True)
class Calculation:
    """What an instruction makes of numbers.

    Attributes:
        result: its type.
        operands: theirs.
        value: of the operands, arrays of a number a lane.

    """

    result: str
    operands: tuple[str, ...]
    value: Callable[..., Array]


ROUNDS = {"rn", "approx", "full"}  # to nearest, or more roughly: all as exactly as NumPy does
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
BOOLEANS: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@functools.cache
def find(op: str) -> Calculation:
    """What an instruction does.

    Raises:
        Fault: it is not known, or has a modifier that is not.

    """
    base, *modifiers = op.split(".")
    if not modifiers or base not in _MAKERS:
        raise Fault(f"unknown instruction {op}")
    kind = modifiers.pop()
    try:
        made = _MAKERS[base](base, kind, set(modifiers), modifiers)
    except KeyError:
        made = None
    if made is None:
        raise Fault(f"unknown instruction {op}")
    return made


def _only(known: set[str], modifiers: set[str]) -> None:
    if modifiers - known:
        raise KeyError(modifiers - known)


def _flushed(x: Array) -> Array:
    """Subnormal numbers become 0."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _with_modifiers(value: Callable[..., Array], modifiers: set[str]) -> Callable[..., Array]:
    if "ftz" in modifiers:
        inner = value
        value = lambda *x: _flushed(inner(*map(_flushed, x)))  # noqa: E731
    if "sat" in modifiers:
        unbounded = value
        value = lambda *x: np.fmin(np.fmax(unbounded(*x), 0), 1).astype(x[0].dtype)  # noqa: E731
    return value


# ----------------------------------------------------------------- arithmetic


def _divided(x: Array, y: Array) -> Array:
    """Towards zero."""
    y = np.where(y == 0, np.ones_like(y), y)
    if x.dtype.kind == "u":
        return x // y
    sign = np.where((x < 0) == (y < 0), 1, -1).astype(x.dtype)
    return (np.abs(x) // np.abs(y)) * sign


def _max(x: Array, y: Array) -> Array:
    return np.fmax(x, y)


_TWO: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.fmin,
    "max": np.fmax,
    "rem": lambda x, y: x - _divided(x, y) * y,
}
_ONE: dict[str, Callable[[Array], Array]] = {"neg": np.negative, "abs": np.abs, "sqrt": np.sqrt}
_ROUGH: dict[str, Callable[[Array], Array]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def _two(base: str, kind: str, modifiers: set[str], _: list[str]) -> Calculation:
    _only(ROUNDS | {"ftz", "sat", "NaN"} if is_float(kind) else set(), modifiers)
    value = _TWO[base]
    if "NaN" in modifiers:
        value = {"min": np.minimum, "max": np.maximum}[base]
    return Calculation(kind, (kind, kind), _with_modifiers(value, modifiers))


def _one(base: str, kind: str, modifiers: set[str], _: list[str]) -> Calculation:
    _only(ROUNDS | {"ftz"}, modifiers)
    return Calculation(kind, (kind,), _with_modifiers({**_ONE, **_ROUGH}[base], modifiers))


def _div(_: str, kind: str, modifiers: set[str], __: list[str]) -> Calculation:
    _only(ROUNDS | {"ftz"} if is_float(kind) else set(), modifiers)
    value = np.divide if is_float(kind) else _divided
    return Calculation(kind, (kind, kind), _with_modifiers(value, modifiers))


def _fused(x: Array, y: Array, z: Array) -> Array:
    """x * y + z, rounded once: of twice the bits, the product is exact."""
    wide = np.longdouble if x.dtype == np.float64 else np.float64
    return (x.astype(wide) * y + z).astype(x.dtype)


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * bits_of(kind)}"


def _high(x: Array, y: Array) -> Array:
    """The upper half of a product."""
    bits = 8 * x.itemsize
    if bits == 64:
        product = x.astype(object) * y.astype(object) >> 64
        return (product & (2**64 - 1)).astype(np.uint64).view(x.dtype)
    wide = (SIGNED if x.dtype.kind == "i" else UNSIGNED)[2 * bits]
    return ((x.astype(wide) * y.astype(wide)) >> wide(bits)).astype(x.dtype)


def _product(base: str, kind: str, modifiers: set[str], _: list[str]) -> Calculation:
    """`mul` and `mad`, `fma`."""
    if is_float(kind):
        _only({"rn", "ftz", "sat"}, modifiers)
        if base == "mul":
            return Calculation(kind, (kind, kind), _with_modifiers(np.multiply, modifiers))
        return Calculation(kind, (kind,) * 3, _with_modifiers(_fused, modifiers))
    [half] = modifiers
    result = _wide(kind) if half == "wide" else kind
    dtype = dtype_of(result)
    product = {
        "lo": np.multiply,
        "hi": _high,
        "wide": lambda x, y: x.astype(dtype) * y.astype(dtype),
    }[half]
    if base == "mul":
        return Calculation(result, (kind, kind), product)
    return Calculation(result, (kind, kind, result), lambda x, y, z: product(x, y) + z)


# ----------------------------------------------------------------------- bits


def _bitwise(base: str, kind: str, modifiers: set[str], _: list[str]) -> Calculation:
    _only(set(), modifiers)
    if base == "not":
        return Calculation(kind, (kind,), np.invert)
    return Calculation(kind, (kind, kind), BOOLEANS[base])


def _shift(base: str, kind: str, modifiers: set[str], _: list[str]) -> Calculation:
    """All bits go where the distance is larger than the number is wide."""
    _only(set(), modifiers)
    bits, dtype = bits_of(kind), dtype_of(kind)

    def value(x: Array, distance: Array) -> Array:
        near = np.minimum(distance, bits - 1).astype(dtype)
        shifted = x << near if base == "shl" else x >> near
        if base == "shr" and kind[0] == "s":
            return shifted
        return np.where(distance < bits, shifted, np.zeros_like(x))

    return Calculation(kind, (kind, "u32"), value)


def _funnel(base: str, kind: str, modifiers: set[str], order: list[str]) -> Calculation:
    """`shf.l.wrap.b32`: the upper half of two words that are shifted, or the lower."""
    side, mode = order
    distance_of = {"wrap": lambda n: n & 31, "clamp": lambda n: np.minimum(n, 32)}[mode]

    def value(low: Array, high: Array, n: Array) -> Array:
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        n = distance_of(n).astype(np.uint64)
        both = (both << n) >> np.uint64(32) if side == "l" else both >> n
        return both.astype(np.uint32)

    return Calculation("b32", ("b32", "b32", "u32"), value)


def _extract(_: str, kind: str, modifiers: set[str], __: list[str]) -> Calculation:
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


def _insert(_: str, kind: str, modifiers: set[str], __: list[str]) -> Calculation:
    """`bfi`: b with some bits of a, from a position on."""
    _only(set(), modifiers)
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


def _permute(_: str, kind: str, modifiers: set[str], __: list[str]) -> Calculation:
    """`prmt`: four of the eight bytes of two words, or their signs."""
    _only(set(), modifiers)

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


def _logic(_: str, kind: str, modifiers: set[str], __: list[str]) -> Calculation:
    """`lop3`: any function of three bits, by its table."""
    _only(set(), modifiers)

    def value(x: Array, y: Array, z: Array, table: Array) -> Array:
        result = np.zeros_like(x)
        for i in range(8):
            term = (x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z)
            result |= np.where((table >> np.uint32(i)) & np.uint32(1), term, np.uint32(0))
        return result

    return Calculation("b32", ("b32",) * 4, value)


def _count(base: str, kind: str, modifiers: set[str], __: list[str]) -> Calculation:
    """`popc`; `clz`: zeros before the first one."""
    _only(set(), modifiers)
    bits = bits_of(kind)

    def value(x: Array) -> Array:
        if base == "popc":
            return np.bitwise_count(x).astype(np.uint32)
        for n in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
            x = x | (x >> x.dtype.type(n))
        return np.uint32(bits) - np.bitwise_count(x).astype(np.uint32)

    return Calculation("u32", (kind,), value)


# ---------------------------------------------------- comparison and conversion


def _compare(_: str, kind: str, modifiers: set[str], order: list[str]) -> Calculation:
    """`setp`, also with `.and`, `.or`, `.xor` and one predicate more."""
    name, *more = [x for x in order if x != "ftz"]
    unordered = is_float(kind) and name not in COMPARISONS
    if name in ("nan", "num"):
        missing = name == "nan"
        compare = lambda x, y: ((x != x) | (y != y)) == missing  # noqa: E731
    elif name == "ne" and is_float(kind):
        compare = lambda x, y: (x != y) & (x == x) & (y == y)  # noqa: E731
    elif unordered:  # `neu` and the like: also where one is not a number
        known = COMPARISONS[name.removesuffix("u")]
        compare = lambda x, y: known(x, y) | (x != x) | (y != y)  # noqa: E731
    else:
        compare = COMPARISONS[name]
    if "ftz" in modifiers:
        exact = compare
        compare = lambda x, y: exact(_flushed(x), _flushed(y))  # noqa: E731
    if not more:
        return Calculation("pred", (kind, kind), compare)
    [join] = more
    both = BOOLEANS[join]
    return Calculation("pred", (kind, kind, "pred"), lambda x, y, p: both(compare(x, y), p))


def _select(_: str, kind: str, modifiers: set[str], __: list[str]) -> Calculation:
    _only(set(), modifiers)
    return Calculation(kind, (kind, kind, "pred"), lambda x, y, p: np.where(p, x, y))


_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(_: str, kind: str, modifiers: set[str], order: list[str]) -> Calculation:
    *how, result = order
    how = [x for x in how if x not in ("ftz", "sat")]
    dtype = dtype_of(result)
    if result in ("f16x2", "bf16x2"):  # the first operand is the upper half
        _only({"rn", result}, modifiers)
        return Calculation(
            result, (kind, kind), lambda x, y: np.stack([y, x], -1).astype(dtype).reshape(-1)
        )
    if is_float(kind) and not is_float(result):
        [rounding] = how
        largest = np.iinfo(dtype)

        def whole(x: Array) -> Array:
            x = _TO_WHOLE[rounding](x.astype(np.longdouble))
            return np.clip(np.nan_to_num(x), largest.min, largest.max).astype(dtype)

        return Calculation(result, (kind,), _with_modifiers(whole, modifiers & {"ftz"}))
    if how and how[0] in _TO_WHOLE:  # a whole number, as a floating-point number
        value = _TO_WHOLE[how[0]]
    else:
        _only({"rn", "ftz", "sat", result} if is_float(result) else {result}, modifiers)
        value = lambda x: x.astype(dtype)  # noqa: E731
    return Calculation(result, (kind,), _with_modifiers(value, modifiers & {"ftz", "sat"}))


_MAKERS: dict[str, Callable[[str, str, set[str], list[str]], Calculation]] = {
    **dict.fromkeys(_TWO, _two),
    **dict.fromkeys([*_ONE, *_ROUGH], _one),
    **dict.fromkeys(["mul", "mad", "fma"], _product),
    **dict.fromkeys(["and", "or", "xor", "not"], _bitwise),
    **dict.fromkeys(["shl", "shr"], _shift),
    **dict.fromkeys(["popc", "clz"], _count),
    "div": _div,
    "shf": _funnel,
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": _logic,
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
}
