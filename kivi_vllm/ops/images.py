"""Images whose tokens see each other: the last position that each token of a step sees.

Some models (Gemma-3, Gemma-4, PaliGemma) let the tokens of an image attend in both directions.
**Position t sees position s iff t - W < s <= e(t)**: e(t) is t itself, or the last position of
the image that t belongs to; W is the sliding window, if there is one. An image is computed in one
step (but for what a prefix hit found of it), so all that t sees after itself are the step's own
tokens, at full precision. What it sees before itself is the rule of `residual`, as ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

Ranges = Mapping[int, Sequence[tuple[int, int]]]
"""The first and the last position of each image of a request, by the request's index."""


def last_visible(
    ranges: Ranges | None, starts: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor | None:
    """The last position that tokens of images see, of the tokens of a step.

    Args:
        ranges: of some requests; those of one do not overlap.
        starts: [num_reqs + 1] integers on the CPU, the first token of each request in the step.
        ends: [num_reqs] integers on the CPU, tokens of each request after the step; of requests
            without an image in it, whatever they are.

    Returns:
        [num_tokens] int32 on the CPU, not beyond the request's tokens in this step, and -1 for
        tokens that see up to themselves; None where all do.

    """
    if not ranges or not any(ranges.values()):
        return None
    seen, first_of, end_of = None, starts.tolist(), ends.tolist()
    for index, images in ranges.items():
        q0, n = first_of[index], first_of[index + 1] - first_of[index]
        a = end_of[index] - n
        for first, last in images:
            low, high = max(first - a, 0), min(last - a + 1, n)
            if high - low < 2:
                continue
            if seen is None:
                seen = torch.full((first_of[-1],), -1, dtype=torch.int32)
            seen[q0 + low : q0 + high] = a + high - 1
    return seen
