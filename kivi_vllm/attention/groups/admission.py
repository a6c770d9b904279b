"""Admission: how many pages the running requests will need during a block.

A block is many tokens here, so that many requests run in few pages. A new request that took
the last pages would be preempted, or others would, as soon as they grow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kivi_vllm.config import BLOCK_SIZE


class Forecast:
    """Pages of all requests in each of the next steps.

    Args:
        rings: ring pages during a decode step that ends at length n, for n modulo their
            number.
        num_others: pages that a request claims in other groups with its first whole
            block, and keeps.

    """

    def __init__(self, rings: Sequence[int], num_others: int) -> None:
        self._rings = np.array(rings)
        self._num_others = num_others

    def most_pages(self, lengths: Sequence[int], ends: Sequence[int]) -> int:
        """Most pages that requests will hold in the ring and claim elsewhere, in one step.

        Every request grows by about a token a step, so their rings are not full together,
        unless they began together; those that reach their end give theirs back.

        Args:
            lengths: tokens of each request now.
            ends: tokens at which it will end.

        """
        now = np.array(lengths)[:, None]
        ahead = now + np.arange(BLOCK_SIZE + 1)
        rings = self._rings[ahead % len(self._rings)]
        pages = ahead // BLOCK_SIZE - now // BLOCK_SIZE
        others = ((now < BLOCK_SIZE) & (ahead >= BLOCK_SIZE)) * self._num_others
        taken = (rings + pages + others) * (ahead <= np.array(ends)[:, None])
        return int(taken.sum(0).max())
