"""What all generation tasks share: a prompt with its score, and the run of many on one engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from kivi_vllm.cli.errors import UserError


class Generates(Protocol):
    """The part of `evaluation.run.Engine` that tasks use."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Sequence[str] | None = None,
        on_done: Callable[[int], object] | None = None,
    ) -> Sequence[Any]:
        """Greedy answers with a `text`."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        task: items of one task are averaged.
        id: within the task.
        prompt: token ids.
        max_tokens: of the answer.
        expected: right answers, for the report.
        scores: named scores of an answer's text, 0 .. 1; the first is the task's.
        stop: texts that end an answer.
        facts: more for the report: `cut`, tokens removed from the middle of the prompt; `depth`.

    """

    task: str
    id: str
    prompt: Sequence[int]
    max_tokens: int
    expected: Sequence[str]
    scores: dict[str, Callable[[str], float]]
    stop: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of prompt and longest answer together."""
        return len(self.prompt) + self.max_tokens


@dataclass(frozen=True)
class Answer:
    """What a model said to an item.

    Attributes:
        task, id, expected, facts: the item's.
        prompt_tokens: length of its prompt.
        text: the answer.
        scores: by name, 0 .. 1.

    """

    task: str
    id: str
    expected: list[str]
    prompt_tokens: int
    text: str
    scores: dict[str, float]
    facts: dict[str, Any]


@dataclass(frozen=True)
class Mean:
    """A mean score, 0 .. 100, its standard error over the items, and their number.

    Attributes:
        error: None for a single item.

    """

    mean: float
    error: float | None
    count: int


def run(
    engine: Generates, items: Sequence[Item], on_done: Callable[[int], object] = lambda n: None
) -> list[Answer]:
    """Ask everything; the answers come in the order of the items."""
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault((item.max_tokens, item.stop), []).append(index)
    texts: dict[int, str] = {}
    for (max_tokens, stop), members in groups.items():
        before = len(texts)
        found = engine.generate(
            [items[index].prompt for index in members],
            max_tokens,
            stop=list(stop),
            on_done=lambda n, before=before: on_done(before + n),  # type: ignore[misc]
        )
        texts.update((index, one.text) for index, one in zip(members, found, strict=True))
    return [_answer(item, texts[index]) for index, item in enumerate(items)]


def _answer(item: Item, text: str) -> Answer:
    scores = {name: float(score(text)) for name, score in item.scores.items()}
    return Answer(
        task=item.task,
        id=item.id,
        expected=list(item.expected),
        prompt_tokens=len(item.prompt),
        text=text,
        scores=scores,
        facts=item.facts,
    )


def mean(numbers: Sequence[float]) -> Mean:
    """The mean in percent with its standard error."""
    count = len(numbers)
    middle = sum(numbers) / count
    if count < 2:
        return Mean(100 * middle, None, count)
    variance = sum((number - middle) ** 2 for number in numbers) / (count - 1)
    return Mean(100 * middle, 100 * math.sqrt(variance / count), count)


def means(answers: Sequence[Answer]) -> dict[str, dict[str, Mean]]:
    """The mean scores by task and score name, in the order of the answers."""
    table: dict[str, dict[str, Mean]] = {}
    for task in dict.fromkeys(answer.task for answer in answers):
        mine = [answer.scores for answer in answers if answer.task == task]
        table[task] = {name: mean([scores[name] for scores in mine]) for name in mine[0]}
    return table


def as_rows(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The answers for a JSON file."""
    return [asdict(answer) for answer in answers]


def fitting_length(items: Sequence[Item], given: int | None, model: int | None) -> int:
    """The `max_model_len` for all items: what was given, or what they need.

    Nothing is shortened here: what does not fit is an error.

    Args:
        items: with at least one.
        given: `--max-model-len`, if it was.
        model: positions of the model, as far as its configuration says.

    Raises:
        UserError: an item needs more.

    """
    longest = max(items, key=lambda item: item.tokens)
    need = longest.tokens
    what = (
        f"{longest.task} {longest.id} has a prompt of {len(longest.prompt):,} tokens and up to "
        f"{longest.max_tokens} for the answer, {need:,} together"
    )
    if given is not None:
        if need > given:
            raise UserError(f"{what}: more than --max-model-len {given:,}", _remedy(need, model))
        return given
    if model is not None and need > model:
        raise UserError(
            f"{what}, but the model is made for {model:,}",
            "take a model with a longer context, or shorter prompts (fewer shots, another length); "
            f"--max-model-len {need} if the model's rotary scaling allows more than its "
            "configuration says",
        )
    return need


def _remedy(need: int, model: int | None) -> str:
    if model is not None and need > model:
        return f"take a model with a longer context (this one: {model:,}), or shorter prompts"
    return f"--max-model-len {need}, or shorter prompts"
