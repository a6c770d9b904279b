"""Texts, and windows of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from benchmarks.quality import texts
from kivi_vllm.cli.errors import UserError
from tests.evaluation.tokenizers import bytes_tokenizer


def test_pydoc_is_long_and_sorted() -> None:
    found = texts.text("pydoc")
    assert len(found) > 300_000
    assert found.index('The "assert" statement') < found.index('The "yield" statement')


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("äöü")
    assert texts.text(str(path)) == "äöü"
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read"):
        texts.text(str(path))
    with pytest.raises(UserError, match=r"austen cannot be read: .*No such file") as found:
        texts.text("austen")
    assert "pydoc" in found.value.remedy


@pytest.mark.parametrize("bos", [False, True])
def test_windows(tmp_path: Path, bos: bool) -> None:
    model = bytes_tokenizer(tmp_path / "model", bos=bos)
    path = tmp_path / "text"
    path.write_text("".join(chr(ord("a") + i // 10) for i in range(100)))
    windows = texts.windows(str(path), model, 31, 3)
    assert [len(window) for window in windows] == [31] * 3
    tokenizer = texts.tokenizer(model)
    assert all((window[0] == tokenizer.bos_token_id) == bos for window in windows)
    said = [tokenizer.decode(window[bos:]).replace(" ", "") for window in windows]
    whole = path.read_text()
    size = 31 - bos
    assert said[0] == whole[:size] and said[2] == whole[100 - size :]
    starts = [whole.index(one[:11]) for one in said]
    assert all(b - a >= size for a, b in itertools.pairwise(starts)), "no overlap"
    with pytest.raises(UserError, match="has 100 tokens, less than 4 windows of 31"):
        texts.windows(str(path), model, 31, 4)
