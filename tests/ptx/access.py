"""Loads, stores and copies."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.numbers import UNSIGNED, Array, reader
from tests.ptx.parse import Fault, Instruction, bits_of
from tests.ptx.warp import matrix_addresses

if TYPE_CHECKING:
    from tests.ptx.machine import Machine
    from tests.ptx.program import Program, Step

GENERIC = 1 << 60
"""Where shared memory lies in generic addresses; global memory is where it is."""


def _space(program: Program, words: list[str], size: int) -> str:
    """Of an access of so many bytes; "" is any."""
    for word in words:
        space = word.partition("::")[0]
        if space in ("global", "param"):
            return space
        if space in ("local", "const"):
            raise Fault(f"{space} memory is not known")
        if space == "shared":
            break
    else:
        space = ""
    program.shared_unit = min(program.shared_unit, size)
    return space


def _in_shared(space: str, at: Array) -> tuple[bool, Array]:
    """Whether addresses are of shared memory, and where they are there."""
    if space == "":
        shared = at >= GENERIC
        if shared.any() != shared.all():
            raise Fault("generic addresses of two spaces")
        return bool(shared.any()), at - GENERIC if shared.any() else at
    return space == "shared", at


def _load(program: Program, x: Instruction, words: list[str]) -> Step:
    to, source = x.operands[:2]
    names = to if isinstance(to, tuple) else (to,)
    kind = words[-1]
    puts = [(i, program.writing(y, kind)) for i, y in enumerate(names) if y != "_"]
    dtype, size = UNSIGNED[bits_of(kind)], bits_of(kind) // 8 * len(names)
    numbers = reader(kind, bits_of(kind))
    space, address = _space(program, words, size), program.address(source)

    def load(m: Machine) -> None:
        which = m.which()
        shared, at = _in_shared(space, address(m)[which])
        if shared:
            data = m.shared.load(at, size, which)
        elif space == "param":
            data = m.parameters[at[:, None] + np.arange(size)]
        else:
            data = m.memory.load(at, size, m.block_of[which])
        parts = data.view(dtype)
        for i, put in puts:
            put(m, numbers(_everywhere(m, parts[:, i], which)))

    return load


def _store(program: Program, x: Instruction, words: list[str]) -> Step:
    to, source = x.operands[:2]
    names = source if isinstance(source, tuple) else (source,)
    kind = f"b{bits_of(words[-1])}"
    size = bits_of(kind) // 8 * len(names)
    reads, address = [program.reading(y, kind) for y in names], program.address(to)
    space = _space(program, words, size)

    def store(m: Machine) -> None:
        which = m.which()
        data = np.stack([read(m)[which] for read in reads], -1).view(np.uint8)
        shared, at = _in_shared(space, address(m)[which])
        if shared:
            m.shared.store(at, data.reshape(-1, size), which)
        else:
            m.memory.store(at, data.reshape(-1, size), m.block_of[which])

    return store


def _everywhere(m: Machine, some: Array, which: Array) -> Array:
    """Numbers of some threads, as of all."""
    if len(which) == m.count:
        return np.ascontiguousarray(some)
    out = np.zeros(m.count, some.dtype)
    out[which] = some
    return out


def _copy(program: Program, x: Instruction, words: list[str]) -> Step:
    """`cp.async`, and the ends of its groups."""
    if words[-1] == "commit_group":
        return lambda m: m.commit()
    if words[-1] == "wait_group":
        newest = int(str(x.operands[0]), 0)
        return lambda m: m.wait(newest)
    if words[:2] not in (["async", "ca"], ["async", "cg"]):
        raise Fault(f"unknown instruction {x.op}")
    size = int(str(x.operands[2]), 0)
    program.shared_unit = min(program.shared_unit, size)
    to, source = map(program.address, x.operands[:2])
    given = program.reading(x.operands[3], "u32") if len(x.operands) > 3 else None

    def copy(m: Machine) -> None:
        which = m.which()
        data = np.zeros((len(which), size), np.uint8)
        there = np.ones(len(which), bool)
        if given is not None:  # so many bytes, and zeros
            counts = given(m)[which]
            there = counts == size
            if (counts[~there] > 0).any():
                raise Fault("a copy of part of its bytes")
        if there.any():
            some = which[there]
            data[there] = m.memory.load(source(m)[some], size, m.block_of[some])
        m.copy(to(m)[which], data, which)

    return copy


def _matrices(program: Program, x: Instruction, words: list[str]) -> Step:
    """`ldmatrix`, `stmatrix`."""
    [count] = [int(y[1]) for y in words if re.fullmatch(r"x\d", y)]
    transposed, load = "trans" in words, x.op.startswith("ld")
    names, place = x.operands if load else x.operands[::-1]
    names = names if isinstance(names, tuple) else (names,)
    address, size = program.address(place), 2 if transposed else 4
    program.shared_unit = min(program.shared_unit, size)
    dtype, each = UNSIGNED[8 * size], 4 // size
    uses: list[Callable[..., Any]] = [
        program.writing(y, "b32") if load else program.reading(y, "b32") for y in names
    ]

    def places(m: Machine) -> tuple[Array, Array, Array]:
        m.warps()
        which = m.which()
        at = matrix_addresses(address(m)[which], count, transposed)
        return np.concatenate(at), np.tile(which, len(at)), which

    def read(m: Machine) -> None:
        at, threads, which = places(m)
        parts = m.shared.load(at, size, threads).view(dtype).reshape(count, each, -1)
        for put, part in zip(uses, parts, strict=True):
            together = np.ascontiguousarray(part.T).view(np.uint32)[:, 0]
            put(m, _everywhere(m, together, which))

    def write(m: Machine) -> None:
        at, threads, which = places(m)
        parts = [of(m)[which].view(dtype).reshape(-1, each).T.ravel() for of in uses]
        m.shared.store(at, np.concatenate(parts).view(np.uint8).reshape(-1, size), threads)

    return read if load else write


def _generic(program: Program, x: Instruction, words: list[str]) -> Step:
    """`cvta`: an address of a space as a generic one, or back."""
    put, read = program.writing(x.operands[0], "s64"), program.reading(x.operands[1], "s64")
    by = GENERIC if words[-2].startswith("shared") else 0
    by = -by if words[0] == "to" else by
    return lambda m: put(m, read(m) + by)


MAKERS = {
    "ld": _load,
    "ldu": _load,
    "st": _store,
    "cp": _copy,
    "ldmatrix": _matrices,
    "stmatrix": _matrices,
    "cvta": _generic,
}
