"""Sizes, offsets and capacities of pages, as literal numbers."""

from __future__ import annotations

import pytest
import torch

from kivi_vllm.config import KiviConfig
from kivi_vllm.ops.format import PageFormat

NAMES = ["k_scale", "k_zero", "k_codes", "v_scale", "v_zero", "v_codes"]

# dtype, group size, head size; bytes a token and a page of one kv head, whatever the model's
# dtype; full-precision tokens that the page holds for a 16-bit and for a 32-bit model.
QUANTIZED = [
    ("kivi2", 32, 32, 24, 3072, 24, 12),
    ("kivi2", 32, 64, 48, 6144, 24, 12),
    ("kivi2", 32, 96, 72, 9216, 24, 12),
    ("kivi2", 32, 128, 96, 12288, 24, 12),
    ("kivi2", 32, 160, 120, 15360, 24, 12),
    ("kivi2", 32, 192, 144, 18432, 24, 12),
    ("kivi2", 32, 256, 192, 24576, 24, 12),
    ("kivi_k4v2", 32, 32, 32, 4096, 32, 16),
    ("kivi_k4v2", 32, 64, 64, 8192, 32, 16),
    ("kivi_k4v2", 32, 96, 96, 12288, 32, 16),
    ("kivi_k4v2", 32, 128, 128, 16384, 32, 16),
    ("kivi_k4v2", 32, 160, 160, 20480, 32, 16),
    ("kivi_k4v2", 32, 192, 192, 24576, 32, 16),
    ("kivi_k4v2", 32, 256, 256, 32768, 32, 16),
    ("kivi4", 32, 32, 40, 5120, 40, 20),
    ("kivi4", 32, 64, 80, 10240, 40, 20),
    ("kivi4", 32, 96, 120, 15360, 40, 20),
    ("kivi4", 32, 128, 160, 20480, 40, 20),
    ("kivi4", 32, 160, 200, 25600, 40, 20),
    ("kivi4", 32, 192, 240, 30720, 40, 20),
    ("kivi4", 32, 256, 320, 40960, 40, 20),
    ("kivi2", 64, 64, 40, 5120, 20, 10),
    ("kivi2", 64, 128, 80, 10240, 20, 10),
    ("kivi2", 64, 192, 120, 15360, 20, 10),
    ("kivi2", 64, 256, 160, 20480, 20, 10),
    ("kivi_k4v2", 64, 64, 56, 7168, 28, 14),
    ("kivi_k4v2", 64, 128, 112, 14336, 28, 14),
    ("kivi_k4v2", 64, 192, 168, 21504, 28, 14),
    ("kivi_k4v2", 64, 256, 224, 28672, 28, 14),
    ("kivi4", 64, 64, 72, 9216, 36, 18),
    ("kivi4", 64, 128, 144, 18432, 36, 18),
    ("kivi4", 64, 192, 216, 27648, 36, 18),
    ("kivi4", 64, 256, 288, 36864, 36, 18),
    ("kivi2", 128, 128, 72, 9216, 18, 9),
    ("kivi2", 128, 256, 144, 18432, 18, 9),
    ("kivi_k4v2", 128, 128, 104, 13312, 26, 13),
    ("kivi_k4v2", 128, 256, 208, 26624, 26, 13),
    ("kivi4", 128, 128, 136, 17408, 34, 17),
    ("kivi4", 128, 256, 272, 34816, 34, 17),
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
]

# dtype, group size, head size; first byte of each field.
OFFSETS = [
    ("kivi2", 32, 64, [0, 512, 1024, 3072, 3584, 4096]),
    ("kivi2", 32, 128, [0, 1024, 2048, 6144, 7168, 8192]),
    ("kivi2", 64, 128, [0, 512, 1024, 5120, 5632, 6144]),
    ("kivi2", 128, 128, [0, 256, 512, 4608, 4864, 5120]),
    ("kivi2", 128, 256, [0, 512, 1024, 9216, 9728, 10240]),
    ("kivi_k4v2", 32, 64, [0, 512, 1024, 5120, 5632, 6144]),
    ("kivi_k4v2", 32, 128, [0, 1024, 2048, 10240, 11264, 12288]),
    ("kivi4", 32, 64, [0, 512, 1024, 5120, 5632, 6144]),
    ("kivi4", 32, 128, [0, 1024, 2048, 10240, 11264, 12288]),
]

# dtype, group size, head size; shape of k_scale, k_codes, v_scale, v_codes.
SHAPES = [
    ("kivi2", 32, 64, (4, 64), (2, 16, 16, 4), (2, 128), (2, 16, 16, 4)),
    ("kivi2", 128, 256, (1, 256), (2, 64, 16, 4), (2, 128), (8, 16, 16, 4)),
    ("kivi_k4v2", 32, 96, (4, 96), (4, 24, 16, 4), (3, 128), (3, 16, 16, 4)),
    ("kivi4", 64, 128, (2, 128), (4, 32, 16, 4), (2, 128), (4, 32, 16, 4)),
]

MODEL_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def page_format(dtype: str, g: int, d: int, raw: torch.dtype = torch.bfloat16) -> PageFormat:
    return PageFormat.of(KiviConfig(dtype, group_size=g), d, raw)


def label(*row: object) -> str:
    return "{}-G{}-D{}".format(*row)


@pytest.mark.parametrize("raw", MODEL_DTYPES, ids=str)
@pytest.mark.parametrize("row", QUANTIZED, ids=[label(*r) for r in QUANTIZED])
def test_sizes(row: tuple, raw: torch.dtype) -> None:
    dtype, g, d, token_bytes, page_bytes, tokens_16, tokens_32 = row
    fmt = page_format(dtype, g, d, raw)
    assert fmt.bytes_per_token == token_bytes
    assert fmt.page_bytes == page_bytes
    assert fmt.raw_tokens == (tokens_32 if raw == torch.float32 else tokens_16)
    # They fill the page exactly: 2 * D numbers of 2 or 4 bytes each.
    assert fmt.raw_tokens * 2 * d * (4 if raw == torch.float32 else 2) == page_bytes
    assert token_bytes * 128 == page_bytes
    assert not fmt.is_raw


@pytest.mark.parametrize("raw", MODEL_DTYPES, ids=str)
@pytest.mark.parametrize("row", RAW, ids=[f"D{r[0]}" for r in RAW])
def test_sizes_of_raw_pages(row: tuple, raw: torch.dtype) -> None:
    d, *sizes = row
    fmt = page_format("kivi_raw", 32, d, raw)
    token_bytes, page_bytes = sizes[2:] if raw == torch.float32 else sizes[:2]
    assert (fmt.bytes_per_token, fmt.page_bytes) == (token_bytes, page_bytes)
    assert fmt.raw_tokens == 32
    assert fmt.is_raw
    fields = {name: (f.offset, f.shape, f.dtype) for name, f in fmt.fields.items()}
    half = page_bytes // 2
    assert fields == {"k_codes": (0, (128, d), raw), "v_codes": (half, (128, d), raw)}


def test_every_combination_is_in_the_tables() -> None:
    """So that a new dtype or head size cannot be left out."""
    head_sizes = (32, 64, 96, 128, 160, 192, 256)
    wanted = {
        (dtype, g, d)
        for dtype in ("kivi2", "kivi_k4v2", "kivi4")
        for g in (32, 64, 128)
        for d in head_sizes
        if d % g == 0
    }
    assert {row[:3] for row in QUANTIZED} == wanted
    assert tuple(row[0] for row in RAW) == head_sizes


@pytest.mark.parametrize("row", OFFSETS, ids=[label(*r) for r in OFFSETS])
def test_offsets(row: tuple) -> None:
    fields = page_format(*row[:3]).fields
    assert list(fields) == NAMES
    assert [f.offset for f in fields.values()] == row[3]


@pytest.mark.parametrize("row", SHAPES, ids=[label(*r) for r in SHAPES])
def test_shapes(row: tuple) -> None:
    fields = page_format(*row[:3]).fields
    k_scale, k_codes, v_scale, v_codes = row[3:]
    shapes = [k_scale, k_scale, k_codes, v_scale, v_scale, v_codes]
    assert [f.shape for f in fields.values()] == shapes
    half, byte = torch.float16, torch.uint8
    assert [f.dtype for f in fields.values()] == [half, half, byte, half, half, byte]


@pytest.mark.parametrize("raw", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "row", QUANTIZED + [("kivi_raw", 32, r[0]) for r in RAW], ids=lambda r: label(*r)
)
def test_fields_tile_the_page(row: tuple, raw: torch.dtype) -> None:
    fmt = page_format(*row[:3], raw)
    owners = [0] * fmt.page_bytes
    for field in fmt.fields.values():
        assert field.offset % 64 == 0
        for byte in range(field.offset, field.offset + field.nbytes):
            owners[byte] += 1
    assert set(owners) == {1}


def test_fields_are_read_through_strides() -> None:
    """Pages of several layers may lie interleaved, heads and blocks in any order."""
    fmt = page_format("kivi2", 32, 32)
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
