"""Admission: how many pages the running requests will need during a block.

A block is many tokens here, so that many requests run in few pages. A new request that took
the last pages would be preempted, or others would, as soon as they grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kivi_vllm.config import BLOCK_SIZE


@dataclass(frozen=True)
class PageGroup:
    """A cache group of quantized pages.

    Attributes:
        pages: pages of each layer in one block of the pool.
        window: tokens that its layers see; 0: all.
        chunk: tokens of its layers' attention chunks; 0: there are none.

    """

    pages: int = 1
    window: int = 0
    chunk: int = 0

    def held(self, lengths: np.ndarray) -> np.ndarray:
        """Blocks of the pool that requests of these lengths hold."""
        blocks = -(-(lengths // BLOCK_SIZE) // self.pages)
        if self.chunk:  # those of a chunk that is over are free when it is known to be over
            start = np.maximum(lengths - 2, 0) // self.chunk * self.chunk
            return blocks - start // (BLOCK_SIZE * self.pages)
        if not self.window:
            return blocks
        return np.minimum(blocks, -(-(self.window - 1) // (BLOCK_SIZE * self.pages)) + 1)


class Forecast:
    """Blocks of the pool for all requests in each of the next steps.

    Args:
        rings: ring pages during a decode step that ends at length n, for n modulo their
            number.
        page_groups: the groups of quantized pages.
        num_others: pages that a request claims in further groups with its first whole
            block, and keeps.

    """

    def __init__(
        self, rings: Sequence[int], page_groups: Sequence[PageGroup], num_others: int
    ) -> None:
        self._rings = np.array(rings)
        self._page_groups = page_groups
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
        claimed = self._held_elsewhere(ahead) - self._held_elsewhere(now)
        taken = (rings + claimed) * (ahead <= np.array(ends)[:, None])
        return int(taken.sum(0).max())

    def _held_elsewhere(self, lengths: np.ndarray) -> np.ndarray:
        others = (lengths >= BLOCK_SIZE) * self._num_others
        return others + sum(group.held(lengths) for group in self._page_groups)
