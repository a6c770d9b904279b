"""The rule of the residual: which tokens a query sees at full precision, and which must wait.

B = 128 tokens of a block, R = residual_length. **Position t sees position s at full precision iff
s >= F(t) = max(0, B * floor(t / B) - R) or s < sink_tokens, and dequantized from its page
otherwise**; keys and values alike. So a query sees its own block, the R tokens before it and the
sequence's first tokens as they were.
"""

from __future__ import annotations

from kivi_vllm.config import BLOCK_SIZE as B


def full_precision_from(position: int, residual_length: int) -> int:
    """F(t): the first position that position t sees at full precision, sinks aside."""
    return max(0, position // B * B - residual_length)


def first_visible(position: int, window: int, chunk_size: int) -> int:
    """The first position that a position sees.

    Through a sliding window, and in its attention chunk; 0: there is none.
    """
    in_window = max(0, position + 1 - window) if window else 0
    return max(in_window, position // chunk_size * chunk_size) if chunk_size else in_window


def ring_start(end: int, decode_len: int) -> int:
    """First position that a step after one of positions up to `end` may need from the ring.

    All but one of the step's last `decode_len` tokens may be drafts that are rejected.
    """
    return max(0, end - (decode_len - 1)) // B * B


def ring_entry(position: int, page_tokens: int) -> int:
    """Entry of the ring's table for a position: every block begins in a page of its own.

    Like `ring_slot`, for tensors of positions too.
    """
    return position // B * -(-B // page_tokens) + position % B // page_tokens


def ring_slot(position: int, page_tokens: int) -> int:
    """Token of the ring's page at which a position lies."""
    return position % B % page_tokens
