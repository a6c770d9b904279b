"""Triton's interpreter: its product of bf16 matrices put right, and what it does again left out.

It keeps bf16 numbers as their bits in uint16 and multiplies those bits. And it spends most of its
time on two things that change nothing: see `quicken`.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle


def _widened(handle: TensorHandle) -> TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def repair(builder: type = InterpreterBuilder) -> None:
    """Teach the interpreter's `tl.dot` bf16; once."""
    original = builder.create_dot
    if getattr(original, "knows_bf16", False):
        return

    def create_dot(self: Any, a: Any, b: Any, *args: Any) -> Any:
        return original(self, _widened(a), _widened(b), *args)

    create_dot.knows_bf16 = True  # type: ignore[attr-defined]
    builder.create_dot = create_dot


def quicken() -> None:
    """Have the interpreter do only what is needed, at half of the time; once.

    - It puts its own functions into `triton.language` again for each call of a device function. Its
      launch had done so, if only for the modules that the kernel imports; here it does for all.
    - It computes whether integers overflow, and drops what it finds unless it debugs.
    """
    patch = interpreter._patch_lang
    if getattr(patch, "is_for_all", False):
        return
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_for_all(_: Any) -> Any:
        return patch(everything)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)

    patch_for_all.is_for_all = True  # type: ignore[attr-defined]
    interpreter._patch_lang = patch_for_all
    InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    checked = builder.options.debug
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=checked)
