"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school problems, few-shot, with a chain of thought.

The worked answers of the shots come from the train file, its first ones, written as in KIVI's
`example.py` and lm-evaluation-harness' task `gsm8k`: `Question: ...` and `Answer: ...`, the
reasoning ending in `#### number`. The two scores are the harness' filters `strict-match` and
`flexible-extract`, under its normalisation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.tasks.data import DataSet, read_jsonl, write_jsonl
from benchmarks.quality.tasks.items import Item
from kivi_vllm.cli.errors import UserError

STOP = ("Question:", "</s>", "<|im_end|>")
"""Ends of an answer: the harness' list."""

MAX_TOKENS = 256
"""Of an answer: the harness' default."""

STRICT = re.compile(r"#### (-?[0-9.,]+)")
NUMBER = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclass(frozen=True)
class Problem:
    """A row of GSM8K; `answer` is the reasoning and, after `####`, the number."""

    question: str
    answer: str


def _download(folder: Path) -> None:
    from datasets import load_dataset

    found = load_dataset("openai/gsm8k", "main")
    for split in ("train", "test"):
        rows = [{"question": row["question"], "answer": row["answer"]} for row in found[split]]
        write_jsonl(folder / f"{split}.jsonl", rows)


DATA = DataSet(
    name="gsm8k",
    command="gsm8k",
    origin="train.jsonl and test.jsonl of GSM8K (the repository openai/grade-school-math, folder "
    "grade_school_math/data; or the hub's openai/gsm8k)",
    download=_download,
)


def load(folder: Path, split: str) -> list[Problem]:
    """The problems of `train.jsonl` or `test.jsonl`."""
    path = folder / f"{split}.jsonl"
    if not path.is_file():
        raise DATA.missing(path)
    rows = read_jsonl(path, {"question": str, "answer": str})
    for number, row in enumerate(rows, 1):
        if strict(row["answer"]) is None:
            raise UserError(
                f"{path}, problem {number}: its answer does not end in '#### number'",
                "the file must be GSM8K's own",
            )
    return [Problem(row["question"], row["answer"]) for row in rows]


def prompt(shots: Sequence[Problem], question: str) -> str:
    """The shots with their answers, and the question without."""
    worked = [f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots]
    return "".join(worked) + f"Question: {question}\nAnswer:"


def strict(text: str) -> str | None:
    """The first number after `####`; None if there is none."""
    found = STRICT.search(text)
    return _plain(found[1]) if found else None


def flexible(text: str) -> str | None:
    """The last number of the text; None if there is none."""
    found = NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    """Without thousands separators, dollar signs and the full stop of a sentence."""
    number = number.replace(",", "").replace("$", "")
    return number.removesuffix(".")


def items(
    problems: Sequence[Problem],
    shots: Sequence[Problem],
    encode: Callable[[str], list[int]],
    max_tokens: int = MAX_TOKENS,
) -> list[Item]:
    """The items of some problems.

    Args:
        problems: to solve.
        shots: worked examples before each.
        encode: text to token ids.
        max_tokens: of an answer.

    """
    return [_item(index, one, shots, encode, max_tokens) for index, one in enumerate(problems)]


def _item(
    index: int,
    problem: Problem,
    shots: Sequence[Problem],
    encode: Callable[[str], list[int]],
    max_tokens: int,
) -> Item:
    right = strict(problem.answer)
    assert right is not None  # `load` looked
    return Item(
        task="gsm8k",
        id=str(index),
        prompt=encode(prompt(shots, problem.question)),
        max_tokens=max_tokens,
        expected=[right],
        scores={
            "strict": lambda text: float(strict(text) == right),
            "flexible": lambda text: float(flexible(text) == right),
        },
        stop=STOP,
    )
