"""The PyTorch truth: store, select and attend (see `contract`). Every kernel is tested against it.

One attention layer's step is these calls, in this order:

1. `store_blocks` quantizes every block that the step completes, for all
   requests: a prefix hit may read what another request completes in this step.
2. `select`, where there is a budget, chooses the pages that generated tokens read.
3. `attend` reads pages, residual, and the step's own keys and values.
4. `store_ring` writes the step's last tokens into the ring, over older ones where a
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
from kivi_vllm.ops.residual import (
    first_visible,
    full_precision_from,
    ring_entry,
    ring_slot,
    ring_start,
)
from kivi_vllm.ops.select import (
    Selection,
    best,
    candidates,
    check_pages,
    count_pages,
    estimates,
    key_estimates,
    must_choose,
    weights,
)
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
    residual, per_page = cache.residual_length, cache.tail_tokens
    for row in step.rows:
        first, last = row.a // B, row.b // B
        if last == first:
            continue
        k, v = _raw_since(row, first * B, cache, key, value)  # [H, n, D]
        k, v = (x[:, : (last - first) * B].unflatten(1, (-1, B)).transpose(0, 1) for x in (k, v))
        blocks, pages = _page_ids(row, first, last, step, cache)
        held = blocks != 0
        if held.any():
            cache.pages[blocks[held], pages[held]] = encode_pages(k[held], v[held], cache.fmt)
        for i, tail in enumerate(cache.tails):
            kept = slice(B - residual + i * per_page, min(B, B - residual + (i + 1) * per_page))
            _keep(tail, row.index, slice(first, last), k[:, :, kept], v[:, :, kept])
        if cache.sinks is not None and first == 0:
            sinks = cache.fmt.sink_tokens
            if held[0]:
                cache.pages[blocks[0], 0] = encode_pages(k[0], v[0], cache.fmt, sinks)
            _keep(cache.sinks, row.index, slice(0, 1), k[:1, :, :sinks], v[:1, :, :sinks])


def _page_ids(
    row: Row, first: int, end: int, step: Step, cache: LayerCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool's block, and the page in it, of a request's blocks [first, end)."""
    at = torch.arange(first, end, device=step.block_table.device)
    per_block = cache.pages_per_block
    return step.block_table[row.index, at // per_block].long(), at % per_block


def _keep(raw: Raw, index: int, entries: slice, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write k, v [pages, num_kv_heads, tokens, D] into those of a request's entries that are."""
    pages = raw.table[index, entries].long()
    held = pages != 0
    kv = torch.cat([k, v], -1)[held]
    raw.cache[pages[held], :, : kv.shape[2], : kv.shape[3]] = kv


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
    entries, slots = (of(at, cache.ring.cache.shape[2]) for of in (ring_entry, ring_slot))
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


# ------------------------------------------------------------------- select


def select(
    step: Step,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
) -> Selection | None:
    """Choose the pages that each generated token reads, by the rule of `select`.

    Args:
        step: the step; `store_blocks` has run for it.
        cache: read: `pages`.
        query: [num_tokens, num_heads, head_size].
        key, value: not read.
        params: scale, soft cap, window, chunks, `token_budget` and `estimate`.

    Returns:
        None: no token has more pages than it may read.

    """
    residual, most = cache.residual_length, params.token_budget // B
    if not must_choose(step.longest_generated, residual, params.token_budget):
        return None
    check_pages(cache.fmt, params.estimate)
    made = Selection.empty(step.num_tokens, cache.num_kv_heads, params.token_budget)
    for row in step.rows:
        for t in range(row.a, row.b) if row.generated else ():
            token = row.q0 + t - row.a
            whole = candidates(t, residual, params)
            if len(whole) <= most:
                continue
            pages = cache.pages[_page_ids(row, whole.start, whole.stop, step, cache)]
            q = query[token].float() * params.scale
            if params.estimate == "keys":
                seen = first_visible(t, params.sliding_window, params.chunk_size)
                unread = max(seen, cache.fmt.sink_tokens) - whole.start * B
                x = key_estimates(q, pages, cache.fmt, max(0, unread))
            else:
                x = estimates(q, pages, cache.fmt)
            read = best(weights(x, params.logits_soft_cap), most) + whole.start
            if full_precision_from(t, residual) % B:
                read = torch.nn.functional.pad(read, (0, 1), value=whole.stop)
            made.blocks[token, :, : read.shape[1]] = read
            made.counts[token] = read.shape[1]
    return made


# ------------------------------------------------------------------- attend


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
    """Causal attention of the step's queries over pages, residual and the step itself.

    Tokens of an image may see those after them, too: `Step.last_visible`.

    Args:
        step: the step; `store_blocks` has run for it.
        cache: read.
        query: [num_tokens, num_heads, head_size].
        key, value: [num_tokens, num_kv_heads, head_size], the step's own.
        params: scale, soft cap, ALiBi slopes, window, sink logits, chunks.
        output: [num_tokens, num_heads, head_size], written for the rows' tokens.
        selection: pages that the generated tokens read; None: all.

    """
    for row in step.rows:
        chosen = selection if row.generated else None
        if row.generated and params.token_budget:
            positions = range(row.a, row.b)
            count_pages(
                row.q0, positions, cache.residual_length, params, cache.num_kv_heads, chosen
            )
        tiles = list(_tiles(step, row, cache.residual_length, alone=chosen is not None))
        seen = first_visible(row.a, params.sliding_window, params.chunk_size)
        oldest, newest = max(seen, tiles[0][2]), tiles[-1][2]
        raw_k, raw_v = (x.float() for x in _raw_since(row, oldest, cache, key, value))
        page_k, page_v = _page_history(row, seen, newest, step, cache)
        for start, end, raw_from in tiles:
            # All queries of a tile are in one block, so in one attention chunk.
            first = first_visible(start, params.sliding_window, params.chunk_size)
            middle = max(first, raw_from)
            tokens = slice(row.q0 + start - row.a, row.q0 + end - row.a)
            t = last = torch.arange(start, end, device=key.device)
            if step.last_visible is not None:
                last = torch.maximum(t, step.last_visible[tokens].to(t))
            until = int(last.max()) + 1
            paged, raw = slice(first - seen, middle - seen), slice(middle - oldest, until - oldest)
            k = torch.cat([page_k[:, paged], raw_k[:, raw]], 1)
            v = torch.cat([page_v[:, paged], raw_v[:, raw]], 1)
            unread = None
            if chosen is not None:
                unread = chosen.unread(tokens.start, first, middle, until, cache.fmt.sink_tokens)
                k, v = (x.masked_fill(unread[..., None], 0) for x in (k, v))  # NaN times 0 is NaN
            output[tokens] = _attend_tile(query[tokens].float(), k, v, t, last, params, unread)


def attend_selected(
    step: Step,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
) -> None:
    """`attend`, in which generated tokens read what `select` chooses; arguments are as theirs."""
    own = (step, cache, query, key, value, params)
    attend(*own, output, select(*own))


def _tiles(
    step: Step, row: Row, residual: int, alone: bool = False
) -> Iterator[tuple[int, int, int]]:
    """Split a row into (start, end, F) runs of positions inside one block; or into single ones."""
    per_position = step.per_position or row.b - row.a <= step.decode_len
    start = row.a
    while start < row.b:
        end = start + 1 if alone else min(row.b, (start // B + 1) * B)
        seen_from = start if per_position else row.a
        yield start, end, full_precision_from(seen_from, residual)
        start = end


def _page_history(
    row: Row, start: int, end: int, step: Step, cache: LayerCache
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantized K and V [num_kv_heads, n, head_size] of positions from `start` on.

    To the last of the block of `end - 1`; of none where `end` <= `start`. The sinks' are as they
    were. No block before `start` is read: a sliding window may have left it to others.
    """
    first, n = start // B, cache.fmt.sink_tokens
    blocks = _page_ids(row, first, max(first, -(-end // B)), step, cache)
    k, v = decode_pages(cache.pages[blocks], cache.fmt)  # [n, H, B, D]
    if cache.sinks is not None and start < n and end > 0:
        d = cache.fmt.head_size
        kv = cache.sinks.cache[cache.sinks.table[row.index, 0].long(), :, :n].float()
        k[0, :, :n], v[0, :, :n] = kv[..., :d], kv[..., d : 2 * d]
    k, v = (x.transpose(0, 1).flatten(1, 2)[:, start % B :] for x in (k, v))
    return k, v


def _attend_tile(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    t: torch.Tensor,
    last: torch.Tensor,
    params: AttentionParams,
    unread: torch.Tensor | None,
) -> torch.Tensor:
    """Queries [n, num_heads, D] at positions t [n], which see up to positions `last` [n].

    k, v [num_kv_heads, m, D] are those of the m positions up to the largest of them; `unread`
    [num_kv_heads, m], if it is there, says which of them are in pages that are not read.
    """
    n, num_heads, d = query.shape
    num_kv_heads, m, _ = k.shape
    s = torch.arange(1 - m, 1, device=k.device)[None] + last.max()
    t, last = t[:, None], last[:, None]
    q = query.unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # [H, G*n, D]
    scores = (q * params.scale) @ k.transpose(1, 2)
    scores = scores.view(num_heads, n, m)
    if params.logits_soft_cap:
        scores = params.logits_soft_cap * torch.tanh(scores / params.logits_soft_cap)
    if params.alibi_slopes is not None:
        scores = scores + params.alibi_slopes.to(scores)[:, None, None] * (s - t)
    hidden = s > last
    if params.sliding_window:
        hidden = hidden | (s <= t - params.sliding_window)
    if unread is not None:
        hidden = hidden | unread.repeat_interleave(num_heads // num_kv_heads, 0)[:, None]
    scores = scores.masked_fill(hidden, float("-inf"))
    if params.sink_logits is not None:
        logits = params.sink_logits.to(scores)[:, None, None].expand(-1, n, 1)
        p = torch.cat([scores, logits], -1).softmax(-1)[..., :-1].contiguous()
    else:
        p = scores.softmax(-1)
    out = p.view(num_kv_heads, -1, m) @ v
    return out.view(num_heads, n, d).transpose(0, 1)
