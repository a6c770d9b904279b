"""The operators of one layer's step on a GPU: `reference`'s, for a `DeviceStep`.

Contract of the tensors, besides the shapes in `reference`: head_size contiguous, and
all other strides and addresses multiples of 16 bytes, as vLLM's are; block tables int32.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os

import torch

from kivi_vllm.ops import checks
from kivi_vllm.ops.checks import CHECKED_FORMS, record_form
from kivi_vllm.ops.contract import Limits
from kivi_vllm.ops.select import Selection
from kivi_vllm.ops.step import AttentionParams, DeviceStep, Layer, LayerCache
from kivi_vllm.ops.triton import ring, spills, store
from kivi_vllm.ops.triton import select as chooser
from kivi_vllm.ops.triton.decode import decode
from kivi_vllm.ops.triton.first_chunk import choose
from kivi_vllm.ops.triton.page import page_constants
from kivi_vllm.ops.triton.prefill import prefill
from kivi_vllm.ops.triton.softmax import rules_of
from kivi_vllm.ops.triton.workspace import reserve

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

CHECKED = os.environ.get("KIVI_VLLM_CHECK_PAGES") == "1"
"""Look at all page ids before every step: slow, and not in CUDA graphs."""

limits = Limits(
    "GPUs",
    # For which the tests compile the kernels. Of 512, a page takes more registers than a program
    # can have, and spills.
    head_sizes=(64, 96, 128, 256),
    # In float32, tiles would not fit the shared memory of all GPUs.
    model_dtypes=(torch.bfloat16, torch.float16),
    # Matrix products of bf16, and asynchronous copies.
    min_capability=((8, 0), "Ampere"),
    decodes_first=True,
    selects=("best",),
    estimates=("ranges",),
    needs_eager="KIVI_VLLM_CHECK_PAGES=1" if CHECKED else "",
)

step = DeviceStep.of

_compiled: set[tuple] = set()


def store_blocks(
    step: DeviceStep, cache: LayerCache, key: torch.Tensor, value: torch.Tensor
) -> None:
    """As `reference.store_blocks`, for a `DeviceStep`; one launch.

    Called first in a step, so it checks what all calls share.

    Raises:
        ValueError: a tensor that the kernels do not take; the message names it.

    """
    raws = {"ring": cache.ring, **{f"tails[{i}]": t for i, t in enumerate(cache.tails)}}
    if cache.sinks is not None:
        raws["sinks"] = cache.sinks
    tables = {"block_table": step.block_table, **{f"{n}.table": r.table for n, r in raws.items()}}
    data = {"pages": cache.pages, **{f"{n}.cache": r.cache for n, r in raws.items()}}
    tokens = {"key": key, "value": value}
    form = (cache.fmt, cache.residual_length, step.num_reqs, step.num_tokens)
    form += (*raws, *map(_form_of, (*tables.values(), *data.values(), *tokens.values())))
    if form not in CHECKED_FORMS:
        device = cache.pages.device
        checks.check_numbers(cache)
        checks.check_pages(cache, device)
        for name, raw in raws.items():
            least = cache.fmt.sink_tokens if raw is cache.sinks else 1
            checks.check_raw(f"{name}.cache", raw.cache, cache, least=least)
        checks.check_tails(cache)
        for name, table in tables.items():
            checks.check_table(name, table, step, device)
        for name, x in tokens.items():
            checks.check_tokens(name, x, step, cache, cache.num_kv_heads, cache.fmt.raw_dtype)
        for name, x in {**data, **tokens}.items():
            _check_alignment(name, x)
        record_form(form)
    if CHECKED:
        checks.check_page_ids(step, cache)
    store.store_blocks(step, cache, key, value)


store_ring = ring.store_ring


def prepare(layer: Layer, params: AttentionParams) -> AttentionParams:
    """Choose and allocate what the kernels need for a layer; see `contract.Operators`."""
    device = torch.device("cuda", torch.accelerator.current_device_index())
    spills.watch()
    slopes = params.alibi_slopes
    params = dataclasses.replace(
        params,
        alibi_slopes=None if slopes is None else slopes.to(device),
        first_chunk=choose(params, layer.head_size, layer.dtype),
    )
    nbytes = reserve(
        rows=layer.max_rows,
        num_kv_heads=layer.num_kv_heads,
        gqa=layer.num_heads // layer.num_kv_heads,
        tokens=layer.decode_len,
        head_size=layer.head_size,
        device=device,
        apart=params.token_budget > 0,
    )
    if params.token_budget:
        chooser.check(layer, params)
        nbytes += chooser.reserve(layer, params.token_budget, device)
    _say_workspace(nbytes, layer.max_rows)
    return params


@functools.cache
def _say_workspace(nbytes: int, rows: int) -> None:
    logging.getLogger("vllm.kivi_vllm").info(
        "Decode steps of up to %d requests take %.0f MiB of GPU memory, which all layers share",
        rows,
        nbytes / 2**20,
    )


select = chooser.select


def attend(
    step: DeviceStep,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
    selection: Selection | None = None,
) -> None:
    """As `reference.attend`, for a `DeviceStep`: decodes first, then the other requests.

    Args:
        step: the step; `store_blocks` has run for it.
        cache, query, key, value, params, output: as the reference's; the params' `first_chunk`
            serves the requests after the decodes where nothing is cached.
        selection: pages that the generated tokens read; None: all.

    Raises:
        ValueError: a tensor that the kernels do not take; the message names it.

    """
    form = (
        cache.fmt,
        cache.num_kv_heads,
        step.num_tokens,
        *map(_form_of, (params.alibi_slopes, params.sink_logits)),
        _form_of(query),
        _form_of(output),
        None if step.last_visible is None else _form_of(step.last_visible),
    )
    if form not in CHECKED_FORMS:
        checks.check_query(step, cache, query, params, output)
        if step.last_visible is not None:
            tokens = step.num_decode_tokens + sum(step.prefill_lens)
            checks.check_last_visible(step.last_visible, tokens, query.device)
        _check_alignment("query", query)
        _check_alignment("output", output)
        record_form(form)
    if step.num_decodes:
        decode(step, cache, query, key, value, params, output, selection)
    if not step.num_prefills:
        return
    first_chunk = params.first_chunk
    plain = first_chunk is not None and step.nothing_cached and not step.per_position
    if params.chunk_size:  # libraries know none, but need not within the first
        plain = plain and max(step.prefill_lens) <= params.chunk_size
    # Libraries attend causally.
    plain = plain and step.last_visible is None
    # Our kernel runs the first time in any case, so that it is compiled by vLLM's warm-up.
    variant = (page_constants(cache), rules_of(params, cache), step.last_visible is None)
    if not plain or variant not in _compiled:
        _compiled.add(variant)
        prefill(step, cache, query, key, value, params, output)
    if plain and first_chunk is not None:
        first = step.num_decode_tokens
        own = slice(first, first + sum(step.prefill_lens))
        q, k, v, out = (x[own] for x in (query, key, value, output))
        starts = step.query_start_loc[step.num_decodes :] - first
        first_chunk(q, k, v, out, starts, step.prefill_lens, params)


def attend_selected(
    step: DeviceStep,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
) -> None:
    """See `reference.attend_selected`."""
    own = (step, cache, query, key, value, params)
    attend(*own, output, select(*own))


def _form_of(x: torch.Tensor | None) -> tuple:
    """What a check of `x` depends on."""
    if x is None:
        return ()
    return x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16


def _check_alignment(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless addresses of tokens are multiples of 16 bytes."""
    strides = [n * x.element_size() for n in x.stride()[:-1]]
    if any(n % 16 for n in (x.data_ptr(), *strides)):
        raise ValueError(
            f"{name} lies at {x.data_ptr():#x} with strides of {strides} bytes, but these must "
            "be multiples of 16"
        )
