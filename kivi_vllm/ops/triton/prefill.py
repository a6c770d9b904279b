"""Attention of many query tokens a request over history, raw tokens and the step itself.

A program serves one tile of queries: some tokens of one request, times the query heads
of one kv head. With many queries to a page, dequantizing it once for the tile costs
less than folding its scales into every query, so this is flash attention over tiles
that come from three places: pages, the ring and tails, and the step's own tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kivi_vllm.ops.step import AttentionParams, DeviceStep, LayerCache
from kivi_vllm.ops.triton.codec import rotate
from kivi_vllm.ops.triton.page import PRECISION, keys_of, page_constants, values_of
from kivi_vllm.ops.triton.softmax import (
    log2_scores,
    oldest_seen,
    rules_of,
    visible,
    weigh,
    with_sink_logits,
)
from kivi_vllm.ops.triton.tokens import (
    B,
    at_full_precision,
    find_row,
    first_raw,
    page_of,
    pages_arguments,
    raw_arguments,
    raw_bases,
    raw_position,
    raw_start,
    row_of,
)

ROWS, ROW_BYTES = 64, 256
"""Queries of a tile (tokens times query heads of a kv head), and the bytes of a query from
which on there are fewer, so that a tile fits the shared memory of every GPU."""

STEP: tl.constexpr = tl.constexpr(64)
"""Tokens of K and V at a time: half a page."""


@triton.jit
def _weigh(state, q, k, s, t, last, seen, slope, scale, RULES: tl.constexpr):
    """Weights [M, n] of keys k [n, D] for queries q [M, D]; what they see: `seen` [M, n]."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale[:, None]
    scores = log2_scores(scores, s[None], t[:, None], slope[:, None], RULES)
    seen &= visible(s[None], t[:, None], last[:, None], RULES)
    return weigh(tl.where(seen, scores, float("-inf")), state[2], 1)


@triton.jit
def _add(state, p, m, alpha, v):
    """The running (out, mass, m) with values v [n, D] of weights p [M, n]."""
    out = tl.dot(p.to(v.dtype), v, state[0] * alpha[:, None], input_precision=PRECISION)
    return out, state[1] * alpha + tl.sum(p, 1), m


@triton.jit(do_not_specialize=["first_row", "num_rows", "decode_len"])
def _prefill(
    query,
    query_token,
    query_head,
    output,
    output_token,
    output_head,
    query_start_loc,
    seq_lens,
    last_visible,
    first_row,
    num_rows,
    decode_len,
    paged,
    raw,
    slopes,
    sink_logits,
    scale,
    C: tl.constexpr,
    RULES: tl.constexpr,
    PER_POSITION: tl.constexpr,
    GQA: tl.constexpr,
    TOKENS: tl.constexpr,
    M: tl.constexpr,
):
    """Grid (tiles of TOKENS tokens, num_kv_heads), for num_rows rows from first_row on."""
    row, j = find_row(query_start_loc + first_row, num_rows, tl.program_id(0), TOKENS)
    row += first_row
    head = tl.program_id(1)
    q0, a, b = row_of(query_start_loc, seq_lens, row)
    start = a + j * TOKENS
    if start < b:
        end = tl.minimum(start + TOKENS, b)
        i = tl.arange(0, M)
        t = start + i // GQA
        live = (i < TOKENS * GQA) & (t < end)
        by_position = PER_POSITION | (b - a <= decode_len)
        seen_from = first_raw(tl.where(by_position, t, a), RULES.R)
        first_seen = first_raw(tl.where(by_position, start, a), RULES.R)
        last_seen = first_raw(tl.where(by_position, end - 1, a), RULES.R)
        oldest = oldest_seen(start, RULES)
        query_of = head * GQA + i % GQA
        slope = tl.zeros((M,), tl.float32)
        if RULES.ALIBI:
            slope = tl.load(slopes + query_of)
        d = tl.arange(0, C.DP)[None]
        token = (q0 + t - a).to(tl.int64)
        last, until = t, end
        if last_visible is not None:
            last = tl.load(last_visible + token, mask=live, other=0)
            last = tl.maximum(last, tl.where(live, t, 0))
            until = tl.minimum(tl.max(last, 0) + 1, b)
        q = query + token * query_token + query_of * query_head
        q = tl.load(q[:, None] + d, mask=live[:, None] & (d < C.D), other=0)
        state = (
            tl.zeros(q.shape, tl.float32),
            tl.zeros((M,), tl.float32),
            tl.full((M,), float("-inf"), tl.float32),
        )
        same = tl.full((M,), 1.0, tl.float32) * scale
        if C.PACKED:
            # fp16 has more bits than bf16 for what was dequantized; its range suffices for
            # queries that are divided by their largest number.
            T: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.float16
            largest = tl.max(tl.abs(q.to(tl.float32)), 1)
            largest = tl.where(largest > 0, largest, 1.0)
            x = (q.to(tl.float32) / largest[:, None]).to(T)
        for n in range(oldest // STEP, tl.cdiv(last_seen, STEP)):
            page = page_of(paged, row, n * STEP // B, head, C)[1]
            half = n * STEP % B // STEP
            s = n * STEP + tl.arange(0, STEP)
            seen = ~at_full_precision(s[None], seen_from[:, None], C)
            if C.PACKED:
                k = keys_of(page, half, C).to(T)
                p, m, alpha = _weigh(state, x, k, s, t, last, seen, slope, largest * scale, RULES)
                state = _add(state, p, m, alpha, values_of(page, half, C).to(T))
            else:
                at = (half * STEP + tl.arange(0, STEP))[:, None] * C.D + d
                k = tl.load((page + C.K[-1]).to(raw.key.dtype) + at, mask=d < C.D, other=0)
                p, m, alpha = _weigh(state, q, k, s, t, last, seen, slope, same, RULES)
                v = tl.load((page + C.V[-1]).to(raw.key.dtype) + at, mask=d < C.D, other=0)
                state = _add(state, p, m, alpha, v)
        if C.RUN > 0:  # noqa: SIM102 - known when it is compiled
            if oldest < last_seen:  # there are pages
                state = (rotate(state[0], C.RUN, 1, True), state[1], state[2])
        first, lead = raw_start(first_seen, oldest, C)
        for s0 in range(first, until, STEP):
            s = raw_position(s0 + tl.arange(0, STEP), first, lead, C)
            k_at, v_at = raw_bases(s, s < until, row, q0, a, head, raw, C, RULES.R)
            mask = (s < until)[:, None] & (d < C.D)
            k = tl.load(k_at[:, None] + d, mask=mask, other=0)
            seen = at_full_precision(s[None], seen_from[:, None], C) & (s < until)[None]
            p, m, alpha = _weigh(state, q, k, s, t, last, seen, slope, same, RULES)
            v = tl.load(v_at[:, None] + d, mask=mask, other=0)
            state = _add(state, p, m, alpha, v)
        out, mass, m = state
        mass = with_sink_logits(mass, m, sink_logits, query_of, RULES)
        to = output + token * output_token + query_of * output_head
        out = (out / tl.where(live, mass, 1.0)[:, None]).to(output.dtype.element_ty)
        tl.store(to[:, None] + d, out, mask=live[:, None] & (d < C.D))


def prefill(
    step: DeviceStep,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
) -> None:
    """`reference.attend` for the requests after the step's decodes; one launch."""
    num_kv_heads = key.shape[1]
    gqa = query.shape[1] // num_kv_heads
    constants = page_constants(cache)
    rows = min(ROWS, ROWS * ROW_BYTES // (constants.DP * query.dtype.itemsize))
    rows = max(rows, triton.next_power_of_2(gqa))
    tokens = rows // gqa
    tiles = (step.num_tokens - step.num_decode_tokens) // tokens + step.num_prefills
    _prefill[(tiles, num_kv_heads)](
        query,
        *query.stride()[:2],
        output,
        *output.stride()[:2],
        step.query_start_loc,
        step.seq_lens,
        step.last_visible,
        step.num_decodes,
        step.num_prefills,
        step.decode_len,
        pages_arguments(step, cache),
        raw_arguments(cache, key, value),
        params.alibi_slopes,
        params.sink_logits,
        params.scale,
        C=constants,
        RULES=rules_of(params, cache),
        PER_POSITION=step.per_position,
        GQA=gqa,
        TOKENS=tokens,
        M=rows,
        num_warps=8,
        num_stages=1,  # more would prefetch into more shared memory than some GPUs have
    )
