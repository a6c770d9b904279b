"""Timing of calls in turn, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.attention.cases import B

AT_LEAST, AT_MOST = 3, 2000
"""Rounds, whatever the budget."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """The same work over other parts of a pool, a call for each.

    `cursor` says which part comes next, to all that read this pool; `before` has for each part what
    a step does just before the call, and is not timed.
    """

    calls: Sequence[Call]
    cursor: Iterator[int]
    before: Sequence[Call] = ()

    def next(self) -> Call:
        """The call over the next part, ready to be made."""
        i = next(self.cursor)
        if self.before:
            self.before[i]()
        return self.calls[i]


class Times(list[float]):
    """Durations of one thing, in seconds."""

    @property
    def quartiles_ms(self) -> list[float]:
        """Lower quartile, median, upper quartile, in milliseconds."""
        return [1e3 * x for x in statistics.quantiles(self, n=4, method="inclusive")]

    @property
    def ms(self) -> float:
        """The median in milliseconds."""
        return self.quartiles_ms[1]


def wall(call: Call) -> float:
    """Seconds of one call, by the clock of the processor."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleave(
    things: Mapping[str, Timed],
    budget: float,
    warm_up: bool = True,
    stopwatch: Callable[[Call], float] = wall,
) -> dict[str, Times]:
    """Time each thing once a round, in random order, until `budget` seconds have gone.

    There are at least `AT_LEAST` rounds. `stopwatch` makes a call and says how many seconds it
    took. With `warm_up`, everything is called once before.
    """
    shuffle = random.Random(0).shuffle
    if warm_up:
        for thing in things.values():
            thing.next()()
    times, order = {name: Times() for name in things}, list(things)
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + budget
        for made in range(AT_MOST):
            if made >= AT_LEAST and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                times[name].append(stopwatch(things[name].next()))
    finally:
        gc.enable()
    return times


def columns(times: Mapping[str, Times]) -> dict[str, Any]:
    """Medians and quartiles as a row's columns: `NAME_ms`, `NAME_q1`, `NAME_q3`."""
    return {
        f"{name}_{what}": round(value, 5)
        for name, one in times.items()
        for what, value in zip(("q1", "ms", "q3"), one.quartiles_ms, strict=True)
    }


def store_columns(times: Mapping[str, Times]) -> dict[str, Any]:
    """Columns of what storing costs, `store_ms`, beside the step's attention, `attend`.

    At decode `store_blocks` was timed twice: where it finds nothing to do (`_idle`), and
    where every sequence completes a block, which it does once in `B` steps; `store_ring`
    right behind `attend` on the same caches, as in a step.
    """
    blocks = times["store_blocks"].ms
    if "store_blocks_idle" in times:
        blocks = times["store_blocks_idle"].ms + blocks / B
    store, attend = times["store_ring"].ms + blocks, times["attend"]
    more = {"store_ms": round(store, 5), "share_of_attend": round(store / attend.ms, 5)}
    return columns(times) | {"iterations": len(attend)} | more
