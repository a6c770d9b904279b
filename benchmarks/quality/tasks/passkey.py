"""The pass key in repeated filler, as data for lm-evaluation-harness.

The text is that of landmark attention (Mohtashami and Jaggi, arXiv 2305.16300), which Quest's
`evaluation/passkey/passkey.py` uses too; KIVI's `passkey_examples.jsonl` has four prompts of it.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"


def prompt(key: int, before: int, after: int) -> str:
    """A prompt with so many lines of filler before and after the key."""
    line = f"The pass key is {key}. Remember it. {key} is the pass key."
    return "\n".join([TASK, *[FILLER] * before, line, *[FILLER] * after, QUESTION])


def lines_for(length: int, size: Callable[[str], int]) -> int:
    """The most lines of filler with which a prompt has at most `length` tokens.

    Args:
        length: tokens of a prompt.
        size: the number of tokens of a text.

    Raises:
        ValueError: not even a prompt of one line is so short.

    """
    if (least := size(prompt(10_000, 0, 1))) > length:
        raise ValueError(f"lengths: {length}: the shortest prompt has {least} tokens; take 1024")
    numbers = range(1, length // 10)  # a line has more than ten tokens
    return bisect_right(numbers, length, key=lambda n: size(prompt(10_000, n // 2, n - n // 2)))


def prompts(
    lengths: Sequence[int], keys: int, size: Callable[[str], int], seed: int = 0
) -> list[dict[str, Any]]:
    """Prompts with their key, `length` in tokens and `depth` in percent.

    Args:
        lengths: tokens of a prompt; it has the lines of filler nearest below.
        keys: prompts of a length; depths are spread as in Quest's script, the last is the end.
        size: the number of tokens of a text.
        seed: of the keys' digits.

    """
    numbers = random.Random(seed)
    rows = []
    for length in lengths:
        lines = lines_for(length, size)
        for index in range(keys):
            depth = 100 * (index + 1) // keys
            before = lines * depth // 100
            key = numbers.randint(10_000, 99_999)
            text = prompt(key, before, lines - before)
            rows.append({"input": text, "target": str(key), "length": length, "depth": depth})
    return rows


def dataset(
    pretrained: str, lengths: Sequence[int] = (4096,), keys: int = 10, **_: Any
) -> dict[str, Any]:
    """The harness' `custom_dataset`: given `--model_args` and `--metadata` together."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pretrained)

    def size(text: str) -> int:
        return len(tokenizer(text, verbose=False).input_ids)

    return {"test": Dataset.from_list(prompts(lengths, keys, size))}
