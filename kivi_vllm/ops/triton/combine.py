"""The second kernel of decode: it puts the splits of a row together."""

from __future__ import annotations

import triton
import triton.language as tl

from kivi_vllm.ops.triton.codec import rotate
from kivi_vllm.ops.triton.softmax import oldest_seen, weigh, with_sink_logits
from kivi_vllm.ops.triton.tokens import B, first_raw, row_of


@triton.jit
def split_of(a, b, splits, RULES: tl.constexpr):
    """(first page, end, pages of a split) of a row's history."""
    first = oldest_seen(a, RULES) // B
    end = tl.cdiv(first_raw(b - 1, RULES.R), B)
    return first, end, tl.maximum(tl.cdiv(end - first, splits), 2)


@triton.jit
def _add_splits(state, partial, statistics, base, k, used, C: tl.constexpr, N: tl.constexpr):
    """The running (sums [DP], mass, m) of a column with those of its splits k that are `used`."""
    total, mass, m = state
    d, at, good = tl.arange(0, C.DP), (base + k) * N + tl.program_id(2), k < used
    maximum = tl.load(statistics + 2 * at, mask=good, other=float("-inf"))
    weight, m, alpha = weigh(maximum, m, 0)
    mass = mass * alpha + tl.sum(weight * tl.load(statistics + 2 * at + 1, mask=good, other=0), 0)
    mask = good[:, None] & (d < C.D)[None]
    part = tl.load(partial + at[:, None] * C.D + d[None], mask=mask, other=0)
    return total * alpha + tl.sum(part * weight[:, None], 0), mass, m


@triton.jit(do_not_specialize=["splits"])
def _combine(
    partial,
    statistics,
    query_start_loc,
    seq_lens,
    sink_logits,
    output,
    output_token,
    output_head,
    counts,
    splits,
    C: tl.constexpr,
    RULES: tl.constexpr,
    GQA: tl.constexpr,
    TILES: tl.constexpr,
    N: tl.constexpr,
    APART: tl.constexpr,
    STEP: tl.constexpr,
):
    """Put the splits together; grid (rows, num_kv_heads * TILES, N).

    `partial` [rows, num_kv_heads * TILES, 1 + splits, N, D] fp32: sums of weights times
    values; `statistics` [.., N, 2]: the maximum and the sum of weights. APART: tiles of a token,
    where each has its own, and reads `counts` pages, -1: all; else 0.
    """
    row, head = tl.program_id(0), tl.program_id(1) // TILES
    tile = tl.program_id(1) % TILES
    q0, a, b = row_of(query_start_loc, seq_lens, row)
    if APART > 0:
        i, of_group = tile // APART, tile % APART * N + tl.program_id(2)
    else:
        column = tile * N + tl.program_id(2)
        i, of_group = column // GQA, column % GQA
    if (a + i < b) & (of_group < GQA):
        if APART > 0:
            first, end, per_split = split_of(a + i, a + i + 1, splits, RULES)
            listed = tl.load(counts + q0 + i)
            first = tl.where(listed < 0, first, 0)
            end = tl.where(listed < 0, end, listed)
            per_split = tl.maximum(tl.cdiv(end - first, splits), 2)
        else:
            first, end, per_split = split_of(a, b, splits, RULES)
        used = 1 + tl.cdiv(tl.maximum(end - first, 0), per_split)
        base = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (1 + splits)
        d = tl.arange(0, C.DP)
        state = (tl.zeros(d.shape, tl.float32), 0.0, float("-inf"))
        for start in range(1 if C.RUN > 0 else 0, used, STEP):
            k = start + tl.arange(0, STEP)
            state = _add_splits(state, partial, statistics, base, k, used, C, N)
        if C.RUN > 0:  # the sums over pages are of rotated values, those of the raw split not
            state = (rotate(state[0], C.RUN, 1, True), state[1], state[2])
            state = _add_splits(state, partial, statistics, base, tl.arange(0, 1), used, C, N)
        query_of = head * GQA + of_group
        total, mass, m = state
        mass = with_sink_logits(mass, m, sink_logits, query_of, RULES)
        to = output + (q0 + i).to(tl.int64) * output_token + query_of * output_head
        tl.store(to + d, (total / mass).to(output.dtype.element_ty), mask=d < C.D)
