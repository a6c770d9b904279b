"""Triton's launches, compiled and run: `device(capability)` is a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITFunction

from tests.ptx.machine import Argument, load, run
from tests.unit.ahead import compiled


def launch(function: Any, kernel: Any, args: Any, kwargs: Any, grid: Any, **options: Any) -> None:
    """Run what a launch `function[grid](*args, **kwargs)` compiles to: `kernel`."""
    given = {**dict(zip(function.arg_names, args, strict=False)), **kwargs}
    arguments: list[Argument] = []
    for name, signature in kernel.src.signature.items():
        arguments += _flat(signature, given.get(name))
    ptx = kernel.asm["ptx"]
    # What Triton's own launcher adds: buffers that our kernels do not use.
    arguments += [0] * (len(load(ptx).kernel.parameters) - len(arguments))
    grid = grid(given) if callable(grid) else grid
    run(ptx, arguments, grid, shared=kernel.metadata.shared, **options)


def _flat(signature: Any, value: Any) -> list[Argument]:
    """The arguments that are passed: those of tuples one by one, and no constants."""
    if isinstance(signature, tuple | list):
        pairs = zip(signature, value, strict=True)
        return [x for pair in pairs for x in _flat(*pair)]
    return [] if signature == "constexpr" else [value]


@contextmanager
def device(capability: int, reachable: Iterable[torch.Tensor] = ()) -> Iterator[list[Any]]:
    """Kernels that are launched run as on a GPU of `capability`; gives them, in order.

    `reachable`: tensors whose addresses kernels find in memory.
    """
    with compiled(capability, assembled=False) as kernels:
        compile_ = JITFunction.run

        def run_(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
            kernel = compile_(self, *args, grid=grid, warmup=True, **kwargs)
            launch(self, kernel, args, kwargs, grid, reachable=reachable)
            return kernel

        with mock.patch.object(JITFunction, "run", run_):
            yield kernels
