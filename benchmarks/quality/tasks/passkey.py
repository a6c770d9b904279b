"""The pass key in repeated filler, as KIVI's and Quest's repositories ask for it.

The text is that of landmark attention (Mohtashami and Jaggi, arXiv 2305.16300), which Quest's
`evaluation/passkey/passkey.py` uses too; KIVI's `passkey_examples.jsonl` has four prompts of 12k
tokens of it. Such filler is easy to tell from the key; `in_text` hides it in real text instead.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.quality import passkey as real
from benchmarks.quality.tasks.data import read_jsonl
from benchmarks.quality.tasks.items import Item
from benchmarks.quality.tasks.tokens import Tokens
from kivi_vllm.cli.errors import UserError

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"

MAX_TOKENS = 10
"""Of an answer, as in Quest's script."""

NUMBER = re.compile(r"\d+")


def prompt(key: int, before: int, after: int) -> str:
    """A prompt with so many lines of filler before and after the key."""
    line = f"The pass key is {key}. Remember it. {key} is the pass key."
    return "\n".join([TASK, *[FILLER] * before, line, *[FILLER] * after, QUESTION])


def lines_for(length: int, tokens: Tokens) -> int:
    """The most lines of filler with which a prompt has at most `length` tokens."""

    def size(lines: int) -> int:
        return len(tokens.encode(prompt(10_000, lines // 2, lines - lines // 2)))

    if size(1) > length:
        raise UserError(
            f"--length {length}: the shortest prompt has {size(1)} tokens", "--length 1024"
        )
    low, high = 1, 2
    while size(high) <= length:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if size(middle) <= length else (low, middle)
    return low


def items(lengths: Sequence[int], keys: int, tokens: Tokens, seed: int = 0) -> list[Item]:
    """Prompts by length.

    Args:
        lengths: tokens of a prompt: the lines of filler nearest below.
        keys: prompts of a length; the depths are spread as in Quest's script, the last at the end.
        tokens: of the model.
        seed: of the keys' digits.

    """
    numbers = random.Random(seed)
    found = []
    for length in lengths:
        lines = lines_for(length, tokens)
        for index in range(keys):
            depth = 100 * (index + 1) // keys
            before = lines * depth // 100
            key = numbers.randint(10_000, 99_999)
            text = prompt(key, before, lines - before)
            name = f"{length} at {depth} %"
            found.append(_item(f"passkey {length}", name, text, str(key), tokens, depth))
    return found


def in_text(name: str, model: str, lengths: Sequence[int], keys: int, seed: int = 0) -> list[Item]:
    """Prompts of `benchmarks.quality.passkey`: real text, and the model's chat template.

    Args:
        name: of a text, or its path: see `evaluation.texts`.
        model: its folder.
        lengths: tokens of prompt and answer together.
        keys: prompts of a length, at most: whole rounds over the depths, at least one.
        seed: of keys and places.

    """
    rounds = max(1, keys // len(real.DEPTHS))
    return [
        Item(
            task=f"passkey {length} {Path(name).stem}",
            id=f"{length} at {100 * case.depth:.0f} %",
            prompt=case.prompt,
            max_tokens=real.ANSWER_TOKENS,
            expected=[case.key],
            scores={"score": lambda text, case=case: float(case.score(text))},  # type: ignore[misc]
            facts={"depth": round(100 * case.depth)},
        )
        for length in lengths
        for case in real.cases(name, model, length, rounds, kinds=["passkey"], seed=seed)
    ]


def read(path: Path, tokens: Tokens) -> list[Item]:
    """The prompts of KIVI's `passkey_examples.jsonl`, asked as in its `long_context_example.py`."""
    if not path.is_file():
        raise UserError(
            f"--data {path}: there is no such file",
            "passkey_examples.jsonl of the repository jy-yuan/KIVI; without --data prompts of the "
            "same text are made",
        )
    found = []
    for number, row in enumerate(read_jsonl(path, {"input": str, "target": str}), 1):
        text = row["input"] + QUESTION + " "
        depth = round(100 * row["input"].find(row["target"]) / max(1, len(row["input"])))
        found.append(_item(f"passkey {path.name}", str(number), text, row["target"], tokens, depth))
    return found


def _item(task: str, name: str, text: str, key: str, tokens: Tokens, depth: int) -> Item:
    return Item(
        task=task,
        id=name,
        prompt=tokens.encode(text),
        max_tokens=MAX_TOKENS,
        expected=[key],
        scores={"score": scorer(key)},
        facts={"depth": depth},
    )


def scorer(key: str) -> Callable[[str], float]:
    """Whether the first number of an answer is the key."""

    def score(text: str) -> float:
        found = NUMBER.search(text)
        return float(found is not None and found[0] == key)

    return score
