"""The processor's side: what is checked, set up, timed and reported for each case."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import cycle
from typing import Any

import torch
import vllm  # noqa: F401  (loads the plugins)
from vllm.platforms import current_platform

from benchmarks.attention import baseline, selection
from benchmarks.attention.baseline import VllmPool
from benchmarks.attention.cases import KIVI_DTYPES, SHAPES, VLLM_DTYPES, B, Case, Shape
from benchmarks.attention.check import Variant, check, kivi
from benchmarks.attention.floor import reader
from benchmarks.attention.kivi import CPU, KiviPool, Place
from benchmarks.attention.memory import allocate, cold_sets, huge_page_bytes
from benchmarks.attention.timing import Timed, columns, interleave, store_columns
from benchmarks.attention.work import Work
from benchmarks.common.child import report
from benchmarks.common.machine import GIB
from kivi_vllm.ops import reference
from kivi_vllm.ops.cpu import library

_FLOORS = {"kivi2": "floor", "bf16": "bf16_floor"}
"""Whose bytes are also read raw, and the name of that column."""

Result = dict[str, Any]
Pools = dict[str, Any]


def measure_all(threads: int, cases: Sequence[Case], settings: dict[str, Any]) -> None:
    """Check and time all cases with so many threads; reports as `children.Tell` says.

    Settings are `budget`, seconds of timing a case; `memory`, bytes that a case's pools may take
    together; `llc`, bytes of the last-level cache; `huge_pages`, whether to ask for them; and
    `token_budgets` and `estimate`, of the section "selection".
    """
    torch.set_num_threads(threads)
    current_platform.import_kernels()
    report(("header", _header(threads)))
    budgets, estimate = settings.pop("token_budgets"), settings.pop("estimate")
    many = "1 thread" if threads == 1 else f"{threads} threads"
    errors: dict[str, dict[str, float]] = {}
    for case in cases:
        if case.section == "selection":
            report(("now", f"{case}, {many}"))
            if not errors:
                errors = {"": {name: selection.check(name, estimate) for name in selection.CACHES}}
            row = selection.measure(case, budgets, estimate, **settings)
            report(("row", case.fields | row | {"threads": threads, "rel_errors": errors[""]}))
            continue
        if case.shape not in errors:
            report(("now", f"checking {case.shape} against float64, {many}"))
            errors[case.shape] = _errors(SHAPES[case.shape])
        report(("now", f"{case}, {many}"))
        found = errors[case.shape]
        more = {"threads": threads, "rel_error": found["kivi2"], "rel_errors": found}
        report(("row", case.fields | _measure(case, **settings) | more))


def _errors(shape: Shape) -> dict[str, float]:
    """The relative errors of both sides, by cache."""
    variants: dict[str, Variant] = {
        name: partial(baseline.checked, shape, name) for name in baseline.names()
    }
    variants |= {dtype: partial(kivi, shape, dtype) for dtype in KIVI_DTYPES}
    return check(shape, variants, CPU.device)


def _header(threads: int) -> dict[str, Any]:
    shape, native = next(iter(SHAPES.values())), CPU.operators is not reference
    names = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")
    return {
        "operators": CPU.operators.__name__,  # type: ignore[attr-defined]
        "isa": library.load().isa if native else "none (PyTorch)",
        "vllm_isa": {name: VllmPool(shape, name, 1, 1, 1).isa for name in baseline.names()},
        "binding": {str(threads): {name: os.environ[name] for name in names if name in os.environ}},
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
    }


def _measure(case: Case, budget: float, memory: int, llc: int, huge_pages: bool) -> Result:
    """One case's medians and quartiles, or `skipped` with the reason."""
    shape = SHAPES[case.shape]
    work = Work(shape, case.batch, case.new, case.end)
    place = Place("cpu", CPU.device, partial(allocate, huge_pages=huge_pages))
    names = [*baseline.names(), *KIVI_DTYPES] if case.section == "decode" else ["bf16", "kivi2"]
    pools: Pools = {}
    for name in names:
        kind = VllmPool if name in VLLM_DTYPES else KiviPool
        read = kind(shape, name, 1, case.batch, 1).read_bytes(work)
        sets = cold_sets(read, llc) if case.decodes else 1
        pools[name] = kind(shape, name, sets, case.batch, -(-case.end // B), place)
    need = sum(pool.nbytes for pool in pools.values())
    if need > memory:
        each = ", ".join(f"{name} {pool.nbytes / GIB:.2g}" for name, pool in pools.items())
        limit = f"the limit is {memory / GIB:.3g}"
        return {"skipped": f"the pools need {need / GIB:.3g} GiB ({each}), {limit}"}
    for pool in pools.values():
        pool.prepare()
    share = {"pool_bytes": need, "huge_page_share": round(min(1.0, huge_page_bytes() / need), 3)}
    of = {"decode": _decode, "prefill": _prefill, "store": _store}
    return of[case.section](pools, work, budget) | share


def _attention(pool: Any, work: Work) -> Timed:
    calls = [pool.attention(i, work) for i in range(pool.sets)]
    return Timed(calls, cycle(range(pool.sets)))


def _decode(pools: Pools, work: Work, budget: float) -> Result:
    things = {}
    for name, pool in pools.items():
        things[name] = _attention(pool, work)
        if name in _FLOORS:
            found = (reader(pool.ranges(i, work)) for i in range(pool.sets))
            if reads := [read for read in found if read is not None]:
                things[_FLOORS[name]] = Timed(reads, things[name].cursor)
    times = interleave(things, budget)
    row: Result = columns(times)
    for floor in set(_FLOORS.values()) - set(times):  # no native library
        row |= {f"{floor}_{what}": None for what in ("ms", "q1", "q3")}
    row["iterations"] = len(times["bf16"])
    parts = {"ratio_bf16": "bf16", "ratio_fp8": "fp8", "share_of_floor": "floor"}
    for column, other in parts.items():
        row[column] = round(times[other].ms / times["kivi2"].ms, 3) if other in times else None
    if reasons := baseline.refused():
        row["unavailable"] = reasons
    return row | {f"{name}_bytes": pool.read_bytes(work) for name, pool in pools.items()}


def _prefill(pools: Pools, work: Work, budget: float) -> Result:
    # vLLM reads a step's own tokens back from its cache.
    pools["bf16"].writer(0, work.end - work.new, work.end, work.key, work.value)()
    things = {name: _attention(pool, work) for name, pool in pools.items()}
    times = interleave(things, budget, warm_up=False)
    ratio = round(times["bf16"].ms / times["kivi2"].ms, 3)
    return columns(times) | {"iterations": len(times["bf16"]), "ratio": ratio}


def _store(pools: Pools, work: Work, budget: float) -> Result:
    """What storing adds to a step: a decode, which completes a block once in 128, or a chunk."""
    kivi2, bf16 = pools["kivi2"], pools["bf16"]
    calls, cursor = kivi2.of_a_step(work), cycle(range(kivi2.sets))
    things = {name: Timed(mine, cursor) for name, mine in calls.items()}
    if work.new == 1:
        things["store_ring"] = Timed(calls["store_ring"], cursor, before=calls["attend"])
    span = (work.end - work.new, work.end)
    writes = [bf16.writer(i, *span, work.key, work.value) for i in range(bf16.sets)]
    things["bf16_store"] = Timed(writes, cycle(range(bf16.sets)))
    return store_columns(interleave(things, budget))
