"""What the model knows of GPUs and of their instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

USABLE = 0.93
"""Of a GPU's bandwidth, what reads alone can get of it."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        capability: as in 90.
        clock: GHz.
        processors: multiprocessors.
        bandwidth: of the memory, bytes a second.
        mma: cycles that a sub-core's tensor cores take for a product of 16 x 8 x 16.
        dram: cycles until data come from memory that is not busy.
        shared: bytes of shared memory of a multiprocessor, of which a program takes 1 KiB more
            than it asks for.
        warps: most of a multiprocessor.

    """

    capability: int
    clock: float
    processors: int
    bandwidth: float
    mma: int
    dram: int
    shared: int
    warps: int = 64

    @property
    def bytes_per_cycle(self) -> float:
        """That the memory gives each multiprocessor."""
        return self.bandwidth * USABLE / self.processors / (self.clock * 1e9)

    def programs(self, registers: int, warps: int, shared: int) -> int:
        """How many programs of so many warps, registers a thread and bytes fit a processor."""
        each = -(-registers // 8) * 8 * 32 * warps
        return min(65536 // each, self.shared // (shared + 1024), self.warps // warps, 32)


GPUS = {
    "h100": Gpu(90, 1.755, 132, 3.35e12, mma=6, dram=620, shared=228 << 10),
    "h200": Gpu(90, 1.98, 132, 4.8e12, mma=6, dram=680, shared=228 << 10),
    "a100": Gpu(80, 1.41, 108, 2.04e12, mma=8, dram=560, shared=164 << 10),
}


class Cost(NamedTuple):
    """Of an instruction of a warp.

    Attributes:
        pipe: which of a sub-core's pipes it takes, None: none that could be short.
        interval: for how many cycles.
        latency: cycles until what it writes is there, where no stall says it.
        port: cycles of the port that the multiprocessor's sub-cores share, to shared memory and
            caches; 0: it does not use it.

    """

    pipe: str | None = None
    interval: int = 1
    latency: int = 4
    port: int = 0


_HALF_RATE = (
    *("LOP3", "LOP", "PLOP3", "SHF", "SHL", "SHR", "PRMT", "SGXT", "LEA", "IADD3", "VIADD", "IABS"),
    *("FMNMX", "FMNMX3", "HMNMX2", "IMNMX", "VIMNMX", "VHMNMX", "FSETP", "ISETP", "FSEL", "SEL"),
    *("F2FP", "P2R", "R2P", "VOTE", "MOV"),
)
_FULL_RATE = ("FADD", "FMUL", "FFMA", "HMUL2", "HADD2", "HFMA2")


def cost(opcode: str, gpu: Gpu) -> Cost:
    """What an instruction takes on a GPU."""
    name, wide = opcode.split(".")[0], 4 if "128" in opcode else 2 if "64" in opcode else 1
    if name in _HALF_RATE:
        found = Cost("alu", 2)
    elif name in _FULL_RATE:
        found = Cost("fma")
    elif name == "IMAD":
        found = Cost("fma", 2)
    elif name in ("HMMA", "HGMMA"):
        found = Cost("tensor", gpu.mma, 33)
    elif name == "MUFU":
        found = Cost("special", 8, 23)
    elif name in ("I2F", "F2I", "F2F"):
        found = Cost("convert", 4, 20)
    elif name in ("LDSM", "STSM"):
        matrices = 4 if opcode.endswith(".4") else 2 if opcode.endswith(".2") else 1
        found = Cost(latency=33 if name == "LDSM" else 20, port=matrices)
    elif name in ("LDS", "STS"):
        found = Cost(latency=29 if name == "LDS" else 20, port=wide)
    elif name in ("SHFL", "MOVM", "REDUX"):
        found = Cost(latency=24, port=1)
    elif name == "LDGSTS":
        found = Cost(latency=10, port=wide)
    elif name in ("LDG", "UBLKCP"):
        found = Cost(port=1)
    elif name in ("LDL", "STL"):
        found = Cost(latency=35, port=wide)
    elif name in ("LDC", "S2UR", "S2R", "R2UR"):
        found = Cost(latency=30, port=1)
    else:
        found = Cost()
    return found
