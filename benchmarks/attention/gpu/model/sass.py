"""The machine code of a compiled kernel, with the compiler's control codes."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        opcode, operands: as `nvdisasm` writes them.
        stall: cycles until the warp's next one.
        writes, reads: the barrier (0 to 5) that says that its result is there, or that its
            operands may be overwritten; 7: none.
        waits: bits of the barriers that it waits for.

    """

    opcode: str
    operands: str
    stall: int
    writes: int
    reads: int
    waits: int


class Label(str):
    """A place in the code."""


_LABEL = re.compile(r"(\.L_x_\d+):")
_LINE = re.compile(
    r"\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?P\w+)?\s*([A-Z0-9_.]+)\s*(.*?);?\s*/\*\s*0x[0-9a-f]{16}"
)
_HEX = re.compile(r"/\*\s*0x([0-9a-f]{16})\s*\*/")


def tool(name: str, *arguments: str) -> str:
    """What one of the CUDA tools that Triton brings prints."""
    command = [str(TOOLS / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassemble(cubin: bytes) -> list[Instruction | Label]:
    """The code of the only kernel in `cubin`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        lines = iter(tool("nvdisasm", "-c", "-hex", file.name).splitlines())
    code: list[Instruction | Label] = []
    for line in lines:
        if label := _LABEL.match(line):
            code.append(Label(label[1]))
        elif found := _LINE.match(line):
            second = _HEX.search(next(lines))
            assert second, line
            control = int(second[1], 16) >> 41
            fields = (control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63)
            code.append(Instruction(found[1], found[2], *fields))
    return code


def page_loop(code: list[Instruction | Label]) -> list[Instruction]:
    """Instructions of the loop with the most matrix products: a decode kernel's over pages.

    Raises:
        ValueError: no loop has any.

    """
    places = {at: i for i, at in enumerate(code) if isinstance(at, Label)}
    best: list[Instruction] = []
    for i, one in enumerate(code):
        target = _LABEL_OF.search(one.operands) if not isinstance(one, Label) else None
        if target and not isinstance(one, Label) and one.opcode.startswith("BRA"):
            start = places.get(Label(target[1]), i)
            loop = [x for x in code[start : i + 1] if not isinstance(x, Label)]
            if _products(loop) > _products(best):
                best = loop
    if not best:
        raise ValueError("the kernel has no loop with matrix products")
    return best


_LABEL_OF = re.compile(r"`\((\.L_x_\d+)\)")


def _products(code: list[Instruction]) -> int:
    return sum(x.opcode.startswith(("HMMA", "HGMMA")) for x in code)


def spills(code: list[Instruction | Label]) -> int:
    """Instructions that load or store what registers do not hold."""
    return sum(x.opcode.startswith(("LDL", "STL")) for x in code if not isinstance(x, Label))
