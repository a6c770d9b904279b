"""Triton's interpreter, with its product of bf16 matrices put right.

It keeps bf16 numbers as their bits in uint16 and multiplies those bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


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
