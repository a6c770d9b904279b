"""Both kinds of pages and attention once more, in NumPy, from docs/format.md alone.

Nothing here imports `kivi_vllm`: the tests compare the two. All sums are of whole numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]
Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]
Doubles = NDArray[np.float64]

TOKENS = 128
NAN_HALF = 0x7E00
LARGEST = np.float32(65504)


class Format(Protocol):
    """What there is to know of a page."""

    k_bits: int
    v_bits: int
    group_size: int
    head_size: int
    two_level: bool


def to_half(x: Floats) -> Halves:
    """Nearest fp16; what lies beyond its range becomes ±65504. NaN stays."""
    return np.clip(x, -LARGEST, LARGEST).astype(np.float16)


def single(x: Any) -> Floats:
    return np.asarray(x, np.float32)


def whole(x: Floats) -> Ints:
    """Of whole numbers; NaN, which nobody reads then, becomes 0."""
    return np.nan_to_num(x).astype(np.int64)


# -------------------------------------------------------------------- ranges


def span(groups: Floats, bits: int) -> tuple[Floats, Floats, Floats]:
    """Of groups along axis 1: least number, span, scale, each [n, D]."""
    low, high = groups.min(1), groups.max(1)
    spread = np.where(high == low, np.float32(0), high - low)  # two equal infinities too
    return low, spread, spread / single(2**bits - 1)


def quantize(groups: Floats, bits: int) -> tuple[Bytes, Halves, Halves]:
    """Groups along axis 1 of [n, G, D]: codes [n, G, D], scale and zero [n, D], as published."""
    with np.errstate(all="ignore"):
        low, _, step = span(groups, bits)
        zero, scale = to_half(low), to_half(step)
        steps = np.rint((groups - single(zero)[:, None]) / single(scale)[:, None])
        steps = np.where(scale[:, None] > 0, steps, 0)  # scale 0 or NaN
        return np.clip(steps, 0, 2**bits - 1).astype(np.uint8), scale, zero


def fitted(groups: Floats, bits: int) -> tuple[Floats, Floats]:
    """Scale and zero [n, D] of groups along axis 1, by least squares from their spans."""
    low, spread, scale = span(groups, bits)
    useful = (spread > 1e-6) & (spread < LARGEST)  # nor NaN
    most = 2**bits - 1
    u = whole(np.rint(np.clip((groups - low[:, None]) * (1023 / spread)[:, None], 0, 1023)))
    u[np.broadcast_to(~useful[:, None], u.shape)] = 0
    # Thresholds of the weights 1 to 5.
    w = 1 + sum(((2 * u - 1023) ** 2 > 2**17 * (2 * i + 1)).astype(np.int64) for i in range(4))
    slope, start = np.full_like(low, single(1023) / single(most)), np.zeros_like(low)
    for _ in range(2):
        steps = (single(u) - start[:, None]) * (1 / slope)[:, None]
        c = whole(np.rint(np.clip(steps, 0, most)))
        n, c1, c2, u1, cu = ((w * x).sum(1) for x in (np.ones_like(c), c, c * c, u, c * u))
        several = n * c2 != c1 * c1
        below = np.where(several, n * c2 - c1 * c1, 1)
        slope = np.where(several, single((n * cu - c1 * u1) / below), slope)
        start = np.where(several, single((u1 * c2 - c1 * cu) / below), start)
    step = spread / single(1023)
    zero = single(low.astype(float) + start.astype(float) * step.astype(float))
    return np.where(useful, slope * step, scale), np.where(useful, zero, low)


def encode_keys(k: Floats, bits: int, g: int) -> tuple[Bytes, Halves, Halves, Bytes]:
    """k [128, D]: codes [128, D], low and step [D], ranges [128 / g, D]."""
    most, r = 2**bits - 1, {2: 1, 3: 4, 4: 8}[bits]
    groups = k.reshape(TOKENS // g, g, -1)
    with np.errstate(all="ignore"):
        scale, zero = fitted(groups, bits)
        scale, zero = np.minimum(scale, single(60000)), np.clip(zero, -LARGEST, LARGEST)
        lost = (np.isnan(scale) | np.isnan(zero)).any(0)
        low = to_half(zero.min(0))
        start = single(low)
        step = np.maximum(scale.max(0) / single(15), (zero - start).max(0) / single(15 * r))
        step = to_half(np.maximum(step, single(2.0**-24)))
        unit = single(step)
        u = np.clip(np.rint(scale / unit), 1, 15)
        # The middle of the range, [codes 0 to most], stays where it was.
        half = most / 2
        middle = zero.astype(float) + scale.astype(float) * half - (u * unit).astype(float) * half
        z = np.clip(np.rint(single(middle - start.astype(float)) / (unit * r)), 0, 15)
        scale, zero = u * unit, start + z * (unit * r)
        codes = np.rint(np.clip((groups - zero[:, None]) * (1 / scale)[:, None], 0, most))
        codes = whole(np.where(lost, 0, codes)).astype(np.uint8)
        ranges = whole(np.where(lost, 0, u + 16 * z)).astype(np.uint8)
    low[lost], step[lost] = np.nan, 0
    return codes.reshape(k.shape), low, step, ranges


def cut(x: Floats) -> Ints:
    """Nearest whole numbers, at most 2^20."""
    return whole(np.rint(np.clip(x, -(2.0**20), 2.0**20)))


def root(x: Floats) -> Floats:
    return single(np.sqrt(x.astype(float)))


def encode_values(v: Floats, bits: int, sinks: int) -> tuple[Bytes, Halves, Halves]:
    """Rotated v [128, D]: codes [128, D], scale [128], mean [D]."""
    most, d = 2**bits - 1, v.shape[1]
    gauss = {2: 0.9957, 3: 0.5860, 4: 0.3352}[bits]
    with np.errstate(all="ignore"):
        size = np.abs(v).max(1)
        finite, good = np.isfinite(size), np.isfinite(size) & (size > 2.0**-60)
        size = np.where(good, size, np.float32(1))
        u = whole(np.rint(np.clip(v * (1023 / size)[:, None], -1023, 1023)))
        u[~good] = 0
        power = single((u * u).sum(1))
        scale = np.where(good, root(power) * single(gauss / d**0.5), single(1))

        def placed(scale: Floats) -> Ints:
            return cut(single(u) * (1024 / scale)[:, None])

        direction = single(placed(scale)[sinks:].sum(0)) / single(1024 * (TOKENS - sinks))
        taken = single((cut(direction * 8) ** 2).sum()) * single(gauss**2 / (64 * d))
        smaller = root(np.minimum((1 - np.minimum(taken, single(15 / 16))) * single(1.5), 1))
        first = scale = scale * smaller
        mean = to_half(direction / smaller)
        fine, coarse = (cut(single(mean) * parts) - parts // 2 * most for parts in (1024, 8))

        def moments(scale: Floats) -> tuple[Floats, Floats]:
            codes = whole(np.rint(np.clip(single(placed(scale) - fine) / 1024, 0, most)))
            stands_for = 8 * codes + coarse
            return single((u * stands_for).sum(1)), single((stands_for**2).sum(1))

        for _ in range(2):
            along, square = moments(scale)
            scale = np.where((along > 0) & (square > 0), along * 8 / square, scale)
            scale = np.minimum(np.maximum(scale, first / 4), first * 4)
        along = moments(scale)[0] * scale
        longer = np.clip(np.where(along > 0, power * 8 / along, single(1)), 1, single(1.5))
        scale = to_half(scale * longer * (size / single(1023)))
        scale[~good] = 0
        codes = np.clip(v * (1 / single(scale))[:, None], -(2.0**20), 2.0**20)
        codes = np.rint(np.clip(codes - (single(mean) - most / 2), 0, most))
        codes = whole(np.where(scale[:, None] > 0, codes, 0)).astype(np.uint8)
    scale[~finite] = np.nan
    return codes, scale, mean


def rotated(v: Floats, inverse: bool = False) -> Floats:
    """v [n, D] rotated, or rotated back, in the order of sums of the fast transform."""
    d = v.shape[1]
    n = d & -d
    log_n = n.bit_length() - 1
    h = 1
    with np.errstate(all="ignore"):
        while h < n:
            new = v.copy()
            for c in range(d):
                new[:, c] = v[:, c ^ h] - v[:, c] if c & h else v[:, c] + v[:, c ^ h]
            v, h = new, 2 * h
        return v * np.float32(2.0 ** -(log_n - log_n // 2 if inverse else log_n // 2))


# --------------------------------------------------------------------- pages


def layout(fmt: Format) -> dict[str, tuple[int, int]]:
    """Start and end byte of each field of a page."""
    d, g = fmt.head_size, fmt.group_size
    k_codes, v_codes = 16 * d * fmt.k_bits, 16 * d * fmt.v_bits
    if fmt.two_level:
        sizes = {"k_low": 2 * d, "k_step": 2 * d, "k_range": TOKENS // g * d, "k_codes": k_codes}
        sizes |= {"v_mean": 2 * d, "v_scale": 2 * TOKENS, "v_codes": v_codes}
    else:
        ranges = 256 * d // g
        sizes = {"k_scale": ranges, "k_zero": ranges, "k_codes": k_codes}
        sizes |= {"v_scale": ranges, "v_zero": ranges, "v_codes": v_codes}
    ends = np.cumsum(list(sizes.values())).tolist()
    return {name: (end - n, end) for (name, n), end in zip(sizes.items(), ends, strict=True)}


def place(side: str, token: int, channel: int, bits: int, d: int) -> list[tuple[int, int]]:
    """Byte of the field and bit in it of each bit of one code, the lowest first."""
    in_byte = 4 if bits == 2 else 2
    if side == "k":
        n, slot, lane = token // 16 // in_byte, token // 16 % in_byte, token % 16
        q, j, quads, last = channel // 4, channel % 4, d // 4, n == 3
    else:
        n, half, lane, j = channel // 32, channel % 32 // 16, channel % 16, token % 4
        q, slot = (token % 64 // 4, 2 * (token // 64) + half) if bits == 2 else (token // 4, half)
        quads, last = {2: 16, 3: 24, 4: 32}[bits], q >= 24
    pitch = 8 // in_byte

    def byte(n: int, q: int) -> int:
        return ((n * quads + q) * 16 + lane) * 4 + j

    if bits == 3 and last:  # each bit is the spare one of another code
        others = [(m, q) if side == "k" else (n, 3 * (q - 24) + m) for m in range(3)]
        return [(byte(*other), slot * pitch + 3) for other in others]
    return [(byte(n, q), slot * pitch + m) for m in range(bits)]


@functools.cache
def places(side: str, bits: int, d: int) -> tuple[NDArray[np.int_], NDArray[np.uint8]]:
    """`place` of every token and channel, bytes and bits [128, D, number of bits]."""
    all_of_them = [[place(side, s, c, bits, d) for c in range(d)] for s in range(TOKENS)]
    at = np.array(all_of_them)
    return at[..., 0], at[..., 1].astype(np.uint8)


def pack(codes: Bytes, bits: int, side: str) -> Bytes:
    """Codes [128, D] -> bytes."""
    byte, bit = places(side, bits, codes.shape[1])
    out = np.zeros(codes.size * bits // 8, np.uint8)
    np.bitwise_or.at(out, byte, (codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1) << bit)
    return out


def unpack(packed: Bytes, bits: int, side: str, d: int) -> Bytes:
    """Inverse of `pack`."""
    byte, bit = places(side, bits, d)
    found = (packed[byte] >> bit & 1) << np.arange(bits, dtype=np.uint8)
    return found.sum(-1, dtype=np.uint8)


def encode_page(k: Floats, v: Floats, fmt: Format, sinks: int = 0) -> Bytes:
    """One block of one kv head, k and v [128, D] -> page bytes."""
    g = fmt.group_size
    k = np.concatenate([k[sinks : 2 * sinks], k[sinks:]])  # others stand in for the sinks
    if fmt.two_level:
        k_codes, low, step, ranges = encode_keys(k, fmt.k_bits, g)
        v_codes, scale, mean = encode_values(rotated(v), fmt.v_bits, sinks)
        fields = {"k_low": low, "k_step": step, "k_range": ranges}
        fields |= {"v_mean": mean, "v_scale": scale}
    else:
        k_codes, k_scale, k_zero = quantize(k.reshape(TOKENS // g, g, -1), fmt.k_bits)
        # g channels of every token are g tokens of every channel, with the axes exchanged.
        v_codes, v_scale, v_zero = quantize(v.T.reshape(-1, g, TOKENS), fmt.v_bits)
        v_codes = v_codes.reshape(-1, TOKENS).T
        fields = {"k_scale": k_scale, "k_zero": k_zero, "v_scale": v_scale, "v_zero": v_zero}
    fields["k_codes"] = pack(k_codes.reshape(k.shape), fmt.k_bits, "k")
    fields["v_codes"] = pack(v_codes, fmt.v_bits, "v")
    at = layout(fmt)
    page = np.full(max(end for _, end in at.values()), 0xEE, np.uint8)
    for name, (start, end) in at.items():
        page[start:end] = np.frombuffer(fields[name].tobytes(), np.uint8)
    return np.concatenate([page, np.zeros(-len(page) % TOKENS, np.uint8)])


def decode_page(page: Bytes, fmt: Format) -> tuple[Floats, Floats]:
    """Page bytes -> k, v [128, D]."""
    g, d = fmt.group_size, fmt.head_size
    raw = {name: page[slice(*at)] for name, at in layout(fmt).items()}
    k, v = (
        single(unpack(raw[f"{side}_codes"], bits, side, d))
        for side, bits in (("k", fmt.k_bits), ("v", fmt.v_bits))
    )

    def half(name: str, width: int) -> Floats:
        return single(np.frombuffer(raw[name].tobytes(), np.float16)).reshape(-1, width)

    with np.errstate(all="ignore"):
        if fmt.two_level:
            ranges = raw["k_range"].reshape(-1, d).repeat(g, 0)
            step = half("k_step", d)
            zero = half("k_low", d) + (ranges >> 4) * (step * {2: 1, 3: 4, 4: 8}[fmt.k_bits])
            v = v + (half("v_mean", d) - single((2**fmt.v_bits - 1) / 2))
            return k * ((ranges & 15) * step) + zero, rotated(half("v_scale", 1) * v, True)
        k_scale, k_zero = (half(f"k_{name}", d).repeat(g, 0) for name in ("scale", "zero"))
        v_scale, v_zero = (half(f"v_{name}", TOKENS).repeat(g, 0).T for name in ("scale", "zero"))
        return k * k_scale + k_zero, v * v_scale + v_zero


def ranges(page: Bytes, fmt: Format) -> tuple[Doubles, Doubles]:
    """Least and largest key of each group of K that codes can stand for, each [128 / G, D]."""
    d = fmt.head_size
    for name, (start, end) in layout(fmt).items():
        if name == "k_codes":
            ends = []
            for code in (0, 2**fmt.k_bits - 1):
                codes = np.full((TOKENS, d), code, np.uint8)
                changed = page.copy()
                changed[start:end] = pack(codes, fmt.k_bits, "k").ravel()
                keys = decode_page(changed, fmt)[0]
                ends.append(keys[:: fmt.group_size].astype(np.float64))
    return ends[0], ends[1]


def page_weights(
    q: Doubles, pages: Sequence[Bytes], fmt: Format, soft_cap: float, radius: float = 0.5
) -> Doubles:
    """What pages of one head weigh for its queries [heads, D], times the scale, in float64."""
    x = []
    for page in pages:
        low, high = ranges(page, fmt)
        middle, half = (low + high) / 2, (high - low) / 2
        x.append(q @ middle.T + radius * (np.abs(q) @ half.T))
    return _shares(np.stack(x, 1), soft_cap)


def key_weights(
    q: Doubles, pages: Sequence[Bytes], fmt: Format, soft_cap: float, unread: int
) -> Doubles:
    """The same by a page's best key, in those channels that the queries have most power in.

    The first `unread` tokens of the first page do not count.
    """
    start, end = layout(fmt)["k_step"]
    steps = pages[-1][start:end].view(np.float16).astype(np.float64)
    power = ((q * steps) ** 2).sum(0).reshape(-1, 4).sum(1)
    count = -(-(fmt.head_size // 4) // 32) * 8  # of four channels each
    channels = np.isin(np.arange(fmt.head_size) // 4, np.argsort(-power, kind="stable")[:count])
    keys = np.stack([decode_page(page, fmt)[0] for page in pages])  # [pages, 128, D]
    scores = np.einsum("hd,ptd->hpt", q[:, channels], keys[..., channels].astype(np.float64))
    scores[:, 0, :unread] = -np.inf
    return _shares(scores.max(-1, keepdims=True), soft_cap)


def _shares(scores: Doubles, soft_cap: float) -> Doubles:
    """Of scores [heads, pages, n]: what of all softmaxes lies in each page."""
    if soft_cap:
        scores = soft_cap * np.tanh(scores / soft_cap)
    e = np.exp(scores - scores.max((1, 2), keepdims=True))
    return (e / e.sum((1, 2), keepdims=True)).sum((0, 2))


def canonical(page: Bytes, fmt: Format) -> Bytes:
    """The page with one NaN and one zero: the formula leaves their bits and sign open."""
    page = page.copy()
    for name, (start, end) in layout(fmt).items():
        if not name.endswith(("codes", "range")):
            half = page[start:end].view(np.float16)
            bits = page[start:end].view(np.uint16)
            bits[np.isnan(half)] = NAN_HALF
            bits[half == 0] = 0
    return page


def attention(
    q: Doubles,
    k: Doubles,
    v: Doubles,
    t: NDArray[np.int_],
    scale: float,
    soft_cap: float,
    slopes: Doubles | None,
    window: int,
    sink_logits: Doubles | None,
    chunk: int,
    images: Sequence[tuple[int, int]] = (),
    unread: NDArray[np.bool_] | None = None,
) -> Doubles:
    """Queries [n, num_heads, D] at positions t [n] over k, v [.., num_kv_heads, D], in float64.

    Tokens of an image, from its first position to its last, see each other. `unread` [n,
    num_kv_heads, ..] are positions whose pages a query leaves out.
    """
    out = np.empty_like(q)
    per_kv_head = q.shape[1] // k.shape[1]
    distance = np.arange(len(k))[None] - t[:, None]  # of the key, from the query
    visible = distance <= 0
    for first, last in images:
        of_query, of_key = ((first <= x) & (x <= last) for x in (t, np.arange(len(k))))
        visible |= of_query[:, None] & of_key[None]
    visible &= (distance > -window) if window else True
    if chunk:
        visible &= np.arange(len(k))[None] // chunk == t[:, None] // chunk
    for h in range(q.shape[1]):
        # einsum, for it starts no threads, which would be slow for many small products.
        scores = scale * np.einsum("td,sd->ts", q[:, h], k[:, h // per_kv_head])
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        if slopes is not None:
            scores = scores + slopes[h] * distance
        scores = np.where(visible, scores, -np.inf)
        if unread is not None:
            scores = np.where(unread[:, h // per_kv_head], -np.inf, scores)
        if sink_logits is not None:  # a key that has no value
            more = np.full((len(scores), 1), sink_logits[h])
            scores = np.concatenate([more, scores], 1)
        p = np.exp(scores - scores.max(1, keepdims=True))
        p = p[:, -len(k) :] / p.sum(1, keepdims=True)
        out[:, h] = np.einsum("ts,sd->td", p, v[:, h // per_kv_head])
    return out
