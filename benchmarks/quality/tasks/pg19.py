"""PG-19 (Rae et al., arXiv 1911.05507): perplexity of books by context length.

Quest's `evaluation/pg19/ppl_eval.py` feeds the first book of the test split one token at a time, so
that every position sees what it would see at decode. The KIVI dtypes compute that in one go with
`prefill=cached`; other dtypes run in short steps, so that nearly all of a context is history.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.metrics import Summary, TokenFigures, summary
from benchmarks.quality.tasks.data import DataSet
from benchmarks.quality.tasks.tokens import Tokens
from kivi_vllm.cli.errors import UserError


def _download(folder: Path) -> None:
    from datasets import load_dataset

    (folder / "test").mkdir(exist_ok=True)
    for index, row in enumerate(load_dataset("emozilla/pg19-test", split="test")):
        (folder / "test" / f"{index:05}.txt").write_text(row["text"], encoding="utf-8")


DATA = DataSet(
    name="pg19",
    command="pg19",
    origin="the folder test/ of PG-19, a book a .txt (the repository google-deepmind/pg19; on the "
    "hub, emozilla/pg19-test)",
    download=_download,
)


@dataclass(frozen=True)
class Book:
    """A text.

    Attributes:
        name: its title if `metadata.csv` has one, else its file's name.
        text: all of it.

    """

    name: str
    text: str


@dataclass(frozen=True)
class Figure:
    """Of one cache at one context length, over all books.

    Attributes:
        length: tokens.
        whole: over the first `length` tokens: what Quest's script reports.
        tail: over the second half of them.

    """

    length: int
    whole: Summary
    tail: Summary


def load(folder: Path, limit: int) -> list[Book]:
    """The first books of `folder/test`, or of `folder` itself, in the order of their names."""
    place = folder / "test" if (folder / "test").is_dir() else folder
    paths = sorted(place.glob("*.txt"))[:limit]
    if not paths:
        raise DATA.missing(folder / "test" / "*.txt")
    titles = _titles(folder / "metadata.csv")
    return [Book(titles.get(p.stem, p.stem), p.read_text(encoding="utf-8")) for p in paths]


def _titles(path: Path) -> dict[str, str]:
    """Titles by number; PG-19's rows are: number, title, year, address."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        return {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}


def windows(books: Sequence[Book], length: int, tokens: Tokens) -> list[list[int]]:
    """The first `length` tokens of each book.

    Raises:
        UserError: a book is shorter.

    """
    found = []
    for book in books:
        # Characters enough for these tokens: the rest of a book need not be split.
        ids = tokens.encode(book.text[: 32 * length])
        if len(ids) < length:
            raise UserError(
                f"{book.name} has {len(ids):,} tokens, less than --length {length:,}",
                "a shorter --length, or other books",
            )
        found.append(ids[:length])
    return found


def figures(books: Sequence[TokenFigures], lengths: Sequence[int]) -> list[Figure]:
    """What books' figures say by length.

    Args:
        books: figures of each at positions 0 .. longest - 2: the last token is only predicted.
        lengths: to report.

    """
    return [
        Figure(
            length=length,
            whole=summary([book[: length - 1] for book in books]),
            tail=summary([book[length // 2 : length - 1] for book in books]),
        )
        for length in lengths
    ]
