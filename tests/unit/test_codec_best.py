"""What recipe "best" promises of its pages, beyond that they are the same everywhere."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kivi_vllm.config import HEAD_SIZES, QUANTIZED_DTYPES, KiviConfig
from kivi_vllm.ops import codec, paper, two_level
from kivi_vllm.ops.codes import unpack
from kivi_vllm.ops.format import PageFormat
from tests.unit.test_codec import best_formats, blocks


@pytest.mark.parametrize("d", HEAD_SIZES)
def test_rotation_is_hadamards(d: int) -> None:
    x = torch.randn(5, d)
    y = codec.rotate(x)
    n = d & -d
    signs = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * int(np.log2(n)))
    wanted = (x.unflatten(-1, (-1, n)) @ torch.from_numpy(signs).float()).flatten(-2) * 2.0 ** -(
        int(np.log2(n)) // 2
    )
    assert torch.allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert torch.allclose(codec.rotate(y, inverse=True), x, rtol=1e-5, atol=1e-5)
    exact = torch.randint(-999, 999, (5, d)).float()  # sums below 2^24
    assert torch.equal(codec.rotate(codec.rotate(exact), inverse=True), exact)


def fitted(x: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`two_level.fit` of groups along `dim`, from their spans: scale and zero."""
    low, high = (f(x.float(), dim, keepdim=True) for f in (torch.amin, torch.amax))
    return two_level.fit(x.float(), low, high - low, (high - low) / (2**bits - 1), bits, dim)


def error(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    s, z = scale.double(), zero.double()
    codes = ((x - z) / s.where(s > 0, 1)).round().clamp(0, 2**bits - 1)
    return codes * s + z - x


@given(st.data(), best_formats)
@settings(max_examples=30, deadline=None)
def test_fitted_ranges_have_less_error(data: st.DataObject, fmt: PageFormat) -> None:
    """A number at the end of its group's span weighs five times one amid it."""
    x = data.draw(blocks(fmt, ordinary=True)).float().unflatten(0, (-1, fmt.group_size))
    low, high = (f(x, 1, keepdim=True).double() for f in (torch.amin, torch.amax))
    span = (high - low).clamp(min=1e-30)
    weight = 1 + (2 * (x - low) / span - 1).square().mul(4).round()
    spans, fits = ((high - low) / (2**fmt.k_bits - 1), low), fitted(x, fmt.k_bits, 1)
    errors = [(weight * error(x, *r, fmt.k_bits).square()).sum(1) for r in (spans, fits)]
    # The range is found from numbers rounded to 1,023 steps.
    step = x.abs().amax(1).double() * 2.0**-9 + 2.0**-20
    assert (errors[1] <= errors[0] * 1.05 + 5 * fmt.group_size * step.square()).all()


def test_fitting_gives_up_outliers_and_spares_the_rest() -> None:
    x = torch.cat([torch.linspace(-1, 1, 31), torch.tensor([8.0])])
    spans = torch.tensor([3.0]), torch.tensor([-1.0])
    errors = [error(x, *r, 2).square().sum() for r in (spans, fitted(x, 2, 0))]
    assert errors[1] < 0.8 * errors[0]


def test_golden_page_of_recipe_best() -> None:
    fmt = PageFormat(2, 2, 16, 32, torch.float32, two_level=True)
    s = torch.arange(128.0)[:, None]
    k = (s % 4 * 15).expand(128, 32)  # a scale of 15 steps of 1, and a zero of 0
    v = torch.zeros(128, 32)
    v[:, 0] = 1 - s[:, 0] % 2 * 2  # rotated: 1/4 or -1/4 in all channels, 1.5 codes from the middle
    wanted = (
        bytes.fromhex("0000") * 32  # k_low
        + bytes.fromhex("003c") * 32  # k_step
        + bytes.fromhex("0f") * 256  # k_range
        + bytes.fromhex("00000000 55555555 aaaaaaaa ffffffff") * 64  # k_codes: lanes are tokens
        + bytes.fromhex("0000") * 32  # v_mean
        + bytes.fromhex("5531") * 128  # v_scale: a sixth
        + bytes.fromhex("ff00ff00") * 256  # v_codes: tokens lie side by side
        + bytes(64)
    )
    page = codec.encode_pages(k, v, fmt)
    assert page.numpy().tobytes() == wanted
    got_k, got_v = codec.decode_pages(page, fmt)
    assert torch.equal(got_k, k)
    assert (got_v - v).abs().max() < 2.0**-11


@pytest.mark.parametrize(("bits", "group"), [(2, 16), (3, 32), (4, 32)])
def test_ranges_of_two_levels_are_as_good_as_ranges_of_fp16(bits: int, group: int) -> None:
    """With keys as models have them: channels of different size and mean, and a slow wave."""
    generator = torch.Generator().manual_seed(0)
    size, mean = torch.rand(2, 64, generator=generator) * 4
    wave = torch.sin(torch.arange(128)[:, None] * torch.rand(64, generator=generator) * 0.2)
    k = torch.randn(128, 64, generator=generator) * size + mean * 5 + wave * 3
    codes, low, step, ranges = two_level.encode_keys(k, bits, group)
    assert ranges.shape == (128 // group, 64)
    ours = two_level.decode_keys(codes, low, step, ranges, bits) - k
    groups = k.unflatten(0, (-1, group))
    published = paper.dequantize(*paper.quantize(groups, bits, 1)) - groups
    fp16 = error(groups, *fitted(groups, bits, 1), bits)
    fp16, published, ours = (x.square().mean() for x in (fp16, published, ours))
    assert fp16 < ours < 1.15 * fp16
    assert ours < 1.01 * published


# By bits, the part of its power that a Gaussian loses to evenly spaced levels: by so much scales of
# least squares alone shrink it.
@pytest.mark.parametrize(("bits", "lost"), [(2, 0.1188), (3, 0.0374), (4, 0.0115)])
def test_values_keep_their_size_and_means_are_worth_their_bytes(bits: int, lost: float) -> None:
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(128, 64, generator=generator) + torch.randn(64, generator=generator)
    sizes = torch.rand(128, 1, generator=generator) * 9 + 1
    # With a sign of its own for each token no channel has a mean.
    signs = torch.randint(0, 2, (128, 1), generator=generator) * 2.0 - 1
    errors = []
    for x in (v, v * signs):
        codes, scale, mean = two_level.encode_values(x * sizes, bits)
        got = two_level.decode_values(codes, scale, mean, bits) / sizes
        along = (got * x).sum(-1) / x.square().sum(-1)
        assert (along.mean() - 1).abs() < lost / 2
        errors.append((got - x).square().mean())
    assert errors[0] < 0.85 * errors[1]


@given(st.data(), best_formats, st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
@settings(max_examples=40, deadline=None)
def test_poison_stays_in_its_channel_and_its_token(
    data: st.DataObject, fmt: PageFormat, poison: float
) -> None:
    k, v = (data.draw(blocks(fmt, ordinary=True)) for _ in range(2))
    s, c = data.draw(st.integers(0, 127)), data.draw(st.integers(0, fmt.head_size - 1))
    bad_k, bad_v, without = k.clone(), v.clone(), v.clone()
    bad_k[s, c] = bad_v[s, c] = poison
    finite = bool(bad_v[s, c].isfinite())
    if not finite:
        without[s] = 0  # a token that is not finite counts as 0 in the means
    clean, dirty = codec.encode_pages(k, without, fmt), codec.encode_pages(bad_k, bad_v, fmt)
    fields = {name: (f.of(clean), f.of(dirty)) for name, f in fmt.fields.items()}
    others = torch.arange(fmt.head_size) != c
    for name in ("k_low", "k_step", "k_range"):
        a, b = fields[name]
        assert torch.equal(a[..., others], b[..., others])
    a, b = (unpack(x.flatten(), fmt.k_bits, "k") for x in fields["k_codes"])
    assert torch.equal(a[:, others], b[:, others])
    if not finite:
        for name in ("v_mean", "v_codes"):
            assert torch.equal(*fields[name])
        a, b = fields["v_scale"]
        assert torch.equal(a[torch.arange(128) != s], b[torch.arange(128) != s])
        assert a[s] == 0 and b[s].isnan()
    got_k, got_v = codec.decode_pages(dirty, fmt)
    assert got_k[:, others].isfinite().all()
    assert got_v[torch.arange(128) != s].isfinite().all()
    # NaN is told; infinities of a key saturate.
    assert got_k[:, c].isnan().all() if poison != poison else got_k[:, c].isfinite().all()
    assert got_v[s].isnan().all() != finite


@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, -100.3, 6e-8, 1e-7, 1e-40, 60000.0, 1e30, 3e38])
def test_numbers_that_are_all_equal(dtype: str, value: float) -> None:
    """Keys are as exact as fp16; of values, a part of the levels' distance is lost."""
    fmt = PageFormat.of(KiviConfig.from_options(dtype, {}), 64, torch.float32)
    x = torch.full((128, 64), value)
    k, v = codec.decode_pages(codec.encode_pages(x, x, fmt, 4), fmt)
    held = min(value, 65504.0)
    if value < 3e38:
        assert (k - held).abs().max() <= abs(held) * 2.0**-11 + 2.0**-22
    if abs(value) < 1e30:  # a scale beyond fp16 is cut
        assert (v - value).square().mean().sqrt() <= abs(value) * 0.2 + 2.0**-20
    assert k.isfinite().all()
    assert v.isnan().all() if value == 3e38 else v.isfinite().all()  # rotated, it is beyond fp32


@pytest.mark.parametrize("sinks", [4, 8, 16])
@pytest.mark.parametrize("dtype", ["kivi2", "kivi_k3v2"])
def test_sinks_touch_neither_ranges_nor_means_of_others(dtype: str, sinks: int) -> None:
    config = KiviConfig.from_options(dtype, {"sink_tokens": sinks})
    fmt = PageFormat.of(config, 64, torch.float16)
    generator = torch.Generator().manual_seed(sinks)
    k, v = torch.randn(2, 128, 64, generator=generator).half()
    loud_k, loud_v = k.clone(), v.clone()
    loud_k[:sinks] *= 100
    loud_v[:sinks] = loud_v[:sinks] * 100 + 50
    a, b = (codec.encode_pages(*x, fmt, sinks) for x in ((k, v), (loud_k, loud_v)))
    c = codec.encode_pages(loud_k, loud_v, fmt)  # the negative control
    for name, field in fmt.fields.items():
        if name == "v_scale":
            assert torch.equal(field.of(a)[sinks:], field.of(b)[sinks:])
        elif name == "v_codes":
            codes = [unpack(field.of(x).flatten(), fmt.v_bits, "v")[sinks:] for x in (a, b)]
            assert torch.equal(*codes)
        else:
            assert torch.equal(field.of(a), field.of(b))
        assert not torch.equal(field.of(a), field.of(c))
