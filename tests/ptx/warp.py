"""What the lanes of a warp do together: shuffles, and products of matrices.

Registers come as [warps * 32] numbers. Lane 4 g + t holds, of a matrix, what stands in row g and
in the columns 2 t and 2 t + 1: PTX ISA, "Matrix fragments for mma.m16n8k16".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.ptx.numbers import Array, halves
from tests.ptx.parse import Fault

LANES = np.arange(32)


def shuffled(how: str, x: Array, by: Array, limits: Array) -> tuple[Array, Array]:
    """`shfl.sync`: x of other lanes, and whether there are any; x otherwise."""
    lane = np.tile(LANES, len(x) // 32)
    by = (by & np.uint32(31)).astype(np.int64)
    clamp, segment = (limits & 31).astype(np.int64), (limits >> np.uint32(8) & 31).astype(np.int64)
    last = (lane & segment) | (clamp & ~segment)
    if how == "idx":
        source = (lane & segment) | (by & ~segment)
    else:
        source = {"up": lane - by, "down": lane + by, "bfly": lane ^ by}[how]
    there = source >= last if how == "up" else source <= last
    source = np.where(there, source, lane)
    return x.reshape(-1, 32)[np.arange(len(x)) // 32, source], there


REDUCTIONS: dict[str, Callable[..., Array]] = {
    "add": np.add.reduce,
    "min": np.minimum.reduce,
    "max": np.maximum.reduce,
    "and": np.bitwise_and.reduce,
    "or": np.bitwise_or.reduce,
    "xor": np.bitwise_xor.reduce,
}


def reduced(how: str, x: Array) -> Array:
    """`redux.sync` over all lanes."""
    return np.repeat(REDUCTIONS[how](x.reshape(-1, 32), axis=1, dtype=x.dtype), 32)


def _halves(x: Array, kind: str) -> Array:
    """Two numbers of each lane, float32: [warps, 8, 8]."""
    return halves(x, kind).reshape(-1, 8, 8)


def multiplied(
    kind: str, a: Sequence[Array], b: Sequence[Array], c: Sequence[Array]
) -> list[Array]:
    """`mma.m16n8k16`, fp32 sums: the registers of a * b + c."""
    left = [_halves(x, kind) for x in a]
    top, bottom = np.concatenate(left[0::2], 2), np.concatenate(left[1::2], 2)
    left = np.concatenate([top, bottom], 1)  # [warps, 16, 16]
    right = np.concatenate([_halves(x, kind) for x in b], 2)  # [warps, 8, 16], transposed
    product = left @ right.transpose(0, 2, 1)  # [warps, 16, 8]
    numbers = product.reshape(-1, 2, 8, 4, 2)
    order = ((0, 0), (0, 1), (1, 0), (1, 1))
    return [
        np.ascontiguousarray(numbers[:, i, :, :, j]).reshape(-1) + x.view(np.float32)
        for (i, j), x in zip(order, c, strict=True)
    ]


def matrix_addresses(rows: Array, count: int, transposed: bool) -> list[Array]:
    """Where the lanes find their part of `count` matrices of 8 rows of 16 bytes.

    Args:
        rows: addresses of rows, matrix after matrix: a lane's each.
        count: matrices.
        transposed: whether a lane's two numbers stand below each other: then two arrays come
            for each matrix, of two bytes each; otherwise one, of four.

    Raises:
        Fault: a row is at an odd address.

    """
    rows = rows.reshape(-1, 32)
    if (rows[:, : 8 * count] % 16).any():
        raise Fault("a row of a matrix is at an odd address")
    places = []
    for i in range(count):
        if not transposed:
            places.append(rows[:, 8 * i + LANES // 4] + LANES % 4 * 4)
            continue
        for j in range(2):
            places.append(rows[:, 8 * i + LANES % 4 * 2 + j] + LANES // 4 * 2)
    return [x.reshape(-1) for x in places]
