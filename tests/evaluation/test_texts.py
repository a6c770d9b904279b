"""Texts by name and by path, and the formats that packages carry them in."""

from __future__ import annotations

import itertools
import struct
import zlib
from pathlib import Path

import pytest

from benchmarks.quality import texts
from benchmarks.quality.text_formats import r_lines, strip_markup, wiki_articles
from kivi_vllm.cli.errors import UserError
from tests.evaluation.tokenizers import bytes_tokenizer


def _entry(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + zlib.compress(data)


def _strings(lines: list[str | None], version: int = 3) -> bytes:
    data = b"X\n" + struct.pack(">iii", version, 0x040201, 0x030500)
    if version >= 3:
        data += struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(lines))
    for line in lines:
        raw = b"" if line is None else line.encode()
        data += struct.pack(">ii", 0x040009, -1 if line is None else len(raw)) + raw
    return data


@pytest.mark.parametrize("version", [2, 3])
def test_r_data(version: int) -> None:
    number = b"X\n" + struct.pack(">iii", 2, 0, 0) + struct.pack(">ii", 13, 1)
    rdb = _entry(_strings(["Ça", "", "b"], version)) + _entry(number)
    rdb += _entry(_strings(["c", None], version))
    assert list(r_lines(rdb)) == [["Ça", "", "b"], ["c"]]


def test_broken_r_data_is_refused() -> None:
    rdb = _entry(_strings(["a" * 1000]))
    for bad in (rdb[:-8], b"nonsense" * 4, _entry(b"A\n" + bytes(40))):
        with pytest.raises(ValueError):
            list(r_lines(bad))


def test_wiki_markup() -> None:
    source = (
        "{{Infobox|a={{nested|b}}}}'''Bold''' [[target page|word]] and [[plain]].<ref>a [[b]]"
        "</ref><ref name=x/>\n== Heading ==\n* item\n[[File:a.png|thumb|A [[link]] here]]\n"
        "{| class=x\n| cell\n|}\n[http://x.y/z outer]<!-- gone --> &amp; end\n\n\n[[Category:A]]"
    )
    assert strip_markup(source) == ("Bold word and plain.\nHeading\nitem\n\nouter & end")


def test_wiki_articles() -> None:
    page = "<page>\n <title>{}</title>\n <ns>{}</ns>\n<id>1</id><text x='y'>{}</text></page>"
    dump = "".join(
        page.format(*one)
        for one in [("A", 0, "'''a''' &lt;b&gt;"), ("T", 1, "talk"), ("R", 0, "#REDIRECT [[A]]")]
    )
    assert list(wiki_articles(dump)) == ["A\n\na"]


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
    with pytest.raises(UserError, match="no such text") as found:
        texts.text("austin")
    assert "austen" in found.value.remedy


@pytest.mark.parametrize("name", ["austen", "wiki"])
def test_what_cannot_be_downloaded_can_be_put_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIVI_VLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))  # no apt-get
    monkeypatch.setattr(texts.sys, "executable", str(tmp_path / "python"))  # no pip
    with pytest.raises(UserError, match=f"the text {name} could not be had") as found:
        texts.text(name)
    path = texts.text_path(name)
    assert str(path) in found.value.remedy and not path.exists()
    assert list(path.parent.iterdir()) == [], "nothing half done is left"
    path.write_text("mine")
    assert texts.text(name) == "mine"


def test_a_package_without_the_text_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KIVI_VLLM_CACHE", str(tmp_path))
    monkeypatch.setitem(texts._DOWNLOADED, "wiki", ("test", lambda work: "too short"))
    with pytest.raises(UserError, match="only 9 characters"):
        texts.text("wiki")
    assert not texts.text_path("wiki").exists()


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
