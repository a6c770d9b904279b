"""Registers as numbers of PTX's types.

A register is an array of one unsigned number of 16, 32 or 64 bits a thread, or of bools. bf16 is
calculated with in float32; two halves in one register are two numbers a thread.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.ptx.parse import Fault, bits_of

Array = NDArray[Any]


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


Maker = Callable[[str, str, list[str]], Calculation]
"""Of an instruction's name, its last type, and what stands between them."""


def only(known: set[str], modifiers: list[str]) -> None:
    """Raise KeyError for a modifier that is not known."""
    if unknown := {*modifiers} - known:
        raise KeyError(unknown)


UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}


def storage(bits: int) -> Any:
    """Of a register."""
    return np.bool_ if bits == 1 else UNSIGNED[bits]


def dtype_of(kind: str) -> Any:
    """Of the numbers that a type is calculated with."""
    if kind == "pred":
        return np.bool_
    if kind.startswith("bf16"):
        return np.float32
    if kind.startswith("f"):
        return FLOAT[int(kind[1:3])]
    return (SIGNED if kind[0] == "s" else UNSIGNED)[bits_of(kind)]


def is_float(kind: str) -> bool:
    return kind[0] == "f" or kind.startswith("bf")


def widened(bits: Array) -> Array:
    """bf16, as bits, in float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrowed(x: Array) -> Array:
    """float32 as the bits of bf16, half to even."""
    bits = x.view(np.uint32)
    up = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (up + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    return np.where(x != x, np.uint16(0x7FFF), rounded)


def halves(x: Array, kind: str) -> Array:
    """Of bits, numbers of f16 or bf16 in float32."""
    return x.view(np.float16).astype(np.float32) if kind == "f16" else widened(x.view(np.uint16))


@functools.cache
def reader(kind: str, bits: int) -> Callable[[Array], Array]:
    """Numbers of a type from registers of so many bits, whose lowest they are."""
    width, dtype = bits_of(kind), dtype_of(kind)
    if width == bits:
        if kind.startswith("bf16"):
            return lambda x: widened(x.view(np.uint16))
        if dtype in (np.bool_, storage(bits)):
            return lambda x: x
        return lambda x: x.view(dtype)
    if width > bits:
        raise Fault(f"a register of {bits} bits holds no {kind}")
    unsigned = UNSIGNED[width]
    whole = reader(kind, width)
    return lambda x: whole(x.astype(unsigned))


@functools.cache
def writer(kind: str, bits: int) -> Callable[[Array], Array]:
    """What registers of so many bits are, from numbers of a type; unused bits are its sign's."""
    width = bits_of(kind)
    if kind == "pred":
        return lambda x: x
    if kind.startswith("bf16"):
        return lambda x: narrowed(x).view(UNSIGNED[width])
    if width == bits:
        unsigned = UNSIGNED[bits]
        return lambda x: x.view(unsigned)
    if width > bits or is_float(kind):
        raise Fault(f"a register of {bits} bits holds no {kind}")
    wide = (SIGNED if kind[0] == "s" else UNSIGNED)[bits]
    return lambda x: x.astype(wide).view(UNSIGNED[bits])


def constant(text: str, bits: int) -> Any:
    """A number in the text, as a register of so many bits holds it.

    Raises:
        Fault: it is no number.

    """
    if found := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})|0[dD]([0-9A-Fa-f]{16})", text):
        value = int(found[1] or found[2], 16)
        if found[2] and bits == 32:  # an f64 where an f32 is meant
            [value] = struct.unpack(
                "<I", struct.pack("<f", struct.unpack("<d", value.to_bytes(8, "little"))[0])
            )
    elif re.fullmatch(r"-?(0[xX][0-9A-Fa-f]+|\d+)U?", text):
        value = int(text.rstrip("U"), 0)
    else:
        raise Fault(f"not a register, a variable or a number: {text}")
    return storage(bits)(value != 0 if bits == 1 else value & ((1 << bits) - 1))
