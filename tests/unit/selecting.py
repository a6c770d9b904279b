"""A simulator whose generated tokens choose pages: the choice is checked, and the rest poisoned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kivi_vllm.ops.residual import first_visible
from kivi_vllm.ops.select import COUNTED, Selection
from kivi_vllm.ops.step import AttentionParams, LayerCache, Row, Step
from tests.unit import kivi_numpy
from tests.unit.simulator import POISON, B, Request, Simulator


@contextlib.contextmanager
def unread_poisoned(
    step: Step, cache: LayerCache, selection: Selection | None, params: AttentionParams
) -> Iterator[int]:
    """While it lasts, pages that the step's tokens see, and none reads, are NaN; how many."""
    k, heads = cache.pages_per_block, range(cache.num_kv_heads)
    held: set[tuple[int, int, int]] = set()
    read: set[tuple[int, int, int]] = set()
    for row in step.rows if selection else ():
        pages = [(int(step.block_table[row.index, j // k]), j % k) for j in range(row.b // B)]
        first = first_visible(row.a, params.sliding_window, params.chunk_size) // B
        held |= {(*page, head) for page in pages[first:] for head in heads}
        for token in range(row.q0, row.q1):
            count = int(selection.counts[token]) if row.generated else -1
            for head in heads:
                listed = range(len(pages)) if count < 0 else selection.blocks[token, head, :count]
                read |= {(*pages[int(j)], head) for j in listed}
    kept = {page: cache.pages[page].clone() for page in held - read}
    for page in kept:
        cache.pages[page] = POISON
    yield len(kept)
    for page, content in kept.items():
        cache.pages[page] = content


class SelectingSimulator(Simulator):
    """What pages weigh is computed once more, and attention sees a NaN in each that is not chosen.

    Attributes:
        near: pages that weigh so much the same, relatively, may be taken for each other.
        chosen: choices that were checked so far.
        poisoned: pages that were NaN during an attention so far.
        change: what attention gets in place of a selection.
        at_once: whether choosing and attending in one call must give the same.

    """

    def __init__(
        self, *args: Any, near: float = 1e-4, at_once: bool = False, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.near, self.at_once = near, at_once
        self.chosen = self.poisoned = 0
        self.change: Any = lambda selection: selection

    def _attend(
        self,
        step: Step,
        cache: LayerCache,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        output: torch.Tensor,
        order: list[Request],
    ) -> None:
        params = self.case.params
        selection = self.ops.select(step, cache, q, k, v, params)
        for row in step.rows if self.case.budget else ():
            request = order[row.index]
            for i, t in enumerate(range(row.a, row.b)):
                count = -1 if selection is None else int(selection.counts[row.q0 + i])
                if not row.generated or count < 0:
                    assert not row.generated or self._candidates(t)[1] <= self.case.budget // B
                    continue
                read = np.zeros((self.case.heads[1], -(-self.seen(row.a, row.b)[i] // B)), bool)
                for head, blocks in enumerate(selection.blocks[row.q0 + i, :, :count].numpy()):
                    self._check_choice(request, row, t, head, blocks, q, cache)
                    read[head, blocks] = True
                request.read[t] = read
        changed, own = self.change(selection), (step, cache, q, k, v, params)
        before = COUNTED.clone()
        with unread_poisoned(step, cache, selection, params) as poisoned:
            self.ops.attend(*own, output, changed)
        self.poisoned += poisoned
        if self.at_once and changed is selection:
            again, counted = torch.full_like(output, torch.nan), COUNTED.clone()
            self.ops.attend_selected(*own, again)
            assert torch.equal(COUNTED - counted, counted - before)
            COUNTED.copy_(counted)
            # Several threads share out the work in another way.
            exact = {"rtol": 0.0, "atol": 0.0} if torch.get_num_threads() == 1 else {}
            torch.testing.assert_close(again, output, equal_nan=True, **exact)

    def _candidates(self, t: int) -> tuple[int, int]:
        """The first block that a generated token at t may choose of, and how many there are."""
        first, end = self._first_seen(t) // B, self.rule(t, self.case.residual) // B
        return first, max(0, end - first)

    def _check_choice(
        self,
        request: Request,
        row: Row,
        t: int,
        head: int,
        blocks: np.ndarray,
        q: torch.Tensor,
        cache: LayerCache,
    ) -> None:
        """Assert that blocks are the best ones, as far as rounding lets one tell."""
        first, n = self._candidates(t)
        most, cut = self.case.budget // B, self.rule(t, self.case.residual) % B > 0
        assert n > most and len(blocks) == most + cut and (np.diff(blocks) > 0).all()
        if cut:
            assert blocks[-1] == first + n
            blocks = blocks[:-1]
        assert blocks[0] >= first and blocks[-1] == first + n - 1, "without the newest whole page"
        per_head = self.case.heads[0] // self.case.heads[1]
        own = q[row.q0 + t - row.a, head * per_head : (head + 1) * per_head]
        k = self.case.per_block
        held = [(request.blocks[j // k], j % k, head) for j in range(first, first + n)]
        pages = [cache.pages[page].numpy() for page in held]
        scaled = own.double().numpy() * self.case.params.scale
        if self.case.estimate == "keys":
            unread = max(0, max(self._first_seen(t), self.fmt.sink_tokens) - first * B)
            w = kivi_numpy.key_weights(scaled, pages, self.fmt, self.case.soft_cap, unread)
        else:
            w = kivi_numpy.page_weights(scaled, pages, self.fmt, self.case.soft_cap)
        chosen = np.zeros(n, bool)
        chosen[blocks - first] = True
        least, others = w[:-1][chosen[:-1]].min(initial=np.inf), w[:-1][~chosen[:-1]].max()
        assert least >= others * (1 - self.near), f"{others} was left for {least} at {t}"
        self.chosen += 1
