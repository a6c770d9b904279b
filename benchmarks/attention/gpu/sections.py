"""The three sections on a GPU: what is set up, checked, timed and reported for one case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from benchmarks.attention import check
from benchmarks.attention.cases import KIVI_DTYPES, RESIDUAL, SHAPES, B, Case, Shape
from benchmarks.attention.gpu.contenders import CONTENDERS, Contender, best, writer
from benchmarks.attention.gpu.device import Call, Gpu, brief
from benchmarks.attention.gpu.pools import MOST_SETS, PagedPool, Pool, QuantizedPool, fitting
from benchmarks.attention.gpu.replay import replayed
from benchmarks.attention.gpu.work import Work
from benchmarks.attention.kivi import rows
from benchmarks.attention.timing import Times, columns, interleave, once, store_columns

Result = dict[str, Any]


class Wrong(Exception):
    """A contender's result is not what its cache holds."""


@dataclass
class Bench:
    """What all cases of a process share.

    Attributes:
        gpu: the device.
        say: reports an event.
        budget: seconds of timing per case.
        memory: bytes that the pools of a case may take together; None: what is free.
        bandwidth: as `Gpu.bandwidth` says.
        without: contenders that are left out, and why.
        errors: of this project's dtypes on small steps, by shape.

    """

    gpu: Gpu
    say: Callable[[str, Any], None]
    budget: float
    memory: int | None
    bandwidth: dict[str, float]
    without: dict[str, str] = field(default_factory=dict)
    errors: dict[Shape, dict[str, float]] = field(default_factory=dict)

    def measure(self, case: Case) -> Result:
        """One case's row: medians and quartiles, or `skipped` with the reason."""
        shape = SHAPES[case.shape]
        self._check(shape)
        if "kivi2" in self.without:
            return case.fields | {"skipped": self.without["kivi2"]}
        small = {"small_rel_errors": self.errors[shape]}
        of = {"decode": self._decode, "prefill": self._prefill, "store": self._store}
        return case.fields | small | of[case.section](case, shape)

    # ------------------------------------------------------------- checks

    def _check(self, shape: Shape) -> None:
        """All three operators on small steps, and their graphs, before anything is timed."""
        if shape in self.errors:
            return
        errors: dict[str, float] = {}
        for dtype in KIVI_DTYPES:
            if dtype in self.without:
                continue
            self.say("doing", dtype)
            try:
                variant = partial(check.kivi, shape, dtype, place=self.gpu.place)
                steps = check.STEPS if dtype == "kivi2" else check.STEPS[:1]
                errors |= check.check(shape, {dtype: variant}, self.gpu.device, steps)
                if not self.errors:
                    self.say("header", {f"graph_{dtype}": replayed(self.gpu, shape, dtype)})
            except Exception as error:  # the others may do without it
                self.gpu.finish()
                self.without[dtype] = brief(error)
        self.errors[shape] = errors

    def _checked(
        self, name: str, pool: Pool, call: Call, work: Work, expected: dict[Any, torch.Tensor]
    ) -> float:
        """The relative error of a contender on some sequences of the case itself.

        Args:
            name: of the contender.
            pool, call, work: its cache, its call for the first set, and the step.
            expected: what was computed for others over the same cache; added to.

        Raises:
            Wrong: it is above its limit.

        """
        contender = CONTENDERS[name]
        work.output.fill_(float("nan"))
        result = call()
        self.gpu.finish()
        output = work.output
        if isinstance(result, torch.Tensor):
            output = result.reshape(work.query.shape)
        errors = []
        for row in work.rows():
            key = (pool.name, contender.in_order, row)
            if key not in expected:
                expected[key] = work.exact(row, pool.seen(row, work, contender.in_order))
            errors.append(check.relative(work.last(output, row), expected[key]))
        error = max(errors)
        if not all(x <= contender.limit for x in errors):  # NaN too
            raise Wrong(
                f"wrong: its relative error against float64 is {error:.4g}, the limit is "
                f"{contender.limit}"
            )
        return error

    def _written(self, contender: Contender, call: Call, work: Work) -> None:
        """Call what will be timed, and see that it computes something.

        Raises:
            Wrong: it leaves outputs as they were.

        """
        work.output.fill_(float("nan"))
        call()
        self.gpu.finish()
        if not contender.in_order and not work.output.isfinite().all():
            raise Wrong("wrong: captured, it leaves outputs unwritten")

    def _pools(
        self, shape: Shape, blocks: dict[str, int], batch: int, most: int = MOST_SETS
    ) -> tuple[dict[str, Pool], dict[str, str]]:
        """As `pools.fitting`, with a word on each pool."""
        told = partial(self.say, "doing")
        return fitting(self.gpu, self.memory, shape, blocks, batch, most, told)

    # ------------------------------------------------------------- timing

    def _time(self, things: dict[str, tuple[Call, int]]) -> dict[str, Times]:
        """Time each call in turn; each is so many calls of what is meant."""
        times = interleave(
            {name: once(call) for name, (call, _) in things.items()},
            self.budget,
            stopwatch=self.gpu.stopwatch,
        )
        return {
            name: Times([seconds / things[name][1] for seconds in one])
            for name, one in times.items()
        }

    def _contend(
        self, names: Sequence[str], pools: dict[str, Pool], reasons: dict[str, str], work: Work
    ) -> tuple[dict[str, Times], Result]:
        """Check, capture and time contenders; their times and what else the row says.

        Raises:
            Wrong: kivi2 is.

        """
        things: dict[str, tuple[Call, int]] = {}
        errors: dict[str, float] = {}
        uncaptured: dict[str, str] = {}
        missing: dict[str, str] = {}
        expected: dict[Any, torch.Tensor] = {}
        for name in names:
            contender = CONTENDERS[name]
            if name in self.without or contender.cache in reasons:
                missing[name] = self.without.get(name) or reasons[contender.cache]
                continue
            self.say("doing", name)
            pool = pools[contender.cache]
            try:
                calls = [contender.make(pool, i, work) for i in range(pool.sets)]
                errors[name] = self._checked(name, pool, calls[0], work, expected)
                call, why = self.gpu.captured(calls)
                self._written(contender, call, work)
            except Exception as error:
                self.gpu.finish()
                if name == "kivi2":
                    raise
                missing[name] = brief(error)
                if isinstance(error, ImportError):
                    self.without[name] = missing[name]
                continue
            things[name] = call, len(calls)
            if why:
                uncaptured[name] = why
        self.say("doing", None)
        times = self._time(things)
        medians = {name: one.ms for name, one in times.items()}
        row: Result = columns(times)
        for cache in ("bf16", "fp8"):
            fastest = best(medians, cache)
            row |= {f"{cache}_is": fastest, f"{cache}_ms": None, f"ratio_{cache}": None}
            if fastest is not None:
                row[f"{cache}_ms"] = round(medians[fastest], 5)
                row[f"ratio_{cache}"] = round(medians[fastest] / medians["kivi2"], 3)
        row |= {
            "iterations": len(times["kivi2"]),
            "calls_per_graph": things["kivi2"][1],
            "rel_error": errors["kivi2"],
            "rel_errors": errors,
            "unavailable": missing,
            "not_captured": uncaptured,
        }
        return times, row

    # ----------------------------------------------------------- sections

    def _decode(self, case: Case, shape: Shape) -> Result:
        work = Work(shape, case.batch, 1, case.context + RESIDUAL, self.gpu.device)
        blocks = {
            one.cache: case.context // B + (one.cache not in KIVI_DTYPES)
            for one in CONTENDERS.values()
        }
        names = [name for name, one in CONTENDERS.items() if one.decode]
        pools, reasons = self._pools(shape, blocks, case.batch)
        if "kivi2" in reasons:
            return {"skipped": f"kivi2: {reasons['kivi2']}"}
        try:
            times, row = self._contend(names, pools, reasons, work)
        except Wrong as error:
            return {"skipped": f"kivi2: {error}"}
        for name, one in times.items():
            nbytes = pools[CONTENDERS[name].cache].read_bytes(work)
            row[f"{name}_bytes"] = nbytes
            share = nbytes / (one.ms / 1e3) / self.bandwidth["copy"]
            row[f"{name}_share"] = round(share, 4)
        row["share_of_bandwidth"] = row["kivi2_share"]
        return row

    def _prefill(self, case: Case, shape: Shape) -> Result:
        end = case.context + case.new
        work = Work(shape, 1, case.new, end, self.gpu.device)
        blocks = {name: -(-end // B) for name in ("kivi2", "bf16")}
        pools, reasons = self._pools(shape, blocks, 1, most=1)
        if "kivi2" in reasons:
            return {"skipped": f"kivi2: {reasons['kivi2']}"}
        names = [name for name, one in CONTENDERS.items() if one.prefill]
        if case.context:
            names.remove("kivi2_served")
        try:
            return self._contend(names, pools, reasons, work)[1]
        except Wrong as error:
            return {"skipped": f"kivi2: {error}"}

    def _store(self, case: Case, shape: Shape) -> Result:
        """What storing adds to a step: at decode, or to a first chunk."""
        decode = case.new == 1
        end = case.context + RESIDUAL if decode else case.new
        work = Work(shape, case.batch, case.new, end, self.gpu.device)
        count = case.context // B + 1 if decode else -(-case.new // B)
        blocks = {"kivi2": count, "bf16": count}
        pools, reasons = self._pools(shape, blocks, case.batch)
        if reasons:
            return {"skipped": "; ".join(f"{name}: {why}" for name, why in reasons.items())}
        kivi2, bf16 = pools["kivi2"], pools["bf16"]
        assert isinstance(kivi2, QuantizedPool) and isinstance(bf16, PagedPool)
        this = rows(work.batch, work.new, work.end)

        def store(name: str, of: Any) -> list[Call]:
            own = (work.key, work.value)
            return [kivi2.store(name, i, of, *own) for i in range(kivi2.sets)]

        attend = CONTENDERS["kivi2"].make
        things = {
            "attend": [attend(kivi2, i, work) for i in range(kivi2.sets)],
            "store_ring": store("store_ring", this),
            "store_blocks": store("store_blocks", this),
        }
        if decode:
            things["store_blocks_idle"] = things["store_blocks"]
            all_complete = rows(work.batch, 1, case.context + B)
            things["store_blocks"] = store("store_blocks", all_complete)
        missing: dict[str, str] = {}
        self.say("doing", "bf16_store")
        try:
            things["bf16_store"] = [writer(bf16, i, work) for i in range(bf16.sets)]
            things["bf16_store"][0]()
            self.gpu.finish()
        except Exception as error:
            self.gpu.finish()
            things.pop("bf16_store", None)
            missing["bf16_store"] = brief(error)
        self.say("doing", "kivi2")
        captured = {name: self.gpu.captured(calls) for name, calls in things.items()}
        times = self._time({name: (captured[name][0], len(things[name])) for name in things})
        row: Result = store_columns(times)
        row |= {"rel_error": self.errors[shape]["kivi2"], "unavailable": missing}
        row["not_captured"] = {name: why for name, (_, why) in captured.items() if why}
        return row
