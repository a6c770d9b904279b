"""The PyTorch truth: store and attend. Every kernel is tested against it.

One attention layer's step is three calls, in this order:

1. `store_blocks` quantizes every block that the step completes, for all
   requests: a prefix hit may read what another request completes in this step.
2. `attend` reads pages, residual, and the step's own keys and values.
3. `store_ring` writes the step's last tokens into the ring, over older ones where a
   page has moved on from the block before: `attend` still needed those.

What a query sees (B = 128, R = residual_length): **position t sees position s at
full precision iff s >= F(t) = max(0, B * floor(t / B) - R) or s < sink_tokens, and
dequantized from its page otherwise**; keys and values alike. So a query sees its own
block, the R tokens before it and the sequence's first tokens as they were. The step's
own tokens come from `key` and `value`; older ones of the current block from the ring;
the R tokens before it from the tail pages of the block before; the sinks from a page of
their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from kivi_vllm.config import BLOCK_SIZE as B
from kivi_vllm.ops.codec import decode_pages, encode_pages
from kivi_vllm.ops.format import PageFormat


@dataclass(frozen=True)
class Row:
    """One request of a step: its tokens are `query[q0:q1]`, at positions a..b-1; a < b."""

    index: int
    q0: int
    q1: int
    a: int
    b: int


@dataclass(frozen=True)
class Step:
    """What one step computes, shared by all layers of a model.

    Attributes:
        rows: the requests that have tokens in this step.
        block_table: [num_reqs, max_blocks], page ids of each request's blocks.
        per_position: queries of all rows follow F(t) of their own position
            ("cached"); otherwise those of rows longer than `decode_len` take
            F(a) of the row's first ("exact").
        decode_len: longest row that counts as decode: 1 + draft tokens.

    """

    rows: list[Row]
    block_table: torch.Tensor
    per_position: bool = True
    decode_len: int = 1

    @functools.cached_property
    def row_array(self) -> torch.Tensor:
        """The rows as [n, 5] int64 on the CPU: index, q0, q1, a, b."""
        rows = [(r.index, r.q0, r.q1, r.a, r.b) for r in self.rows]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 5)

    @functools.cached_property
    def num_tokens(self) -> int:
        """Tokens that the step's tensors must hold at least."""
        return max((row.q1 for row in self.rows), default=0)

    @functools.cached_property
    def completes_a_block(self) -> bool:
        """Whether `store_blocks` has anything to do."""
        return any(row.a // B != row.b // B for row in self.rows)

    @functools.cached_property
    def num_reqs(self) -> int:
        """Rows that the step's tables must have at least."""
        return 1 + max((row.index for row in self.rows), default=-1)


@dataclass(frozen=True)
class Raw:
    """Pages of full-precision tokens with the table that finds them.

    Attributes:
        cache: [num_blocks, num_kv_heads, raw_tokens, >= 2 * head_size], the
            model's dtype; K in [..., :D], V in [..., D:2D].
        table: [num_reqs, max_pages] page ids.

    """

    cache: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True)
class LayerCache:
    """One layer's caches for one step.

    Attributes:
        fmt: the page format.
        pages: [num_blocks, num_kv_heads, page_bytes] uint8.
        ring: the tokens of each request's current block; position s is token
            `s % fmt.raw_tokens` of the page at entry `s // fmt.raw_tokens`. Entries of
            tokens that no step needs any more hold anything.
        tails: one per `fmt.raw_tokens` tokens of R, in order: entry j of a
            table finds (a part of) the last R tokens of block j. Those of a block
            whose entry is 0, vLLM's null page, are not kept.
        residual_length: R.
        sinks: with `fmt.sink_tokens`: entry 0 of a table finds the first tokens of the
            sequence, from its first whole block on.
        native: what a compiled implementation keeps between the calls of a step.

    """

    fmt: PageFormat
    pages: torch.Tensor
    ring: Raw
    tails: tuple[Raw, ...] = ()
    residual_length: int = 0
    sinks: Raw | None = None
    native: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)


@dataclass(frozen=True)
class AttentionParams:
    """What the model asks of the attention besides Q, K and V.

    Attributes:
        scale: factor of q·k.
        logits_soft_cap: c > 0 replaces a score x by c * tanh(x / c); 0: none.
        alibi_slopes: [num_heads] fp32 or None; adds slope * (s - t).
        sliding_window: W > 0: position t sees t - W < s <= t; 0: all.

    """

    scale: float
    logits_soft_cap: float = 0.0
    alibi_slopes: torch.Tensor | None = None
    sliding_window: int = 0


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


def ring_start(end: int, decode_len: int) -> int:
    """First position that a step after one of positions up to `end` may need from the ring.

    All but one of the step's last `decode_len` tokens may be drafts that are rejected.
    """
    return max(0, end - (decode_len - 1)) // B * B


def _ring_slots(
    row: Row, start: int, end: int, cache: LayerCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ring page id and slot of each position in [start, end)."""
    table = cache.ring.table
    at = torch.arange(start, end, device=table.device)
    return table[row.index, at // cache.fmt.raw_tokens].long(), at % cache.fmt.raw_tokens


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
        yield start, end, max(0, seen_from // B * B - residual)
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
