"""A GPU's side: what is checked, set up, timed and reported for each case."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import repeat
from typing import Any

import torch

from benchmarks.attention import check
from benchmarks.attention.cases import KIVI_DTYPES, SHAPES, B, Case, Shape
from benchmarks.attention.gpu.contenders import CONTENDERS, Contender, writer
from benchmarks.attention.gpu.device import Gpu, brief
from benchmarks.attention.gpu.pools import PLAIN_DTYPES, PagedPool, TurboQuantPool
from benchmarks.attention.kivi import KiviPool
from benchmarks.attention.timing import Call, Timed, Times, columns, interleave, store_columns
from benchmarks.attention.work import Work
from benchmarks.common.child import report
from benchmarks.common.machine import GIB
from kivi_vllm.cli.errors import UserError

MOST_SETS, SET_BYTES = 16, 2 * GIB
"""Calls over different caches in one graph: as many as fit into so many bytes, at most 16."""

KINDS: dict[str, Any] = dict.fromkeys(PLAIN_DTYPES, PagedPool) | {"turboquant": TurboQuantPool}
KINDS |= dict.fromkeys(KIVI_DTYPES, KiviPool)
"""Pools by cache."""

Result = dict[str, Any]


class Wrong(Exception):
    """A result is not what the cache holds."""


def measure_all(cases: Sequence[Case], settings: dict[str, Any], without: dict[str, str]) -> None:
    """Check and time all cases `without` what broke before; reports as `children.Tell` says.

    Settings are `budget`, seconds of timing a case; `memory`, bytes that its pools may take
    together, None for what is free; `deadline`, after which no case begins; `smoke`.
    """
    if settings["smoke"]:
        from tests.triton.interpreted import repair

        repair()
    elif not torch.cuda.is_available():
        raise UserError("PyTorch finds no GPU", "run this where `nvidia-smi` shows one", status=1)
    gpu = Gpu(settings["smoke"])
    bandwidth = gpu.bandwidth()
    header = gpu.header() | {
        "bandwidth_bytes_per_s": bandwidth,
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
    }
    report(("header", header))
    bench = Bench(gpu, settings["budget"], settings["memory"], bandwidth["copy"], dict(without))
    for case in cases:
        row = case.fields | {"device": "cuda"}
        if time.time() > settings["deadline"]:
            report(("row", row | {"skipped": "the time of --seconds was over"}))
            continue
        report(("now", str(case)))
        start = time.monotonic()
        try:
            row |= bench.measure(case)
        except Wrong as error:
            row["skipped"] = f"kivi2: {error}"
        except Exception as error:
            gpu.finish()  # if the GPU itself failed this process is of no more use
            row["skipped"] = brief(error)
        report(("row", row | {"took_s": round(time.monotonic() - start, 2)}))


@dataclass
class Bench:
    """What all cases of a process share.

    `bandwidth` is bytes a second of a copy, `without` the contenders that are left out, and why,
    `errors` those of this project's dtypes on small steps, by shape.
    """

    gpu: Gpu
    budget: float
    memory: int | None
    bandwidth: float
    without: dict[str, str] = field(default_factory=dict)
    errors: dict[Shape, dict[str, float]] = field(default_factory=dict)

    def measure(self, case: Case) -> Result:
        """One case's medians and quartiles, or `skipped` with the reason; `Wrong` if kivi2 is."""
        shape = SHAPES[case.shape]
        if shape not in self.errors:
            self.errors[shape] = self._small_steps(shape)
        small = {"small_rel_errors": self.errors[shape]}
        if "kivi2" in self.without:
            return {"skipped": self.without["kivi2"]}
        work = Work(shape, case.batch, case.new, case.end, self.gpu.device)
        names = [name for name, one in CONTENDERS.items() if case.section in one.sections]
        if case.context and "kivi2_served" in names:
            names.remove("kivi2_served")
        caches = list(dict.fromkeys(CONTENDERS[name].cache for name in names)) or ["kivi2", "bf16"]
        pools, reasons = self._pools(work, caches, 1 if case.section == "prefill" else MOST_SETS)
        if lost := reasons if case.section == "store" else reasons.keys() & {"kivi2"}:
            return small | {"skipped": "; ".join(f"{name}: {reasons[name]}" for name in lost)}
        if case.section == "store":
            return small | self._store(pools["kivi2"], pools["bf16"], work)
        times, row = self._contend(names, pools, reasons, work)
        if case.section == "decode":
            for name, one in times.items():
                nbytes = pools[CONTENDERS[name].cache].read_bytes(work)
                row[f"{name}_bytes"] = nbytes
                row[f"{name}_share"] = round(nbytes / (one.ms / 1e3) / self.bandwidth, 4)
            row["share_of_bandwidth"] = row["kivi2_share"]
        return small | row

    # ------------------------------------------------------------- checks

    def _small_steps(self, shape: Shape) -> dict[str, float]:
        """Errors of all three operators on small steps, before anything is timed."""
        errors: dict[str, float] = {}
        for dtype in (name for name in KIVI_DTYPES if name not in self.without):
            report(("doing", dtype))
            try:
                variant = partial(check.kivi, shape, dtype, place=self.gpu.place)
                steps = check.STEPS if dtype == "kivi2" else check.STEPS[:1]
                errors |= check.check(shape, {dtype: variant}, self.gpu.device, steps)
            except Exception as error:  # the others may do without it
                self.gpu.finish()
                self.without[dtype] = brief(error)
        return errors

    def _run(self, call: Call, work: Work) -> None:
        """Make a call whose output is then `work.output`: NaN where it writes nothing."""
        work.output.fill_(float("nan"))
        result = call()
        if isinstance(result, torch.Tensor) and result is not work.output:
            work.output.copy_(result.reshape(work.output.shape))
        self.gpu.finish()

    def _checked(
        self, one: Contender, pool: Any, call: Call, work: Work, expected: dict[Any, torch.Tensor]
    ) -> float:
        """The relative error of a contender on the first and the last sequence of the case itself.

        `call` is over the first set of the pool; `expected` has what was computed for others over
        the same cache, and is added to. Raises `Wrong` above the contender's limit.
        """
        self._run(call, work)
        errors = []
        for row in sorted({0, work.batch - 1}):
            key = (pool.name, one.in_order, row)
            if key not in expected:
                expected[key] = work.exact(row, pool.seen(row, work, one.in_order))
            errors.append(work.error(row, expected[key]))
        if not all(x <= one.limit for x in errors):  # NaN too
            raise Wrong(
                f"wrong: its relative error against float64 is {max(errors):.4g}, the limit is "
                f"{one.limit}"
            )
        return max(errors)

    # ------------------------------------------------------------- set up

    def _pools(
        self, work: Work, caches: Sequence[str], most: int
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Filled pools of those caches that fit, the first first; why not of the others.

        They have `most` sets at the most, and fewer where those would take more than `SET_BYTES`.
        """
        pools: dict[str, Any] = {}
        reasons: dict[str, str] = {}

        def sized(name: str, sets: int) -> Any:
            blocks = -(-work.end // B)
            return KINDS[name](work.shape, name, sets, work.batch, blocks, self.gpu.place)

        for name in caches:
            try:
                pools[name] = sized(name, 1)
            except Exception as error:  # whatever others' code raises is a reason to do without
                reasons[name] = brief(error)
        free = self.gpu.free_bytes()
        left = free = free if self.memory is None else min(free, self.memory)
        of_all = sum(pool.nbytes for pool in pools.values())
        sets = min(most, 2 if self.gpu.smoke else most, max(1, min(SET_BYTES, free) // of_all))
        for name in list(pools):
            del pools[name]
            pool = sized(name, sets)
            if pool.nbytes > left:
                reasons[name] = (
                    f"no room: its cache needs {pool.nbytes / GIB:.3g} GiB, of {free / GIB:.3g} "
                    f"free {left / GIB:.3g} were left"
                )
                continue
            report(("doing", name))
            try:
                pool.prepare()
            except Exception as error:
                self.gpu.finish()
                reasons[name] = brief(error)
                continue
            pools[name], left = pool, left - pool.nbytes
        return pools, reasons

    # ------------------------------------------------------------- timing

    def _time(self, things: dict[str, tuple[Call, int]]) -> dict[str, Times]:
        """Time each call in turn; each is so many calls of what is meant."""
        timed = {name: Timed([call], repeat(0)) for name, (call, _) in things.items()}
        times = interleave(timed, self.budget, stopwatch=self.gpu.stopwatch)
        return {name: Times(x / things[name][1] for x in one) for name, one in times.items()}

    def _contend(
        self, names: Sequence[str], pools: dict[str, Any], reasons: dict[str, str], work: Work
    ) -> tuple[dict[str, Times], Result]:
        """Check, capture and time contenders; their times and what else the row says."""
        things: dict[str, tuple[Call, int]] = {}
        errors: dict[str, float] = {}
        uncaptured: dict[str, str] = {}
        missing: dict[str, str] = {}
        expected: dict[Any, torch.Tensor] = {}
        for name in names:
            one = CONTENDERS[name]
            if name in self.without or one.cache in reasons:
                missing[name] = self.without.get(name) or reasons[one.cache]
                continue
            report(("doing", name))
            pool = pools[one.cache]
            try:
                calls = [one.make(pool, i, work) for i in range(pool.sets)]
                errors[name] = self._checked(one, pool, calls[0], work, expected)
                call, why = self.gpu.captured(calls)
                self._run(call, work)
                if not one.in_order and not work.output.isfinite().all():
                    raise Wrong("wrong: captured, it leaves outputs unwritten")
            except Exception as error:
                self.gpu.finish()
                if name == "kivi2":
                    raise
                missing[name] = brief(error)
                if isinstance(error, (ImportError, AttributeError)):  # of another version
                    self.without[name] = missing[name]
                continue
            things[name] = call, len(calls)
            if why:
                uncaptured[name] = why
        report(("doing", None))
        times = self._time(things)
        row: Result = columns(times)
        for cache in PLAIN_DTYPES:
            medians = {name: one.ms for name, one in times.items() if name.endswith(f"_{cache}")}
            fastest = min(medians, key=medians.__getitem__, default=None)
            row |= {f"{cache}_is": fastest, f"{cache}_ms": None, f"ratio_{cache}": None}
            if fastest is not None:
                row[f"{cache}_ms"] = round(medians[fastest], 5)
                row[f"ratio_{cache}"] = round(medians[fastest] / times["kivi2"].ms, 3)
        return times, row | {
            "iterations": len(times["kivi2"]),
            "calls_per_graph": things["kivi2"][1],
            "rel_error": errors["kivi2"],
            "rel_errors": errors,
            "unavailable": missing,
            "not_captured": uncaptured,
        }

    def _store(self, kivi2: KiviPool, bf16: PagedPool, work: Work) -> Result:
        """What storing adds to a step: at decode, or to a first chunk."""
        things, missing = kivi2.of_a_step(work), dict[str, str]()
        report(("doing", "bf16_store"))
        try:
            writes = [writer(bf16, i, work) for i in range(bf16.sets)]
            writes[0]()
            self.gpu.finish()
            things["bf16_store"] = writes
        except Exception as error:
            self.gpu.finish()
            missing["bf16_store"] = brief(error)
        report(("doing", "kivi2"))
        captured = {name: self.gpu.captured(calls) for name, calls in things.items()}
        times = self._time({name: (captured[name][0], len(things[name])) for name in things})
        return store_columns(times) | {
            "rel_error": self.errors[work.shape]["kivi2"],
            "unavailable": missing,
            "not_captured": {name: why for name, (_, why) in captured.items() if why},
        }
