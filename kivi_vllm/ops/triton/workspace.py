"""How far a decode step is split, and where the parts wait to be put together."""

from __future__ import annotations

import functools
import math

import torch

PROGRAMS_PER_PROCESSOR = 16
"""Programs of two warps that should be there for every multiprocessor: about what fits."""

MAX_SPLITS = 128

_buffers: dict[torch.device, list[torch.Tensor]] = {}


@functools.cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # interpreted: few programs, but several splits
    return torch.cuda.get_device_properties(device).multi_processor_count


def num_splits(programs: int, max_blocks: int, device: torch.device) -> int:
    """Into how many parts the pages of every row are split.

    It follows from what is known without a look at the device, so that a captured
    graph stays right: short rows leave splits empty, whose programs end immediately.

    Args:
        programs: rows times kv heads.
        max_blocks: pages that a row can have.
        device: where.

    """
    wanted = -(-PROGRAMS_PER_PROCESSOR * _num_processors(device) // max(1, programs))
    return max(1, min(wanted, MAX_SPLITS, -(-max_blocks // 2)))


def columns(gqa: int, tokens: int) -> tuple[int, int]:
    """Tiles and columns of a tile for `tokens` query tokens of `gqa` query heads a kv head."""
    count = gqa * tokens
    return (1, 8) if count <= 8 else (-(-count // 16), 16)


def reserve(
    rows: int, num_kv_heads: int, gqa: int, tokens: int, head_size: int, device: torch.device
) -> None:
    """Allocate what any step of at most `rows` rows will need.

    Before vLLM measures how much memory is left for the cache, and outside of captures.
    """
    tiles, n = columns(gqa, tokens)
    programs = 2 * rows * num_kv_heads * tiles
    programs += PROGRAMS_PER_PROCESSOR * _num_processors(device)
    _buffer(programs * n * (head_size + 2), device)


def _buffer(numel: int, device: torch.device) -> torch.Tensor:
    """At least `numel` fp32 numbers that stay valid for ever: a captured graph may use them."""
    buffers = _buffers.setdefault(device, [])
    if not buffers or buffers[-1].numel() < numel:
        buffers.append(torch.empty(numel, device=device))
    return buffers[-1]


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
