"""Attention of a few query tokens a request over its packed pages and raw tokens.

A program serves one request, one kv head, and one split of the pages; the raw tokens
are a split of their own, and a second kernel puts the splits together. The columns of
all matrices are the query heads of the kv head, times the query tokens: they are the
narrow side (8) of the tensor cores' tiles, the codes the wide one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kivi_vllm.config import BLOCK_SIZE
from kivi_vllm.ops import codes
from kivi_vllm.ops.cuda import kernels as cuda
from kivi_vllm.ops.select import Selection
from kivi_vllm.ops.step import AttentionParams, DeviceStep, LayerCache
from kivi_vllm.ops.triton.combine import _combine, split_of
from kivi_vllm.ops.triton.in_cuda import fields, variant
from kivi_vllm.ops.triton.page import PageConstants, page_constants
from kivi_vllm.ops.triton.products import packed_scores, packed_values, raw_scores, raw_values
from kivi_vllm.ops.triton.softmax import (
    LOG2E,
    log2_scores,
    oldest_seen,
    rules_of,
    visible,
    weigh,
)
from kivi_vllm.ops.triton.tokens import (
    B,
    at_full_precision,
    first_raw,
    page_of,
    pages_arguments,
    raw_arguments,
    raw_bases,
    raw_position,
    raw_start,
    row_of,
)
from kivi_vllm.ops.triton.workspace import (
    Kernel,
    columns,
    decode_tokens,
    num_splits,
    slots,
    token_columns,
    workspace,
)

# Tokens that the split of the raw ones takes at a time.
RAW_STEP: tl.constexpr = tl.constexpr(32)


@triton.jit
def _add(state, p, m, alpha, parts):
    """The running (sums, mass, m) with what one step adds: weights p, and p * v in `parts`."""
    out0, out1, mass, _ = state
    factor = alpha[None, None]
    return out0 * factor + parts[0], out1 * factor + parts[1], mass * alpha + tl.sum(p, 0), m


@triton.jit
def _add_raw(state, q, k, v, valid, seen, s, t, slope, scale, C: tl.constexpr, RULES: tl.constexpr):
    """`state` with raw tokens at positions s [n], K and V at addresses k, v; `seen` [n, N]."""
    scores = raw_scores(k, valid, q, C) * scale
    scores = log2_scores(scores, s[:, None], t[None], slope[None], RULES)
    seen &= visible(s[:, None], t[None], t[None], RULES)
    p, m, alpha = weigh(tl.where(seen, scores, float("-inf")), state[3], 0)
    return _add(state, p, m, alpha, raw_values(v, valid, p.to(q.dtype), C))


@triton.jit(do_not_specialize=["splits"])
def _decode(
    query,
    query_token,
    query_head,
    query_start_loc,
    seq_lens,
    paged,
    raw,
    slopes,
    scale,
    splits,
    partial,
    statistics,
    C: tl.constexpr,
    RULES: tl.constexpr,
    GQA: tl.constexpr,
    TILES: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Grid (rows, num_kv_heads * TILES, 1 + splits); `partial`, `statistics`: see `_combine`."""
    row, split = tl.program_id(0), tl.program_id(2)
    head, tile = tl.program_id(1) // TILES, tl.program_id(1) % TILES
    q0, a, b = row_of(query_start_loc, seq_lens, row)
    first, end, per_split = split_of(a, b, splits, RULES)
    first += (split - 1) * per_split
    if (a + tile * N // GQA < b) & ((split == 0) | (first < end)):
        column = tile * N + tl.arange(0, N)
        t = a + column // GQA
        live = t < b
        seen_from = first_raw(t, RULES.R)  # [N]
        query_of = head * GQA + column % GQA
        slope = tl.zeros((N,), tl.float32)
        if RULES.ALIBI:
            slope = tl.load(slopes + query_of)
        q = query + (q0 + column // GQA).to(tl.int64) * query_token + query_of * query_head
        zeros = tl.zeros((C.DP // 32, 16, N), tl.float32)
        lowest = tl.full((N,), float("-inf"), tl.float32)
        state = (zeros, zeros, tl.zeros((N,), tl.float32), lowest)
        if split == 0:
            whole = _query(q, live, 0, 1, C.DP, C)
            start, lead = raw_start(first_raw(a, RULES.R), oldest_seen(a, RULES), C)
            for s0 in tl.range(start, b, RAW_STEP, num_stages=2):
                s = raw_position(s0 + tl.arange(0, RAW_STEP), start, lead, C)
                valid = s < b
                k, v = raw_bases(s, valid, row, q0, a, head, raw, C, RULES.R)
                seen = at_full_precision(s[:, None], seen_from[None], C)
                state = _add_raw(state, whole, k, v, valid, seen, s, t, slope, scale, C, RULES)
        elif not C.PACKED:
            whole = _query(q, live, 0, 1, C.DP, C)
            for n in range(first, tl.minimum(first + per_split, end)):
                page = page_of(paged, row, n, head, C)[1]
                for part in range(B // RAW_STEP):
                    token = part * RAW_STEP + tl.arange(0, RAW_STEP)
                    s = n * B + token
                    k = (page + C.K[-1]).to(raw.key.dtype) + token * C.D
                    v = (page + C.V[-1]).to(raw.key.dtype) + token * C.D
                    seen, valid = ~at_full_precision(s[:, None], seen_from[None], C), s >= 0
                    state = _add_raw(state, whole, k, v, valid, seen, s, t, slope, scale, C, RULES)
        else:
            T: tl.constexpr = tl.float32 if query.dtype.element_ty == tl.float32 else tl.float16
            x = _query(q, live, 0, 2, C.DP // 2, C).to(tl.float32)
            y = _query(q, live, 1, 2, C.DP // 2, C).to(tl.float32)
            largest = tl.maximum(tl.max(tl.abs(x), 0), tl.max(tl.abs(y), 0))
            largest = tl.where(largest > 0, largest, 1.0)
            x, y = (x / largest[None]).to(T), (y / largest[None]).to(T)
            PLAIN: tl.constexpr = RULES.CAP == 0 and not RULES.ALIBI
            factor = largest * scale * (LOG2E if PLAIN else 1.0)
            for n in range(first, tl.minimum(first + per_split, end)):
                page = page_of(paged, row, n, head, C)[1]
                s = n * B + tl.arange(0, B)
                scores = packed_scores(page, x, y, factor, C)
                if not PLAIN:
                    scores = log2_scores(scores, s[:, None], t[None], slope[None], RULES)
                if MASKED:  # else all columns see all of these pages
                    seen = s[:, None] < seen_from[None]
                    seen &= visible(s[:, None], t[None], t[None], RULES)
                    scores = tl.where(seen, scores, float("-inf"))
                if C.SINKS > 0:  # noqa: SIM102 - known when it is compiled
                    if n == 0:  # not on every page: that would cost registers
                        token = tl.arange(0, B)[:, None]
                        scores = tl.where(token < C.SINKS, float("-inf"), scores)
                p, m, alpha = weigh(scores, state[3], 0)
                state = _add(state, p, m, alpha, packed_values(page, p.to(T), C))
        at = (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2)
        at = (at + split) * N + tl.arange(0, N)
        tl.store(statistics + 2 * at, state[3])
        tl.store(statistics + 2 * at + 1, state[2])
        channel = tl.arange(0, C.DP // 32)[:, None, None] * 32 + tl.arange(0, 16)[None, :, None]
        to = partial + at[None, None] * C.D + channel
        tl.store(to, state[0], mask=(channel < C.D) & live[None, None])
        tl.store(to + 16, state[1], mask=(channel < C.D) & live[None, None])


@triton.jit
def _query(q, live, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    """Queries at addresses q [N]: COUNT of their channels, from FIRST on: [COUNT, N]."""
    d = FIRST + STEP * tl.arange(0, COUNT)[:, None]
    return tl.load(q[None] + d, mask=live[None] & (d < C.D), other=0)


class Shape(NamedTuple):
    """How `_decode` is compiled: warps of a program, and stages of its loop over pages."""

    warps: int
    stages: int


def launch_shape(constants: PageConstants, columns: int) -> Shape:
    """As few warps as have registers enough, and a page more in shared memory if it fits."""
    # Whether many words are made of others.
    spare = constants.PACKED and codes.spare(constants.K_BITS) and codes.spare(constants.V_BITS)
    if constants.PACKED and constants.DP * columns <= 1024 and not spare:
        return Shape(2, 5)  # finding the page takes stages, too: two buffers are left of five
    if constants.DP * max(2, constants.K_BITS) * columns <= 2048:
        return Shape(2, 2)
    if constants.DP > 128:
        return Shape(8, 1 if spare else 2)  # two pages of these would not fit all GPUs
    return Shape(4, 2)


_kernels: dict[Any, Kernel] = {}
"""What programs of `_decode` take, by what it was compiled for, once it has been launched."""


def decode(
    step: DeviceStep,
    cache: LayerCache,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    params: AttentionParams,
    output: torch.Tensor,
    selection: Selection | None = None,
) -> None:
    """`reference.attend` for the step's decodes; two launches."""
    num_kv_heads = key.shape[1]
    rows, gqa = step.num_decodes, query.shape[1] // num_kv_heads
    tokens, apart, read = decode_tokens(step), 0, 0
    if selection is None:
        tiles, n = columns(gqa, tokens)
    else:
        apart, n = token_columns(gqa, cache.fmt.head_size)
        tiles, read = tokens * apart, selection.blocks.shape[2] - 1
    most_pages = step.block_table.shape[1] * cache.pages_per_block
    constants, rules = page_constants(cache), rules_of(params, cache)
    masked = step.decode_len > 1 or rules.R % BLOCK_SIZE > 0 or rules.WINDOW > 0
    in_cuda = None
    if cuda.serves(cache.fmt, query.dtype, n):
        sizes = (gqa, (tiles, n), masked, read)
        in_cuda = cuda.kernel(variant(constants, rules, query.dtype, *sizes), query.device)
    form = (constants, rules, gqa, tiles, n, masked, query.dtype, query.device)
    together = slots(query.device, in_cuda or _kernels.get(form))
    splits = num_splits(rows * num_kv_heads * tiles, most_pages, together)
    parts = (rows, num_kv_heads * tiles, 1 + splits, n)
    partial, statistics = workspace(parts, cache.fmt.head_size, query.device)
    paged, raw = pages_arguments(step, cache), raw_arguments(cache, key, value)
    if in_cuda is not None:
        given = fields(query, step, paged, raw, params)
        given |= {"partial": partial.data_ptr(), "statistics": statistics.data_ptr()}
        if selection is not None:
            given |= {name: getattr(selection, name).data_ptr() for name in ("blocks", "counts")}
        cuda.launch(in_cuda, parts[:3], given | {"splits": splits})
    elif selection is not None:
        raise ValueError("there is no kernel that reads lists of pages: see select")
    else:
        warps, stages = launch_shape(constants, n)
        compiled = _decode[parts[:3]](
            query,
            *query.stride()[:2],
            step.query_start_loc,
            step.seq_lens,
            paged,
            raw,
            params.alibi_slopes,
            params.scale,
            splits,
            partial,
            statistics,
            C=constants,
            RULES=rules,
            GQA=gqa,
            TILES=tiles,
            N=n,
            MASKED=masked,
            num_warps=warps,
            num_stages=stages,
            maxnreg=255,  # else ptxas would rather spill than pass 128
        )
        if form not in _kernels and hasattr(compiled, "n_regs"):
            _kernels[form] = Kernel(compiled.n_regs, compiled.metadata.shared, warps)
    _combine[(rows, num_kv_heads * tiles, n)](
        partial,
        statistics,
        step.query_start_loc,
        step.seq_lens,
        params.sink_logits,
        output,
        *output.stride()[:2],
        None if selection is None else selection.counts,
        splits,
        C=constants,
        RULES=rules,
        GQA=gqa,
        TILES=tiles,
        N=n,
        APART=apart,
        STEP=16,
    )
