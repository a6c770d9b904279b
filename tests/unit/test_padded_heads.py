"""Head sizes 80 and 112, in pages of 96 and 128 channels: as heads of that size without padding."""

from __future__ import annotations

import pytest
import torch

from kivi_vllm.config import PADDED_HEAD_SIZES, KiviConfig
from kivi_vllm.ops import reference
from kivi_vllm.ops.codec import decode_pages, encode_pages
from kivi_vllm.ops.codes import unpack
from kivi_vllm.ops.cpu import operators as native
from kivi_vllm.ops.format import PageFormat
from kivi_vllm.ops.paper import quantize
from kivi_vllm.ops.two_level import encode_keys
from tests.unit import native as native_tests
from tests.unit.padded_heads import ThroughTheLayer
from tests.unit.simulator import TOLERANCE, Case, Simulator

B = 128
CASES = [
    Case(head_size=80, model=torch.bfloat16, residual=32),
    Case("kivi_k3v2", head_size=112, heads=(4, 1), exact=True, window=150),
    Case("kivi_k4v3", head_size=80, heads=(3, 3), sinks=8, drafts=3),
    Case("kivi_raw", head_size=112, residual=64, model=torch.float16),
    Case("kivi4", "paper", head_size=80, soft_cap=20.0, alibi=True, model=torch.bfloat16),
]


def heads(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values [3, 128, size], and both with zeros up to the size of the pages."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(3, B, size, generator=generator) + torch.arange(size).sin() for _ in "kv")
    more = PADDED_HEAD_SIZES[size] - size
    wide = (torch.nn.functional.pad(x, (0, more)) for x in (k, v))
    return k, v, *wide  # type: ignore[return-value]


@pytest.mark.parametrize("ops", [reference, native], ids=["reference", "native"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_that_over_heads_without_padding(case: Case, ops: object) -> None:
    """In float64 over 80 or 112 channels, of what the second implementation of pages gives."""
    tolerance = TOLERANCE if ops is reference else native_tests.TOLERANCE
    sim = Simulator(case, ops=ThroughTheLayer(ops), tolerance=tolerance)
    assert sim.fmt.head_size == PADDED_HEAD_SIZES[case.head_size]
    sim.run(sim.add(case.tokens), sim.add(170))
    sim.check_untouched()


def test_what_fills_heads_up_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with ones in place of zeros, the same comparison fails."""
    from kivi_vllm.attention import impl

    monkeypatch.setattr(impl, "pad", lambda x, more: torch.nn.functional.pad(x, more, value=1.0))
    sim = Simulator(CASES[0], ops=ThroughTheLayer(reference))
    with pytest.raises(AssertionError, match="are off by"):
        sim.run(sim.add(300))


@pytest.mark.parametrize("dtype", ["kivi2", "kivi_k3v2", "kivi4"])
@pytest.mark.parametrize("size", [80, 112])
def test_keys_have_the_codes_and_ranges_of_unpadded_ones(size: int, dtype: str) -> None:
    fmt = PageFormat.of(KiviConfig.from_options(dtype, {}), size, torch.float32)
    k, _, wide, values = heads(size, seed=size)
    pages = encode_pages(wide, values, fmt)
    fields = {name: field.of(pages) for name, field in fmt.fields.items()}
    codes, low, step, ranges = encode_keys(k, fmt.k_bits, fmt.group_size)
    found = unpack(fields["k_codes"].flatten(-4), fmt.k_bits, "k")
    assert torch.equal(found[..., :size], codes)
    for name, wanted in (("k_low", low), ("k_step", step), ("k_range", ranges)):
        assert torch.equal(fields[name][..., :size], wanted)
    # What fills keys up is read as nothing.
    assert not decode_pages(pages, fmt)[0][..., size:].any()


@pytest.mark.parametrize("size", [80, 112])
def test_values_of_whole_groups_have_the_papers_codes(size: int) -> None:
    fmt = PageFormat.of(KiviConfig.from_options("kivi2", {"recipe": "paper"}), size, torch.float32)
    _, v, keys, wide = heads(size, seed=size)
    pages = encode_pages(keys, wide, fmt)
    found = unpack(fmt.fields["v_codes"].of(pages).flatten(-4), fmt.v_bits, "v")
    whole = size // fmt.group_size * fmt.group_size
    codes, _, _ = quantize(v[..., :whole].unflatten(-1, (-1, fmt.group_size)), fmt.v_bits, -1)
    assert torch.equal(found[..., :whole], codes.flatten(-2))


@pytest.mark.parametrize("dtype", ["kivi2", "kivi_k4v3", "kivi4"])
@pytest.mark.parametrize("size", [80, 112])
def test_values_lose_no_more_than_in_heads_that_need_no_padding(size: int, dtype: str) -> None:
    """Zeros are rotated into the values beside them, but a token's scale is fitted to all."""

    def error(size: int) -> float:
        fmt = PageFormat.of(KiviConfig.from_options(dtype, {}), size, torch.float32)
        v = torch.randn(8, B, size, generator=torch.Generator().manual_seed(1))
        wide = torch.nn.functional.pad(v, (0, fmt.head_size - size))
        back = decode_pages(encode_pages(wide, wide, fmt), fmt)[1][..., :size]
        return ((back - v).square().mean() / v.square().mean()).sqrt().item()

    assert error(size) < 1.1 * error(PADDED_HEAD_SIZES[size])
