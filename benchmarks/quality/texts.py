"""Real text: Python's own manual, or a file."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from kivi_vllm.cli.errors import UserError


def text(name: str) -> str:
    """A text: `pydoc`, the manual in Python's standard library, or the path of a file in UTF-8.

    Raises:
        UserError: there is no such file, or it is no text.

    """
    if name == "pydoc":
        from pydoc_data.topics import topics

        return "\n".join(topics[key] for key in sorted(topics))
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--text {name} cannot be read: {error}", "pydoc, or the path of a text in UTF-8"
        ) from None


@functools.lru_cache(maxsize=4)
def tokens(name: str, model: str) -> tuple[int, ...]:
    """A text as token ids of a model, without special tokens.

    Args:
        name: see `text`.
        model: folder of the model.

    """
    # One piece would do, but tokenizers warn of texts longer than the model's context.
    return tuple(tokenizer(model)(text(name), add_special_tokens=False, verbose=False).input_ids)


@functools.lru_cache(maxsize=2)
def tokenizer(model: str) -> Any:
    """The `transformers` tokenizer of a model."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} has no tokenizer: {error}", "name a model that has one") from None


def windows(name: str, model: str, length: int, count: int) -> list[list[int]]:
    """Windows of a text that do not overlap, spread evenly over it.

    Args:
        name: see `text`.
        model: whose tokens.
        length: tokens of a window, the one that begins a text (BOS) included where the model has
            one.
        count: of windows.

    Raises:
        UserError: the text is too short.

    """
    ids = tokens(name, model)
    mark = tokenizer(model)("", add_special_tokens=True).input_ids
    begin = list(mark[:1]) if mark and mark[0] == tokenizer(model).bos_token_id else []
    size = length - len(begin)
    if size * count > len(ids):
        raise UserError(
            f"the text {name} has {len(ids):,} tokens, less than {count} windows of {length:,}",
            "take fewer or shorter windows, or a longer text",
        )
    starts = [i * (len(ids) - size) // max(1, count - 1) for i in range(count)]
    return [begin + list(ids[start : start + size]) for start in starts]
