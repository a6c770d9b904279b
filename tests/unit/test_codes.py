"""Where the bits of a code lie: against literals and against NumPy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kivi_vllm.config import HEAD_SIZES
from kivi_vllm.ops import codes
from kivi_vllm.ops.codes import Side, pack, unpack
from tests.unit import kivi_numpy

# side, bits, head size, byte of the field -> token and channel of its codes, lowest bits first.
ORDER = [
    ("k", 2, 64, 0, [(0, 0), (16, 0), (32, 0), (48, 0)]),
    ("k", 2, 64, 3, [(0, 3), (16, 3), (32, 3), (48, 3)]),
    ("k", 2, 64, 4, [(1, 0), (17, 0), (33, 0), (49, 0)]),
    ("k", 2, 64, 64, [(0, 4), (16, 4), (32, 4), (48, 4)]),
    ("k", 2, 64, 1024, [(64, 0), (80, 0), (96, 0), (112, 0)]),
    ("k", 4, 64, 1024, [(32, 0), (48, 0)]),
    ("k", 4, 96, 64 * 24 * 3 + 5, [(97, 1), (113, 1)]),
    ("v", 2, 64, 0, [(0, 0), (0, 16), (64, 0), (64, 16)]),
    ("v", 2, 64, 3, [(3, 0), (3, 16), (67, 0), (67, 16)]),
    ("v", 2, 64, 4, [(0, 1), (0, 17), (64, 1), (64, 17)]),
    ("v", 2, 64, 64, [(4, 0), (4, 16), (68, 0), (68, 16)]),
    ("v", 2, 96, 1024 * 2, [(0, 64), (0, 80), (64, 64), (64, 80)]),
    ("v", 4, 64, 64, [(4, 0), (4, 16)]),
    ("v", 4, 64, 2048 + 64 * 31 + 63, [(127, 47), (127, 63)]),
    # Of 3 bits: the low bits of two slots.
    ("k", 3, 64, 0, [(0, 0), (16, 0)]),
    ("k", 3, 64, 1024 * 2 + 64 * 15 + 63, [(79 + 0, 63), (95, 63)]),
    ("v", 3, 64, 64, [(4, 0), (4, 16)]),
    ("v", 3, 64, 64 * 24 + 64 * 23 + 63, [(95, 47), (95, 63)]),
]


@pytest.mark.parametrize("row", ORDER, ids=str)
def test_literal_order_of_codes(row: tuple) -> None:
    side, bits, d, byte, wanted = row
    packed = torch.zeros(16 * d * bits, dtype=torch.uint8)
    packed[byte] = 255
    # Spare bits are those of other codes, which then are 1, 2 or 4.
    own = unpack(packed, bits, side) == 2**bits - 1
    assert own.nonzero().tolist() == sorted(map(list, wanted))
    for slot, at in enumerate(wanted):
        packed[byte] = 1 << slot * (8 // len(wanted))
        codes = unpack(packed, bits, side)
        assert codes.nonzero().tolist() == [list(at)] and codes.max() == 1


# side, head size, token and channel -> bytes and bits of a code of 3 bits, the lowest first.
SPARE = [
    ("k", 64, (96, 0), [(0, 3), (1024, 3), (2048, 3)]),
    ("k", 64, (112, 0), [(0, 7), (1024, 7), (2048, 7)]),
    ("k", 64, (127, 63), [(1023, 7), (2047, 7), (3071, 7)]),
    ("k", 96, (97, 5), [(64 + 5, 3), (1536 + 69, 3), (3072 + 69, 3)]),
    ("v", 64, (96, 0), [(0, 3), (64, 3), (128, 3)]),
    ("v", 64, (96, 16), [(0, 7), (64, 7), (128, 7)]),
    ("v", 64, (127, 63), [(3071 - 128, 7), (3071 - 64, 7), (3071, 7)]),
    ("v", 96, (101, 65), [(3072 + 192 + 5, 3), (3072 + 256 + 5, 3), (3072 + 320 + 5, 3)]),
]


@pytest.mark.parametrize("row", SPARE, ids=str)
def test_literal_order_of_spare_bits(row: tuple) -> None:
    side, d, at, wanted = row
    for m, (byte, bit) in enumerate(wanted):
        codes = torch.zeros(128, d, dtype=torch.uint8)
        codes[at] = 1 << m
        packed = pack(codes, 3, side)
        assert packed.nonzero().flatten().tolist() == [byte]
        assert packed[byte] == 1 << bit


@given(st.sampled_from([2, 3, 4]), st.integers(0, 2**32), st.sampled_from(HEAD_SIZES))
@settings(max_examples=40, deadline=None)
def test_packing_is_inverted(bits: int, seed: int, d: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (128, d), np.uint8)
    for side in ("k", "v"):
        packed = pack(torch.from_numpy(codes), bits, side)
        assert packed.shape == (16 * d * bits,)
        assert torch.equal(packed, torch.from_numpy(kivi_numpy.pack(codes, bits, side)))
        assert torch.equal(unpack(packed, bits, side), torch.from_numpy(codes))


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_byte_is_unpacked_and_packed_again(bits: int, side: Side) -> None:
    every = torch.arange(16 * 32 * bits).to(torch.uint8)
    codes = unpack(every, bits, side)
    assert torch.equal(codes, torch.from_numpy(kivi_numpy.unpack(every.numpy(), bits, side, 32)))
    assert torch.equal(pack(codes, bits, side), every)


def test_a_number_of_bits_is_asked_for_here_alone() -> None:
    """All else asks files of this name, so that a format with new bits is their affair."""
    package = Path(codes.__file__).parents[1]
    asks = re.compile(r"(bits|_BITS|\bKB|\bVB) *[=!]= *[0-9]", re.IGNORECASE)
    sources = (x for end in ("py", "h", "cpp", "cu", "cuh") for x in package.rglob(f"*.{end}"))
    found = {x.relative_to(package).as_posix() for x in sources if asks.search(x.read_text())}
    assert {x for x in found if Path(x).stem != "codes"} <= {"config.py", "ops/format.py"}
    assert found, "the pattern finds nothing at all"
