"""`wgmma`: products of four warps, whose operands lie in shared memory, asynchronously.

Results are there, and what is read may be overwritten, when they have been waited for. What was
written to shared memory must have passed a proxy fence before.
PTX ISA, "Asynchronous warpgroup level matrix instructions".
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx.numbers import Array, halves
from tests.ptx.parse import Fault, Instruction

if TYPE_CHECKING:
    from tests.ptx.machine import Machine
    from tests.ptx.program import Program, Step

WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of the rows within which 16-byte parts are swizzled, by the two highest bits; 0: not."""


def part_addresses(descriptor: Array, rows: int, transposed: bool) -> Array:
    """Of an operand of `rows` rows and 16 columns, of 16 bytes each: [n, rows, 2].

    Args:
        descriptor: matrix descriptors [n].
        rows: along M or N.
        transposed: whether columns lie together, not rows: then [n, 16, rows / 8].

    Raises:
        Fault: a layout that is not known.

    """

    def bytes_of(bit: int) -> Array:
        return ((descriptor >> np.uint64(bit)).astype(np.int64) & 0x3FFF)[:, None, None] << 4

    [mode] = np.unique(descriptor >> np.uint64(62)).tolist()
    if mode and (descriptor >> np.uint64(49) & np.uint64(7)).any():  # else it has no meaning
        raise Fault("a matrix descriptor with an offset")
    width = WIDTHS[mode]
    start, lead, stride = bytes_of(0), bytes_of(16), bytes_of(32)
    if transposed:
        k, part = np.arange(16)[:, None], np.arange(rows // 8)
        if mode == 0:
            lead, stride = stride, lead
        at = start + part * 8 // (width // 2) * lead + part * 16 % width
        at = at + k % 8 * width + k // 8 * stride
    else:
        row, part = np.arange(rows)[:, None], np.arange(2)
        at = start + row // 8 * stride + row % 8 * width + part * (16 if mode else lead)
    return at ^ (at >> 3 & width - 16)


@dataclass
class _Group:
    """Products that some threads wait for together: registers' values, and what is being read."""

    threads: Array
    values: dict[int, Array] = field(default_factory=dict)
    reads: list[tuple[Array, Array]] = field(default_factory=list)  # addresses, threads


class Products:
    """Those of a machine that have been begun."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._open = self._group()
        self._groups: list[_Group] = []
        self._sums: dict[int, tuple[Array, Array]] = {}  # threads that wait, values

    def _group(self) -> _Group:
        return _Group(np.zeros(self.machine.count, bool))

    def begin(self, slots: list[int], make: Callable[[list[Array]], list[Array]]) -> None:
        """`make` new values of registers from the old ones, which may be on their way."""
        m = self.machine
        active = np.ones(m.count, bool) if m.active is None else m.active
        olds = []
        for slot in slots:
            waiting, values = self._sums.get(slot, (np.zeros(m.count, bool), m.registers[slot]))
            olds.append(np.where(waiting, values, m.registers[slot]))
        for slot, new in zip(slots, make(olds), strict=True):
            waiting, values = self._sums.get(slot, (np.zeros(m.count, bool), new))
            self._sums[slot] = waiting | active, np.where(active, new, values)
            self._open.values[slot] = self._sums[slot][1]
            m.put(slot, np.full(m.count, 0xFFFFFFFF, np.uint32))
        self._open.threads |= active

    def read(self, at: Array, threads: Array) -> Array:
        """16 bytes at each address [groups, n] for the four warps of each group: [groups, n, 8]."""
        groups, n = at.shape
        flat = np.repeat(at, 4, 0).ravel()
        of = np.repeat(threads.reshape(-1, 32)[:, 0], n)
        data = self.machine.shared.hold(flat, 16, of)
        self._open.reads.append((flat, of))
        return data.view(np.uint16).reshape(groups, 4, n, 8)[:, 0]

    def commit(self) -> None:
        self._groups.append(self._open)
        self._open = self._group()

    def wait(self, newest: int) -> None:
        """All groups of the active threads but so many of the newest have ended."""
        m = self.machine
        before = m.active
        older = np.zeros(m.count, np.int64)
        for group in reversed(self._groups):
            older += group.threads
            landing = group.threads & (older > newest)
            if before is not None:
                landing &= before
            if not landing.any():
                continue
            m.active = landing
            for slot, values in group.values.items():
                m.put(slot, values)
                waiting, sums = self._sums[slot]
                self._sums[slot] = waiting & ~landing, sums
            for at, threads in group.reads:
                mine = landing[threads]
                m.shared.release(at[mine], 16, threads[mine])
            group.threads &= ~landing
        m.active = before
        self._groups = [group for group in self._groups if group.threads.any()]


def _multiply(program: Program, x: Instruction, kind: str, columns: int) -> Step:
    to, left, right, scaled, *flags = x.operands
    slots = [program.slot(y, 32) for y in to]
    keep = program.reading(scaled, "pred")
    fragments = [program.reading(y, "b32") for y in left] if isinstance(left, tuple) else None
    describe = None if fragments else program.reading(left, "b64")
    describe_right = program.reading(right, "b64")
    turned = [flag == "1" for flag in flags[2:]]
    if flags[:2] != ["1", "1"] or len(turned) != (1 if fragments else 2):
        raise Fault(f"unknown instruction {x.op}")

    def operand(m: Machine, descriptors: Array, rows: int, transposed: bool) -> Array:
        """[groups, rows, 16]."""
        which = m.which()
        each = descriptors[which].reshape(-1, 128)
        if (each != each[:, :1]).any():
            raise Fault("lanes of a warpgroup have different descriptors")
        at = part_addresses(each[:, 0], rows, transposed)
        parts = m.products.read(at.reshape(len(at), -1), which)
        matrix = halves(parts, kind).reshape(len(at), *at.shape[1:2], -1)
        return matrix.transpose(0, 2, 1) if transposed else matrix

    def multiply(m: Machine) -> None:
        warps = m.warps().reshape(-1, 4)
        if (warps[:, 0] % 4).any() or (warps != warps[:, :1] + np.arange(4)).any():
            raise Fault("only some warps of a group are here")
        which = m.which()
        if fragments:
            a = [halves(read(m)[which], kind).reshape(-1, 8, 8) for read in fragments]
            top, bottom = np.concatenate(a[0::2], 2), np.concatenate(a[1::2], 2)
            a = np.concatenate([top, bottom], 1).reshape(-1, 64, 16)
        else:
            a = operand(m, describe(m), 64, turned[0])  # type: ignore[misc]
        b = operand(m, describe_right(m), columns, turned[-1])
        product = (a @ b.transpose(0, 2, 1)).reshape(-1, 2, 8, columns // 8, 4, 2)
        order = [(j, half, i) for j in range(columns // 8) for half in range(2) for i in range(2)]

        def make(olds: list[Array]) -> list[Array]:
            news = []
            for (j, half, i), old in zip(order, olds, strict=True):
                new = np.zeros(m.count, np.float32)
                new[which] = product[:, half, :, j, :, i].reshape(-1)
                new += np.where(keep(m), old.view(np.float32), np.float32(0))
                news.append(new.view(np.uint32))
            return news

        m.products.begin(slots, make)

    return multiply


def make(program: Program, x: Instruction, words: list[str]) -> Step:
    """`wgmma` of halves with sums of fp32, its groups and its fence."""
    if words[0] == "fence":
        return lambda m: None
    if words[0] == "commit_group":
        return lambda m: m.products.commit()
    if words[0] == "wait_group":
        newest = int(str(x.operands[0]))
        return lambda m: m.products.wait(newest)
    kind = words[-1]
    known = rf"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.{kind}\.{kind}"
    found: Any = re.fullmatch(known, x.op)
    if not found or kind not in ("f16", "bf16"):
        raise Fault(f"unknown instruction {x.op}")
    program.shared_unit = min(program.shared_unit, 16)
    return _multiply(program, x, kind, int(found[1]))
