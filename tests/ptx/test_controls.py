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


def about_to_decode(capability: int = 80) -> tuple[Simulator, Request]:
    sim = simulator(CASE)
    request = sim.add(420)
    sim.step({request: 398})
    sim.ops = Compiled(capability)
    return sim, request


def guarded(capability: int, name: str, tokens: int, *guards: str) -> tuple[int, list[str]]:
    """How many such instructions a kernel has in a step, and those that it does well without."""
    calls: list[tuple[Any, ...]] = []

    def record(text: str, *args: Any, **kwargs: Any) -> None:
        calls.append((text, args, kwargs))
        run(text, *args, **kwargs)

    sim, request = about_to_decode(capability)
    with mock.patch.object(launches, "run", record):
        sim.step({request: tokens})
    [(text, args, kwargs)] = [x for x in calls if f".entry {name}(" in x[0]]
    kernel = parse(text)
    places = [i for i, x in enumerate(kernel.instructions) if x.op.startswith(guards)]
    ops = [kernel.instructions[i].op for i in places]
    assert all(any(op.startswith(guard) for op in ops) for guard in guards)
    passed = []
    for i in places:
        try:
            run(without(kernel, i), *args, **kwargs)
        except Fault:
            continue
        passed.append(str(kernel.instructions[i]))
    print(f"{len(places) - len(passed)} of {len(places)} are noticed; not:", *passed, sep="\n")
    return len(places), passed


@pytest.mark.slow
def test_decode_without_a_barrier_or_wait_is_noticed() -> None:
    """All but what another barrier makes up for."""
    count, passed = guarded(80, "_decode", 1, "bar.", "cp.async.wait")
    assert count > 20
    assert len(passed) <= count // 20


@pytest.mark.slow
def test_prefill_without_a_fence_or_wait_is_noticed() -> None:
    """Of its asynchronous products, on Hopper."""
    count, passed = guarded(90, "_prefill", 20, "fence.proxy.async", "wgmma.wait_group")
    assert count >= 4
    assert not passed


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
