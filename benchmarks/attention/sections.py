"""The three sections: what is set up, timed and reported for one case."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from benchmarks.attention import baseline
from benchmarks.attention.baseline import VllmPool
from benchmarks.attention.cases import KIVI_DTYPES, RESIDUAL, SHAPES, B, Case, Shape
from benchmarks.attention.floor import reader
from benchmarks.attention.kivi import KiviPool, Row, rows
from benchmarks.attention.memory import cold_sets, huge_page_bytes
from benchmarks.attention.timing import Call, Timed, columns, interleave, once, store_columns
from benchmarks.attention.tokens import TEMPLATE_BLOCKS, Tokens
from benchmarks.common.machine import GIB

_FLOORS = {"kivi2": "floor", "bf16": "bf16_floor"}
"""Whose bytes are also read raw, and the name of that column."""

Result = dict[str, Any]
Pool = VllmPool | KiviPool


@dataclass(frozen=True)
class Settings:
    """What holds for all cases of a process.

    Attributes:
        budget: seconds of timing per case.
        memory: bytes that the pools of a case may take together.
        llc: bytes of the last-level cache.
        huge_pages: whether to ask for them.

    """

    budget: float
    memory: int
    llc: int
    huge_pages: bool


def measure(case: Case, settings: Settings) -> Result:
    """Time one case.

    Returns:
        the case's row: medians and quartiles, or `skipped` with the reason.

    """
    of = {"decode": _decode, "prefill": _prefill, "store": _store}
    try:
        return case.fields | of[case.section](case, settings)
    except _NoRoom as reason:
        return case.fields | {"skipped": str(reason)}


class _NoRoom(Exception):
    """The pools of a case do not fit."""


def _prepare(pools: dict[str, Pool], shape: Shape, settings: Settings) -> Result:
    """Allocate and fill the pools; the columns about their memory.

    Raises:
        _NoRoom: they do not fit.

    """
    need = sum(pool.nbytes for pool in pools.values())
    if need > settings.memory:
        each = ", ".join(f"{name} {pool.nbytes / GIB:.2g}" for name, pool in pools.items())
        limit = settings.memory / GIB
        raise _NoRoom(f"the pools need {need / GIB:.3g} GiB ({each}), the limit is {limit:.3g}")
    template = Tokens(shape, TEMPLATE_BLOCKS * B)
    for pool in pools.values():
        pool.allocate(settings.huge_pages)
        pool.fill(template.key, template.value)
    return {"pool_bytes": need, "huge_page_share": round(min(1.0, huge_page_bytes() / need), 3)}


def _decode(case: Case, settings: Settings) -> Result:
    shape, batch, blocks = SHAPES[case.shape], case.batch, case.context // B
    total = case.context + RESIDUAL
    pools: dict[str, Pool] = {}
    read: dict[str, int] = {}
    for name in baseline.names():
        read[name] = VllmPool(shape, name, 1, batch, 1).read_bytes(total)
        sets = cold_sets(read[name], settings.llc)
        pools[name] = VllmPool(shape, name, sets, batch, blocks + 1)
    for name in KIVI_DTYPES:
        read[name] = KiviPool(shape, name, 1, batch, 1).read_bytes(blocks, RESIDUAL)
        sets = cold_sets(read[name], settings.llc)
        pools[name] = KiviPool(shape, name, sets, batch, blocks)
    memory = _prepare(pools, shape, settings)
    own = Tokens(shape, batch)
    things: dict[str, Timed] = {}
    for name, pool in pools.items():
        cursor = cycle(range(pool.sets))
        things[name] = Timed(_attention(pool, 1, total, own), cursor)
        if name in _FLOORS and (reads := _floor(pool, total, own)):
            things[_FLOORS[name]] = Timed(reads, cursor)
    times = interleave(things, settings.budget)
    row: Result = columns(times)
    for floor in set(_FLOORS.values()) - set(times):  # no native library
        row |= {f"{floor}_{what}": None for what in ("ms", "q1", "q3")}
    row["iterations"] = len(times["bf16"])
    parts = {"ratio_bf16": "bf16", "ratio_fp8": "fp8", "share_of_floor": "floor"}
    for column, other in parts.items():
        row[column] = round(times[other].ms / times["kivi2"].ms, 3) if other in times else None
    if reasons := baseline.refused():
        row["unavailable"] = reasons
    return row | {f"{name}_bytes": nbytes for name, nbytes in read.items()} | memory


def _attention(pool: Pool, new: int, end: int, own: Tokens) -> list[Call]:
    """The attention of a step of `new` tokens, over each set of the pool."""
    if isinstance(pool, VllmPool):
        plan = pool.plan(new, end)
        return [pool.attention(i, plan, own.query, own.output) for i in range(pool.sets)]
    args = (rows(pool.batch, new, end), own.query, own.key, own.value, own.output)
    return [pool.attention(i, *args) for i in range(pool.sets)]


def _floor(pool: Pool, total: int, own: Tokens) -> list[Call]:
    """Raw reads of what attending at decode reads; nothing if there is no native library."""
    calls: list[Call] = []
    for i in range(pool.sets):
        if isinstance(pool, VllmPool):
            ranges = pool.ranges(i, total)
        else:
            ranges = pool.ranges(i, total // B, total % B - 1)
            # The step's own token comes from the step.
            ranges += [(x.data_ptr(), x.nbytes) for x in (own.key, own.value)]
        if (call := reader(ranges)) is None:
            return []
        calls.append(call)
    return calls


def _prefill(case: Case, settings: Settings) -> Result:
    shape, total = SHAPES[case.shape], case.context + case.new
    bf16 = VllmPool(shape, "bf16", 1, 1, -(-total // B))
    pools: dict[str, Pool] = {"bf16": bf16, "kivi2": KiviPool(shape, "kivi2", 1, 1, -(-total // B))}
    memory = _prepare(pools, shape, settings)
    own = Tokens(shape, case.new)
    # vLLM reads a step's own tokens back from its cache.
    bf16.writer(bf16.slots(0, 0, case.context, total), own.key, own.value)()
    things = {n: once(*_attention(pool, case.new, total, own)) for n, pool in pools.items()}
    times = interleave(things, settings.budget, warm_up=False)
    ratio = round(times["bf16"].ms / times["kivi2"].ms, 3)
    return columns(times) | {"iterations": len(times["bf16"]), "ratio": ratio} | memory


def _store(case: Case, settings: Settings) -> Result:
    """What storing adds to a step: a decode, which completes a block once in 128, or a chunk."""
    shape, batch, decode = SHAPES[case.shape], case.batch, case.new == 1
    end = case.context + RESIDUAL if decode else case.new
    blocks = case.context // B + 1 if decode else -(-case.new // B)
    read = {
        "kivi2": KiviPool(shape, "kivi2", 1, batch, 1).read_bytes(case.context // B, RESIDUAL),
        "bf16": VllmPool(shape, "bf16", 1, batch, 1).read_bytes(end),
    }
    sets = {name: cold_sets(n, settings.llc) if decode else 1 for name, n in read.items()}
    kivi2 = KiviPool(shape, "kivi2", sets["kivi2"], batch, blocks)
    bf16 = VllmPool(shape, "bf16", sets["bf16"], batch, blocks)
    memory = _prepare({"kivi2": kivi2, "bf16": bf16}, shape, settings)
    own = Tokens(shape, batch * case.new)
    writes = []
    for i in range(bf16.sets):
        slots = torch.cat([bf16.slots(i, row, end - case.new, end) for row in range(batch)])
        writes.append(bf16.writer(slots, own.key, own.value))
    cursor, attend = cycle(range(kivi2.sets)), _attention(kivi2, case.new, end, own)
    this = rows(batch, case.new, end)

    def store(name: str, of: list[Row], before: Sequence[Call] = ()) -> Timed:
        calls = [kivi2.store(name, i, of, own.key, own.value) for i in range(kivi2.sets)]
        return Timed(calls, cursor, before)

    things = {
        "attend": Timed(attend, cursor),
        "store_ring": store("store_ring", this, attend if decode else ()),
        "store_blocks": store("store_blocks", this),
        "bf16_store": Timed(writes, cycle(range(bf16.sets))),
    }
    if decode:
        things["store_blocks_idle"] = things["store_blocks"]
        all_complete = rows(batch, 1, case.context + B)
        things["store_blocks"] = store("store_blocks", all_complete)
    return store_columns(interleave(things, settings.budget)) | memory
