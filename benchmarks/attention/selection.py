"""Decode with a `token_budget`: dense, selected and vLLM's bf16 in turn, and what reading takes.

Keys are random, so what is chosen means nothing here: how long it takes to choose, and to read
what is chosen, does not depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from typing import Any

import torch

from benchmarks.attention.baseline import VllmPool
from benchmarks.attention.cases import SHAPES, B, Case
from benchmarks.attention.check import LIMIT
from benchmarks.attention.floor import reader
from benchmarks.attention.kivi import CPU, KiviPool, Place
from benchmarks.attention.memory import Ranges, allocate, cold_sets
from benchmarks.attention.timing import Call, Timed, columns, interleave
from benchmarks.attention.work import Work
from benchmarks.common.machine import GIB
from kivi_vllm.cli.errors import UserError
from kivi_vllm.config import Estimate
from kivi_vllm.ops import reference
from kivi_vllm.ops.select import Selection, estimate_channels

CACHES = ("kivi2", "kivi_k3v2")

Result = dict[str, Any]


class Selecting(KiviPool):
    """A pool whose sequences have generated the step's tokens, which choose by an estimate."""

    def __init__(self, estimate: Estimate, *size: Any) -> None:
        super().__init__(*size)
        self.params = replace(self.params, estimate=estimate)

    def choosing(self, i: int, work: Work, budget: int) -> Callable[[], Selection | None]:
        """A call that chooses what the tokens of set i read."""
        params = replace(self.params, token_budget=budget)
        own = (work.query, work.key, work.value, params)
        return partial(self.place.operators.select, *self.layer(i, work.rows), *own)

    def selected(self, i: int, work: Work, budget: int) -> Call:
        """A call that chooses and attends."""
        params = replace(self.params, token_budget=budget)
        own = (work.query, work.key, work.value, params, work.output)
        return partial(self.place.operators.attend_selected, *self.layer(i, work.rows), *own)

    def head_bytes(self) -> int:
        """Bytes of a page that choosing reads, as if they all were its first ones."""
        codes = self.fmt.fields["k_codes"]
        if self.params.estimate == "ranges":
            return codes.offset
        return (
            codes.offset
            + codes.nbytes * estimate_channels(self.fmt.head_size) // self.fmt.head_size
        )

    def selected_ranges(self, i: int, work: Work, budget: int) -> Ranges:
        """What choosing and attending read of set i: all ranges of keys, and the chosen pages."""
        selection = self.choosing(i, work, budget)()
        everything = self.ranges(i, work)
        if selection is None:
            return everything
        blocks, heads = work.end // B, self.shape.num_kv_heads
        whole = self.batch * blocks * heads  # `ranges` begins with the pages, in this order
        read = torch.zeros(self.batch, blocks, heads, dtype=torch.bool)
        for row in range(self.batch):
            lists = selection.blocks[row, :, : int(selection.counts[row])]
            for head, chosen in enumerate(lists):
                read[row, chosen.long(), head] = True
        pages = zip(everything[:whole], read.flatten().tolist(), strict=True)
        head_bytes = self.head_bytes()
        return [(at, n if all_of_it else head_bytes) for (at, n), all_of_it in pages] + everything[
            whole:
        ]


def measure(
    case: Case,
    budgets: Sequence[int],
    estimate: Estimate,
    budget: float,
    memory: int,
    llc: int,
    huge_pages: bool,
) -> Result:
    """Medians and quartiles of one case for each cache and token budget."""
    shape = SHAPES[case.shape]
    work = Work(shape, case.batch, 1, case.end, generated=True)
    place = Place("cpu", CPU.device, partial(allocate, huge_pages=huge_pages))
    row: Result = {"caches": {}}
    for name in CACHES:
        sets = cold_sets(KiviPool(shape, name, 1, case.batch, 1).read_bytes(work), llc)
        size = (sets, case.batch, -(-case.end // B), place)
        pool, bf16 = Selecting(estimate, shape, name, *size), VllmPool(shape, "bf16", *size)
        if (need := pool.nbytes + bf16.nbytes) > memory:
            limit = f"the limit is {memory / GIB:.3g}"
            return {"skipped": f"the pools of {name} and bf16 need {need / GIB:.3g} GiB, {limit}"}
        pool.prepare()
        bf16.prepare()
        row["caches"][name] = _of_a_cache(pool, bf16, work, budgets, budget)
    return row


def _of_a_cache(
    pool: Selecting, bf16: VllmPool, work: Work, budgets: Sequence[int], seconds: float
) -> Result:
    sets = range(pool.sets)
    cursor = cycle(sets)
    things = {"dense": Timed([pool.attention(i, work) for i in sets], cursor)}
    things["bf16"] = Timed([bf16.attention(i, work) for i in sets], cursor)
    for one in budgets:
        things[f"selected_{one}"] = Timed([pool.selected(i, work, one) for i in sets], cursor)
        reads = [reader(pool.selected_ranges(i, work, one)) for i in sets]
        if all(reads):
            things[f"floor_{one}"] = Timed([read for read in reads if read], cursor)
    choosing = [pool.choosing(i, work, min(budgets)) for i in sets]
    things["choose"] = Timed(choosing, cursor)
    times = interleave(things, seconds)
    row: Result = columns(times) | {"iterations": len(times["dense"])}
    row["share_of_dense"] = round(times["choose"].ms / times["dense"].ms, 4)
    for one in budgets:
        for name, prefix in (("dense", "ratio"), ("bf16", "ratio_bf16")):
            row[f"{prefix}_{one}"] = round(times[name].ms / times[f"selected_{one}"].ms, 3)
    return row


def check(name: str, estimate: Estimate) -> float:
    """The largest relative error of a tiny step's attention over chosen pages.

    Raises:
        UserError: it is larger than `LIMIT`, or a budget that suffices changes the output.

    """
    shape, budget = SHAPES["tiny"], 1024
    work = Work(shape, 2, 1, 16 * B + 40, generated=True)
    pool = Selecting(estimate, shape, name, 1, 2, 17)
    pool.prepare()
    pool.attention(0, work)()
    dense = work.output.clone()
    pool.selected(0, work, 16 * B)()
    if not torch.equal(work.output, dense):
        raise UserError(f"{name}: a budget of the whole context changes the output", "test it")
    pool.selected(0, work, budget)()
    wanted = torch.zeros_like(work.output, dtype=torch.float32)
    own = (work.query, work.key, work.value, replace(pool.params, token_budget=budget))
    selection = pool.choosing(0, work, budget)()
    reference.attend(*pool.layer(0, work.rows), *own, wanted, selection)
    error = float((work.output.float() - wanted).norm() / wanted.norm())
    if not error <= LIMIT:
        raise UserError(
            f"the attention over chosen pages of {name} is wrong: its relative error is "
            f"{error:.4g}, the limit is {LIMIT}",
            "nothing was timed: run the tests of the operators",
            status=1,
        )
    return error
