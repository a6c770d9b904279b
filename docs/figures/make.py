"""Draws the figures of docs/design.md: `python docs/figures/make.py`, from the repository's root.

What they show comes from the code: the fields of a page from `PageFormat`, the places of codes from
`code_index`, the rule of the residual from `residual`, the groups from `plan`. `--check` writes
nothing, and fails if a file is not what the code says.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kivi_vllm.config import BLOCK_SIZE as B
from kivi_vllm.config import QUANTIZED_DTYPES, RECOMMENDED_DTYPE, KiviConfig
from kivi_vllm.ops.codes import Side, code_index, slots, spare
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.residual import full_precision_from, ring_start

FOLDER = Path(__file__).parent
HEAD_SIZE = 128
KEYS, VALUES, SINKS, RING, TAIL, FAINT = (
    "#4477aa", "#aa3377", "#ccbb44", "#228833", "#ee7733", "#dddddd",
)  # fmt: skip
LIGHT = {KEYS: "#a9c4dd", VALUES: "#dcacc6"}


class Picture:
    """An SVG of fixed size, as a list of elements."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="DejaVu Sans, Arial, sans-serif" '
            f'font-size="12">',
            f"<title>{title}</title>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def box(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "white") -> None:
        self.parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )

    def line(self, x0: float, y0: float, x1: float, y1: float, dashed: bool = False) -> None:
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        self.parts.append(
            f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#888"{dash}/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        anchor: str = "middle",
        fill: str = "#222",
        size: int = 12,
        bold: bool = False,
        upright: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if upright else ""
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}" '
            f'font-size="{size}"{weight}{turned}>{text}</text>'
        )

    def heading(self, y: float, text: str) -> None:
        self.text(20, y, text, anchor="start", size=14, bold=True)

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


# ------------------------------------------------------------- the bytes of a page


def page() -> str:
    """One block of one kv head: its size by dtype, its fields, and where a code lies."""
    picture = Picture(980, 592, "The bytes of a page")
    left, width = 110, 800
    bf16 = 2 * 2 * HEAD_SIZE * B

    picture.heading(
        26, f"A block of {B} tokens, one kv head, head size {HEAD_SIZE}: bytes by dtype"
    )
    y = 42
    for name in ("bf16", *reversed(QUANTIZED_DTYPES)):
        picture.text(left - 10, y + 15, name, anchor="end")
        if name == "bf16":
            parts = [(KEYS, bf16 // 2), (VALUES, bf16 // 2)]
        else:
            parts = [(_colour(f.name), f.nbytes) for f in _format(name).fields.values()]
        x, total = float(left), sum(n for _, n in parts)
        for colour, n in parts:
            w = n / bf16 * width
            picture.box(x, y, w, 20, colour)
            x += w
        label = f"{total:,}" + ("" if total == bf16 else f"  (1/{bf16 / total:.3g} of bf16)")
        picture.text(x + 8, y + 15, label, anchor="start")
        y += 26

    fmt = _format(RECOMMENDED_DTYPE)
    y += 34
    size = f"{fmt.page_bytes:,} bytes"
    picture.heading(y, f"The fields of a {RECOMMENDED_DTYPE} page: {size}")
    y += 18
    small = []
    for field in fmt.fields.values():
        x = left + field.offset / fmt.page_bytes * width
        w = field.nbytes / fmt.page_bytes * width
        picture.box(x, y, w, 62, _colour(field.name))
        dtype = str(field.dtype).removeprefix("torch.").replace("float", "fp")
        what = f"{dtype} [{', '.join(map(str, field.shape))}]"
        if not field.name.endswith("codes"):
            picture.text(x + w / 2 + 4, y + 31, field.name, size=11, bold=True, upright=True)
            small.append(f"{field.name} {what} at {field.offset:,}")
            continue
        picture.text(x + w / 2, y + 20, field.name, fill="white", bold=True, size=11)
        picture.text(x + w / 2, y + 37, what, fill="white")
        picture.text(x + w / 2, y + 54, f"{field.nbytes:,} bytes", fill="white", size=11)
        picture.text(x, y + 78, f"{field.offset:,}", size=10, anchor="start", fill="#555")
    picture.text(left + width, y + 78, f"{fmt.page_bytes:,}", size=10, anchor="end", fill="#555")
    picture.text(left - 10, y + 37, "K, then V", anchor="end")
    picture.text(left - 10, y + 78, "offset", anchor="end", size=10, fill="#555")
    picture.text(left, y + 98, "; ".join(small), size=11, anchor="start")

    y += 20
    y += 118
    picture.heading(y, "The first 64 bytes of each field of codes: one vector register")
    _vector(picture, y + 20, fmt, "k")
    _vector(picture, y + 130, fmt, "v")
    return picture.svg()


def _vector(picture: Picture, y: float, fmt: PageFormat, side: Side) -> None:
    """16 lanes of 4 bytes, and the slots of the first byte."""
    bits, colour = (fmt.k_bits, KEYS) if side == "k" else (fmt.v_bits, VALUES)
    index = code_index(side, bits, HEAD_SIZE)[0, 0].flatten(
        0, 1
    )  # [byte, slot]: token * D + channel
    token, channel = index // HEAD_SIZE, index % HEAD_SIZE
    lanes, along = (token, channel) if side == "k" else (channel, token)
    lane_word, along_word = ("token", "channels") if side == "k" else ("channel", "tokens")
    left, cell = 110, 31
    picture.text(left - 10, y + 17, f"{side}_codes", anchor="end", bold=True)
    picture.text(left - 10, y + 45, lane_word, anchor="end", size=11)
    for lane in range(16):
        x = left + lane * cell
        for j in range(4):
            first = lane == 0 and j == 0
            picture.box(x + j * cell / 4, y, cell / 4, 26, colour if first else LIGHT[colour])
        picture.line(x, y - 3, x, y + 29)
        picture.text(x + cell / 2, y + 45, str(int(lanes[4 * lane, 0])), size=11)
    right = left + 16 * cell
    picture.line(right, y - 3, right, y + 29)
    summed = ", ".join(str(int(along[j, 0])) for j in range(4))
    what = f"a lane: one {lane_word}; its 4 bytes: {along_word} {summed}, which are summed over"
    picture.text(left, y + 64, what, anchor="start", size=11)
    x, w = right + 50, 74
    picture.line(left + cell / 4, y, x, y)
    picture.line(left + cell / 4, y + 26, x, y + 26)
    codes = slots(bits)
    for i in reversed(range(codes)):
        at = x + (codes - 1 - i) * w
        picture.box(at, y, w, 26, colour)
        picture.text(at + w / 2, y + 17, f"slot {i}", fill="white", size=11)
        picture.text(at + w / 2, y + 43, f"token {int(token[0, i])}", size=11)
        picture.text(at + w / 2, y + 58, f"channel {int(channel[0, i])}", size=11)
    what = f"the first byte: {codes} codes of {bits} bits, lowest bits in slot 0"
    if spare(bits):
        parts = f"their {codes} highest bits are parts of tokens {B // 4 * 3} to {B - 1}"
        picture.text(x, y + 73, parts, anchor="start", size=11)
    picture.text(x, y - 5, what, anchor="start", size=11)


def _format(dtype: str, residual_length: int = 0, head_size: int = 0) -> PageFormat:
    config = KiviConfig.from_options(dtype, {"residual_length": residual_length})
    return PageFormat.of(config, head_size or HEAD_SIZE, torch.bfloat16)


def _colour(field: str) -> str:
    colour = KEYS if field.startswith("k") else VALUES
    return colour if field.endswith("codes") else LIGHT[colour]


# --------------------------------------- a sequence with sinks, pages, tail and ring

RESIDUAL = 32
LENGTHS = (90, 128, 200, 256, 330)
"""Tokens of the sequence after the steps that are shown."""


def sequence() -> str:
    """What the newest token of a sequence sees, and the pages that its next step needs."""
    fmt = _format(RECOMMENDED_DTYPE, RESIDUAL)
    left, scale, row, top = 150, 1.75, 112, 92
    picture = Picture(1080, top + 60 + row * len(LENGTHS), "A sequence over the steps")
    options = f"sink_tokens {fmt.sink_tokens}, residual_length {RESIDUAL}"
    picture.heading(26, f"A sequence as it grows: {RECOMMENDED_DTYPE}, 16-bit model, {options}")
    x = float(left)
    for colour, label in (
        (KEYS, "quantized pages"),
        (SINKS, f"sinks: the first {fmt.sink_tokens} tokens"),
        (TAIL, f"tail: the last {RESIDUAL} of the block before"),
        (RING, "ring: the current block"),
    ):
        picture.box(x, 40, 14, 14, colour)
        picture.text(x + 20, 52, label, anchor="start")
        x += 50 + 6.8 * len(label)

    def at(position: float) -> float:
        return left + position * scale

    bottom = top + row * len(LENGTHS)
    for block in range(4):
        picture.line(at(block * B), 80, at(block * B), bottom, dashed=True)
        where = f"position {block * B}" if not block else str(block * B)
        picture.text(at(block * B), 76, where, size=11)
        if block < 3:
            picture.text(at((block + 0.5) * B), 76, f"block {block}", size=11, fill="#777")

    for i, length in enumerate(LENGTHS):
        y = top + i * row
        newest = length - 1
        picture.text(left - 12, y + 14, f"{length} tokens", anchor="end", bold=True)
        picture.text(left - 12, y + 34, "the newest sees", anchor="end", size=11, fill="#555")
        picture.text(left - 12, y + 58, "pages", anchor="end", size=11, fill="#555")
        raw_from = full_precision_from(newest, RESIDUAL)
        block_start = newest // B * B
        if raw_from:
            picture.box(at(0), y + 20, raw_from * scale, 20, KEYS)
            picture.box(at(0), y + 20, fmt.sink_tokens * scale, 20, SINKS)
            picture.box(at(raw_from), y + 20, (block_start - raw_from) * scale, 20, TAIL)
            picture.text(at(raw_from), y + 15, f"F({newest}) = {raw_from}", size=11)
        picture.box(at(block_start), y + 20, (length - block_start) * scale, 20, RING)
        _pages(picture, at, y + 46, fmt, length)
    note = (
        "Upper bars: what the newest token reads each position from, its own included. All colours "
        "but blue are full precision.",
        "Lower boxes: the pages that the next step needs, all of one byte size. A quantized one "
        f"has {B} tokens, one of full precision {fmt.raw_tokens}.",
        "Grey: room that is empty, or that nobody reads any more.",
    )
    for i, line in enumerate(note):
        picture.text(20, bottom + 20 + 16 * i, line, anchor="start", size=11, fill="#444")
    return picture.svg()


def _pages(
    picture: Picture, at: Callable[[float], float], y: float, fmt: PageFormat, length: int
) -> None:
    """Draw and count the pages that a step after one of `length` tokens needs."""
    blocks, size = length // B, fmt.raw_tokens
    boundary = blocks * B

    def raw(y: float, first: int, low: int, high: int, colour: str) -> None:
        """A page of `size` tokens, drawn at position `first`, of which [low, high) are read."""
        picture.box(at(first) + 1, y, at(size) - at(0) - 2, 12, FAINT, "#999")
        if low < high:
            picture.box(at(low) + 1, y, at(high) - at(low) - 2, 12, colour, "none")

    for block in range(blocks):
        picture.box(at(block * B) + 1, y, at(B) - at(0) - 2, 16, KEYS)
    tails = range(boundary - RESIDUAL, boundary, size) if blocks else range(0)
    for first in tails:
        raw(y + 19, first, first, min(first + size, boundary), TAIL)
    if blocks:
        raw(y + 19, 0, 0, fmt.sink_tokens, SINKS)
    entries = range(ring_start(length, 1) // size, -(-length // size))
    for entry in entries:
        first = entry * size
        raw(y + 34, first, max(first, boundary), min(first + size, length), RING)
    counts = {
        "quantized": blocks,
        "sink": int(blocks > 0),
        "tail": len(tails),
        "ring": len(entries),
    }
    text = ", ".join(f"{n} {what}" for what, n in counts.items() if n)
    x = at(3 * B) + 12
    total = sum(counts.values())
    picture.text(x, y + 12, f"{total} pages", anchor="start", size=11, bold=True)
    picture.text(x, y + 28, text, anchor="start", size=11)


# --------------------------------------- what a block of the pool holds, by cache group

WINDOW = 1024
STATE = ((3, 8192), (32, 128, 128))
"""Shapes of a state of Qwen3-Next's gated delta nets."""


def blocks() -> str:
    """A block of each cache group, of two models whose layers differ."""
    from vllm.v1.kv_cache_interface import MambaSpec

    gemma: dict[str, Any] = {}
    for i in range(62):
        gemma |= _layer(f"{i}", 16, 128, None if i % 6 == 5 else WINDOW)
    qwen: dict[str, Any] = {}
    for i in range(12):
        qwen |= _layer(f"{i}", 2, 256, None)
    for i in range(36):
        qwen[f"state{i}"] = MambaSpec(block_size=B, shapes=STATE, dtypes=(torch.bfloat16,) * 2)
    picture = Picture(980, 330, "What a block of the pool holds")
    y = _blocks(picture, 26, "Gemma-3-27B: 62 layers, 52 of them with a window", gemma)
    y = _blocks(picture, y + 24, "Qwen3-Next-80B: 12 layers of attention, 36 of states", qwen)
    note = (
        "Each bar is a block, all of one byte size. A box is a layer's part of it: its pages one "
        "behind the other, its full-precision tokens, or its state. Grey: room that stays empty."
    )
    picture.text(20, y + 14, note, anchor="start", size=11, fill="#444")
    return picture.svg()


def _layer(name: str, heads: int, head_size: int, window: int | None) -> dict[str, Any]:
    """The cache specs of a layer of attention."""
    from kivi_vllm.attention.groups.pages import page_spec
    from kivi_vllm.attention.groups.ring import ring_spec
    from kivi_vllm.attention.groups.sinks import sink_spec

    fmt = _format(RECOMMENDED_DTYPE, head_size=head_size)
    return {
        name: page_spec(heads, fmt, window),
        f"{name}.kivi_ring": ring_spec(heads, fmt, 0, 1, window or 0),
        f"{name}.kivi_sinks": sink_spec(heads, fmt),
    }


def _blocks(picture: Picture, y: int, title: str, specs: dict[str, Any]) -> int:
    """Draw a block of each kind of group that `plan` makes; returns where the next may begin."""
    from kivi_vllm.attention.groups import shown
    from kivi_vllm.attention.groups.planner import plan

    made = plan(specs, 131072, align=True)
    picture.heading(
        y, f"{title} ({RECOMMENDED_DTYPE}); prefix hits at multiples of {made.hit_stride}"
    )
    groups: dict[str, list[Any]] = {}
    for group in made.groups:
        groups.setdefault(shown.words(group.kv_cache_spec)[0], []).append(group)
    parts = {
        what: [len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in several]
        for what, several in groups.items()
    }
    left, width, size = 170, 560, max(max(sizes) for sizes in parts.values())
    colours = {shown.RING: RING, shown.SINKS: SINKS, shown.STATES: VALUES}
    y += 14
    for what, several in groups.items():
        layers, tokens = len(several[0].layer_names), shown.words(several[0].kv_cache_spec)[1]
        colour, step = colours.get(what, KEYS), parts[what][0] / size * width / layers
        picture.text(left - 10, y + 15, what.partition(":")[0], anchor="end")
        picture.box(left, y, width, 20, FAINT, "none")
        pages = tokens // B if colour == KEYS else 1
        for i in range(layers):
            picture.box(left + i * step, y, step, 20, colour)
            for page in range(1, pages):
                x = left + (i + page / pages) * step
                picture.line(x, y + 4, x, y + 16)
        holds = f"{layers} layers × {tokens:,} tokens" if tokens else f"{layers} states"
        if len(several) > 1:
            holds += f", {len(several)} such groups"
        picture.text(left + width + 10, y + 15, holds, anchor="start")
        y += 28
    return y


FIGURES = {"page.svg": page, "sequence.svg": sequence, "blocks.svg": blocks}


def main() -> None:
    """Write the figures, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the files only")
    check = parser.parse_args().check
    stale = []
    for name, draw in FIGURES.items():
        path, svg = FOLDER / name, draw()
        if not check:
            path.write_text(svg)
        elif not path.is_file() or path.read_text() != svg:
            stale.append(name)
    if stale:
        sys.exit(f"not what the code says: {', '.join(stale)}; run python docs/figures/make.py")


if __name__ == "__main__":
    main()
