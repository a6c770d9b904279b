"""The loop over pages, played on one multiprocessor."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass, field

from benchmarks.attention.gpu.model.gpus import Gpu
from benchmarks.attention.gpu.model.gpus import cost as cost_of
from benchmarks.attention.gpu.model.sass import Instruction

L2_LATENCY = 270
PORT_QUEUE = 24  # cycles of work that the port to shared memory accepts ahead
BARRIER = 18  # cycles from the last arrival to the first instruction
MOST_CYCLES = 600_000


@dataclass
class Loop:
    """A page loop.

    Attributes:
        code: its instructions; what is rarely taken must not be among them.
        warps: of a program.
        programs: of a multiprocessor.
        page_bytes: that a program reads in a turn.

    """

    code: list[Instruction]
    warps: int
    programs: int
    page_bytes: int


class _Step:
    """An instruction, as the play needs it: everything that can be known before."""

    def __init__(self, one: Instruction, gpu: Gpu) -> None:
        name, cost = one.opcode.split(".")[0], cost_of(one.opcode, gpu)
        self.pipe, self.interval, self.latency, self.port = cost
        self.stall, self.writes, self.reads = max(1, one.stall), one.writes, one.reads
        self.waits = [b for b in range(6) if one.waits >> b & 1]
        self.nbytes = _bytes(one)
        self.copies, self.loads = name == "LDGSTS", name in ("LDG", "LDGSTS")
        self.commits, self.meets = name == "LDGDEPBAR", name == "BAR"
        self.keeps = int(one.operands.split(",")[1], 16) if name == "DEPBAR" else None
        self.makes, self.takes = -1, list[int]()  # registers of products
        if name == "HMMA":
            self.makes, *self.takes = _registers(one.operands)
        elif name == "HGMMA":
            self.makes = GROUP
        elif one.opcode.startswith("WARPGROUP.DEPBAR"):
            self.takes = [GROUP]


GROUP = 1000
"""The register that stands for all products of a group of warps."""


def _registers(operands: str) -> list[int]:
    """The first register of each operand that is one."""
    found = (re.match(r"\s*R(\d+)", x) for x in operands.split(","))
    return [int(r[1]) for r in found if r]


@dataclass(eq=False)
class _Warp:
    program: int
    ready: int
    at: int = 0
    turns: list[int] = field(default_factory=list)  # when each ended
    pending: list[list[float]] = field(default_factory=lambda: [[] for _ in range(6)])
    groups: list[float] = field(default_factory=list)  # of asynchronous copies: when they land
    landing: float = 0.0  # of those that are in no group yet
    products: dict[int, float] = field(default_factory=dict)  # when a register's is there
    waiting: bool = False


def cycles_per_page(loop: Loop, gpu: Gpu, turns: int = 16) -> tuple[float, dict[str, float]]:
    """Cycles in which a multiprocessor takes a page, and shares of the reasons for idling.

    From when all warps have had four turns until the slowest one has had `turns`.
    """
    play = _Play(loop, gpu, turns)
    while not play.done and play.now < MOST_CYCLES:
        play.cycle()
    first = max(w.turns[4] for w in play.warps)
    last = max(w.turns[turns - 1] for w in play.warps)
    pages = sum(first < t <= last for w in play.warps for t in w.turns) / loop.warps
    idle = sum(play.idle.values())
    return (last - first) / pages, {why: n / idle for why, n in play.idle.most_common(4)}


class _Play:
    def __init__(self, loop: Loop, gpu: Gpu, turns: int) -> None:
        self.loop, self.gpu, self.turns = loop, gpu, turns
        self.now, self.idle, self.memory, self.port = 0, Counter[str](), 0.0, 0.0
        self.steps = [_Step(x, gpu) for x in loop.code]
        chance = random.Random(0)
        starts = [chance.randrange(4000) for _ in range(loop.programs)]
        self.warps = [_Warp(p, starts[p]) for p in range(loop.programs) for _ in range(loop.warps)]
        self.cores = [self.warps[i::4] for i in range(4)]
        self.pipes: list[dict[str, int]] = [{} for _ in range(4)]
        self.last = [0] * 4
        self.scale = loop.page_bytes / (sum(x.nbytes for x in self.steps) * loop.warps)

    @property
    def done(self) -> bool:
        return all(len(w.turns) >= self.turns for w in self.warps)

    def cycle(self) -> None:
        for core, warps in enumerate(self.cores):
            why = "no warp"
            for warp in warps[self.last[core] :] + warps[: self.last[core]]:
                blocked = self._blocked(warp, core)
                if blocked is None:
                    # The same warp as long as it can go, but no longer than a turn.
                    self.last[core] = (warps.index(warp) + self._issue(warp, core)) % len(warps)
                    break
                why = blocked
            else:
                self.idle[why] += 1
        self.now += 1

    def _blocked(self, warp: _Warp, core: int) -> str | None:
        """Why a warp's next instruction cannot go now, or None."""
        if warp.waiting:
            return "barrier"
        if self.now < warp.ready:
            return "stall"
        one, now = self.steps[warp.at], self.now
        for b in one.waits:
            warp.pending[b] = [t for t in warp.pending[b] if t > now]
            if warp.pending[b]:
                return "a result"
        if one.keeps is not None:
            landed = len(warp.groups) - one.keeps
            if landed > 0 and warp.groups[landed - 1] > now:
                return "a copy"
        if one.pipe and self.pipes[core].get(one.pipe, 0) > now:
            return one.pipe
        if one.port and self.port > now + PORT_QUEUE:
            return "shared memory"
        if any(warp.products.get(r, 0) > now for r in one.takes):
            return "a product"
        return None

    def _issue(self, warp: _Warp, core: int) -> bool:
        """The warp's next instruction goes; returns whether that was the last one of a turn."""
        one = self.steps[warp.at]
        if one.pipe:
            self.pipes[core][one.pipe] = self.now + one.interval
        finish: float = self.now + one.latency
        if one.port:
            self.port = max(self.port, self.now) + one.port
            finish = self.port + one.latency
        if one.loads:
            finish = self._load(warp, one, finish)
        elif one.commits:
            warp.groups.append(max([warp.landing, *warp.groups[-1:]]))
            warp.landing = 0.0
        elif one.makes >= 0:
            warp.products[one.makes] = finish
        if one.writes != 7:
            warp.pending[one.writes].append(finish)
        if one.reads != 7:
            warp.pending[one.reads].append(min(finish, self.now + (12 if one.port else 6)))
        warp.ready = self.now + one.stall
        if one.meets:
            self._meet(warp)
        warp.at += 1
        if ended := warp.at == len(self.steps):
            warp.at = 0
            warp.turns.append(self.now)
        return ended

    def _load(self, warp: _Warp, one: _Step, finish: float) -> float:
        if not one.nbytes:
            return self.port + L2_LATENCY
        took = one.nbytes * self.scale / self.gpu.bytes_per_cycle
        self.memory = max(self.memory, self.now) + took
        there = max(self.memory, self.port) + self.gpu.dram
        if one.copies:
            warp.landing = max(warp.landing, there)
            return finish
        return there

    def _meet(self, warp: _Warp) -> None:
        warp.waiting = True
        peers = [w for w in self.warps if w.program == warp.program]
        if all(w.waiting for w in peers):
            for w in peers:
                w.waiting, w.ready = False, max(w.ready, self.now + BARRIER)


def _bytes(one: Instruction) -> int:
    """Of a page, that a warp's instruction loads, before all are scaled to a page's.

    Loads of two bytes are of a page; others that go to registers, of tables.
    """
    if one.opcode.startswith("LDGSTS"):
        return 32 * (16 if "128" in one.opcode else 8 if "64" in one.opcode else 4)
    return 64 if one.opcode.startswith("LDG.E.U16") else 0
