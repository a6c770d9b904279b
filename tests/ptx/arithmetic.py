"""What each lane does for itself: the value of an instruction from the values of its operands.

`find` knows an instruction by its name. Modifiers that it does not know are a fault, so that
none is passed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import numpy as np

from tests.ptx import bits
from tests.ptx.numbers import (
    SIGNED,
    UNSIGNED,
    Array,
    Calculation,
    Maker,
    dtype_of,
    is_float,
    only,
)
from tests.ptx.parse import Fault, bits_of

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
        return _MAKERS[base](base, kind, modifiers)
    except (KeyError, ValueError):
        raise Fault(f"unknown instruction {op}") from None


def _flushed(x: Array) -> Array:
    """Subnormal numbers become 0."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _modified(value: Callable[..., Array], modifiers: Iterable[str]) -> Callable[..., Array]:
    """With `.ftz` and `.sat`: results of 0 to 1."""
    if "ftz" in modifiers:
        exact = value
        value = lambda *x: _flushed(exact(*map(_flushed, x)))  # noqa: E731
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


_TWO: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "min": np.fmin,
    "max": np.fmax,
    "rem": lambda x, y: x - _divided(x, y) * y,
}
_ONE: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


def _two(base: str, kind: str, modifiers: list[str]) -> Calculation:
    only(ROUNDS | {"ftz", "sat", "NaN"} if is_float(kind) else set(), modifiers)
    value = _TWO[base]
    if "NaN" in modifiers:
        value = {"min": np.minimum, "max": np.maximum}[base]
    return Calculation(kind, (kind, kind), _modified(value, modifiers))


def _one(base: str, kind: str, modifiers: list[str]) -> Calculation:
    only(ROUNDS | {"ftz"}, modifiers)
    return Calculation(kind, (kind,), _modified(_ONE[base], modifiers))


def _div(_: str, kind: str, modifiers: list[str]) -> Calculation:
    only(ROUNDS | {"ftz"} if is_float(kind) else set(), modifiers)
    value = np.divide if is_float(kind) else _divided
    return Calculation(kind, (kind, kind), _modified(value, modifiers))


def _fused(x: Array, y: Array, z: Array) -> Array:
    """x * y + z, rounded once: of twice the bits, the product is exact."""
    wide = np.longdouble if x.dtype == np.float64 else np.float64
    return (x.astype(wide) * y + z).astype(x.dtype)


def _wide(kind: str) -> str:
    return f"{kind[0]}{2 * bits_of(kind)}"


def _high(x: Array, y: Array) -> Array:
    """The upper half of a product."""
    width = 8 * x.itemsize
    if width == 64:
        product = x.astype(object) * y.astype(object) >> 64
        return (product & (2**64 - 1)).astype(np.uint64).view(x.dtype)
    wide = (SIGNED if x.dtype.kind == "i" else UNSIGNED)[2 * width]
    return ((x.astype(wide) * y.astype(wide)) >> wide(width)).astype(x.dtype)


def _product(base: str, kind: str, modifiers: list[str]) -> Calculation:
    """`mul` and `mad`, `fma`."""
    if is_float(kind):
        only({"rn", "ftz", "sat"}, modifiers)
        if base == "mul":
            return Calculation(kind, (kind, kind), _modified(np.multiply, modifiers))
        return Calculation(kind, (kind,) * 3, _modified(_fused, modifiers))
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


# ---------------------------------------------------- comparison and conversion


def _comparison(name: str, floats: bool) -> Callable[[Array, Array], Array]:
    """By its name; those with a `u` hold also where one is not a number, the others never."""
    if name in ("nan", "num"):
        return lambda x, y: ((x != x) | (y != y)) == (name == "nan")
    if not floats:
        return COMPARISONS[name]
    if name == "ne":
        return lambda x, y: (x != y) & (x == x) & (y == y)
    if name in COMPARISONS:
        return COMPARISONS[name]
    ordered = COMPARISONS[name.removesuffix("u")]
    return lambda x, y: ordered(x, y) | (x != x) | (y != y)


def _compare(_: str, kind: str, modifiers: list[str]) -> Calculation:
    """`setp`, also with `.and`, `.or`, `.xor` and one predicate more."""
    name, *more = [x for x in modifiers if x != "ftz"]
    compare = _comparison(name, is_float(kind))
    if "ftz" in modifiers:
        exact = compare
        compare = lambda x, y: exact(_flushed(x), _flushed(y))  # noqa: E731
    if not more:
        return Calculation("pred", (kind, kind), compare)
    [join] = more
    both = bits.BOOLEANS[join]
    return Calculation("pred", (kind, kind, "pred"), lambda x, y, p: both(compare(x, y), p))


def _select(_: str, kind: str, modifiers: list[str]) -> Calculation:
    only(set(), modifiers)
    return Calculation(kind, (kind, kind, "pred"), lambda x, y, p: np.where(p, x, y))


_TO_WHOLE = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(_: str, kind: str, modifiers: list[str]) -> Calculation:
    *how, result = modifiers
    known, dtype = {*how} & {"ftz", "sat"}, dtype_of(result)
    rounding = [x for x in how if x not in known]
    if result in ("f16x2", "bf16x2"):  # the first operand is the upper half
        only({"rn"}, how)
        return Calculation(
            result, (kind, kind), lambda x, y: np.stack([y, x], -1).astype(dtype).reshape(-1)
        )
    if rounding and rounding[0] in _TO_WHOLE:
        [name] = rounding
        to_whole = _TO_WHOLE[name]
        if is_float(result):
            return Calculation(result, (kind,), _modified(to_whole, known))
        limits = np.iinfo(dtype)
        wide = np.longdouble if limits.bits == 64 else np.float64  # it holds the limits

        def whole(x: Array) -> Array:
            x = np.nan_to_num(to_whole(x.astype(wide)))
            return np.clip(x, limits.min, limits.max).astype(dtype)

        return Calculation(result, (kind,), _modified(whole, known & {"ftz"}))
    only({"rn"} if is_float(result) else set(), rounding)
    return Calculation(result, (kind,), _modified(lambda x: x.astype(dtype), known))


_MAKERS: dict[str, Maker] = {
    **bits.MAKERS,
    **dict.fromkeys(_TWO, _two),
    **dict.fromkeys(_ONE, _one),
    **dict.fromkeys(["mul", "mad", "fma"], _product),
    "div": _div,
    "setp": _compare,
    "selp": _select,
    "cvt": _convert,
}
