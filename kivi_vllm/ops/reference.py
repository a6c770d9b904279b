"""The PyTorch truth: store and attend (see `contract`). Every kernel is tested against it.

One attention layer's step is three calls, in this order:

1. `store_blocks` quantizes every block that the step completes, for all
   requests: a prefix hit may read what another request completes in this step.
2. `attend` reads pages, residual, and the step's own keys and values.
3. `store_ring` writes the step's last tokens into the ring, over older ones where a
   page has moved on from the block before: `attend` still needed those.

What a query sees is the rule of `residual`. The step's own tokens come from `key` and
`value`; older ones of the current block from the ring; the R tokens before it from the tail
pages of the block before; the sinks from a page of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kivi_vllm.config import BLOCK_SIZE as B
from kivi_vllm.ops.codec import decode_pages, encode_pages
from kivi_vllm.ops.contract import Limits
from kivi_vllm.ops.residual import full_precision_from, ring_entry, ring_slot, ring_start
from kivi_vllm.ops.step import AttentionParams, Layer, LayerCache, Raw, Row, Step

limits = Limits("CPUs")

step = Step.of


def prepare(layer: Layer, params: AttentionParams) -> AttentionParams:
    """Nothing need be made ready."""
    return params


# -------------------------------------------------------------------- store


def store_blocks(step: Step, cache: LayerCache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Quantize the blocks that this step completes; keep their last R tokens raw.

    Args:
        step: the step.
        cache: written: `pages`, `tails` and `sinks`.
        key, value: [num_tokens, num_kv_heads, head_size], the step's own.

    """
    residual, per_page = cache.residual_length, cache.fmt.raw_tokens
    for row in step.rows:
        first, last = row.a // B, row.b // B
        if last == first:
            continue
        k, v = _raw_since(row, first * B, cache, key, value)  # [H, n, D]
        k, v = (x[:, : (last - first) * B].unflatten(1, (-1, B)).transpose(0, 1) for x in (k, v))
        blocks = step.block_table[row.index, first:last].long()
        cache.pages[blocks] = encode_pages(k, v, cache.fmt)
        for i, tail in enumerate(cache.tails):
            kept = slice(B - residual + i * per_page, min(B, B - residual + (i + 1) * per_page))
            wanted = tail.table[row.index, first:last] != 0
            _keep(tail, row.index, slice(first, last), k[:, :, kept], v[:, :, kept], wanted)
        if cache.sinks is not None and first == 0:
            sinks = cache.fmt.sink_tokens
            cache.pages[blocks[:1]] = encode_pages(k[:1], v[:1], cache.fmt, sinks)
            _keep(cache.sinks, row.index, slice(0, 1), k[:1, :, :sinks], v[:1, :, :sinks])


def _keep(
    raw: Raw,
    index: int,
    entries: slice,
    k: torch.Tensor,
    v: torch.Tensor,
    wanted: torch.Tensor | slice = slice(None),
) -> None:
    """Write k, v [pages, num_kv_heads, tokens, D] into the `wanted` of a request's entries."""
    kv = torch.cat([k, v], -1)[wanted]
    pages = raw.table[index, entries][wanted].long()
    raw.cache[pages, :, : kv.shape[2], : kv.shape[3]] = kv


def store_ring(step: Step, cache: LayerCache, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write the step's last tokens of every request into its ring.

    Args:
        step: the step.
        cache: written: `ring`.
        key, value: [num_tokens, num_kv_heads, head_size], the step's own.

    """
    d = cache.fmt.head_size
    for row in step.rows:
        start = max(row.a, ring_start(row.b, step.decode_len))
        pages, slots = _ring_slots(row, start, row.b, cache)
        tokens = slice(row.q1 - (row.b - start), row.q1)
        cache.ring.cache[pages, :, slots, :d] = key[tokens]
        cache.ring.cache[pages, :, slots, d : 2 * d] = value[tokens]


def _ring_slots(
    row: Row, start: int, end: int, cache: LayerCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ring page id and slot of each position in [start, end)."""
    table = cache.ring.table
    at = torch.arange(start, end, device=table.device)
    entries, slots = (of(at, cache.fmt.raw_tokens) for of in (ring_entry, ring_slot))
    return table[row.index, entries].long(), slots


def _raw_since(
    row: Row, start: int, cache: LayerCache, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full-precision K and V [num_kv_heads, b - start, head_size] of [start, b).

    F(a) <= `start` <= a: tail tokens, then the ring's, then the step's own.
    """
    d = cache.fmt.head_size
    block_start = row.a // B * B
    older = []
    if start < block_start:
        ids = [tail.table[row.index, block_start // B - 1].long() for tail in cache.tails]
        kv = torch.cat([t.cache[i] for t, i in zip(cache.tails, ids, strict=True)], 1)
        older.append(
            kv[:, cache.residual_length - (block_start - start) :][:, : block_start - start]
        )
    ring_start = max(start, block_start)
    if ring_start < row.a:
        pages, slots = _ring_slots(row, ring_start, row.a, cache)
        older.append(cache.ring.cache[pages, :, slots].transpose(0, 1))
    own = slice(row.q0, row.q1)
    k = [x[..., :d] for x in older] + [key[own].transpose(0, 1)]
    v = [x[..., d : 2 * d] for x in older] + [value[own].transpose(0, 1)]
    return torch.cat(k, 1), torch.cat(v, 1)


# ------------------------------------------------------------------- attend


def attend(
    step: Step,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
) -> None:
    """Causal attention of the step's queries over pages, residual and the step itself.

    Args:
        step: the step; `store_blocks` has run for it.
        cache: read.
        query: [num_tokens, num_heads, head_size].
        key, value: [num_tokens, num_kv_heads, head_size], the step's own.
        params: scale, soft cap, ALiBi slopes, window.
        output: [num_tokens, num_heads, head_size], written for the rows' tokens.

    """
    for row in step.rows:
        tiles = list(_tiles(step, row, cache.residual_length))
        oldest, newest = tiles[0][2], tiles[-1][2]
        raw_k, raw_v = (x.float() for x in _raw_since(row, oldest, cache, key, value))
        page_k, page_v = _page_history(row, newest, step, cache)
        for start, end, raw_from in tiles:
            k = torch.cat([page_k[:, :raw_from], raw_k[:, raw_from - oldest : end - oldest]], 1)
            v = torch.cat([page_v[:, :raw_from], raw_v[:, raw_from - oldest : end - oldest]], 1)
            tokens = slice(row.q0 + start - row.a, row.q0 + end - row.a)
            output[tokens] = _attend_tile(query[tokens].float(), k, v, start, params)


def _tiles(step: Step, row: Row, residual: int) -> Iterator[tuple[int, int, int]]:
    """Split a row into (start, end, F) runs of positions inside one block."""
    per_position = step.per_position or row.b - row.a <= step.decode_len
    start = row.a
    while start < row.b:
        end = min(row.b, (start // B + 1) * B)
        seen_from = start if per_position else row.a
        yield start, end, full_precision_from(seen_from, residual)
        start = end


def _page_history(
    row: Row, end: int, step: Step, cache: LayerCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantized K and V [num_kv_heads, n * B, head_size] of the blocks up to `end`.

    The sinks' are as they were.
    """
    blocks = step.block_table[row.index, : -(-end // B)].long()
    k, v = decode_pages(cache.pages[blocks], cache.fmt)  # [n, H, B, D]
    if cache.sinks is not None and end > 0:
        n, d = cache.fmt.sink_tokens, cache.fmt.head_size
        kv = cache.sinks.cache[cache.sinks.table[row.index, 0].long(), :, :n].float()
        k[0, :, :n], v[0, :, :n] = kv[..., :d], kv[..., d : 2 * d]
    return k.transpose(0, 1).flatten(1, 2), v.transpose(0, 1).flatten(1, 2)


def _attend_tile(
    query: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int, params: AttentionParams
) -> torch.Tensor:
    """Queries [n, num_heads, D] at positions start.. over k, v [num_kv_heads, end, D]."""
    n, num_heads, d = query.shape
    num_kv_heads, end, _ = k.shape
    t = torch.arange(start, end, device=k.device)[:, None]
    first = max(0, start + 1 - params.sliding_window) if params.sliding_window else 0
    s = torch.arange(first, end, device=k.device)[None]
    q = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # [H, G*n, D]
    scores = (q * params.scale) @ k[:, first:].transpose(1, 2)
    scores = scores.view(num_heads, n, end - first)
    if params.logits_soft_cap:
        scores = params.logits_soft_cap * torch.tanh(scores / params.logits_soft_cap)
    if params.alibi_slopes is not None:
        scores = scores + params.alibi_slopes.to(scores)[:, None, None] * (s - t)
    hidden = s > t
    if params.sliding_window:
        hidden = hidden | (s <= t - params.sliding_window)
    p = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    out = p.view(num_kv_heads, -1, end - first) @ v[:, first:]
    return out.view(num_heads, n, d).transpose(0, 1)
