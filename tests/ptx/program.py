"""A kernel's instructions as functions of the machine.

Every register, number and variable that the text names gets a slot of the machine's registers.
A function returns whether the threads go on elsewhere than at the next instruction. `access` and
`together` make those of memory, and of what threads do together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx import access, together, warpgroup
from tests.ptx.arithmetic import find
from tests.ptx.numbers import UNSIGNED, Array, constant, reader, writer
from tests.ptx.parse import Fault, Instruction, Kernel, Operand, bits_of

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Step = Callable[["Machine"], Any]

NOTHING = {"membar", "griddepcontrol", "prefetch", "prefetchu", "discard", "nanosleep"}


class Program:
    """A kernel, ready to run.

    Attributes:
        kernel: what it is made of.
        steps: a function for each instruction, and one that ends.
        bits: of the registers.
        constants: (register, value).
        special: (register, name) of those that the hardware sets.
        parameters: (offset, bytes) of each in what a launch passes.
        shared_unit: bytes of the smallest access to shared memory.

    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.bits: list[int] = []
        self.constants: list[tuple[int, Any]] = []
        self.special: list[tuple[int, str]] = []
        self.parameters: dict[str, tuple[int, int]] = {}
        self.shared_unit = 16
        self._slots: dict[tuple[str, int], int] = {}
        at = 0
        for name, (_, size) in kernel.parameters.items():
            self.parameters[name] = (at, size)
            at += -(-size // 16) * 16
        self.parameter_bytes = at
        self.steps: list[Step] = []
        for index, instruction in enumerate(kernel.instructions):
            try:
                self.steps.append(self._step(index, instruction))
            except Fault as fault:
                raise Fault(f"{fault}; {kernel.name}: {instruction}") from None
        self.steps.append(_end)

    # --------------------------------------------------------------- operands

    def slot(self, name: Operand, bits: int) -> int:
        """Of a register, or of a number or an address of so many bits."""
        if not isinstance(name, str):
            raise Fault(f"not one operand: {name}")
        bits = self.kernel.registers.get(name, bits)
        if (name, bits) in self._slots:
            return self._slots[name, bits]
        slot = self._slots[name, bits] = len(self.bits)
        self.bits.append(bits)
        if name in self.kernel.registers or name == "_":
            pass
        elif name.startswith("%"):
            self.special.append((slot, name))
        elif name in self.kernel.shared:
            at, size = self.kernel.shared[name]
            at = at if size else self.kernel.shared_bytes
            self.constants.append((slot, UNSIGNED[bits](at)))
        elif name in self.parameters:
            self.constants.append((slot, UNSIGNED[bits](self.parameters[name][0])))
        else:
            self.constants.append((slot, constant(name, bits)))
        return slot

    def reading(self, name: Operand, kind: str) -> Callable[[Machine], Array]:
        """Numbers of a type, from an operand."""
        bits = bits_of(kind)
        slot = self.slot(name, 16 if bits == 8 else bits)
        read = reader(kind, self.bits[slot])
        return lambda m: read(m.registers[slot])

    def writing(self, name: Operand, kind: str) -> Callable[[Machine, Array], None]:
        """Set a register, or nothing, to numbers of a type."""
        slot = self.slot(name, bits_of(kind))
        write = writer(kind, self.bits[slot])
        return lambda m, value: m.put(slot, write(value))

    def address(self, operand: Operand) -> Callable[[Machine], Array]:
        """int64, of `[register or variable + offset]`."""
        found = re.fullmatch(r"\[\s*([\w%$']+)\s*(?:\+\s*(-?\w+)\s*)?\]", str(operand))
        if not found:
            raise Fault(f"not an address: {operand}")
        slot, offset = self.slot(found[1], 64), int(found[2] or "0", 0)
        return lambda m: m.registers[slot].astype(np.int64) + offset

    # ----------------------------------------------------------- instructions

    def _step(self, index: int, x: Instruction) -> Step:
        base, *words = x.op.split(".")
        if base in ("bra", "ret", "exit"):
            return self._jump(index, x)
        if base in ("bar", "barrier") and "warp" not in words:
            return together.barrier(index, x)
        make = _MAKERS.get(base)
        step = _pass if base in NOTHING else make(self, x, words) if make else self._calculate(x)
        return step if x.predicate is None else self._guarded(step, x)

    def _guarded(self, step: Step, x: Instruction) -> Step:
        """Executed only where the predicate holds."""
        slot, negated = self.slot(x.predicate or "", 1), x.negated

        def guarded(m: Machine) -> Any:
            before, wanted = m.active, m.registers[slot]
            if negated:
                wanted = ~wanted
            if before is not None:
                wanted = wanted & before
            elif wanted.all():
                return step(m)
            if not wanted.any():
                return None
            m.active = wanted
            try:
                return step(m)
            finally:
                m.active = before

        return guarded

    def _calculate(self, x: Instruction) -> Step:
        calculation = find(x.op)
        value = calculation.value
        if len(x.operands) != 1 + len(calculation.operands):
            raise Fault(f"{len(x.operands)} operands")
        put = self.writing(x.operands[0], calculation.result)
        reads = [*map(self.reading, x.operands[1:], calculation.operands)]
        if len(reads) == 2:
            first, second = reads
            return lambda m: put(m, value(first(m), second(m)))
        return lambda m: put(m, value(*[read(m) for read in reads]))

    def _jump(self, index: int, x: Instruction) -> Step:
        """`bra`, `ret`: those that do not go there go on."""
        target = None
        if x.op.startswith("bra"):
            target = self.kernel.labels[str(x.operands[0])]
        slot = None if x.predicate is None else self.slot(x.predicate, 1)
        negated = x.negated

        def jump(m: Machine) -> bool:
            here = m.active
            if slot is not None:
                wanted = ~m.registers[slot] if negated else m.registers[slot]
                taken = wanted if here is None else wanted & here
                if not taken.any():
                    return False
                m.go(index + 1)
                m.active = taken
            if target is None:
                m.done[m.which()] = True
            else:
                m.go(target)
            return True

        return jump


def _move(program: Program, x: Instruction, words: list[str]) -> Step:
    """`mov`, also of vectors into a register and back."""
    kind = words[-1]
    kind = kind if kind == "pred" else f"b{bits_of(kind)}"
    to, source = x.operands
    if isinstance(to, tuple):
        read, part = program.reading(source, kind), bits_of(kind) // len(to)
        puts = [(i, program.writing(y, f"b{part}")) for i, y in enumerate(to) if y != "_"]
        dtype, count = UNSIGNED[part], len(to)

        def unpack(m: Machine) -> None:
            parts = read(m).view(dtype).reshape(-1, count)
            for i, put in puts:
                put(m, np.ascontiguousarray(parts[:, i]))

        return unpack
    put = program.writing(to, kind)
    if isinstance(source, tuple):
        reads = [program.reading(y, f"b{bits_of(kind) // len(source)}") for y in source]
        dtype = UNSIGNED[bits_of(kind)]
        return lambda m: put(m, np.stack([read(m) for read in reads], -1).view(dtype)[:, 0])
    read = program.reading(source, kind)
    return lambda m: put(m, read(m))


_MAKERS: dict[str, Callable[[Program, Instruction, list[str]], Step]] = {
    "mov": _move,
    **access.MAKERS,
    **together.MAKERS,
    "wgmma": warpgroup.make,
}


def _pass(m: Machine) -> None:
    """Has no effect that can be seen here."""


def _end(m: Machine) -> bool:
    m.done[m.which()] = True
    return True
