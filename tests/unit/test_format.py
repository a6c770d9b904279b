"""Sizes, offsets and capacities of pages, as literal numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kivi_vllm.config import KiviConfig
from kivi_vllm.ops.format import PageFormat

NAMES = ["k_low", "k_step", "k_range", "k_codes", "v_mean", "v_scale", "v_codes"]
PAPER_NAMES = ["k_scale", "k_zero", "k_codes", "v_scale", "v_zero", "v_codes"]

# dtype, head size; bytes a token and a page of one kv head, whatever the model's dtype; zeros at
# the page's end; full-precision tokens that the page holds for a 16-bit and for a 32-bit model.
BEST = [
    ("kivi2", 32, 22, 2816, 64, 22, 11),
    ("kivi2", 64, 41, 5248, 0, 20, 10),
    ("kivi2", 96, 61, 7808, 64, 20, 10),
    ("kivi2", 128, 80, 10240, 0, 20, 10),
    ("kivi2", 160, 100, 12800, 64, 20, 10),
    ("kivi2", 192, 119, 15232, 0, 19, 9),
    ("kivi2", 256, 158, 20224, 0, 19, 9),
    ("kivi2", 512, 314, 40192, 0, 19, 9),
    ("kivi_k3v2", 32, 25, 3200, 64, 25, 12),
    ("kivi_k3v2", 64, 47, 6016, 0, 23, 11),
    ("kivi_k3v2", 96, 70, 8960, 64, 23, 11),
    ("kivi_k3v2", 128, 92, 11776, 0, 23, 11),
    ("kivi_k3v2", 160, 115, 14720, 64, 23, 11),
    ("kivi_k3v2", 192, 137, 17536, 0, 22, 11),
    ("kivi_k3v2", 256, 182, 23296, 0, 22, 11),
    ("kivi_k3v2", 512, 362, 46336, 0, 22, 11),
    ("kivi3", 32, 29, 3712, 64, 29, 14),
    ("kivi3", 64, 55, 7040, 0, 27, 13),
    ("kivi3", 96, 82, 10496, 64, 27, 13),
    ("kivi3", 128, 108, 13824, 0, 27, 13),
    ("kivi3", 160, 135, 17280, 64, 27, 13),
    ("kivi3", 192, 161, 20608, 0, 26, 13),
    ("kivi3", 256, 214, 27392, 0, 26, 13),
    ("kivi3", 512, 426, 54528, 0, 26, 13),
    ("kivi_k4v3", 32, 33, 4224, 64, 33, 16),
    ("kivi_k4v3", 64, 63, 8064, 0, 31, 15),
    ("kivi_k4v3", 96, 94, 12032, 64, 31, 15),
    ("kivi_k4v3", 128, 124, 15872, 0, 31, 15),
    ("kivi_k4v3", 160, 155, 19840, 64, 31, 15),
    ("kivi_k4v3", 192, 185, 23680, 0, 30, 15),
    ("kivi_k4v3", 256, 246, 31488, 0, 30, 15),
    ("kivi_k4v3", 512, 490, 62720, 0, 30, 15),
    ("kivi4", 32, 37, 4736, 64, 37, 18),
    ("kivi4", 64, 71, 9088, 0, 35, 17),
    ("kivi4", 96, 106, 13568, 64, 35, 17),
    ("kivi4", 128, 140, 17920, 0, 35, 17),
    ("kivi4", 160, 175, 22400, 64, 35, 17),
    ("kivi4", 192, 209, 26752, 0, 34, 17),
    ("kivi4", 256, 278, 35584, 0, 34, 17),
    ("kivi4", 512, 554, 70912, 0, 34, 17),
]

# Of recipe "paper": dtype, group size, head size; the same, without zeros.
PAPER = [
    ("kivi2", 32, 32, 24, 3072, 24, 12),
    ("kivi2", 32, 64, 48, 6144, 24, 12),
    ("kivi2", 32, 96, 72, 9216, 24, 12),
    ("kivi2", 32, 128, 96, 12288, 24, 12),
    ("kivi2", 32, 160, 120, 15360, 24, 12),
    ("kivi2", 32, 192, 144, 18432, 24, 12),
    ("kivi2", 32, 256, 192, 24576, 24, 12),
    ("kivi2", 32, 512, 384, 49152, 24, 12),
    ("kivi4", 32, 32, 40, 5120, 40, 20),
    ("kivi4", 32, 64, 80, 10240, 40, 20),
    ("kivi4", 32, 96, 120, 15360, 40, 20),
    ("kivi4", 32, 128, 160, 20480, 40, 20),
    ("kivi4", 32, 160, 200, 25600, 40, 20),
    ("kivi4", 32, 192, 240, 30720, 40, 20),
    ("kivi4", 32, 256, 320, 40960, 40, 20),
    ("kivi4", 32, 512, 640, 81920, 40, 20),
    ("kivi2", 64, 64, 40, 5120, 20, 10),
    ("kivi2", 64, 128, 80, 10240, 20, 10),
    ("kivi2", 64, 192, 120, 15360, 20, 10),
    ("kivi2", 64, 256, 160, 20480, 20, 10),
    ("kivi2", 64, 512, 320, 40960, 20, 10),
    ("kivi4", 64, 64, 72, 9216, 36, 18),
    ("kivi4", 64, 128, 144, 18432, 36, 18),
    ("kivi4", 64, 192, 216, 27648, 36, 18),
    ("kivi4", 64, 256, 288, 36864, 36, 18),
    ("kivi4", 64, 512, 576, 73728, 36, 18),
    ("kivi2", 128, 128, 72, 9216, 18, 9),
    ("kivi2", 128, 256, 144, 18432, 18, 9),
    ("kivi2", 128, 512, 288, 36864, 18, 9),
    ("kivi4", 128, 128, 136, 17408, 34, 17),
    ("kivi4", 128, 256, 272, 34816, 34, 17),
    ("kivi4", 128, 512, 544, 69632, 34, 17),
]

# head size; bytes a token and a page for a 16-bit model, then for a 32-bit model.
RAW = [
    (32, 128, 16384, 256, 32768),
    (64, 256, 32768, 512, 65536),
    (96, 384, 49152, 768, 98304),
    (128, 512, 65536, 1024, 131072),
    (160, 640, 81920, 1280, 163840),
    (192, 768, 98304, 1536, 196608),
    (256, 1024, 131072, 2048, 262144),
    (512, 2048, 262144, 4096, 524288),
]

# dtype, head size; first byte of each field.
OFFSETS = [
    ("kivi2", 64, [0, 128, 256, 768, 2816, 2944, 3200]),
    ("kivi2", 128, [0, 256, 512, 1536, 5632, 5888, 6144]),
    ("kivi_k3v2", 64, [0, 128, 256, 512, 3584, 3712, 3968]),
    ("kivi_k3v2", 96, [0, 192, 384, 768, 5376, 5568, 5824]),
    ("kivi3", 128, [0, 256, 512, 1024, 7168, 7424, 7680]),
    ("kivi_k4v3", 128, [0, 256, 512, 1024, 9216, 9472, 9728]),
    ("kivi4", 256, [0, 512, 1024, 2048, 18432, 18944, 19200]),
    ("kivi_k3v2", 512, [0, 1024, 2048, 4096, 28672, 29696, 29952]),
]

# dtype, group size, head size; first byte of each field of recipe "paper".
PAPER_OFFSETS = [
    ("kivi2", 32, 64, [0, 512, 1024, 3072, 3584, 4096]),
    ("kivi2", 32, 128, [0, 1024, 2048, 6144, 7168, 8192]),
    ("kivi2", 64, 128, [0, 512, 1024, 5120, 5632, 6144]),
    ("kivi2", 128, 128, [0, 256, 512, 4608, 4864, 5120]),
    ("kivi2", 128, 256, [0, 512, 1024, 9216, 9728, 10240]),
    ("kivi4", 32, 64, [0, 512, 1024, 5120, 5632, 6144]),
    ("kivi4", 32, 128, [0, 1024, 2048, 10240, 11264, 12288]),
]

# dtype, head size; shape of k_range, k_codes, v_codes.
SHAPES = [
    ("kivi2", 64, (8, 64), (2, 16, 16, 4), (2, 16, 16, 4)),
    ("kivi_k3v2", 96, (4, 96), (3, 24, 16, 4), (3, 16, 16, 4)),
    ("kivi3", 128, (4, 128), (3, 32, 16, 4), (4, 24, 16, 4)),
    ("kivi_k4v3", 256, (4, 256), (4, 64, 16, 4), (8, 24, 16, 4)),
    ("kivi4", 128, (4, 128), (4, 32, 16, 4), (4, 32, 16, 4)),
]

# dtype, group size, head size; shape of k_scale, k_codes, v_scale, v_codes.
PAPER_SHAPES = [
    ("kivi2", 32, 64, (4, 64), (2, 16, 16, 4), (2, 128), (2, 16, 16, 4)),
    ("kivi2", 128, 256, (1, 256), (2, 64, 16, 4), (2, 128), (8, 16, 16, 4)),
    ("kivi4", 64, 128, (2, 128), (4, 32, 16, 4), (2, 128), (4, 32, 16, 4)),
]

MODEL_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def page_format(
    dtype: str, d: int, raw: torch.dtype = torch.bfloat16, **options: Any
) -> PageFormat:
    return PageFormat.of(KiviConfig.from_options(dtype, options), d, raw)


def paper_format(dtype: str, g: int, d: int, raw: torch.dtype = torch.bfloat16) -> PageFormat:
    return page_format(dtype, d, raw, recipe="paper", group_size=g)


def label(row: tuple) -> str:
    return "{}-D{}".format(*row)


def paper_label(row: tuple) -> str:
    return "{}-G{}-D{}".format(*row)


@pytest.mark.parametrize("raw", MODEL_DTYPES, ids=str)
@pytest.mark.parametrize("row", BEST, ids=label)
def test_sizes(row: tuple, raw: torch.dtype) -> None:
    dtype, d, token_bytes, page_bytes, _, tokens_16, tokens_32 = row
    fmt = page_format(dtype, d, raw)
    assert fmt.bytes_per_token == token_bytes
    assert fmt.page_bytes == page_bytes == token_bytes * 128
    assert fmt.raw_tokens == (tokens_32 if raw == torch.float32 else tokens_16)
    # One more would not fit: 2 * D numbers of 2 or 4 bytes each.
    left = page_bytes - fmt.raw_tokens * 2 * d * (4 if raw == torch.float32 else 2)
    assert 0 <= left < 2 * d * (4 if raw == torch.float32 else 2)
    assert fmt.two_level and not fmt.is_raw


@pytest.mark.parametrize("raw", MODEL_DTYPES, ids=str)
@pytest.mark.parametrize("row", PAPER, ids=paper_label)
def test_sizes_of_recipe_paper(row: tuple, raw: torch.dtype) -> None:
    dtype, g, d, token_bytes, page_bytes, tokens_16, tokens_32 = row
    fmt = paper_format(dtype, g, d, raw)
    assert fmt.bytes_per_token == token_bytes
    assert fmt.page_bytes == page_bytes == token_bytes * 128
    assert fmt.raw_tokens == (tokens_32 if raw == torch.float32 else tokens_16)
    # They fill the page exactly.
    assert fmt.raw_tokens * 2 * d * (4 if raw == torch.float32 else 2) == page_bytes
    assert not fmt.two_level and not fmt.is_raw


@pytest.mark.parametrize("raw", MODEL_DTYPES, ids=str)
@pytest.mark.parametrize("row", RAW, ids=[f"D{r[0]}" for r in RAW])
def test_sizes_of_raw_pages(row: tuple, raw: torch.dtype) -> None:
    d, *sizes = row
    fmt = page_format("kivi_raw", d, raw)
    token_bytes, page_bytes = sizes[2:] if raw == torch.float32 else sizes[:2]
    assert (fmt.bytes_per_token, fmt.page_bytes) == (token_bytes, page_bytes)
    assert fmt.raw_tokens == 32
    assert fmt.is_raw
    fields = {name: (f.offset, f.shape, f.dtype) for name, f in fmt.fields.items()}
    half = page_bytes // 2
    assert fields == {"k_codes": (0, (128, d), raw), "v_codes": (half, (128, d), raw)}


def test_every_combination_is_in_the_tables() -> None:
    """So that a new dtype or head size cannot be left out."""
    head_sizes = (32, 64, 96, 128, 160, 192, 256, 512)
    dtypes = ("kivi2", "kivi_k3v2", "kivi3", "kivi_k4v3", "kivi4")
    assert [row[:2] for row in BEST] == [(dtype, d) for dtype in dtypes for d in head_sizes]
    wanted = {
        (dtype, g, d)
        for dtype in ("kivi2", "kivi4")
        for g in (32, 64, 128)
        for d in head_sizes
        if d % g == 0
    }
    assert {row[:3] for row in PAPER} == wanted
    assert tuple(row[0] for row in RAW) == head_sizes


@pytest.mark.parametrize(("head_size", "page"), [(80, 96), (112, 128)])
def test_heads_that_are_filled_up(head_size: int, page: int) -> None:
    assert page_format("kivi2", head_size) == page_format("kivi2", page)


@pytest.mark.parametrize("row", OFFSETS, ids=label)
def test_offsets(row: tuple) -> None:
    fields = page_format(*row[:2]).fields
    assert list(fields) == NAMES
    assert [f.offset for f in fields.values()] == row[2]


@pytest.mark.parametrize("row", PAPER_OFFSETS, ids=paper_label)
def test_offsets_of_recipe_paper(row: tuple) -> None:
    fields = paper_format(*row[:3]).fields
    assert list(fields) == PAPER_NAMES
    assert [f.offset for f in fields.values()] == row[3]


@pytest.mark.parametrize("row", SHAPES, ids=label)
def test_shapes(row: tuple) -> None:
    fields = page_format(*row[:2]).fields
    d, (k_range, k_codes, v_codes) = row[1], row[2:]
    shapes = [(d,), (d,), k_range, k_codes, (d,), (128,), v_codes]
    assert [f.shape for f in fields.values()] == shapes
    half, byte = torch.float16, torch.uint8
    assert [f.dtype for f in fields.values()] == [half, half, byte, byte, half, half, byte]


@pytest.mark.parametrize("row", PAPER_SHAPES, ids=paper_label)
def test_shapes_of_recipe_paper(row: tuple) -> None:
    fields = paper_format(*row[:3]).fields
    k_scale, k_codes, v_scale, v_codes = row[3:]
    shapes = [k_scale, k_scale, k_codes, v_scale, v_scale, v_codes]
    assert [f.shape for f in fields.values()] == shapes
    half, byte = torch.float16, torch.uint8
    assert [f.dtype for f in fields.values()] == [half, half, byte, half, half, byte]


FORMATS = [
    *((page_format(*row[:2], raw), row[4]) for row in BEST for raw in MODEL_DTYPES[1:]),
    *((paper_format(*row[:3], raw), 0) for row in PAPER for raw in MODEL_DTYPES[1:]),
    *((page_format("kivi_raw", row[0], raw), 0) for row in RAW for raw in MODEL_DTYPES[1:]),
]


@pytest.mark.parametrize(("fmt", "zeros"), FORMATS, ids=lambda x: str(getattr(x, "page_bytes", x)))
def test_fields_tile_the_page(fmt: PageFormat, zeros: int) -> None:
    owners = [0] * fmt.page_bytes
    for field in fmt.fields.values():
        assert field.offset % 64 == 0
        for byte in range(field.offset, field.offset + field.nbytes):
            owners[byte] += 1
    assert owners == [1] * (fmt.page_bytes - zeros) + [0] * zeros


@pytest.mark.parametrize("dtype", ["kivi2", "kivi_k3v2", "kivi_raw"])
@pytest.mark.parametrize("raw", MODEL_DTYPES, ids=str)
def test_pages_shown_as_tokens(dtype: str, raw: torch.dtype) -> None:
    """What is written to them lies in the bytes of their page, in its order, and nowhere else."""
    fmt = page_format(dtype, 64, raw)
    storage = torch.full((5, 3, 2, fmt.page_bytes), 255, dtype=torch.uint8)
    tokens = fmt.as_raw(storage[:, 1])
    assert tokens.shape == (5, 2, fmt.raw_tokens, 128) and tokens.dtype == raw
    tokens[4, 1] = torch.arange(fmt.raw_tokens * 128).view(fmt.raw_tokens, 128) % 251
    wanted = (torch.arange(fmt.raw_tokens * 128) % 251).to(raw).view(torch.uint8)
    assert torch.equal(storage[4, 1, 1, : len(wanted)], wanted)
    storage[4, 1, 1, : len(wanted)] = 255
    assert (storage == 255).all()


def test_fields_are_read_through_strides() -> None:
    """Pages of several layers may lie interleaved, heads and blocks in any order."""
    fmt = page_format("kivi_k3v2", 32)
    storage = torch.randint(0, 256, (5, 3, 2, fmt.page_bytes), dtype=torch.uint8)
    pages = storage[:, 1].transpose(0, 1)
    assert not pages.is_contiguous()
    for field in fmt.fields.values():
        got = field.of(pages)
        assert got.shape == (2, 5, *field.shape)
        assert got.dtype == field.dtype
        for head in range(2):
            for block in range(5):
                page = storage[block, 1, head].numpy().tobytes()
                wanted = page[field.offset : field.offset + field.nbytes]
                assert got[head, block].contiguous().view(torch.uint8).numpy().tobytes() == wanted
