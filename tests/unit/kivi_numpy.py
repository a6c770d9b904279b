"""KIVI's formula and the page layout once more, in NumPy, from their documentation alone.

Nothing here imports `kivi_vllm`: the tests compare the two.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Doubles = NDArray[np.float64]

TOKENS = 128
NAN_HALF = 0x7E00


def to_half(x: Floats) -> NDArray[np.float16]:
    """Nearest fp16; what lies beyond its range becomes ±65504. NaN stays."""
    return np.clip(x, np.float32(-65504), np.float32(65504)).astype(np.float16)


def fitted(group: Floats, bits: int, rounds: int) -> tuple[np.float32, np.float32] | None:
    """Scale and zero of one group by least squares from its span; None if it has no useful one.

    In Python's whole numbers, but for what the documentation says is rounded.
    """
    low, spread = group.min(), group.max() - group.min()
    if not 1e-6 < spread < 65504:  # nor NaN
        return None
    top = 2**bits - 1
    u = np.rint(np.minimum((group - low) * (np.float32(1023) / spread), np.float32(1023)))
    # Thresholds of the weights 1 to 5.
    w = [1 + sum((2 * int(y) - 1023) ** 2 > 2**17 * (2 * i + 1) for i in range(4)) for y in u]
    slope, start = np.float32(np.float32(1023) / np.float32(top)), np.float32(0)
    for _ in range(rounds):
        steps = (u - start) * (np.float32(1) / slope)
        c = [int(x) for x in np.rint(np.clip(steps, 0, np.float32(top)))]
        n, c1, c2, u1, cu = (
            sum(x * y for x, y in zip(w, terms, strict=True))
            for terms in (
                [1] * len(c),
                c,
                [x * x for x in c],
                [int(y) for y in u],
                [x * int(y) for x, y in zip(c, u, strict=True)],
            )
        )
        if n * c2 == c1 * c1:
            continue
        slope = np.float32((n * cu - c1 * u1) / (n * c2 - c1 * c1))
        start = np.float32((u1 * c2 - c1 * cu) / (n * c2 - c1 * c1))
    step = np.float32(spread / np.float32(1023))
    return slope * step, np.float32(float(low) + float(start) * float(step))


def quantize(
    groups: Floats, bits: int, rounds: int = 0
) -> tuple[Bytes, NDArray[np.float16], NDArray[np.float16]]:
    """Groups, one a row: codes [n, G], scale [n] and zero [n]."""
    top = np.float32(2**bits - 1)
    with np.errstate(all="ignore"):
        low, high = groups.min(1), groups.max(1)
        spread = high - low
        spread[high == low] = 0  # two equal infinities too
        step = spread / top
        for i, group in enumerate(groups if rounds else ()):
            step[i], low[i] = fitted(group, bits, rounds) or (step[i], low[i])
        zero, scale = to_half(low), to_half(step)
        steps = np.rint(
            (groups - zero[:, None].astype(np.float32)) / scale[:, None].astype(np.float32)
        )
        steps[~(scale > 0)] = 0  # scale 0 or NaN
        codes = np.minimum(np.maximum(steps, 0), top).astype(np.uint8)
    return codes, scale, zero


def hadamard(d: int, inverse: bool = False) -> Floats:
    """[D, D], of runs of the largest power of two in D, times a power of two."""
    n = d & -d
    i = np.arange(n)
    signs = np.vectorize(lambda x: 1 - 2 * (int(x).bit_count() % 2))(i[:, None] & i)
    log_n = n.bit_length() - 1
    factor = 2.0 ** -(log_n - log_n // 2 if inverse else log_n // 2)
    return (np.kron(np.eye(d // n), signs) * factor).astype(np.float32)


def rotated(v: Floats) -> Floats:
    """v [n, D] rotated, in the order of sums of the fast transform."""
    d = v.shape[1]
    n = d & -d
    h = 1
    with np.errstate(all="ignore"):
        while h < n:
            new = v.copy()
            for c in range(d):
                new[:, c] = v[:, c ^ h] - v[:, c] if c & h else v[:, c] + v[:, c ^ h]
            v, h = new, 2 * h
        return v * np.float32(2.0 ** -((n.bit_length() - 1) // 2))


def layout(k_bits: int, v_bits: int, g: int, d: int) -> dict[str, tuple[int, int]]:
    """Start and end byte of each field of a page."""
    sizes = {
        "k_scale": 256 * d // g,
        "k_zero": 256 * d // g,
        "k_codes": 16 * d * k_bits,
        "v_scale": 256 * d // g,
        "v_zero": 256 * d // g,
        "v_codes": 16 * d * v_bits,
    }
    ends = np.cumsum(list(sizes.values())).tolist()
    return {name: (end - n, end) for (name, n), end in zip(sizes.items(), ends, strict=True)}


def place(side: str, token: int, channel: int, bits: int, d: int) -> tuple[int, int]:
    """Byte of the field and first bit in it of one code."""
    if side == "k":
        in_byte = 8 // bits  # tokens, 16 apart
        n, slot, lane = token // 16 // in_byte, token // 16 % in_byte, token % 16
        return ((n * d // 4 + channel // 4) * 16 + lane) * 4 + channel % 4, slot * bits
    n, half, lane = channel // 32, channel % 32 // 16, channel % 16
    group, quads = (token % 64 // 4, 16) if bits == 2 else (token // 4, 32)
    slot = 2 * (token // 64) + half if bits == 2 else half
    return ((n * quads + group) * 16 + lane) * 4 + token % 4, slot * bits


@functools.cache
def places(side: str, bits: int, d: int) -> tuple[NDArray[np.int_], NDArray[np.uint8]]:
    """`place` of every token and channel [128, D]."""
    all_of_them = [[place(side, s, c, bits, d) for c in range(d)] for s in range(TOKENS)]
    at = np.array(all_of_them)
    return at[..., 0], at[..., 1].astype(np.uint8)


def pack(codes: Bytes, bits: int, side: str) -> Bytes:
    """Codes [128, D] -> bytes."""
    byte, shift = places(side, bits, codes.shape[1])
    out = np.zeros(codes.size * bits // 8, np.uint8)
    np.bitwise_or.at(out, byte, codes << shift)
    return out


def unpack(packed: Bytes, bits: int, side: str, d: int) -> Bytes:
    """Inverse of `pack`."""
    byte, shift = places(side, bits, d)
    return (packed[byte] >> shift) & np.uint8(2**bits - 1)


def encode_page(
    k: Floats,
    v: Floats,
    k_bits: int,
    v_bits: int,
    g: int,
    *,
    sinks: int = 0,
    rotate: bool = False,
    rounds: int = 0,
) -> Bytes:
    """One block of one kv head, k and v [128, D] -> page bytes."""
    d = k.shape[1]
    k = k.copy()
    for s in range(sinks):  # others stand in for them
        k[s] = k[s + sinks]
    v = rotated(v) if rotate else v
    k_codes, v_codes = np.zeros((2, TOKENS, d), np.uint8)
    k_scale, k_zero = np.zeros((2, TOKENS // g, d), np.float16)
    v_scale, v_zero = np.zeros((2, TOKENS, d // g), np.float16)
    for i in range(TOKENS // g):  # g tokens of every channel
        part = slice(i * g, (i + 1) * g)
        codes, k_scale[i], k_zero[i] = quantize(k[part].T, k_bits, rounds)
        k_codes[part] = codes.T
    for i in range(d // g):  # g channels of every token
        part = slice(i * g, (i + 1) * g)
        v_codes[:, part], v_scale[:, i], v_zero[:, i] = quantize(v[:, part], v_bits, rounds)
    fields = {
        "k_scale": k_scale,
        "k_zero": k_zero,
        "k_codes": pack(k_codes, k_bits, "k"),
        "v_scale": v_scale.T,
        "v_zero": v_zero.T,
        "v_codes": pack(v_codes, v_bits, "v"),
    }
    at = layout(k_bits, v_bits, g, d)
    page = np.full(max(end for _, end in at.values()), 0xEE, np.uint8)
    for name, (start, end) in at.items():
        page[start:end] = np.frombuffer(fields[name].tobytes(), np.uint8)
    return page


def decode_page(
    page: Bytes, k_bits: int, v_bits: int, g: int, d: int, *, rotate: bool = False
) -> tuple[Floats, Floats]:
    """Page bytes -> k, v [128, D]."""
    raw = {name: page[slice(*at)].tobytes() for name, at in layout(k_bits, v_bits, g, d).items()}
    half = {n: np.frombuffer(b, np.float16).astype(np.float32) for n, b in raw.items()}
    k_codes = unpack(np.frombuffer(raw["k_codes"], np.uint8), k_bits, "k", d)
    v_codes = unpack(np.frombuffer(raw["v_codes"], np.uint8), v_bits, "v", d)
    k, v = k_codes.astype(np.float32), v_codes.astype(np.float32)
    with np.errstate(invalid="ignore"):
        for s in range(TOKENS):
            row = slice(s // g * d, (s // g + 1) * d)
            k[s] = k[s] * half["k_scale"][row] + half["k_zero"][row]
        for c in range(d):
            col = slice(c // g * TOKENS, (c // g + 1) * TOKENS)
            v[:, c] = v[:, c] * half["v_scale"][col] + half["v_zero"][col]
        return k, np.einsum("sc,cd->sd", v, hadamard(d, inverse=True)) if rotate else v


def canonical(page: Bytes, k_bits: int, v_bits: int, g: int, d: int) -> Bytes:
    """The page with one NaN and one zero: the formula leaves their bits and sign open."""
    page = page.copy()
    for name, (start, end) in layout(k_bits, v_bits, g, d).items():
        if not name.endswith("codes"):
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
) -> Doubles:
    """Queries [n, num_heads, D] at positions t [n] over k, v [.., num_kv_heads, D], in float64."""
    out = np.empty_like(q)
    per_kv_head = q.shape[1] // k.shape[1]
    distance = np.arange(len(k))[None] - t[:, None]  # of the key, from the query
    visible = (distance <= 0) & ((distance > -window) if window else True)
    for h in range(q.shape[1]):
        # einsum, for it starts no threads, which would be slow for many small products.
        scores = scale * np.einsum("td,sd->ts", q[:, h], k[:, h // per_kv_head])
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        if slopes is not None:
            scores = scores + slopes[h] * distance
        scores = np.where(visible, scores, -np.inf)
        p = np.exp(scores - scores.max(1, keepdims=True))
        out[:, h] = np.einsum("ts,sd->td", p / p.sum(1, keepdims=True), v[:, h // per_kv_head])
    return out
