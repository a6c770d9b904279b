"""Which tensors the kernels take: everything else is a ValueError that names it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kivi_vllm.config import BLOCK_SIZE, PAPER_GROUP_SIZES
from kivi_vllm.config import DTYPES as CACHE_DTYPES
from kivi_vllm.ops.residual import ring_entry, ring_start
from kivi_vllm.ops.select import Selection
from kivi_vllm.ops.step import AttentionParams, LayerCache, Step

if TYPE_CHECKING:
    from kivi_vllm.ops.step import DeviceStep

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""KiviDtype of csrc/abi.h."""

FORMATS = {(*dtype[:3], True) for dtype in CACHE_DTYPES.values()} | {
    (dtype.k_bits, dtype.v_bits, group_size, False)
    for dtype in CACHE_DTYPES.values()
    if dtype.published
    for group_size in PAPER_GROUP_SIZES
}
"""Bits of keys and of values, group size, and whether pages are those of recipe "best"."""

CHECKED_FORMS: dict[tuple, Any] = {}
"""Forms of tensors (shapes, strides and the like) that have passed, and what to know of such
tensors; operators look here first."""

MOST_KNOWN = 4096


def record_form(form: tuple, what: Any = None) -> None:
    """Tensors of this form are good, and this is to be known of them."""
    if len(CHECKED_FORMS) >= MOST_KNOWN:
        CHECKED_FORMS.clear()
    CHECKED_FORMS[form] = what


def check_pages(cache: LayerCache, device: torch.device) -> None:
    """Raise ValueError unless the pages are of the cache's format, and the kernels have that."""
    fmt, pages = cache.fmt, cache.pages
    if (fmt.k_bits, fmt.v_bits, fmt.group_size, fmt.two_level) not in FORMATS:
        raise ValueError(
            f"the kernels have no format of {fmt.k_bits} and {fmt.v_bits} bits with "
            f"group_size {fmt.group_size} under recipe {'best' if fmt.two_level else 'paper'!r}"
        )
    if not (
        pages.device == device
        and pages.dtype == torch.uint8
        and pages.dim() == 4
        and pages.shape[1] > 0
        and pages.shape[3] == fmt.page_bytes
        and pages.stride(3) == 1
        and not any(n % 4 for n in (pages.data_ptr(), *pages.stride()[:3]))
    ):
        shape = f"[num_blocks, pages of a block, num_kv_heads, {fmt.page_bytes}]"
        wanted = f"uint8 {shape}, aligned to 4 bytes"
        raise _unfit("pages", pages, wanted, device)


def check_numbers(cache: LayerCache) -> None:
    """Raise ValueError unless R is one, and there are sinks where the format has some."""
    residual = cache.residual_length
    if not 0 <= residual <= BLOCK_SIZE:
        raise ValueError(f"residual_length is {residual}, but must be 0 to {BLOCK_SIZE}")
    if (cache.sinks is None) != (cache.fmt.sink_tokens == 0):
        given = "no page" if cache.sinks is None else "a page"
        raise ValueError(
            f"sinks: {given} for sink_tokens {cache.fmt.sink_tokens} of the format; there must be "
            "one where there are sink tokens, and none otherwise"
        )


def check_tails(cache: LayerCache) -> None:
    """Raise ValueError unless the tails, which have passed `check_raw`, can hold R tokens."""
    tokens = sorted({tail.cache.shape[2] for tail in cache.tails})
    if len(tokens) > 1:
        raise ValueError(f"tails have pages of {tokens} tokens, but all must be of the same")
    if len(cache.tails) * cache.tail_tokens < cache.residual_length:
        raise ValueError(
            f"{len(cache.tails)} tails of {cache.tail_tokens} tokens cannot hold "
            f"residual_length {cache.residual_length}"
        )


def check_raw(name: str, data: torch.Tensor, cache: LayerCache, *, least: int = 1) -> None:
    """Raise ValueError unless `data`, a `Raw.cache`, fits the format and the pages.

    `least`: tokens that a page must hold.
    """
    fmt, heads = cache.fmt, cache.num_kv_heads
    if not (
        data.device == cache.pages.device
        and data.dtype == fmt.raw_dtype
        and data.dim() == 4
        and data.shape[1] == heads
        and least <= data.shape[2] <= BLOCK_SIZE
        and data.shape[3] >= 2 * fmt.head_size
        and data.stride(3) == 1
    ):
        shape = f"[num_blocks, {heads}, {least} to {BLOCK_SIZE}, >= {2 * fmt.head_size}]"
        raise _unfit(name, data, f"{fmt.raw_dtype} {shape}", cache.pages.device)


def check_table(
    name: str, table: torch.Tensor, step: Step | DeviceStep, device: torch.device
) -> None:
    """Raise ValueError unless `table` has page ids of all of the step's requests."""
    if not (
        table.device == device
        and table.dtype == torch.int32
        and table.dim() == 2
        and table.shape[0] >= step.num_reqs
        and (table.stride(1) == 1 or table.shape[1] <= 1)
    ):
        raise _unfit(name, table, f"int32 [>= {step.num_reqs}, n]", device)


def check_tokens(
    name: str,
    x: torch.Tensor,
    step: Step | DeviceStep,
    cache: LayerCache,
    heads: int,
    dtype: torch.dtype,
) -> None:
    """Raise ValueError unless `x` is `dtype` [num_tokens or more, heads, head_size]."""
    head_size, device = cache.fmt.head_size, cache.pages.device
    if not (
        x.device == device
        and x.dtype == dtype
        and x.dim() == 3
        and x.shape[0] >= step.num_tokens
        and x.shape[1:] == (heads, head_size)
        and x.stride(2) == 1
    ):
        wanted = f"{dtype} [>= {step.num_tokens}, {heads}, {head_size}]"
        raise _unfit(name, x, wanted, device)


def check_query(
    step: Step | DeviceStep,
    cache: LayerCache,
    query: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
) -> None:
    """Raise ValueError unless the query, the output and the params fit each other and the cache."""
    fmt, num_kv_heads = cache.fmt, cache.num_kv_heads
    heads = query.shape[1] if query.dim() == 3 else 0
    if not heads or heads % num_kv_heads:
        wanted = f"{fmt.raw_dtype} [num_tokens, a multiple of {num_kv_heads}, {fmt.head_size}]"
        raise _unfit("query", query, wanted, cache.pages.device)
    check_tokens("query", query, step, cache, heads, fmt.raw_dtype)
    if output.dtype not in DTYPES:
        raise ValueError(
            f"output is {output.dtype}, but must be one of {', '.join(map(str, DTYPES))}"
        )
    check_tokens("output", output, step, cache, heads, output.dtype)
    for name in ("alibi_slopes", "sink_logits"):
        if getattr(params, name) is not None:
            check_per_head(name, getattr(params, name), heads, cache.pages.device)


def check_per_head(name: str, x: torch.Tensor, heads: int, device: torch.device) -> None:
    """Raise ValueError unless `x` is a number of each query head."""
    if not (
        x.device == device
        and x.dtype == torch.float32
        and x.shape == (heads,)
        and x.is_contiguous()
    ):
        raise _unfit(name, x, f"float32 [{heads}]", device)


def check_last_visible(x: torch.Tensor, num_tokens: int, device: torch.device) -> None:
    """Raise ValueError unless `x` has a position of each token of a step."""
    if not (
        x.device == device
        and x.dtype == torch.int32
        and x.dim() == 1
        and x.shape[0] >= num_tokens
        and x.is_contiguous()
    ):
        raise _unfit("last_visible", x, f"int32 [>= {num_tokens}]", device)


def check_selection(selection: Selection, step: Step, cache: LayerCache) -> None:
    """Raise ValueError unless there is a list of blocks for each token of a step and kv head."""
    blocks, counts = selection.blocks, selection.counts
    shape = (blocks.dim(), *blocks.shape[1:2])
    fits = shape == (3, cache.num_kv_heads) and blocks.shape[0] >= step.num_tokens
    lists = f"int32 [>= {step.num_tokens}, {cache.num_kv_heads}, n]"
    for name, x, wanted, good in (
        ("selection.blocks", blocks, lists, fits),
        ("selection.counts", counts, "int32 [as many as lists]", counts.shape == blocks.shape[:1]),
    ):
        as_it_must = x.dtype == torch.int32 and x.device == cache.pages.device and x.is_contiguous()
        if not (good and as_it_must):
            raise _unfit(name, x, wanted, cache.pages.device)


def check_page_ids(step: DeviceStep, cache: LayerCache) -> None:
    """Raise ValueError unless all pages that the step reads or writes are there.

    It reads tables on the host, so it is for tests, and for looking for a fault.
    """
    starts, ends = step.query_start_loc.tolist(), step.seq_lens.tolist()
    for row, (q0, q1, b) in enumerate(zip(starts, starts[1:], ends, strict=False)):
        if q0 == q1:
            continue
        a = b - (q1 - q0)
        first, blocks = a // BLOCK_SIZE, b // BLOCK_SIZE
        read, written = first * BLOCK_SIZE, max(a, ring_start(b, step.decode_len))
        positions = (*range(read, a), *range(written, b))
        slots = {ring_entry(s, cache.ring.cache.shape[2]) for s in positions}
        held = range(-(-blocks // cache.pages_per_block))
        wanted: list[Any] = [("block_table", step.block_table, len(cache.pages), held)]
        wanted += [("ring.table", cache.ring.table, len(cache.ring.cache), sorted(slots))]
        for i, tail in enumerate(cache.tails):
            kept = range(max(0, first - 1), blocks)
            wanted += [(f"tails[{i}].table", tail.table, len(tail.cache), kept)]
        if cache.sinks is not None and blocks:
            wanted += [("sinks.table", cache.sinks.table, len(cache.sinks.cache), [0])]
        for name, table, pages, entries in wanted:
            for at in entries:
                page = int(table[row, at]) if at < table.shape[1] else -1
                if not 0 <= page < pages:
                    raise ValueError(f"{name} has page {page} for request {row}, of {pages} pages")


def _unfit(name: str, x: torch.Tensor, wanted: str, device: torch.device) -> ValueError:
    found = f"{x.dtype} {list(x.shape)} with strides {list(x.stride())} on {x.device}"
    return ValueError(
        f"{name} is {found}, but must be {wanted} on {device}, its last dimension dense"
    )
