"""One workload on the engines of several caches in turn, its table and its JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.quality import perplexity
from benchmarks.quality.child_engine import Engine, Settings
from benchmarks.quality.metrics import Estimate, TokenFigures
from benchmarks.quality.rows import CacheRow
from benchmarks.quality.tasks import pg19
from benchmarks.quality.tasks.items import Answer, Item, Mean, as_rows, mean, means, run
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.files import write_json
from kivi_vllm.cli.progress import step

UNQUANTIZED = ("auto", "bfloat16", "float16", "kivi_raw")
"""Caches that keep what they are given."""


@dataclass
class Comparison:
    """What all workloads share.

    Attributes:
        settings: of the engines.
        rows: the caches; the others are compared with the first.
        header: of the JSON file: machine, versions, the protocol's settings.
        json_path: where to write after every row; None for nowhere.
        failed: the errors of rows that failed.

    """

    settings: Settings
    rows: list[CacheRow]
    header: dict[str, Any]
    json_path: Path | None = None
    failed: dict[str, UserError] = field(default_factory=dict)

    def answers(self, items: Sequence[Item]) -> dict[str, list[Answer]]:
        """Ask every row's engine the same."""
        found: dict[str, list[Answer]] = {}

        def one(row: CacheRow, engine: Engine, done: Callable[[int], None]) -> dict[str, Any]:
            found[row.name] = run(engine, items, done)
            scores = means(found[row.name])
            return {
                "scores": {t: {n: asdict(m) for n, m in s.items()} for t, s in scores.items()},
                "answers": as_rows(found[row.name]),
            }

        self._each(one, lambda row: self.settings, len(items))
        return found

    def figures(
        self, windows: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> dict[str, list[pg19.Figure]]:
        """Perplexity of every row; `windows` are token ids of one length, `lengths` to report."""
        found: dict[str, list[pg19.Figure]] = {}
        reference: list[Any] = []

        def one(row: CacheRow, engine: Engine, done: Callable[[int], None]) -> dict[str, Any]:
            states = engine.hidden_states([window[:-1] for window in windows], done)
            reference.extend(() if reference else states)
            books: list[TokenFigures] = [
                engine.compare(a, b, window[1:])
                for a, b, window in zip(reference, states, windows, strict=True)
            ]
            found[row.name] = pg19.figures(books, lengths)
            return {"figures": [asdict(figure) for figure in found[row.name]]}

        def settings(row: CacheRow) -> Settings:
            size = perplexity.chunk(row, unquantized=row.dtype in UNQUANTIZED)
            return (
                self.settings
                if size is None
                else replace(self.settings, max_num_batched_tokens=size)
            )

        self._each(one, settings, len(windows))
        return found

    def _each(
        self,
        work: Callable[[CacheRow, Engine, Callable[[int], None]], dict[str, Any]],
        settings: Callable[[CacheRow], Settings],
        count: int,
    ) -> None:
        written: list[dict[str, Any]] = []
        for row in self.rows:
            mine = settings(row)
            try:
                with (
                    step(f"{row.name}: {count} prompts") as update,
                    Engine(mine, row, update=update) as engine,
                ):
                    result = work(row, engine, lambda n: update(f"{n} of {count}"))
                    facts = engine.facts
            except UserError as error:
                self.failed[row.name] = error
                self.header["failed"] = {name: str(one) for name, one in self.failed.items()}
                if row is self.rows[0]:
                    raise  # nothing to compare with
            else:
                arguments = mine.for_row(row)
                arguments["model"] = Path(mine.model).name
                written.append({"cache": row.name, "engine": arguments, "facts": facts, **result})
            if self.json_path is not None:
                write_json(self.json_path, {"header": self.header, "rows": written})

    def finish(self) -> None:
        """Raise if a row failed."""
        if self.failed:
            text = "\n\n".join(map(str, self.failed.values()))
            raise UserError(text, next(iter(self.failed.values())).remedy, status=1)


def score_table(found: dict[str, list[Answer]]) -> Table:
    """Scores by task and cache, with the difference to the first cache."""
    table = Table()
    for name in ("task", "score", "items"):
        table.add_column(name, justify="left" if name != "items" else "right")
    for name in found:
        table.add_column(name, justify="right")
    first = next(iter(found.values()))
    scores = {name: means(answers) for name, answers in found.items()}
    for task, names in means(first).items():
        for score in names:
            cells = [_cell(scores[name][task][score]) for name in found]
            for index, answers in enumerate(list(found.values())[1:], 1):
                cells[index] += f"\n({_difference(first, answers, task, score)})"
            table.add_row(task, score, str(names[score].count), *cells)
    if len(means(first)) > 1:
        cells = [f"{_average(scores[name]):.2f}" for name in found]
        table.add_section()
        table.add_row("average", "", "", *cells)
    return table


def _cell(one: Mean) -> str:
    return f"{one.mean:.2f}" + ("" if one.error is None else f" ± {one.error:.2f}")


def _difference(first: Sequence[Answer], mine: Sequence[Answer], task: str, score: str) -> str:
    """Of the means, with the standard error of the differences by item."""
    pairs = zip(first, mine, strict=True)
    one = mean([b.scores[score] - a.scores[score] for a, b in pairs if a.task == task])
    return f"{one.mean:+.2f}" + ("" if one.error is None else f" ± {one.error:.2f}")


def _average(scores: dict[str, dict[str, Mean]]) -> float:
    """Of the tasks' first scores, each task counting the same."""
    firsts = [next(iter(names.values())).mean for names in scores.values()]
    return sum(firsts) / len(firsts)


def perplexity_table(found: dict[str, list[pg19.Figure]]) -> Table:
    """Perplexities by length and cache."""
    table = Table()
    table.add_column("cache")
    for name in ("length", "tokens", "perplexity", "ratio", "second half", "ratio", "KL", "top-1"):
        table.add_column(name, justify="right")
    for name, figures in found.items():
        for one in figures:
            table.add_row(
                name,
                f"{one.length:,}",
                f"{one.whole.tokens:,}",
                f"{one.whole.perplexity:.3f}",
                _interval(one.whole.ratio),
                f"{one.tail.perplexity:.3f}",
                _interval(one.tail.ratio),
                f"{one.whole.kl.value:.4f}",
                f"{100 * one.whole.top1.value:.1f} %",
            )
    return table


def _interval(one: Estimate) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"


def show(title: str, table: Table) -> None:
    """Print a table, wide enough where nobody says how wide."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    console.print(title, markup=False, soft_wrap=True)
    console.print(table)
