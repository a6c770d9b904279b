"""Divergence from a reference of tokens that are generated, the text's own being forced on them.

What a prompt's tokens read, and what generated tokens do, may differ: with a `token_budget` only
these select pages. So a window is a prompt up to its last tokens, which are decoded one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.engine import Done, Engine
from benchmarks.quality.perplexity import summary

DECODED = 128
"""Tokens of a window that are decoded."""


def measure(
    engine: Engine,
    windows: Mapping[str, Sequence[Sequence[int]]],
    lengths: Sequence[int],
    reference: dict[tuple[str, int], list[np.ndarray]],
    on_done: Done = print,
) -> list[dict[str, Any]]:
    """Decode the ends of all windows, and compare a row with the reference.

    Args:
        engine: the row's.
        windows: token ids by text, of the longest length each.
        lengths: what windows are cut to: prompt and decoded tokens.
        reference: hidden states by text and length; filled by the first row, empty until then.
        on_done: called with the number of windows, of each length, that are done.

    Returns:
        Figures by `text` and `length`, see `perplexity.summary`.

    """
    records, done = [], 0
    for text, ones in windows.items():
        for length in lengths:
            mine, parts = [], []
            base = reference.get((text, length))
            for i, window in enumerate(ones):
                tokens = list(window[:length])
                mine.append(engine.decoded_states(tokens, DECODED))
                other = None if base is None else mine[-1]
                of = mine[-1] if base is None else base[i]
                parts.append(engine.compare(of, other, tokens[1 - DECODED :]))
                on_done(done := done + 1)
            reference.setdefault((text, length), mine)
            records.append({"text": text, "length": length, **summary(parts)})
    return records
