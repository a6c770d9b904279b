"""What a score goes through before it weighs a value, and the running softmax."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from kivi_vllm.ops.step import AttentionParams, LayerCache

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


class Rules(NamedTuple):
    """What changes scores besides their scale, at compile time.

    Attributes:
        CAP: soft cap, or 0.
        ALIBI: whether there are slopes.
        WINDOW: sliding window, or 0.
        CHUNK: chunk size of local attention, or 0.
        SINK_LOGITS: whether there are sink logits.
        R: residual length.

    """

    CAP: float
    ALIBI: bool
    WINDOW: int
    CHUNK: int
    SINK_LOGITS: bool
    R: int


@triton.jit
def log2_scores(scores, s, t, slope, RULES: tl.constexpr):
    """Scores q·k * scale as powers of two; s and t, positions, and slope broadcast to them."""
    if RULES.CAP > 0:
        scores = RULES.CAP * (1 - 2 / (tl.exp(scores * (2 / RULES.CAP)) + 1))
    if RULES.ALIBI:
        scores += slope * (s - t).to(tl.float32)
    return scores * LOG2E


@triton.jit
def weigh(scores, m, AXIS: tl.constexpr):
    """Weights 2^(score - maximum), the new maximum, and what older sums are multiplied by.

    `scores` -inf: not seen. `m`: maximum so far, -inf: nothing seen yet.
    """
    m_new = tl.maximum(m, tl.max(scores, AXIS))
    safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    return tl.exp2(scores - tl.expand_dims(safe, AXIS)), m_new, tl.exp2(m - safe)


@triton.jit
def with_sink_logits(mass, m, logits, head, RULES: tl.constexpr):
    """The sum of weights of heads `head`, with that of their sink logit, which has no value."""
    if RULES.SINK_LOGITS:
        above = tl.load(logits + head) * LOG2E - m
        mass += tl.exp2(tl.minimum(above, 126.0))  # that much leaves nothing of an output
    return mass


@triton.jit
def visible(s, t, last, RULES: tl.constexpr):
    """Whether t sees s, both positions: up to `last`, through the window, in its chunk."""
    seen = s <= last
    if RULES.WINDOW > 0:
        seen &= s > t - RULES.WINDOW
    if RULES.CHUNK > 0:
        seen &= s >= t // RULES.CHUNK * RULES.CHUNK
    return seen


@triton.jit
def oldest_seen(t, RULES: tl.constexpr):
    """The first position that position t sees."""
    oldest = 0
    if RULES.WINDOW > 0:
        oldest = tl.maximum(t + 1 - RULES.WINDOW, 0)
    if RULES.CHUNK > 0:
        oldest = tl.maximum(oldest, t // RULES.CHUNK * RULES.CHUNK)
    return oldest


def rules_of(params: AttentionParams, cache: LayerCache) -> Rules:
    """The rules of a layer."""
    return Rules(
        CAP=params.logits_soft_cap,
        ALIBI=params.alibi_slopes is not None,
        WINDOW=params.sliding_window,
        CHUNK=params.chunk_size,
        SINK_LOGITS=params.sink_logits is not None,
        R=cache.residual_length,
    )
