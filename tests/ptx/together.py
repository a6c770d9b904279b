"""Barriers, and what the lanes of a warp exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tests.ptx import warp
from tests.ptx.parse import Fault, Instruction

if TYPE_CHECKING:
    from tests.ptx.machine import Machine
    from tests.ptx.program import Program, Step


def barrier(index: int, x: Instruction) -> Step:
    """`bar.sync`: of all threads of a block, or of as many as it says."""
    if x.op not in ("bar.sync", "barrier.sync", "barrier.sync.aligned") or x.predicate is not None:
        raise Fault(f"unknown instruction {x}")
    number, *count = (int(str(y), 0) for y in x.operands)
    return lambda m: m.arrive(number, count[0] if count else m.block_threads, index + 1)


def _warp_barrier(program: Program, x: Instruction, words: list[str]) -> Step:
    return lambda m: m.shared.synchronize_lanes(m.warps())


def _fence(program: Program, x: Instruction, words: list[str]) -> Step:
    """Of memory: only what asynchronous products need is looked after."""
    if words[:2] == ["proxy", "async"]:
        return lambda m: m.shared.fence(m.which())
    return lambda m: None


def _shuffle(program: Program, x: Instruction, words: list[str]) -> Step:
    name, _, found = str(x.operands[0]).partition("|")
    put = program.writing(name, "b32")
    put_found = program.writing(found, "pred") if found else None
    value, by, limits = (program.reading(y, "u32") for y in x.operands[1:4])
    how = words[1]

    def shuffle(m: Machine) -> None:
        m.warps()
        got, there = warp.shuffled(how, value(m), by(m), limits(m))
        put(m, got)
        if put_found:
            put_found(m, there)

    return shuffle


def _reduce(program: Program, x: Instruction, words: list[str]) -> Step:
    how, kind = words[1:]
    put, read = program.writing(x.operands[0], kind), program.reading(x.operands[1], kind)

    def reduce(m: Machine) -> None:
        m.warps()
        put(m, warp.reduced(how, read(m)))

    return reduce


def _vote(program: Program, x: Instruction, words: list[str]) -> Step:
    """`vote.sync`: which lanes, whether all of them, or any."""
    how, kind = words[1:]
    put, read = program.writing(x.operands[0], kind), program.reading(x.operands[1], "pred")

    def vote(m: Machine) -> None:
        m.warps()
        holds = read(m).reshape(-1, 32)
        if how == "ballot":
            answer = np.packbits(holds, axis=1, bitorder="little").view(np.uint32)[:, 0]
        else:
            answer = {"all": holds.all, "any": holds.any}[how](1)
        put(m, np.repeat(answer, 32))

    return vote


def _transpose(program: Program, x: Instruction, words: list[str]) -> Step:
    """`movmatrix`: an 8 x 8 matrix of 16-bit numbers."""
    put, read = program.writing(x.operands[0], "b32"), program.reading(x.operands[1], "b32")

    def transpose(m: Machine) -> None:
        m.warps()
        matrices = read(m).view(np.uint16).reshape(-1, 8, 8)
        put(m, np.ascontiguousarray(matrices.transpose(0, 2, 1)).view(np.uint32).reshape(-1))

    return transpose


def _multiply(program: Program, x: Instruction, words: list[str]) -> Step:
    kind = words[-2]
    known = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
    if x.op != known or kind not in ("f16", "bf16"):
        raise Fault(f"unknown instruction {x.op}")
    to, *sources = (y if isinstance(y, tuple) else (y,) for y in x.operands)
    puts = [program.writing(y, "f32") for y in to]
    a, b, c = ([program.reading(y, "b32") for y in names] for names in sources)

    def multiply(m: Machine) -> None:
        m.warps()
        values = ([read(m) for read in reads] for reads in (a, b, c))
        for put, value in zip(puts, warp.multiplied(kind, *values), strict=True):
            put(m, value)

    return multiply


MAKERS = {
    "bar": _warp_barrier,
    "fence": _fence,
    "shfl": _shuffle,
    "redux": _reduce,
    "vote": _vote,
    "movmatrix": _transpose,
    "mma": _multiply,
}
