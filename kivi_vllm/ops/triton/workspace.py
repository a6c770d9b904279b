"""How far a decode step is split, and where the parts wait to be put together."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Protocol

import torch

from kivi_vllm.ops.step import DeviceStep

MOST_PROGRAMS = 16
"""Programs of a multiprocessor that splits count with, at most: a bound of the workspace."""

MAX_SPLITS = 128

MOST_WAVES = 4
"""So often, at most, the programs of a step fill the GPU for the sake of even waves."""

FULL = 0.9
"""Of all waves that is enough."""

SYSTEM_SHARED = 1024
"""Bytes of shared memory that a program takes besides its own."""

_buffers: dict[tuple[str, torch.device], list[torch.Tensor]] = {}


class Takes(Protocol):
    """What a program of a compiled kernel takes: of a thread, of shared memory, and its warps."""

    registers: int
    shared_bytes: int
    warps: int


@dataclass(frozen=True)
class Kernel:
    """A kernel of Triton's, as `Takes` has it."""

    registers: int
    shared_bytes: int
    warps: int


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted: few programs, but several splits
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def slots(device: torch.device, kernel: Takes | None) -> int:
    """Programs of `kernel` that run on a device together; None: it is not compiled yet."""
    each = MOST_PROGRAMS
    if device.type == "cuda" and kernel is not None:
        of = torch.cuda.get_device_properties(device)
        registers = -(-kernel.registers // 8) * 8 * 32 * kernel.warps  # of a warp, whole 256s
        each = min(
            MOST_PROGRAMS,
            of.regs_per_multiprocessor // registers,
            of.shared_memory_per_multiprocessor // (kernel.shared_bytes + SYSTEM_SHARED),
            of.max_threads_per_multi_processor // (32 * kernel.warps),
        )
    return _num_processors(device) * max(1, each)


@functools.lru_cache(4096)  # of every layer's every step
def num_splits(programs: int, most_pages: int, slots: int) -> int:
    """Into how many parts the pages of every row are split.

    As few as fill whole waves: of the programs that run together in each, nearly all have
    something to do in the last one too. It follows from what is known without a look at the
    device, so that a captured graph stays right: short rows leave splits empty, whose programs
    end immediately.

    Args:
        programs: rows times kv heads, and tiles of columns.
        most_pages: pages that a row can have.
        slots: programs that run together.

    """
    most = min(MAX_SPLITS, -(-most_pages // 2), MOST_WAVES * slots // max(1, programs))
    best, best_share = 1, 0.0
    for splits in range(1, most + 1):
        waves = -(-programs * splits // slots)
        share = programs * splits / (waves * slots)
        if share > best_share:
            best, best_share = splits, share
        if share >= FULL:
            break
    return best


def decode_tokens(step: DeviceStep) -> int:
    """Tokens that a decode of a step may have: one, or as many as any, so that few are compiled."""
    return 1 if step.max_query_len == 1 else step.decode_len


def columns(gqa: int, tokens: int) -> tuple[int, int]:
    """Tiles and columns of a tile for `tokens` query tokens of `gqa` query heads a kv head."""
    count = gqa * tokens
    return (1, 8) if count <= 8 else (-(-count // 16), 16)


def token_columns(gqa: int, head_size: int) -> tuple[int, int]:
    """Tiles of one token, and columns of a tile, where each token has tiles of its own."""
    n = 8 if gqa <= 8 or head_size > 128 else 16
    return -(-gqa // n), n


def reserve(
    rows: int,
    num_kv_heads: int,
    gqa: int,
    tokens: int,
    head_size: int,
    device: torch.device,
    apart: bool = False,
) -> int:
    """Allocate what any step of at most `rows` rows will need.

    Before vLLM measures how much memory is left for the cache, and outside of captures.

    Args:
        rows, num_kv_heads, gqa, tokens, head_size, device: of the steps.
        apart: each token has tiles of its own, those of `token_columns`.

    Returns:
        its bytes.

    """
    tiles, n = columns(gqa, tokens)
    if apart:
        tiles, n = token_columns(gqa, head_size)
        tiles *= tokens
    programs = rows * num_kv_heads * tiles
    # Full-precision tokens are one split more.
    programs += max(programs, MOST_WAVES * slots(device, None))
    return _buffer(programs * n * (head_size + 2), device).nbytes


def kept(what: str, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """At least so many numbers, zeros at first, that stay valid for ever: a graph may use them."""
    buffers = _buffers.setdefault((what, device), [])
    if not buffers or buffers[-1].numel() < numel:
        buffers.append(torch.zeros(numel, dtype=dtype, device=device))
    return buffers[-1]


def _buffer(numel: int, device: torch.device) -> torch.Tensor:
    return kept("parts", numel, torch.float32, device)


def workspace(
    parts: tuple[int, int, int, int], head_size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Buffers for partial sums [*parts, head_size] and statistics [*parts, 2], fp32.

    All layers of a step use the same memory, one after the other.
    """
    count = math.prod(parts)
    flat = _buffer(count * (head_size + 2), device)
    partial = flat[: count * head_size].view(*parts, head_size)
    return partial, flat[count * head_size : count * (head_size + 2)].view(*parts, 2)
