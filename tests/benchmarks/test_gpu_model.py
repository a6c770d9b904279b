"""The model of a decode kernel's page loop: its limits, and the code that it reads."""

from __future__ import annotations

import pytest

from benchmarks.attention.gpu.model import sass
from benchmarks.attention.gpu.model.gpus import GPUS
from benchmarks.attention.gpu.model.sass import Instruction
from benchmarks.attention.gpu.model.timing import Loop, cycles_per_page
from kivi_vllm.ops.cuda import compiler
from kivi_vllm.ops.cuda import kernels as cuda

H100 = GPUS["h100"]


def instruction(opcode: str, operands: str = "", stall: int = 1, **more: int) -> Instruction:
    return Instruction(opcode, operands, stall, more.get("writes", 7), 7, more.get("waits", 0))


COPY = instruction("LDGSTS.E.BYPASS.128", "[R1], desc[UR4][R2.64]")
COMMIT = instruction("LDGDEPBAR")
WAIT_FOR_THE_LAST_BUT_ONE = instruction("DEPBAR.LE", "SB0, 0x1")


def cycles(code: list[Instruction], programs: int = 8, page_bytes: int = 10240) -> float:
    return cycles_per_page(Loop(code, 1, programs, page_bytes), H100, turns=10)[0]


def test_copies_ahead_take_what_the_memory_takes() -> None:
    code = [WAIT_FOR_THE_LAST_BUT_ONE, *[COPY] * 20, COMMIT]
    assert cycles(code) == pytest.approx(10240 / H100.bytes_per_cycle, rel=0.03)
    assert cycles(code, page_bytes=20480) == pytest.approx(20480 / H100.bytes_per_cycle, rel=0.03)


def test_arithmetic_takes_what_the_pipes_take() -> None:
    for opcode, each in (("FFMA", 1), ("LOP3.LUT", 2), ("MUFU.EX2", 8), ("HMMA.16816.F32", 6)):
        code = [instruction(opcode, f"R{8 + 4 * i}, R1, R2, RZ") for i in range(200)]
        code += [COPY, COMMIT]
        assert cycles(code, page_bytes=64) == pytest.approx(200 * each / 4, rel=0.1), opcode


def test_a_load_that_is_waited_for_takes_as_long_as_the_memory() -> None:
    load = instruction("LDG.E.U16", "R4, desc[UR4][R2.64]", writes=0)
    code = [load, instruction("FADD", "R5, R4, R4", waits=1)]
    assert cycles(code, programs=1, page_bytes=64) >= H100.dram
    assert cycles(code, programs=8, page_bytes=64) == pytest.approx(H100.dram / 8, rel=0.2)


@pytest.mark.skipif(not compiler.available(), reason="there is no NVRTC")
def test_the_loop_over_pages_is_found() -> None:
    variant = cuda.Variant(
        D=64, K_BITS=2, V_BITS=2, G=16, SINKS=4, PER_BLOCK=1, RING=20, TAIL=1, R=0, GQA=4, TILES=1,
        N=8, MASKED=False, BF16=True, CAP=0.0, ALIBI=False, WINDOW=0, CHUNK=0,
    )  # fmt: skip
    code = sass.disassemble(cuda.compiled(variant, cuda.ENTRIES["decode"][0], "sm_90"))
    loop = sass.page_loop(code)
    products = sum(x.opcode == "HMMA.16816.F32" for x in loop)
    copies = [x for x in loop if x.opcode.startswith("LDGSTS")]
    # 64 * 128 codes of keys, as many of values, 16 x 16 in a product; zeros and means beside them.
    assert products >= 2 * 64 * 128 // 256
    assert 512 * len(copies) >= 16 * 64 * 2 * 2 and all("128" in x.opcode for x in copies)
    assert sass.spills(code) == 0
    with pytest.raises(ValueError, match="no loop"):
        sass.page_loop([x for x in code if isinstance(x, sass.Label)])


def test_programs_that_fit() -> None:
    assert H100.programs(registers=168, warps=1, shared=10240) == 12
    assert H100.programs(registers=237, warps=2, shared=18944) == 4
    assert H100.programs(registers=32, warps=4, shared=100 << 10) == 2
