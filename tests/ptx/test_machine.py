"""The interpreter: what instructions give, where threads part, and what it does not let pass."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.ptx.machine import run
from tests.ptx.parse import Fault


def module(body: str, threads: int = 64, shared: int = 0) -> str:
    """A kernel whose parameters are two pointers, in %rd1 and %rd2; thread's place in %rd3."""
    return f"""
    .visible .entry test(.param .u64 test_param_0, .param .u64 test_param_1)
    .reqntid {threads}
    {{
        .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<19>; .reg .b64 %rd<19>;
        .shared .align 16 .b8 memory[{max(shared, 16)}];
        ld.param.b64 %rd1, [test_param_0];
        ld.param.b64 %rd2, [test_param_1];
        mov.u32 %r1, %tid.x;
        mul.wide.u32 %rd3, %r1, 4;
        add.s64 %rd1, %rd1, %rd3;
        add.s64 %rd2, %rd2, %rd3;
        mov.b32 %r2, memory;
        shl.b32 %r3, %r1, 2;
        add.s32 %r3, %r2, %r3;
        {body}
        ret;
    }}"""


def result(body: str, given: torch.Tensor | None = None, **options: int) -> torch.Tensor:
    """What 64 threads store as int32 from %r9; `given` are their 32 bits at %rd2."""
    given = torch.arange(64, dtype=torch.int32) if given is None else given
    out = torch.full((64,), -1, dtype=torch.int32)
    run(module(body + "\nst.global.b32 [%rd1], %r9;", **options), [out, given], (1,))
    return out


def of_bits(instructions: str, *values: int) -> int:
    """The bits that instructions leave in %r9, from %r4 and so on."""
    moves = "".join(f"mov.b32 %r{4 + i}, {value:#x};\n" for i, value in enumerate(values))
    return int(result(moves + instructions)[0]) & 0xFFFFFFFF


def bits(x: float, dtype: type = np.float32) -> int:
    return int(np.array(x, dtype).view({4: np.uint32, 2: np.uint16}[np.dtype(dtype).itemsize]))


@pytest.mark.parametrize(
    ("instruction", "values", "wanted"),
    [
        ("add.s32 %r9, %r4, %r5", (0xFFFFFFFF, 2), 1),
        ("mad.lo.s32 %r9, %r4, %r5, %r4", (0xFFFFFFFD, 5), 0xFFFFFFEE),
        ("mul.hi.s32 %r9, %r4, %r5", (0xFFFFFFFF, 2), 0xFFFFFFFF),
        ("mul.hi.u32 %r9, %r4, %r5", (0xFFFFFFFF, 2), 1),
        ("div.s32 %r9, %r4, 2", (0xFFFFFFFD,), 0xFFFFFFFF),
        ("rem.s32 %r9, %r4, 2", (0xFFFFFFFD,), 0xFFFFFFFF),
        ("shr.s32 %r9, %r4, 40", (0x80000000,), 0xFFFFFFFF),
        ("shr.u32 %r9, %r4, 40", (0x80000000,), 0),
        ("shl.b32 %r9, %r4, 4", (0x12345678,), 0x23456780),
        ("bfe.u32 %r9, %r4, 8, 12", (0x12345678,), 0x456),
        ("bfe.s32 %r9, %r4, 28, 8", (0x82345678,), 0xFFFFFFF8),
        ("bfi.b32 %r9, %r4, %r5, 8, 12", (0xFABC, 0x12345678), 0x123ABC78),
        ("prmt.b32 %r9, %r4, %r5, 0x5410", (0x33221100, 0x77665544), 0x55441100),
        ("prmt.b32 %r9, %r4, %r5, 0x8A4F", (0x808182FF, 0x77665544), 0xFFFF4400),
        ("lop3.b32 %r9, %r4, %r5, %r6, 0xE8", (0b1100, 0b1010, 0b0110), 0b1110),
        ("shf.l.wrap.b32 %r9, %r4, %r5, 36", (0x89ABCDEF, 0x01234567), 0x12345678),
        ("shf.r.wrap.b32 %r9, %r4, %r5, 4", (0x89ABCDEF, 0x01234567), 0x789ABCDE),
        ("clz.b32 %r9, %r4", (0x00010000,), 15),
        ("popc.b32 %r9, %r4", (0xF0F0F0F1,), 17),
        ("min.s32 %r9, %r4, %r5", (0xFFFFFFFF, 1), 0xFFFFFFFF),
        ("max.f32 %r9, %r4, %r5", (0x7FC00000, bits(1.5)), bits(1.5)),
        ("max.NaN.f32 %r9, %r4, %r5", (0x7FC00000, bits(1.5)), 0x7FC00000),
        ("fma.rn.f32 %r9, %r4, %r4, %r5", (bits(1 + 2**-23), bits(-1.0)), bits(2**-22 + 2**-46)),
        ("add.rn.f16x2 %r9, %r4, %r4", (0x3C000400,), 0x40000800),
        ("cvt.rzi.s32.f32 %r9, %r4", (bits(-2.7),), 0xFFFFFFFE),
        ("cvt.rzi.s32.f32 %r9, %r4", (bits(3e9),), 0x7FFFFFFF),
        ("cvt.rzi.s32.f32 %r9, %r4", (0x7FC00000,), 0),
        ("cvt.rni.f32.f32 %r9, %r4", (bits(2.5),), bits(2.0)),
        ("cvt.rn.f16x2.f32 %r9, %r4, %r5", (bits(1.0), bits(2.0)), 0x3C004000),
        ("cvt.rn.bf16x2.f32 %r9, %r4, %r5", (bits(1.0), bits(1 + 3 * 2**-8)), 0x3F803F82),
        ("ex2.approx.ftz.f32 %r9, %r4", (bits(-127.0),), 0),
        ("ex2.approx.f32 %r9, %r4", (bits(-127.0),), bits(2**-127)),
    ],
)
def test_values(instruction: str, values: tuple[int, ...], wanted: int) -> None:
    assert f"{of_bits(instruction + ';', *values):#x}" == f"{wanted:#x}"


def test_bytes_of_registers_and_signs() -> None:
    assert of_bits("mov.b32 {%h1, %h2}, %r4; cvt.s32.s8 %r9, %h1;", 0x1234FF80) == 0xFFFFFF80
    assert of_bits("mov.b32 {_, %h2}, %r4; mov.b32 %r9, {%h2, %h2};", 0x1234FF80) == 0x12341234


def test_scopes_have_registers_and_labels_of_their_own() -> None:
    one = "{ .reg .b32 x; mov.b32 x, %r1; $on: add.s32 %r9, x, 1; @%p1 bra $on; }"
    other = "{ .reg .b16 x; mov.b32 {x, _}, %r9; bra.uni $on; $on: cvt.u32.u16 %r9, x; }"
    assert result("mov.pred %p1, 0;" + one + other).tolist() == [*range(1, 65)]


def test_generic_addresses_and_parameters_by_address() -> None:
    body = """
        cvt.u64.u32 %rd4, %r3; cvta.shared.u64 %rd5, %rd4; st.b32 [%rd5], %r1;
        cvta.to.shared.u64 %rd6, %rd5; cvt.u32.u64 %r4, %rd6; ld.shared.b32 %r5, [%r4];
        mov.b64 %rd7, test_param_0; ld.param.b64 %rd8, [%rd7 + 16]; add.s64 %rd8, %rd8, %rd3;
        cvta.to.global.u64 %rd8, %rd8; ld.b32 %r6, [%rd8]; add.s32 %r9, %r5, %r6;
    """
    assert result(body, shared=256).tolist() == [2 * i for i in range(64)]


def test_lanes_exchange() -> None:
    lanes = torch.arange(64, dtype=torch.int32) % 32
    first = torch.arange(64, dtype=torch.int32) // 32 * 32
    shuffle = "shfl.sync.{}.b32 %r9|%p1, %r1, {}, {}, -1; @!%p1 mov.b32 %r9, 99;"
    assert result(shuffle.format("bfly", 3, 31)).tolist() == (first + (lanes ^ 3)).tolist()
    down = torch.where(lanes % 8 < 6, first + lanes + 2, 99)
    assert result(shuffle.format("down", 2, 0x181F)).tolist() == down.tolist()
    assert result(shuffle.format("up", 1, 0)).tolist() == [
        99 if i % 32 == 0 else i - 1 for i in range(64)
    ]
    ballot = "setp.lt.u32 %p1, %r1, 33; vote.sync.ballot.b32 %r9, %p1, -1;"
    assert result(ballot).tolist() == [-1] * 32 + [1] * 32


def test_products_of_matrices() -> None:
    """In the order in which PTX documents the fragments; a transposed matrix by two ways."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(16, 16)).astype(np.float16), rng.normal(size=(16, 8)).astype(np.float16)
    memory = torch.from_numpy(np.concatenate([a.ravel(), b.ravel()])).view(torch.int32)
    out = torch.zeros(16, 8)
    g, t = "%r10", "%r11"
    words = "\n".join(
        f"ld.global.b32 %r{12 + i}, [%rd{4 + i // 2 % 2} + {offset}];"
        for i, offset in enumerate([0, 8 * 32, 16, 8 * 32 + 16])
    ).replace("%rd5", "%rd4")
    columns = "".join(
        f"ld.global.b16 %h{1 + i}, [%rd6 + {512 + 16 * k}];" for i, k in enumerate([0, 1, 8, 9])
    )
    body = f"""
        sub.s64 %rd1, %rd1, %rd3; sub.s64 %rd2, %rd2, %rd3;
        shr.u32 {g}, %r1, 2; and.b32 {t}, %r1, 3;
        mad.lo.s32 %r4, {g}, 32, 0; mad.lo.s32 %r4, {t}, 4, %r4; cvt.u64.u32 %rd4, %r4;
        add.s64 %rd4, %rd2, %rd4;
        mul.lo.s32 %r4, {t}, 32; mad.lo.s32 %r4, {g}, 2, %r4; cvt.u64.u32 %rd6, %r4;
        add.s64 %rd6, %rd2, %rd6;
        {words} {columns}
        mov.b32 %r16, {{%h1, %h2}}; mov.b32 %r17, {{%h3, %h4}}; mov.b32 %r5, 0;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
            {{%r6, %r7, %r8, %r9}}, {{%r12, %r13, %r14, %r15}}, {{%r16, %r17}},
            {{%r5, %r5, %r5, %r5}};
        mul.lo.s32 %r4, {g}, 32; mad.lo.s32 %r4, {t}, 8, %r4; cvt.u64.u32 %rd7, %r4;
        add.s64 %rd7, %rd1, %rd7;
        st.global.v2.b32 [%rd7], {{%r6, %r7}}; st.global.v2.b32 [%rd7 + 256], {{%r8, %r9}};
    """
    run(module(body, threads=32), [out, memory], (1,))
    wanted = a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(out.numpy() - wanted).max() < 1e-5


def test_matrices_from_shared_memory() -> None:
    """`ldmatrix.trans` is `ldmatrix` and then `movmatrix`; `stmatrix` undoes `ldmatrix`."""
    rows = "and.b32 %r4, %r1, 31; mad.lo.s32 %r4, %r4, 16, %r2;"
    fill = "mul.lo.s32 %r5, %r1, 7001; st.shared.b32 [%r3], %r5; bar.warp.sync -1;"
    read = "ldmatrix.sync.aligned.m8n8.x1{}.shared.b16 {{%r9}}, [%r4];"
    turn = "movmatrix.sync.aligned.m8n8.trans.b16 %r9, %r9;"
    back = """bar.warp.sync -1; add.s32 %r6, %r4, 512; add.s32 %r7, %r3, 512;
        stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r6], {%r9};
        bar.warp.sync -1; ld.shared.b32 %r9, [%r7];"""
    half = {"threads": 32, "shared": 1024}
    whole = result(fill + rows + read.format(""), **half)
    assert whole[:32].tolist() == [7001 * i for i in range(32)]
    assert torch.equal(
        result(fill + rows + read.format(".trans"), **half),
        result(fill + rows + read.format("") + turn, **half),
    )
    assert torch.equal(result(fill + rows + read.format("") + back, **half), whole)


def test_threads_part_and_meet() -> None:
    """Each thread goes round a loop as often as its number says; then a warp exchanges."""
    body = """
        mov.b32 %r9, 0; and.b32 %r4, %r1, 7;
        $again: setp.eq.s32 %p1, %r4, 0; @%p1 bra $done;
        add.s32 %r9, %r9, %r4; sub.s32 %r4, %r4, 1; bra.uni $again;
        $done: shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
    """
    triangles = [n * (n + 1) // 2 for n in range(8)]
    assert result(body).tolist() == [triangles[i % 8 ^ 1] for i in range(64)]


WRITE, READ = "st.shared.b32 [%r3], %r1;", "ld.shared.b32 %r9, [%r3];"
OTHER_WARP = "xor.b32 %r4, %r1, 32; mad.lo.s32 %r4, %r4, 4, %r2;"
OTHER_LANE = "xor.b32 %r4, %r1, 1; mad.lo.s32 %r4, %r4, 4, %r2;"
READ_OTHER, WRITE_OTHER = "ld.shared.b32 %r9, [%r4];", "st.shared.b32 [%r4], %r1;"
COPY = "cp.async.ca.shared.global [%r3], [%rd2], 4; cp.async.commit_group;"
WAIT = "cp.async.wait_group 0;"


@pytest.mark.parametrize(
    ("before", "between", "after"),
    [
        (OTHER_WARP + WRITE, "bar.sync 0;", READ_OTHER),
        (OTHER_WARP + WRITE + "bar.sync 0;" + READ, "bar.sync 0;", WRITE_OTHER),
        (OTHER_WARP + WRITE, "bar.sync 0;", WRITE_OTHER),
        (OTHER_LANE + WRITE, "bar.warp.sync -1;", READ_OTHER),
        (OTHER_LANE + WRITE + "bar.warp.sync -1;" + READ, "bar.warp.sync -1;", WRITE_OTHER),
        (COPY, WAIT, READ),
        (COPY, WAIT, WRITE),
        (OTHER_LANE + COPY + WAIT, "bar.warp.sync -1;", READ_OTHER),
        (OTHER_WARP + WRITE + "bar.sync 0;" + READ_OTHER, "bar.sync 0;", COPY + WAIT),
    ],
)
def test_what_must_stand_between_two_accesses(before: str, between: str, after: str) -> None:
    result(before + between + after, shared=256)
    with pytest.raises(Fault, match=r"without a barrier|on its way"):
        result(before + after, shared=256)


def test_newest_groups_may_be_on_their_way() -> None:
    two = COPY + COPY.replace("[%r3]", "[%r3+256]")
    one_left = "cp.async.wait_group 1;"
    assert result(two + one_left + READ, shared=512).tolist() == [*range(64)]
    with pytest.raises(Fault, match="on its way"):
        result(two + one_left + READ.replace("[%r3]", "[%r3+256]"), shared=512)


def test_shared_memory_begins_as_nan() -> None:
    assert result(READ, shared=256).tolist() == [-1] * 64


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r9, [%rd2+4];", "outside of all tensors"),
        ("ld.global.b32 %r9, [%rd2+2];", "at an odd address"),
        ("ld.shared.b32 %r9, [%r3+4];", "outside of 256 of shared memory"),
        ("ld.shared.b32 %r9, [%r3+2];", "at an odd address"),
        ("sub.s64 %rd1, %rd1, %rd3; mov.b32 %r9, %r1;", "different bytes to one place"),
        ("st.shared.b32 [%r2], %r1;", "different bytes to one place"),
        ("setp.eq.s32 %p1, %r1, 3; @%p1 ret; bar.sync 0;", "only some lanes"),
        ("setp.lt.s32 %p1, %r1, 32; @%p1 ret; bar.sync 0;", "others never reach"),
        ("setp.lt.s32 %p1, %r1, 3; @%p1 redux.sync.add.s32 %r9, %r1, -1;", "only some lanes"),
        ("add.rz.f32 %r9, %r1, %r1;", "unknown instruction add.rz.f32"),
        ("frob.b32 %r9, %r1;", "unknown instruction frob.b32"),
        (".loc 1 7 0 // f.py:7\nfrob.b32 %r9, %r1;", "test: frob.b32 %r9, %r1 (f.py:7)"),
        (".loc 1 7 3 // f.py:7:3 @[ g.py:1:2 ]\nfrob.b32 %r9;", "test: frob.b32 %r9 (f.py:7)"),
        ("mov.b32 %r9, %nothing;", "unknown register %nothing"),
        ("ld.local.b32 %r9, [%rd2];", "local memory is not known"),
    ],
)
def test_faults(body: str, message: str) -> None:
    with pytest.raises(Fault, match=re.escape(message)):
        result(body, shared=256)


def test_blocks_must_not_meet() -> None:
    """What one block writes, another neither writes nor reads: their order is not known."""
    out, given = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    write, read = "st.global.b32 [%rd1], 7;", "ld.global.b32 %r4, [%rd2];"
    run(module(write), [out, given], (1,))
    with pytest.raises(Fault, match="two blocks write"):
        run(module(write), [out, given], (2,))
    apart = "st.global.b32 [%rd5], %r9;" + read
    one = "mov.u32 %r9, %ctaid.x; mul.wide.u32 %rd4, %r9, 256; add.s64 %rd5, %rd1, %rd4;"
    both = torch.zeros(128, dtype=torch.int32)
    run(module(one + apart), [both, given], (2,))
    assert both.tolist() == [0] * 64 + [1] * 64
    with pytest.raises(Fault, match="a block reads"):
        run(module(one + apart), [both, both], (2,))


def test_wrong_launches() -> None:
    with pytest.raises(Fault, match="has 2 parameters, not 1"):
        run(module(""), [1], (1,))
    with pytest.raises(Fault, match="a block of 32 threads; test is for 64"):
        run(module(""), [1, 2], (1,), block=(32,))
    with pytest.raises(Fault, match="0 kernels"):
        run("", [], (1,))
