"""Threads, control flow and barriers: `run` runs a kernel.

All threads of some blocks go in lock-step. Where their ways part, those that are least far in
the text go on, so that they meet again at the first place where they can. An instruction that
only some of them execute leaves the registers of the others as they are.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tests.ptx.memory import MOST_BLOCKS, GlobalMemory, SharedMemory
from tests.ptx.numbers import Array, storage
from tests.ptx.parse import Fault, Kernel, parse
from tests.ptx.program import Program
from tests.ptx.warpgroup import Products

THREADS = 4096  # that go in lock-step, about: more only fill the caches

Argument = torch.Tensor | int | float | bytes


@dataclass
class _Copies:
    """Asynchronous copies of a thread group that have not landed.

    Attributes:
        threads: bools [n], whose they still are.
        copies: addresses in shared memory, bytes, threads.

    """

    threads: Array
    copies: list[tuple[Array, Array, Array]]


class Machine:
    """Some blocks of a launch, and what their threads hold.

    `active`: bools [threads], which of them execute the next instruction; None: all.
    """

    def __init__(
        self,
        program: Program,
        blocks: Array,
        block: tuple[int, int, int],
        grid: tuple[int, int, int],
        parameters: Array,
        memory: GlobalMemory,
        shared: int,
    ) -> None:
        self.program, self.memory, self.parameters = program, memory, parameters
        self.block_threads = math.prod(block)
        self.count = len(blocks) * self.block_threads
        self.threads = np.arange(self.count)
        self.block_of = np.repeat(blocks, self.block_threads)
        self.shared = SharedMemory(len(blocks), self.block_threads, shared, program.shared_unit)
        self.products = Products(self)
        self.active: Array | None = None
        self.pcs = np.zeros(self.count, np.int64)
        self.done = np.zeros(self.count, bool)
        self.waiting = np.full(self.count, -1)  # the barrier that a thread waits at
        self._join = -1
        self._pending: list[tuple[Array, Array, Array]] = []
        self._groups: list[_Copies] = []
        ones = {bits: np.full(self.count, -1).astype(storage(bits)) for bits in (1, 16, 32, 64)}
        self.registers = [ones[bits] for bits in program.bits]  # which LLVM's `undef` may be
        for slot, value in program.constants:
            self.registers[slot] = np.full(self.count, value)
        thread = self.threads % self.block_threads
        special = {"%laneid": thread % 32, "%warpid": thread // 32}
        for name, at, size in (("tid", thread, block), ("ctaid", self.block_of, grid)):
            for axis, n in zip("xyz", size, strict=True):
                special[f"%{name}.{axis}"] = at % n
                special[f"%n{name}.{axis}"] = np.full(self.count, n)
                at = at // n
        for slot, name in program.special:
            if name not in special:
                raise Fault(f"unknown register {name}")
            self.registers[slot] = special[name].astype(storage(program.bits[slot]))

    def run(self) -> None:
        """Until all threads have ended.

        Raises:
            Fault: something went wrong; the message names the instruction.

        """
        steps = self.program.steps
        while (pc := self._next()) is not None:
            try:
                while not steps[pc](self):
                    pc += 1
                    if pc == self._join:
                        self.go(pc)
                        break
            except Fault as fault:
                where = f"{self.program.kernel.name}: {self.program.kernel.instructions[pc]}"
                raise Fault(f"{fault}; {where}") from None

    def _next(self) -> int | None:
        """Choose the threads that go on, and where."""
        runnable = ~self.done & (self.waiting < 0)
        if not runnable.any():
            if (self.waiting >= 0).any():
                raise Fault("threads wait at a barrier, which others never reach")
            return None
        at = self.pcs[runnable]
        pc = int(at.min())
        active = runnable & (self.pcs == pc)
        self.active = None if active.all() else active
        others = at[at > pc]
        self._join = int(others.min()) if len(others) else -1
        return pc

    def go(self, pc: int) -> None:
        """The active threads go to a place."""
        if self.active is None:
            self.pcs[:] = pc
        else:
            self.pcs[self.active] = pc

    def put(self, slot: int, value: Array) -> None:
        """Set a register of the active threads."""
        if self.active is not None:
            value = np.where(self.active, value, self.registers[slot])
        self.registers[slot] = value

    def which(self) -> Array:
        """Numbers of the active threads."""
        return self.threads if self.active is None else np.flatnonzero(self.active)

    def warps(self) -> Array:
        """Numbers of the active warps.

        Raises:
            Fault: only some lanes of a warp are active.

        """
        if self.active is None:
            return self.threads[: self.count // 32]
        lanes = self.active.reshape(-1, 32)
        if (lanes.any(1) != lanes.all(1)).any():
            raise Fault("only some lanes of a warp are here")
        return np.flatnonzero(lanes[:, 0])

    # ------------------------------------------------------------ barriers

    def arrive(self, barrier: int, expected: int, then: int) -> bool:
        """The active threads wait for so many of their block; where they go then."""
        if self.active is None and expected == self.block_threads:
            self.shared.synchronize(self.threads[: self.count // 32].reshape(-1, self.shared.warps))
            return False
        self.warps()
        self.waiting[self.which()] = barrier
        self.go(then)
        waiting = self.waiting.reshape(-1, self.block_threads) == barrier
        for i in np.flatnonzero(waiting.sum(1) >= expected):
            [own] = np.nonzero(waiting[i])
            own += i * self.block_threads
            self.waiting[own] = -1
            self.shared.synchronize(np.unique(own // 32)[None])
        return True

    # -------------------------------------------------- asynchronous copies

    def copy(self, to: Array, data: Array, threads: Array) -> None:
        self.shared.announce(to, data.shape[1], threads)
        self._pending.append((to, data, threads))

    def commit(self) -> None:
        """What the active threads have copied since the last time is a group."""
        mine = np.ones(self.count, bool) if self.active is None else self.active.copy()
        if mine.all():
            copies, self._pending = self._pending, []
        else:
            copies = [_of(mine, x) for x in self._pending]
            self._pending = [_of(~mine, x) for x in self._pending]
        self._groups.append(_Copies(mine, copies))

    def wait(self, newest: int) -> None:
        """All groups of the active threads but so many of the newest land."""
        older = np.zeros(self.count, np.int64)
        for group in reversed(self._groups):
            older += group.threads
            landing = group.threads & (older > newest)
            if self.active is not None:
                landing &= self.active
            if not landing.any():
                continue
            for copies in group.copies:
                self.shared.land(*_of(landing, copies))
            group.copies = [_of(~landing, x) for x in group.copies]
            group.threads &= ~landing
        self._groups = [group for group in self._groups if group.threads.any()]


def _of(threads: Array, copies: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    """Those copies that are of these threads."""
    mine = threads[copies[2]]
    to, data, of = copies
    return (to, data, of) if mine.all() else (to[mine], data[mine], of[mine])


@functools.lru_cache(64)
def load(text: str) -> Program:
    """The only kernel of a module, ready to run."""
    return Program(parse(text))


def run(
    kernel: str | Kernel,
    arguments: Sequence[Argument],
    grid: Sequence[int],
    *,
    block: Sequence[int] = (),
    shared: int = 0,
    reachable: Iterable[torch.Tensor] = (),
    apart: bool = True,
) -> None:
    """Run a kernel as a GPU would.

    Args:
        kernel: PTX of a module with one entry, or what `parse` made of it.
        arguments: of its parameters: a tensor for a pointer, a number, or the bytes of a struct.
        grid: blocks along x, y and z.
        block: threads along x, y and z; if empty, as many as the text requires.
        shared: bytes of shared memory that the launch gives, beyond those of the text.
        reachable: tensors that the kernel finds by addresses in memory.
        apart: no block may read or write what another one writes.

    Raises:
        Fault: it does what a GPU would not do, or what might go wrong on one.

    """
    program = load(kernel) if isinstance(kernel, str) else Program(kernel)
    kernel = program.kernel
    if len(arguments) != len(kernel.parameters):
        raise Fault(f"{kernel.name} has {len(kernel.parameters)} parameters, not {len(arguments)}")
    block = block or (kernel.threads or 0,)
    sizes = tuple(block) + (1,) * (3 - len(block)), tuple(grid) + (1,) * (3 - len(grid))
    threads = math.prod(sizes[0])
    if not threads or threads % 32 or kernel.threads not in (None, threads):
        raise Fault(f"a block of {threads} threads; {kernel.name} is for {kernel.threads}")
    memory = GlobalMemory([*(x for x in arguments if isinstance(x, torch.Tensor)), *reachable])
    parameters = np.zeros(program.parameter_bytes, np.uint8)
    for (name, (kind, size)), value in zip(kernel.parameters.items(), arguments, strict=True):
        at = program.parameters[name][0]
        parameters[at : at + size] = np.frombuffer(_bytes(kind, size, value), np.uint8)
    blocks, each = math.prod(sizes[1]), max(1, THREADS // threads)
    if blocks > MOST_BLOCKS:
        raise Fault(f"{blocks} blocks; {MOST_BLOCKS} can be told apart")
    total = kernel.shared_bytes + shared
    with np.errstate(all="ignore"):
        for start in range(0, blocks, each):
            some = np.arange(start, min(start + each, blocks))
            Machine(program, some, *sizes, parameters, memory, total).run()
        if apart:
            memory.check_races()


def _bytes(kind: str, size: int, value: Any) -> bytes:
    """A parameter, as it lies in memory."""
    if isinstance(value, bytes):
        made = value
    elif isinstance(value, torch.Tensor):
        made = value.data_ptr().to_bytes(8, "little")
    elif kind[0] == "f":
        made = struct.pack({4: "<f", 8: "<d"}[size], value)
    else:
        made = (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")
    if len(made) != size:
        raise Fault(f"{len(made)} bytes for a parameter of {size}")
    return made
