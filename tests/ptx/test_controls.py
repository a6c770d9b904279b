"""That these tests can fail: kernels without one of their barriers, and tables that lead astray."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest

from tests.ptx import launches
from tests.ptx.device import BF16, Compiled, simulator
from tests.ptx.machine import run
from tests.ptx.parse import Fault, Kernel, parse
from tests.unit.simulator import Case, Request, Simulator

CASE = Case(heads=(8, 2), model=BF16)


def about_to_decode() -> tuple[Simulator, Request]:
    sim = simulator(CASE)
    request = sim.add(400)
    sim.step({request: 398})
    sim.ops = Compiled(80)
    return sim, request


@pytest.mark.slow
def test_barriers_and_waits_are_missed() -> None:
    """Of decode: all that it has, but for what another barrier makes up for."""
    calls: list[tuple[Any, ...]] = []

    def record(text: str, *args: Any, **kwargs: Any) -> None:
        calls.append((text, args, kwargs))
        run(text, *args, **kwargs)

    sim, request = about_to_decode()
    with mock.patch.object(launches, "run", record):
        sim.step({request: 1})
    [(text, args, kwargs)] = [x for x in calls if ".entry _decode(" in x[0]]
    kernel = parse(text)
    ops = [x.op for x in kernel.instructions]
    guards = [i for i, op in enumerate(ops) if op.startswith(("bar.", "cp.async.wait"))]
    passed = []
    for i in guards:
        try:
            run(without(kernel, i), *args, **kwargs)
        except Fault:
            continue
        passed.append(str(kernel.instructions[i]))
    print(f"{len(guards) - len(passed)} of {len(guards)} are missed; not:", *passed, sep="\n")
    assert len(guards) > 20
    assert {ops[i].split(".")[0] for i in guards} == {"bar", "cp"}
    assert len(passed) <= len(guards) // 20


def without(kernel: Kernel, i: int) -> Kernel:
    """The kernel with an instruction that does nothing in the place of one."""
    instructions = [*kernel.instructions]
    nothing = {"op": "membar.cta", "operands": ()}
    instructions[i] = dataclasses.replace(instructions[i], **nothing)
    return dataclasses.replace(kernel, instructions=instructions)


@pytest.mark.slow
def test_a_poisoned_page_is_noticed() -> None:
    sim, request = about_to_decode()
    request.blocks[1] = 0  # NaN
    with pytest.raises(AssertionError, match=r"positions .* are off by up to nan"):
        sim.step({request: 1})


@pytest.mark.slow
def test_an_entry_beyond_the_pool_is_noticed() -> None:
    sim, request = about_to_decode()
    request.blocks[1] = 1 << 20
    with pytest.raises(Fault, match="outside of all tensors; _decode"):
        sim.step({request: 1})
