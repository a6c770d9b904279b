"""Quantization, packing and pages of the reference against NumPy and against literals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kivi_vllm.config import HEAD_SIZES, QUANTIZED_DTYPES, KiviConfig
from kivi_vllm.ops import codec, paper
from kivi_vllm.ops.codes import unpack
from kivi_vllm.ops.format import PageFormat
from tests.unit import kivi_numpy

MODEL_DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Zeros, fp16 and fp32 subnormals, fp16's end and beyond, infinities, NaN.
SPECIAL = [0.0, -0.0, 6e-8, -3e-8, 1e-7, 1e-40, 6.1e-5, 1.0, 65504.0, -65504.0, 65519.0, 65520.0]
SPECIAL += [1e5, -1e5, 1e30, -1e30, 2e38, 3e38, -3e38, float("inf"), -float("inf"), float("nan")]

best_formats = st.builds(
    lambda dtype, d, raw, sinks: PageFormat.of(
        KiviConfig.from_options(dtype, {"sink_tokens": sinks}), d, raw
    ),
    st.sampled_from(QUANTIZED_DTYPES),
    st.sampled_from(HEAD_SIZES),
    st.sampled_from(MODEL_DTYPES),
    st.sampled_from([4, 4, 8]),
)
paper_formats = st.builds(
    lambda dtype, shape, raw, sinks: PageFormat.of(
        KiviConfig.from_options(
            dtype, {"recipe": "paper", "group_size": shape[0], "sink_tokens": sinks}
        ),
        shape[1],
        raw,
    ),
    st.sampled_from(["kivi2", "kivi4"]),
    st.sampled_from([(g, d) for g in (32, 64, 128) for d in HEAD_SIZES if d % g == 0]),
    st.sampled_from(MODEL_DTYPES),
    st.sampled_from([0, 0, 8]),
)
formats = st.one_of(best_formats, best_formats, paper_formats)


@st.composite
def blocks(draw: st.DrawFn, fmt: PageFormat, *, ordinary: bool = False) -> torch.Tensor:
    """Keys or values [128, D] of one head: noise, constants, and special values here and there."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (128, fmt.head_size)
    kind = draw(st.sampled_from(["normal", "uniform", "integers", "constant", "rows", "columns"]))
    x = {
        "normal": lambda: rng.normal(size=shape),
        "uniform": lambda: rng.uniform(-3, 5, shape),
        "integers": lambda: rng.integers(-8, 9, shape),  # many ties
        "constant": lambda: np.full(shape, rng.normal()),
        "rows": lambda: np.repeat(rng.normal(size=(128, 1)), fmt.head_size, 1),
        "columns": lambda: np.repeat(rng.normal(size=(1, fmt.head_size)), 128, 0),
    }[kind]()
    exponents = st.floats(-2, 2) if ordinary else st.sampled_from([-38, -8, -7, -4, 0, 0, 4, 5, 29])
    x = x * 10.0 ** draw(exponents) + draw(st.sampled_from([0, 0, 1, -100]))
    if not ordinary:
        special = draw(st.lists(st.sampled_from(SPECIAL), max_size=6))
        for value in special:
            at = rng.integers(0, x.size, draw(st.sampled_from([1, 1, 300])))
            x.flat[at] = value
    return torch.from_numpy(x).to(fmt.raw_dtype)


def both(
    fmt: PageFormat, k: torch.Tensor, v: torch.Tensor, sinks: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Page bytes of the reference and of NumPy, with the NaN and zeros that are one alike."""
    page = codec.encode_pages(k, v, fmt, sinks).numpy()
    again = kivi_numpy.encode_page(k.float().numpy(), v.float().numpy(), fmt, sinks)
    ours, theirs = (kivi_numpy.canonical(x, fmt) for x in (page, again))
    return torch.from_numpy(ours), torch.from_numpy(theirs)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


# ------------------------------------------------------------------ literals


def test_golden_page_of_2_bits() -> None:
    fmt = PageFormat(2, 2, 32, 32, torch.float32, two_level=False)
    s, c = torch.arange(128.0)[:, None], torch.arange(32.0)[None]
    k = (s % 4).expand(128, 32)  # 0 1 2 3 along each channel: zero 0, scale 1
    v = (c % 4 * 0.5 - 1).expand(128, 32)  # -1 -0.5 0 0.5 along each token: zero -1, scale 0.5
    wanted = (
        bytes.fromhex("003c") * 128  # k_scale, 4 groups of tokens x 32 channels
        + bytes.fromhex("0000") * 128  # k_zero
        + bytes.fromhex("00000000 55555555 aaaaaaaa ffffffff") * 64  # k_codes: lanes are tokens
        + bytes.fromhex("0038") * 128  # v_scale
        + bytes.fromhex("00bc") * 128  # v_zero
        + bytes.fromhex("00000000 55555555 aaaaaaaa ffffffff") * 64  # v_codes: lanes are channels
    )
    page = codec.encode_pages(k, v, fmt)
    assert page.numpy().tobytes() == wanted
    assert all(map(torch.equal, codec.decode_pages(page, fmt), (k, v)))


def test_golden_page_of_4_bits() -> None:
    fmt = PageFormat(4, 4, 32, 32, torch.bfloat16, two_level=False)
    s, c = torch.arange(128)[:, None], torch.arange(32)[None]
    k = (s % 16 * 2 + 1).expand(128, 32).bfloat16()  # zero 1, scale 2
    v = (c % 16 - 16).expand(128, 32).bfloat16()  # zero -16, scale 1
    wanted = (
        bytes.fromhex("0040") * 128
        + bytes.fromhex("003c") * 128
        + b"".join(bytes([code * 0x11]) * 4 for code in range(16)) * 32
        + bytes.fromhex("003c") * 128
        + bytes.fromhex("00cc") * 128
        + b"".join(bytes([code * 0x11]) * 4 for code in range(16)) * 32
    )
    page = codec.encode_pages(k, v, fmt)
    assert page.numpy().tobytes() == wanted
    assert all(map(torch.equal, codec.decode_pages(page, fmt), (k.float(), v.float())))


# x, bits -> codes, scale, zero of one group.
GROUPS = {
    "ties-to-even": ([0.0, 0.5, 1.5, 2.5, 3.0], 2, [0, 0, 2, 2, 3], 1.0, 0.0),
    "ties-to-even-4-bits": ([0.0, 0.5, 6.5, 7.5, 15.0], 4, [0, 0, 6, 8, 15], 1.0, 0.0),
    "constant": ([7.0, 7.0, 7.0], 2, [0, 0, 0], 0.0, 7.0),
    "zeros": ([0.0, 0.0], 4, [0, 0], 0.0, 0.0),
    # 2049 is no fp16 number; the codes are those of the rounded zero, 2048.
    "rounded-zero": ([2049.0, 2052.0], 2, [1, 3], 1.0, 2048.0),
    # A third of 6e-8, below half of the least fp16 number, rounds to scale 0.
    "scale-underflows": ([0.0, 6e-8], 2, [0, 0], 0.0, 0.0),
    "least-scale": ([0.0, 2.0**-24, 3 * 2.0**-24], 2, [0, 1, 3], 2.0**-24, 0.0),
    "saturated": ([-1e6, 0.0, 1e6], 2, [0, 1, 3], 65504.0, -65504.0),
    "plus-infinity": ([0.0, 1.0, float("inf")], 2, [0, 0, 3], 65504.0, 0.0),
    "minus-infinity": ([-float("inf"), 0.0, 1e30], 2, [0, 1, 3], 65504.0, -65504.0),
    "both-infinities": ([-float("inf"), 5.0, float("inf")], 4, [0, 1, 15], 65504.0, -65504.0),
    "only-infinities": ([float("inf"), float("inf")], 2, [0, 0], 0.0, 65504.0),
    "nan": ([1.0, float("nan"), 2.0], 2, [0, 0, 0], float("nan"), float("nan")),
    "nan-and-infinity": ([float("inf"), float("nan")], 4, [0, 0], float("nan"), float("nan")),
    "two-huge": ([2e38, 3e38], 2, [3, 3], 65504.0, 65504.0),
}


@pytest.mark.parametrize("case", GROUPS.values(), ids=[*GROUPS])
def test_literal_groups(case: tuple) -> None:
    x, bits, codes, scale, zero = case
    ours = paper.quantize(torch.tensor(x), bits, 0)
    theirs = kivi_numpy.quantize(np.array(x, np.float32)[None, :, None], bits)
    for got in (ours, [torch.from_numpy(part) for part in theirs]):
        assert got[0].flatten().tolist() == codes
        assert same(got[1].flatten().float(), torch.tensor([scale]))
        assert same(got[2].flatten().float(), torch.tensor([zero]))


# ---------------------------------------------------------------- properties


@given(st.data(), formats)
@settings(max_examples=120, deadline=None)
def test_pages_equal_numpy(data: st.DataObject, fmt: PageFormat) -> None:
    k, v = data.draw(blocks(fmt)), data.draw(blocks(fmt))
    ours, theirs = both(fmt, k, v, sinks=fmt.sink_tokens)
    assert torch.equal(ours, theirs)
    # Dequantized, exactly, and from bytes that NumPy wrote.
    wanted = kivi_numpy.decode_page(theirs.numpy(), fmt)
    for got, want in zip(codec.decode_pages(theirs, fmt), wanted, strict=True):
        assert same(got, torch.from_numpy(want))


@given(st.data(), formats)
@settings(max_examples=30, deadline=None)
def test_any_bytes_decode_alike(data: st.DataObject, fmt: PageFormat) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    page = rng.integers(0, 256, fmt.page_bytes, np.uint8)
    wanted = kivi_numpy.decode_page(page, fmt)
    for got, want in zip(codec.decode_pages(torch.from_numpy(page), fmt), wanted, strict=True):
        assert same(got, torch.from_numpy(want))


@given(st.data(), paper_formats)
@settings(max_examples=40, deadline=None)
def test_error_of_recipe_paper_is_half_a_step(data: st.DataObject, fmt: PageFormat) -> None:
    x = [data.draw(blocks(fmt, ordinary=True)) for _ in range(2)]
    page = codec.encode_pages(*x, fmt)
    scales = [fmt.fields[name].of(page).double() for name in ("k_scale", "v_scale")]
    scales = [
        scales[0].repeat_interleave(fmt.group_size, 0),
        scales[1].mT.repeat_interleave(fmt.group_size, 1),
    ]
    for got, true, scale, bits in zip(
        codec.decode_pages(page, fmt), x, scales, (fmt.k_bits, fmt.v_bits), strict=True
    ):
        spread = (2**bits - 1) * scale
        # fp16 rounds zero and the whole spread by 2^-11 of their size; and there are subnormals.
        slack = 2.0**-11 * (true.double().abs() + 2 * spread) + 2.0**-20
        assert ((got - true).abs() <= scale / 2 + slack).all()


@given(st.data(), paper_formats, st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
@settings(max_examples=40, deadline=None)
def test_poison_stays_in_its_group_of_recipe_paper(
    data: st.DataObject, fmt: PageFormat, poison: float
) -> None:
    g, d = fmt.group_size, fmt.head_size
    k, v = (data.draw(blocks(fmt, ordinary=True)) for _ in range(2))
    s, c = data.draw(st.integers(0, 127)), data.draw(st.integers(0, d - 1))
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[s, c] = bad_v[s, c] = poison
    clean, dirty = codec.encode_pages(k, v, fmt), codec.encode_pages(bad_k, bad_v, fmt)
    k_group, v_group = torch.zeros(2, 128, d, dtype=torch.bool)
    k_group[s // g * g : s // g * g + g, c] = True
    v_group[s, c // g * g : c // g * g + g] = True
    for name, group in (("k", k_group), ("v", v_group)):
        # One number of a group stands for all in scale and zero.
        at_group = group[::g] if name == "k" else group[:, ::g]
        for part, mask in (("scale", at_group), ("zero", at_group), ("codes", group)):
            field, bits = fmt.fields[f"{name}_{part}"], getattr(fmt, f"{name}_bits")
            a, b = field.of(clean), field.of(dirty)
            if part == "codes":
                a, b = (unpack(x.flatten(), bits, name) for x in (a, b))
            elif name == "v":
                a, b = a.mT, b.mT
            assert torch.equal(a[~mask], b[~mask])
    decoded = (codec.decode_pages(page, fmt) for page in (clean, dirty))
    for a, b, group in zip(*decoded, (k_group, v_group), strict=True):
        assert torch.equal(a[~group], b[~group])
        assert b[~group].isfinite().all()
        # Within the group: NaN is told, infinities saturate.
        assert b[group].isnan().all() if poison != poison else b[group].isfinite().all()


@pytest.mark.parametrize("raw", MODEL_DTYPES, ids=str)
def test_raw_pages_are_verbatim(raw: torch.dtype) -> None:
    fmt = PageFormat.of(KiviConfig.from_options("kivi_raw", {}), 64, raw)
    k, v = torch.randn(2, 3, 128, 64).to(raw)
    k[0, :7, 0] = torch.tensor([-0.0, 1e-40, 1e30, float("inf"), -float("inf"), float("nan"), 1e-7])
    page = codec.encode_pages(k, v, fmt)
    for block in range(3):
        stored = k[block].view(torch.uint8).flatten(), v[block].view(torch.uint8).flatten()
        assert torch.equal(page[block], torch.cat(stored))
    for got, want in zip(codec.decode_pages(page, fmt), (k, v), strict=True):
        assert same(got, want.float())


@pytest.mark.parametrize("sinks", [0, 4])
def test_pages_do_not_depend_on_those_beside_them(sinks: int) -> None:
    """Nor on how the blocks lie in memory."""
    fmt = PageFormat(3, 2, 32, 64, torch.float16, two_level=True, sink_tokens=sinks)
    k, v = torch.randn(2, 128, 3, 2, 64).half().permute(0, 2, 3, 1, 4)  # [3, 2, 128, 64] strided
    k[0, 1, 60, 5], v[0, 1, 77, 9], v[1, 0] = torch.nan, torch.inf, 0
    pages = codec.encode_pages(k, v, fmt, sinks)
    decoded = codec.decode_pages(pages, fmt)
    for i in range(3):
        for j in range(2):
            page = pages[i, j].numpy()
            ours, theirs = both(fmt, k[i, j], v[i, j], sinks)
            assert torch.equal(torch.from_numpy(kivi_numpy.canonical(page, fmt)), theirs)
            assert torch.equal(ours, theirs)
            alone = codec.decode_pages(pages[i, j].clone(), fmt)
            assert all(same(x[i, j], y) for x, y in zip(decoded, alone, strict=True))


def test_negative_control_near_formulas_differ() -> None:
    """Codes of the unrounded zero and scale, and ties away from zero, are told apart."""
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1
    codes, _, _ = paper.quantize(x, 2, 1)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    unrounded = ((x - low) / ((high - low) / 3)).round().to(torch.uint8)
    assert 0 < (codes != unrounded).sum() < 100
    ties = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0])
    assert paper.quantize(ties, 2, 0)[0].tolist() != (ties + 0.5).floor().tolist()
