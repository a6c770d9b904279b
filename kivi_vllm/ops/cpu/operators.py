"""`store_blocks`, `select`, `attend` and `store_ring` by the native kernels.

Meaning and arguments are those of `kivi_vllm.ops.reference`. Whatever does not fit the
kernels raises a ValueError that names it before any of them runs (`checks`); a page id
outside of its cache does so too.

The calls of a step must cost microseconds in every layer: what they have in common is
packed by the first and kept in `LayerCache.native` for the others; caches and tables, which
live for many calls, are checked and described once; and keys, values, queries and outputs
like some that passed the checks are recognized by their shapes and strides.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch

from kivi_vllm.ops import checks
from kivi_vllm.ops.checks import CHECKED_FORMS, DTYPES, MOST_KNOWN, record_form
from kivi_vllm.ops.cpu.abi import COMMON, QUERY, RAW, RAW_FIELDS
from kivi_vllm.ops.cpu.library import BAD_LIST, BAD_PAGE, NO_MEMORY, OK, load
from kivi_vllm.ops.reference import limits, prepare, step
from kivi_vllm.ops.select import (
    COUNTED,
    Selection,
    check_pages,
    estimate_channels,
    must_choose,
)
from kivi_vllm.ops.step import AttentionParams, LayerCache, Raw, Step

__all__ = [
    "attend",
    "attend_selected",
    "limits",
    "prepare",
    "select",
    "step",
    "store_blocks",
    "store_ring",
]

NO_QUERY = bytes(QUERY.size)
NO_RAW = (0,) * len(RAW_FIELDS)

_CPU = torch.device("cpu")

_described: dict[int, tuple[Any, tuple[Any, ...], Any]] = {}  # by id: weak reference, context


def store_blocks(step: Step, cache: LayerCache, key: torch.Tensor, value: torch.Tensor) -> None:
    """See `reference.store_blocks`."""
    if step.completes_a_block:
        _run(load().store_blocks, _common(step, cache, key, value) + NO_QUERY, cache)


def store_ring(step: Step, cache: LayerCache, key: torch.Tensor, value: torch.Tensor) -> None:
    """See `reference.store_ring`."""
    if step.rows:
        _run(load().store_ring, _common(step, cache, key, value) + NO_QUERY, cache)


def select(
    step: Step,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
) -> Selection | None:
    """See `reference.select`."""
    made = _lists(step, cache, params)
    if made is None:
        return None
    call = _common(step, cache, key, value) + _query(step, cache, query, params, query, made)
    _run(load().select_pages, call, cache)
    return made


def _lists(step: Step, cache: LayerCache, params: AttentionParams) -> Selection | None:
    """Where a step's lists go; None: it needs none."""
    if not must_choose(step.longest_generated, cache.residual_length, params.token_budget):
        return None
    check_pages(cache.fmt, params.estimate)
    made = _room(step.num_tokens, cache.num_kv_heads, params.token_budget)
    cache.native["selection"] = step, made  # which needs no checks
    return made


@functools.lru_cache(maxsize=4)  # of layers that differ
def _room(num_tokens: int, num_kv_heads: int, budget: int) -> Selection:
    """Room for lists: one for all layers, each of which reads before the next one chooses."""
    return Selection.empty(num_tokens, num_kv_heads, budget)


def attend(
    step: Step,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
    selection: Selection | None = None,
) -> None:
    """See `reference.attend`."""
    if not step.rows:
        return
    call = _common(step, cache, key, value) + _query(step, cache, query, params, output, selection)
    _run(load().attend, call, cache)


def attend_selected(
    step: Step,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
) -> None:
    """See `reference.attend_selected`: one call, which chooses for a head and attends at once."""
    made = _lists(step, cache, params)
    if made is None:
        return attend(step, cache, query, key, value, params, output)
    call = _common(step, cache, key, value) + _query(step, cache, query, params, output, made)
    _run(load().attend_selected, call, cache)


def _query(
    step: Step,
    cache: LayerCache,
    query: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
    selection: Selection | None,
) -> bytes:
    """The part of a KiviCall that choosing and attending need."""
    form = _form_of("query", step, cache, query, output)
    strides = CHECKED_FORMS.get(form)
    if strides is None:
        checks.check_query(step, cache, query, params, output)
        strides = _record_strides(form, query, output)
    slopes, logits = params.alibi_slopes, params.sink_logits
    token, head, out_token, out_head = strides
    lists = (0, 0, 0)
    if selection is not None:
        chosen = cache.native.get("selection")
        if not (chosen and chosen[0] is step and chosen[1] is selection):
            checks.check_selection(selection, step, cache)
        blocks, counts = selection.blocks, selection.counts
        lists = (blocks.data_ptr(), counts.data_ptr(), blocks.shape[2])
    return QUERY.pack(
        query.data_ptr(),
        token,
        head,
        output.data_ptr(),
        out_token,
        out_head,
        DTYPES[output.dtype],
        query.shape[1],
        params.scale,
        params.logits_soft_cap,
        0 if slopes is None else _per_head("alibi_slopes", slopes, query),
        params.sliding_window,
        0 if logits is None else _per_head("sink_logits", logits, query),
        params.chunk_size,
        _last_visible(step),
        params.token_budget,
        estimate_channels(cache.fmt.head_size) if params.estimate == "keys" else 0,
        *lists,
        COUNTED.data_ptr() if params.token_budget else 0,
    )


def _common(step: Step, cache: LayerCache, key: torch.Tensor, value: torch.Tensor) -> bytes:
    """The part of a KiviCall that all calls need."""
    made = cache.native.get("common")
    if made and made[0] is step and made[1] is key and made[2] is value:
        return made[3]
    fmt, pages = cache.fmt, cache.pages
    checks.check_numbers(cache)
    where = _described_once(
        pages, (fmt,), lambda: _pages(cache)
    )  # first: tensors are compared with them
    form = _form_of("key", step, cache, key, value)
    strides = CHECKED_FORMS.get(form)
    if strides is None:
        for name, x in (("key", key), ("value", value)):
            checks.check_tokens(name, x, step, cache, cache.num_kv_heads, fmt.raw_dtype)
        strides = _record_strides(form, key, value)
    token, head, value_token, value_head = strides
    tails = ctypes.create_string_buffer(
        b"".join(RAW.pack(*_raw(f"tails[{i}]", x, step, cache)) for i, x in enumerate(cache.tails))
    )
    checks.check_tails(cache)
    common = COMMON.pack(
        step.row_array.data_ptr(),
        len(step.rows),
        step.per_position,
        step.decode_len,
        fmt.k_bits,
        fmt.v_bits,
        fmt.group_size,
        fmt.two_level,
        fmt.head_size,
        DTYPES[fmt.raw_dtype],
        cache.num_kv_heads,
        *where,
        *_table("block_table", step.block_table, step),
        *_raw("ring", cache.ring, step, cache),
        ctypes.addressof(tails),
        len(cache.tails),
        cache.residual_length,
        *(NO_RAW if cache.sinks is None else _raw("sinks", cache.sinks, step, cache)),
        fmt.sink_tokens,
        key.data_ptr(),
        token,
        head,
        value.data_ptr(),
        value_token,
        value_head,
        torch.get_num_threads(),
    )
    cache.native["common"] = (step, key, value, common, tails)
    return common


def _described_once(x: torch.Tensor, context: tuple[Any, ...], describe: Callable[[], Any]) -> Any:
    """What `describe`, which checks, says of `x`: once for a tensor in this context."""
    known = _described.get(id(x))
    if known is not None and known[0]() is x and known[1] == context:
        return known[2]
    description = describe()
    if len(_described) >= MOST_KNOWN:
        _described.clear()
    _described[id(x)] = (weakref.ref(x), context, description)
    return description


def _pages(cache: LayerCache) -> tuple[int, ...]:
    checks.check_pages(cache, _CPU)
    pages = cache.pages
    num_blocks, per_block = pages.shape[:2]
    return pages.data_ptr(), *pages.stride()[:3], num_blocks, per_block


def _table(name: str, table: torch.Tensor, step: Step) -> tuple[int, int, int]:
    def describe() -> tuple[int, int, int]:
        checks.check_table(name, table, step, _CPU)
        return table.data_ptr(), table.stride(0), table.shape[1]

    return _described_once(table, (step.num_reqs,), describe)


def _raw(name: str, raw: Raw, step: Step, cache: LayerCache) -> tuple[int, ...]:
    """KiviRaw."""

    def describe() -> tuple[int, ...]:
        least = cache.fmt.sink_tokens if raw is cache.sinks else 1
        checks.check_raw(name, raw.cache, cache, least=least)
        num_blocks, _, tokens, _ = raw.cache.shape
        strides = (n * raw.cache.itemsize for n in raw.cache.stride()[:3])
        return raw.cache.data_ptr(), *strides, num_blocks, tokens

    context = (cache.fmt, cache.num_kv_heads, raw is cache.sinks)
    return (
        *_described_once(raw.cache, context, describe),
        *_table(f"{name}.table", raw.table, step),
    )


def _per_head(name: str, x: torch.Tensor, query: torch.Tensor) -> int:
    """Address of `x`, a number of each query head."""
    heads = query.shape[1]

    def describe() -> int:
        checks.check_per_head(name, x, heads, _CPU)
        return x.data_ptr()

    return _described_once(x, (heads,), describe)


def _last_visible(step: Step) -> int:
    x = step.last_visible
    if x is None:
        return 0

    def describe() -> int:
        checks.check_last_visible(x, step.num_tokens, _CPU)
        return x.data_ptr()

    return _described_once(x, (step.num_tokens,), describe)


def _form_of(
    name: str, step: Step, cache: LayerCache, x: torch.Tensor, y: torch.Tensor
) -> tuple[Any, ...]:
    """All that says whether tensors fit a step over this cache; hashed faster than checked."""
    where = (name, cache.fmt, cache.num_kv_heads, step.num_tokens)
    return (*where, x.dtype, x.shape, x.stride(), x.is_cpu, y.dtype, y.shape, y.stride(), y.is_cpu)


def _record_strides(form: tuple[Any, ...], x: torch.Tensor, y: torch.Tensor) -> tuple[int, ...]:
    """Tensors of this form have passed; returns the strides of tokens and heads of KiviTensor."""
    strides = tuple(n * z.itemsize for z in (x, y) for n in z.stride()[:2])
    record_form(form, strides)
    return strides


def _run(function: Any, call: bytes, cache: LayerCache) -> None:
    status = function(call)
    if status == OK:
        return
    if status == BAD_PAGE:
        raise ValueError(
            "a page id in block_table or in the table of the ring, a tail or the sinks is outside "
            f"of its cache (pages: {cache.pages.shape[0]}, ring: {cache.ring.cache.shape[0]}), the "
            "table has too few columns for a row's positions, a block that attention reads has no "
            "page (id 0), or a row's positions and tokens do not fit"
        )
    if status == BAD_LIST:
        raise ValueError(
            "selection: the blocks of a token are not ascending, or it does not see one of them"
        )
    if status == NO_MEMORY:
        raise MemoryError("no memory for the work space of the CPU kernels")
    raise RuntimeError(f"the CPU kernels returned status {status}")
