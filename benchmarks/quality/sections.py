"""One row's engine through all sections of a quality comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks.common.bars import bar
from benchmarks.quality import generation, passkey, perplexity
from benchmarks.quality.engine import Engine, Settings
from benchmarks.quality.rows import CacheRow
from benchmarks.quality.texts import windows as cut
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.progress import note, step

SECTIONS = ("perplexity", "passkey", "generation")
WINDOWS, REPEATS, PROMPTS = 8, 8, 16
"""What a fraction of 1 is: windows of a text; questions of a kind and depth; prompts."""


@dataclass(frozen=True)
class Workload:
    """What every row computes; made once, before any engine starts.

    Attributes:
        lengths: contexts in tokens, ascending.
        windows: by text, for perplexity; empty without the section.
        cases: for passkey.
        prompts: by text, for generation.

    """

    lengths: tuple[int, ...]
    windows: dict[str, list[list[int]]] = field(default_factory=dict)
    cases: list[passkey.Case] = field(default_factory=list)
    prompts: dict[str, list[list[int]]] = field(default_factory=dict)

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence."""
        answers = generation.PROMPT_TOKENS + generation.ANSWER_TOKENS
        return max(self.lengths[-1], answers if self.prompts else 0)

    @classmethod
    def make(
        cls,
        model: str,
        sections: Sequence[str],
        texts: Sequence[str],
        lengths: Sequence[int],
        kinds: Sequence[str],
        fraction: float,
        limit: int,
        seed: int,
    ) -> Workload:
        """Read the texts and cut them.

        Args:
            model: whose tokens.
            sections: of `SECTIONS`.
            texts: their names.
            lengths: contexts.
            kinds: of hidden facts.
            fraction: of `WINDOWS`, `REPEATS` and `PROMPTS`, one at least.
            limit: the longest context of the model.
            seed: of the hidden facts.

        Raises:
            UserError: a context does not fit into the model or a text.

        """
        perplexity.check_lengths(lengths, limit)
        answers = generation.PROMPT_TOKENS + generation.ANSWER_TOKENS
        if "generation" in sections and answers > limit:
            raise UserError(
                f"the generation section needs {answers} tokens, this model has {limit}",
                "--section perplexity --section passkey",
            )
        windows, repeats, prompts = (
            max(1, round(whole * fraction)) for whole in (WINDOWS, REPEATS, PROMPTS)
        )
        work = cls(tuple(sorted(set(lengths))))
        for name in texts:
            if "perplexity" in sections:
                work.windows[name] = cut(name, model, work.lengths[-1], windows)
            for length in work.lengths if "passkey" in sections else ():
                work.cases.extend(
                    passkey.cases(name, model, length, repeats, kinds=kinds, seed=seed)
                )
            if "generation" in sections:
                work.prompts[name] = cut(name, model, generation.PROMPT_TOKENS, prompts)
        return work


@dataclass
class Reference:
    """What the other rows are compared with."""

    states: list[np.ndarray] = field(default_factory=list)
    answers: dict[str, list[list[int]]] = field(default_factory=dict)


@dataclass
class Result:
    """One row's figures: records for JSON, flat but for the intervals."""

    cache: dict[str, Any]
    perplexity: list[dict[str, Any]] = field(default_factory=list)
    passkey: list[dict[str, Any]] = field(default_factory=list)
    generation: list[dict[str, Any]] = field(default_factory=list)


def measure(
    settings: Settings, row: CacheRow, work: Workload, reference: Reference, is_reference: bool
) -> Result:
    """Start a row's engine and take it through the sections.

    Args:
        settings: of the comparison.
        row: to measure.
        work: what to compute.
        reference: filled if the row is the reference, read otherwise.
        is_reference: whether it is.

    """
    with contextlib.ExitStack() as stack:
        with step(f"{row.name}: starting") as update:
            engine = stack.enter_context(Engine(settings, row, update=update))
        result = Result({**asdict(row), **engine.facts})
        if work.windows:
            _perplexity(engine, work, reference, is_reference, result)
        if row.kind != "vllm":
            if work.cases or work.prompts:
                note(f"  {row.name} is for the perplexity section only")
            return result
        if work.cases:
            _passkey(engine, work, result)
        if work.prompts:
            _generation(engine, work, reference, is_reference, result)
    return result


def _perplexity(
    engine: Engine, work: Workload, reference: Reference, is_reference: bool, result: Result
) -> None:
    count = sum(map(len, work.windows.values()))
    with bar(f"{engine.row.name}: windows of {work.lengths[-1]:,} tokens", count) as done:
        states = perplexity.states(engine, work.windows, done)
    if is_reference:
        reference.states = states
    with bar(f"{engine.row.name}: comparing all logits", count) as done:
        figures = perplexity.compare(
            engine, work.windows, reference.states, states, work.lengths, done
        )
    for figure in figures:
        place = dict(cache=engine.row.name, text=figure.text, length=figure.length)
        result.perplexity.append({**place, **asdict(figure.figures)})


def _passkey(engine: Engine, work: Workload, result: Result) -> None:
    with bar(f"{engine.row.name}: hidden facts", len(work.cases)) as done:
        answers = engine.generate(
            [case.prompt for case in work.cases], passkey.ANSWER_TOKENS, on_done=done
        )
    for case, answer in zip(work.cases, answers, strict=True):
        place = dict(cache=engine.row.name, text=case.text, length=case.length, depth=case.depth)
        said = dict(kind=case.kind, key=case.key, answer=answer.text)
        result.passkey.append({**place, **said, "correct": case.score(answer.text)})


def _generation(
    engine: Engine, work: Workload, reference: Reference, is_reference: bool, result: Result
) -> None:
    count = sum(map(len, work.prompts.values()))
    prompts = [prompt for mine in work.prompts.values() for prompt in mine]
    with bar(f"{engine.row.name}: answers of {generation.ANSWER_TOKENS} tokens", count) as done:
        answers = engine.generate(prompts, generation.ANSWER_TOKENS, on_done=done, ignore_eos=True)
    at = 0
    for text, mine in work.prompts.items():
        tokens = [answer.token_ids for answer in answers[at : at + len(mine)]]
        at += len(mine)
        if is_reference:
            reference.answers[text] = tokens
        figures = generation.compare(reference.answers[text], tokens)
        result.generation.append({"cache": engine.row.name, "text": text, **figures})
