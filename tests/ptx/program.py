"""A kernel's instructions as functions of the machine.

Every register, number and variable that the text names gets a slot of the machine's registers.
A function returns whether the threads go on elsewhere than at the next instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.ptx import warp
from tests.ptx.arithmetic import find
from tests.ptx.numbers import UNSIGNED, Array, constant, reader, writer
from tests.ptx.parse import Fault, Instruction, Kernel, Operand, bits_of

if TYPE_CHECKING:
    from tests.ptx.machine import Machine

Step = Callable[["Machine"], Any]

GENERIC = 1 << 60
"""Where shared memory lies in generic addresses; global memory is where it is."""

NOTHING = {"fence", "membar", "griddepcontrol", "prefetch", "discard", "applypriority", "nanosleep"}


class Program:
    """A kernel, ready to run.

    Attributes:
        kernel: what it is made of.
        steps: a function for each instruction, and one that ends.
        bits: of the registers.
        constants: (register, value).
        special: (register, name) of those that the hardware sets.
        shared_unit: bytes of the smallest access to shared memory.

    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.bits: list[int] = []
        self.constants: list[tuple[int, Any]] = []
        self.special: list[tuple[int, str]] = []
        self._slots: dict[tuple[str, int], int] = {}
        self.shared_unit = 16
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
        assert isinstance(name, str), name
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
        else:
            self.constants.append((slot, constant(name, bits)))
        return slot

    def _reading(self, name: Operand, kind: str) -> Callable[[Machine], Array]:
        bits = bits_of(kind)
        slot = self.slot(name, 16 if bits == 8 else bits)
        read = reader(kind, self.bits[slot])
        return lambda m: read(m.registers[slot])

    def _writing(self, name: Operand, kind: str) -> Callable[[Machine, Array], None]:
        slot = self.slot(name, bits_of(kind))
        write = writer(kind, self.bits[slot])
        return lambda m, value: m.put(slot, write(value))

    def _address(self, operand: Operand) -> Callable[[Machine], Array]:
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
        make = {
            "mov": self._move,
            "ld": self._load,
            "st": self._store,
            "cp": self._copy,
            "bar": self._barrier,
            "barrier": self._barrier,
            "shfl": self._shuffle,
            "redux": self._reduce,
            "mma": self._multiply,
            "ldmatrix": self._matrices,
            "stmatrix": self._matrices,
            "cvta": self._generic,
        }.get(base)
        if base in NOTHING:
            step: Step = _pass
        elif make is None:
            step = self._calculate(x)
        else:
            step = make(index, x, words)
        return step if x.predicate is None else self._guarded(step, x)

    def _guarded(self, step: Step, x: Instruction) -> Step:
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
        put = self._writing(x.operands[0], calculation.result)
        reads = [*map(self._reading, x.operands[1:], calculation.operands)]
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

    def _move(self, index: int, x: Instruction, words: list[str]) -> Step:
        """`mov`, also of vectors into a register and back."""
        kind = words[-1]
        to, source = x.operands
        if isinstance(to, tuple):
            read, part = self._reading(source, f"b{bits_of(kind)}"), bits_of(kind) // len(to)
            puts = [(i, self._writing(y, f"b{part}")) for i, y in enumerate(to) if y != "_"]
            dtype, count = UNSIGNED[part], len(to)

            def unpack(m: Machine) -> None:
                parts = read(m).view(dtype).reshape(-1, count)
                for i, put in puts:
                    put(m, np.ascontiguousarray(parts[:, i]))

            return unpack
        put = self._writing(to, f"b{bits_of(kind)}" if kind != "pred" else kind)
        if isinstance(source, tuple):
            reads = [self._reading(y, f"b{bits_of(kind) // len(source)}") for y in source]
            dtype = UNSIGNED[bits_of(kind)]
            return lambda m: put(m, np.stack([r(m) for r in reads], -1).view(dtype)[:, 0])
        read = self._reading(source, f"b{bits_of(kind)}" if kind != "pred" else kind)
        return lambda m: put(m, read(m))

    def _generic(self, index: int, x: Instruction, words: list[str]) -> Step:
        """`cvta`: an address of a space as a generic one, or back."""
        put, read = self._writing(x.operands[0], words[-1]), self._reading(x.operands[1], words[-1])
        by = GENERIC if "shared" in words[-2] else 0
        by = -by if words[0] == "to" else by
        return lambda m: put(m, (read(m).astype(np.int64) + by).view(np.uint64))

    # ----------------------------------------------------------------- memory

    def _load(self, index: int, x: Instruction, words: list[str]) -> Step:
        to, source = x.operands[:2]
        names = to if isinstance(to, tuple) else (to,)
        kind, count = words[-1], len(names)
        puts = [(i, self._writing(y, kind)) for i, y in enumerate(names) if y != "_"]
        dtype, size = UNSIGNED[bits_of(kind)], bits_of(kind) // 8 * count
        numbers = reader(kind, bits_of(kind))
        if words[0] == "param":
            found = re.fullmatch(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+)\s*)?\]", str(source))
            assert found, source
            name, at = found[1], int(found[2] or 0)

            def parameter(m: Machine) -> None:
                parts = np.frombuffer(m.parameters[name], np.uint8)[at : at + size].view(dtype)
                for i, put in puts:
                    put(m, numbers(np.full(m.count, parts[i])))

            return parameter
        read, address = self._reads(words, size), self._address(source)

        def load(m: Machine) -> None:
            which = m.which()
            parts = read(m, address(m)[which], size, which).view(dtype)
            for i, put in puts:
                put(m, numbers(_everywhere(m, parts[:, i], which)))

        return load

    def _store(self, index: int, x: Instruction, words: list[str]) -> Step:
        to, source = x.operands[:2]
        names = source if isinstance(source, tuple) else (source,)
        kind = f"b{bits_of(words[-1])}"
        size = bits_of(kind) // 8 * len(names)
        reads, address = [self._reading(y, kind) for y in names], self._address(to)
        write = self._writes(words, size)

        def store(m: Machine) -> None:
            which = m.which()
            data = np.stack([read(m)[which] for read in reads], -1).view(np.uint8)
            write(m, address(m)[which], data.reshape(-1, size), which)

        return store

    def _reads(self, words: list[str], size: int) -> Callable[..., Array]:
        space = self._space(words, size)

        def read(m: Machine, at: Array, size: int, which: Array) -> Array:
            if space == "generic" and (at >= GENERIC).any():
                at = at - GENERIC
            elif space != "shared":
                return m.memory.load(at, size, m.block_of[which])
            return m.shared.load(at, size, which)

        return read

    def _writes(self, words: list[str], size: int) -> Callable[..., None]:
        space = self._space(words, size)

        def write(m: Machine, at: Array, data: Array, which: Array) -> None:
            if space == "generic" and (at >= GENERIC).any():
                at = at - GENERIC
            elif space != "shared":
                m.memory.store(at, data, m.block_of[which])
                return
            m.shared.store(at, data, which)

        return write

    def _space(self, words: list[str], size: int) -> str:
        """Of an access of so many bytes."""
        if "global" in words:
            return "global"
        if "local" in words or "const" in words:
            raise Fault("neither local nor constant memory is known")
        self.shared_unit = min(self.shared_unit, size)
        return "shared" if any(x.startswith("shared") for x in words) else "generic"

    def _copy(self, index: int, x: Instruction, words: list[str]) -> Step:
        """`cp.async`, and the ends of its groups."""
        if words[-1] == "commit_group":
            return lambda m: m.commit()
        if words[-1] == "wait_group":
            newest = int(str(x.operands[0]), 0)
            return lambda m: m.wait(newest)
        if words[:2] not in (["async", "ca"], ["async", "cg"]):
            raise Fault(f"unknown instruction {x.op}")
        size = int(str(x.operands[2]), 0)
        self.shared_unit = min(self.shared_unit, size)
        to, source = map(self._address, x.operands[:2])
        given = self._reading(x.operands[3], "u32") if len(x.operands) > 3 else None

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

    # ------------------------------------------------------------------ warps

    def _barrier(self, index: int, x: Instruction, words: list[str]) -> Step:
        if x.predicate is not None:
            raise Fault("a barrier for some threads")
        if "warp" in words:
            return lambda m: m.shared.synchronize_lanes(m.warps())
        if "sync" not in words:
            raise Fault(f"unknown instruction {x.op}")
        barrier, *count = (int(str(y), 0) for y in x.operands)
        return lambda m: m.arrive(barrier, count[0] if count else m.block_threads, index + 1)

    def _shuffle(self, index: int, x: Instruction, words: list[str]) -> Step:
        name, _, found = str(x.operands[0]).partition("|")
        put = self._writing(name, "b32")
        put_found = self._writing(found, "pred") if found else None
        value, by, limits = (self._reading(y, "u32") for y in x.operands[1:4])
        how = words[1]

        def shuffle(m: Machine) -> None:
            m.warps()
            got, there = warp.shuffled(how, value(m), by(m), limits(m))
            put(m, got)
            if put_found:
                put_found(m, there)

        return shuffle

    def _reduce(self, index: int, x: Instruction, words: list[str]) -> Step:
        put, read = self._writing(x.operands[0], words[-1]), self._reading(x.operands[1], words[-1])
        how = words[1]

        def reduce(m: Machine) -> None:
            m.warps()
            put(m, warp.reduced(how, read(m)))

        return reduce

    def _multiply(self, index: int, x: Instruction, words: list[str]) -> Step:
        kind = words[-2]
        known = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"
        if x.op != known or kind not in ("f16", "bf16"):
            raise Fault(f"unknown instruction {x.op}")
        to, *sources = (y if isinstance(y, tuple) else (y,) for y in x.operands)
        puts = [self._writing(y, "f32") for y in to]
        a, b, c = ([self._reading(y, "b32") for y in names] for names in sources)

        def multiply(m: Machine) -> None:
            m.warps()
            values = ([read(m) for read in reads] for reads in (a, b, c))
            for put, value in zip(puts, warp.multiplied(kind, *values), strict=True):
                put(m, value)

        return multiply

    def _matrices(self, index: int, x: Instruction, words: list[str]) -> Step:
        """`ldmatrix`, `stmatrix`."""
        count, transposed = (
            int(next(y for y in words if re.fullmatch(r"x\d", y))[1]),
            "trans" in words,
        )
        load = x.op.startswith("ld")
        names, place = x.operands if load else x.operands[::-1]
        names = names if isinstance(names, tuple) else (names,)
        address, size = self._address(place), 2 if transposed else 4
        self.shared_unit = min(self.shared_unit, size)
        dtype, each = UNSIGNED[8 * size], 4 // size
        if load:
            puts = [self._writing(y, "b32") for y in names]

            def read(m: Machine) -> None:
                m.warps()
                which = m.which()
                places = warp.matrix_addresses(address(m)[which], count, transposed)
                got = m.shared.load(np.concatenate(places), size, np.tile(which, len(places)))
                got = got.view(dtype).reshape(count, each, -1)
                for put, parts in zip(puts, got, strict=True):
                    part = np.ascontiguousarray(parts.T).view(np.uint32)[:, 0]
                    put(m, _everywhere(m, part, which))

            return read
        reads = [self._reading(y, "b32") for y in names]

        def write(m: Machine) -> None:
            m.warps()
            which = m.which()
            places = warp.matrix_addresses(address(m)[which], count, transposed)
            parts = [r(m)[which].view(dtype).reshape(-1, each).T.ravel() for r in reads]
            data = np.concatenate(parts).view(np.uint8).reshape(-1, size)
            m.shared.store(np.concatenate(places), data, np.tile(which, len(places)))

        return write


def _everywhere(m: Machine, some: Array, which: Array) -> Array:
    """Numbers of some threads, as of all."""
    if len(which) == m.count:
        return np.ascontiguousarray(some)
    out = np.zeros(m.count, some.dtype)
    out[which] = some
    return out


def _pass(m: Machine) -> None:
    """Has no effect that can be seen here."""


def _end(m: Machine) -> bool:
    m.done[m.which()] = True
    return True
