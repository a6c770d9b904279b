"""Plain text out of the formats in which packages carry it: R's data files, wiki markup."""

from __future__ import annotations

import html
import re
import struct
import zlib
from collections.abc import Iterator

_HEADER = b"X\n"
_STRINGS, _STRING = 16, 9  # R's STRSXP and CHARSXP
_MISSING = -1


def r_lines(rdb: bytes) -> Iterator[list[str]]:
    """The character vectors in an R package's `.rdb`, in the order of the file.

    Each object is 4 bytes of its length and R's XDR serialization, compressed with zlib; objects
    of other kinds are passed over.

    Raises:
        ValueError: not such a file.

    """
    at = 0
    while at < len(rdb):
        inflate = zlib.decompressobj()
        try:
            data = inflate.decompress(rdb[at + 4 :])
        except zlib.error as error:
            raise ValueError(f"no zlib data at byte {at}: {error}") from None
        if not inflate.eof:
            raise ValueError(f"the object at byte {at} is cut off")
        at = len(rdb) - len(inflate.unused_data)
        if (lines := _strings(data)) is not None:
            yield lines


def _strings(data: bytes) -> list[str] | None:
    """The strings of a serialized character vector; None if it is something else."""
    if not data.startswith(_HEADER):
        raise ValueError("not R's XDR serialization")
    at = len(_HEADER)

    def number() -> int:
        nonlocal at
        value: int = struct.unpack_from(">i", data, at)[0]
        at += 4
        return value

    version = number()
    number(), number()  # versions of R: of the writer, and the oldest that reads it
    if version >= 3:
        size = number()
        at += size  # the name of the encoding
    if number() & 0xFF != _STRINGS:
        return None
    lines = []
    for _ in range(number()):
        if number() & 0xFF != _STRING:
            raise ValueError("a character vector holds something else than strings")
        size = number()
        if size != _MISSING:
            lines.append(data[at : at + size].decode("utf-8", "replace"))
            at += size
    return lines


_PAGE = re.compile(
    r"<page>\s*<title>(?P<title>.*?)</title>\s*<ns>0</ns>.*?<text[^>]*>(?P<text>.*?)</text>", re.S
)


def wiki_articles(dump: str) -> Iterator[str]:
    """The articles of a MediaWiki XML dump as plain text: title, empty line, paragraphs."""
    for page in _PAGE.finditer(dump):
        text = html.unescape(page["text"])
        if not text.lstrip().upper().startswith("#REDIRECT"):
            yield f"{html.unescape(page['title'])}\n\n{strip_markup(text)}"


_DROPPED = (
    re.compile(r"<!--.*?-->", re.S),
    re.compile(r"<ref[^>/]*/>"),
    re.compile(r"<(ref|math|gallery|timeline|source|imagemap)\b.*?</\1\s*>", re.S),
)
_INNERMOST_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}")
_INNERMOST_TABLE = re.compile(r"\{\|(?:(?!\{\|).)*?\|\}", re.S)
_MEDIA = re.compile(r"\[\[(?:File|Image|Category|[a-z-]{2,12}):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]")
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]]*)\]\]")
_OUTER_LINK = re.compile(r"\[(?:https?|ftp)://\S+\s*([^\]]*)\]")


def strip_markup(text: str) -> str:
    """The prose of an article in wiki markup, headings included; tables and templates go."""
    for pattern in _DROPPED:
        text = pattern.sub("", text)
    for pattern in (_INNERMOST_TEMPLATE, _INNERMOST_TABLE):  # they nest
        count = 1
        while count:
            text, count = pattern.subn("", text)
    text = _MEDIA.sub("", text)
    text = _LINK.sub(r"\1", text)
    text = _OUTER_LINK.sub(r"\1", text)
    text = re.sub(r"<[^<>]*>", "", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.M)
    text = re.sub(r"^[*#:;]+\s*", "", text, flags=re.M)
    text = re.sub(r"[^\S\n]+", " ", html.unescape(text)).replace("()", "")
    return re.sub(r"\n\s*\n\s*", "\n\n", text).strip()
