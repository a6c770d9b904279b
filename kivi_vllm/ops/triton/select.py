"""Pages that generated tokens read, chosen on a GPU: `reference.select`, for a `DeviceStep`.

Two launches, of kernels in CUDA C++; Triton has none of them. Nothing is read back: where no token
chooses, they find nothing to do.
"""

from __future__ import annotations

import functools

import torch

from kivi_vllm.config import BLOCK_SIZE, KiviConfigError
from kivi_vllm.ops.cuda import compiler
from kivi_vllm.ops.cuda import kernels as cuda
from kivi_vllm.ops.select import COUNTERS, Selection
from kivi_vllm.ops.step import AttentionParams, DeviceStep, Layer, LayerCache
from kivi_vllm.ops.triton.in_cuda import fields, variant
from kivi_vllm.ops.triton.page import page_constants
from kivi_vllm.ops.triton.softmax import rules_of
from kivi_vllm.ops.triton.tokens import pages_arguments
from kivi_vllm.ops.triton.workspace import (
    decode_tokens,
    kept,
    num_splits,
    slots,
    token_columns,
)

MOST_PAGES = 8192
"""Whose weights fit into a program's shared memory: of a million tokens."""


def check(layer: Layer, params: AttentionParams) -> None:
    """Whether a layer with a budget can be served; before anything slow begins.

    Raises:
        KiviConfigError: there is no compiler, sequences are too long, or pages were to be chosen
            by their keys.

    """
    if params.estimate != "ranges":
        raise KiviConfigError("kivi.estimate is 'ranges' on GPUs; leave it out")
    if not compiler.available() or not cuda.WANTED:
        raise KiviConfigError(
            "kivi.token_budget needs NVRTC on GPUs, to compile the kernels that choose: install "
            f"the package {compiler.package()} (and unset KIVI_VLLM_CUDA_DECODE), or leave the "
            "budget out"
        )
    if layer.max_tokens > MOST_PAGES * BLOCK_SIZE:
        raise KiviConfigError(
            f"kivi.token_budget serves up to {MOST_PAGES * BLOCK_SIZE} tokens on GPUs, but "
            f"--max-model-len is {layer.max_tokens}; lower it, or leave the budget out"
        )


_reserved: dict[torch.device, int] = {}
"""Pages of a sequence that the buffers of a device have room for."""


def reserve(layer: Layer, budget: int, device: torch.device) -> int:
    """Allocate what the choice of any step will need, once for all layers; its bytes."""
    pages = _reserved[device] = _pages(-(-layer.max_tokens // BLOCK_SIZE))
    tokens = layer.max_rows * layer.decode_len
    sizes = (tokens, layer.num_heads, layer.num_kv_heads, pages, budget // BLOCK_SIZE)
    _count(device)
    return sum(x.nbytes for x in _buffers(*sizes, device))


@functools.cache
def _count(device: torch.device) -> None:
    """Once a device: it counts, too."""
    COUNTERS.append(functools.partial(counted, device))


def _pages(most: int) -> int:
    """Pages of a sequence, rounded so that few kernels are compiled."""
    return max(64, 1 << (most - 1).bit_length())


def _buffers(
    tokens: int, heads: int, kv_heads: int, pages: int, read: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimates, lists, their lengths, and the counts of pages; see `Call` in step.cuh."""
    return (
        kept("estimates", 2 * tokens * heads * pages, torch.float32, device),
        kept("blocks", tokens * kv_heads * (read + 1), torch.int32, device),
        kept("counts", tokens, torch.int32, device),
        kept("counted", 2 * tokens * kv_heads, torch.int64, device),
    )


def counted(device: torch.device) -> tuple[int, int]:
    """Pages that generated tokens have seen and read so far, in layers with a budget."""
    seen, read = kept("counted", 0, torch.int64, device).view(-1, 2).sum(0).tolist()
    return seen, read


def select(
    step: DeviceStep,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
) -> Selection | None:
    """Choose the pages that the generated tokens of the step's decodes read."""
    read = params.token_budget // BLOCK_SIZE
    most_pages = step.block_table.shape[1] * cache.pages_per_block
    if not read or step.generated is None or not step.num_decodes or most_pages <= read:
        return None
    num_heads, kv_heads, device = query.shape[1], key.shape[1], query.device
    rows, gqa = step.num_decodes, num_heads // kv_heads
    tokens = decode_tokens(step)
    token_tiles, n = token_columns(gqa, cache.fmt.head_size)
    if not cuda.serves(cache.fmt, query.dtype, n):
        raise KiviConfigError(
            "kivi.token_budget serves pages of recipe 'best' and 16-bit models on GPUs; leave it "
            "out, or set kivi.recipe to 'best'"
        )
    # A table may be wider, where blocks hold several pages; a sequence has no more.
    pages = _reserved.get(device) or _pages(most_pages)
    columns = (tokens * token_tiles, n)
    rules = rules_of(params, cache)
    of = variant(page_constants(cache), rules, query.dtype, gqa, columns, False, read, pages)
    score, choose = (cuda.kernel(of, device, name) for name in ("score", "choose"))
    if score is None or choose is None:
        raise KiviConfigError("kivi.token_budget: its kernels cannot be had; leave it out")
    sizes = (rows * tokens, num_heads, kv_heads, pages, read, device)
    estimates, blocks, counts, counts_of_pages = _buffers(*sizes)
    blocks = blocks[: rows * tokens * kv_heads * (read + 1)].view(-1, kv_heads, read + 1)
    selection = Selection(blocks, counts[: rows * tokens])
    parts = num_splits(rows * kv_heads * columns[0], most_pages, slots(device, score))
    given = fields(query, step, pages_arguments(step, cache), None, params)
    given |= {
        "generated": step.generated.data_ptr(),
        "estimates": estimates.data_ptr(),
        "counted": counts_of_pages.data_ptr(),
        "blocks": blocks.data_ptr(),
        "counts": counts.data_ptr(),
        "most_pages": pages,
    }
    cuda.launch(score, (rows, kv_heads * columns[0], parts), given)
    cuda.launch(choose, (rows, kv_heads, tokens), given)
    return selection
