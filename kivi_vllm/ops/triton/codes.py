"""`kivi_vllm.ops.codes` on the device: codes as numbers that a matrix product takes, and packed.

An int32 word holds 4 bytes, j = 0 to 3, of one lane; a byte holds slots i. With one AND, a
word becomes two 16-bit numbers: the codes in slot i of bytes 0 and 2, or after a shift by 8,
of bytes 1 and 3. **They are never converted**: the bits of code c, in place at bit s =
i * pitch of a 16-bit word, are already the fp16 subnormal number c * 2^(s - 24), which tensor
cores multiply exactly and at full speed. The power of two goes into the result.

Of 3 bits, the words of the last quarter are made of the spare bits of the others (`_spare`), and
then all is as with 4 bits, but for the mask.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi_vllm.ops import codes

top = triton.constexpr_function(codes.top)
slots = triton.constexpr_function(codes.slots)
pitch = triton.constexpr_function(codes.pitch)
pairs = triton.constexpr_function(codes.pairs)
key_tokens = triton.constexpr_function(codes.key_tokens)
key_units = triton.constexpr_function(codes.key_units)
value_tokens = triton.constexpr_function(codes.value_tokens)
value_quads = triton.constexpr_function(codes.value_quads)
zero_step = triton.constexpr_function(codes.zero_step)
gauss_step = triton.constexpr_function(codes.gauss_step)
spare = triton.constexpr_function(codes.spare)


@triton.jit
def codes_of(words, SLOT: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """Codes of one slot, times `unit_of(SLOT, BITS, T)`: words [.., n] -> T [.., 2n]."""
    MASK: tl.constexpr = top(BITS) << SLOT * pitch(BITS)
    return halves_of(words & MASK * 0x10001, T)


@triton.jit
def halves_of(words, T: tl.constexpr):
    """16-bit numbers, the low halves of words first: words [.., n] -> T [.., 2n]."""
    low, high = low_high(words, T)
    return tl.reshape(tl.join(low, high), _twice(words.shape))


@triton.jit
def low_high(words, T: tl.constexpr):
    """The halves of words as T: of 16 bits, their bits; else the whole numbers that they are."""
    low, high = words.to(tl.int16), (words >> 16).to(tl.int16)
    if T.primitive_bitwidth == 16:
        low, high = low.to(T, bitcast=True), high.to(T, bitcast=True)
    else:
        low, high = low.to(T), high.to(T)
    return low, high


@triton.constexpr_function
def _twice(shape):
    return *shape[:-1], 2 * shape[-1]


@triton.constexpr_function
def unit_of(slot, bits, t):
    """What code 1 is in `codes_of`."""
    return 2.0 ** (slot * pitch(bits) - (24 if t == tl.float16 else 0))


@triton.jit
def words_of(field, n, q, UNIT: tl.constexpr, live, MASKED: tl.constexpr):
    """The words [.., 16, ..] at address `field` of units n and quads q, of UNIT quads a unit.

    live: where not, words are 0; MASKED: whether that is anywhere. n, q and live: [N, 1, Q], or 1
    where they do not differ.
    """
    at = field.to(tl.pointer_type(tl.int32)) + (n * UNIT + q) * 16
    at += tl.arange(0, 16)[None, :, None]
    if MASKED:
        words = tl.load(at, mask=live, other=0)
    else:
        words = tl.load(at)
    return words


@triton.jit
def _spare(words0, words1, words2):
    """The words whose codes' bits are the spare ones of these; signs are cut off by the masks."""
    words = (words0 >> 3) & 0x11111111
    words |= (words1 >> 2) & 0x22222222
    return words | ((words2 >> 1) & 0x44444444)


@triton.jit
def _numbers(words, SLOT: tl.constexpr, BITS: tl.constexpr):
    """Codes of one slot of all 4 bytes, fp32: words [n, 16, q] -> [n, 16, 4q]."""
    even = codes_of(words, SLOT, BITS, tl.float32)
    odd = codes_of(words >> 8, SLOT, BITS, tl.float32)
    x = tl.reshape(tl.join(even, odd), (words.shape[0], 16, 4 * words.shape[2]))
    return x * (1 / unit_of(SLOT, BITS, tl.float32))


@triton.jit
def key_words(
    field, first, UNITS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Words of k_codes at `field`, of UNITS units from `first` on: [UNITS, 16, DP / 4]."""
    n, q = first + tl.arange(0, UNITS)[:, None, None], tl.arange(0, DP // 4)[None, None]
    STORED: tl.constexpr = stored(key_units(BITS), BITS)
    live = (n < STORED) & (q < D // 4)
    words = words_of(field, n, q, D // 4, live, spare(BITS) > 0 or D < DP)
    if spare(BITS):
        live = q < tl.where(first + UNITS > STORED, D // 4, 0)
        last = ()
        for m in tl.static_range(STORED):
            last += (words_of(field, m, q, D // 4, live, True),)
        words = tl.where(n < STORED, words, _spare(last[0], last[1], last[2]))
    return words


@triton.jit
def value_words(
    field, first, QUADS: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):
    """Words of v_codes at `field`, QUADS of every unit from `first` on: [DP / 32, 16, QUADS]."""
    n, q = tl.arange(0, DP // 32)[:, None, None], first + tl.arange(0, QUADS)[None, None]
    STORED: tl.constexpr = stored(value_quads(BITS), BITS)
    live = (n < D // 32) & (q < STORED)
    words = words_of(field, n, q, STORED, live, spare(BITS) > 0 or D < DP)
    if spare(BITS):
        live = n < tl.where(first + QUADS > STORED, D // 32, 0)
        r = tl.arange(0, 8)[None, None]
        last = ()
        for m in tl.static_range(3):
            last += (words_of(field, n, 3 * r + m, STORED, live, True),)
        last = _spare(last[0], last[1], last[2])[:, :, None]
        last = tl.broadcast_to(last, (DP // 32, 16, QUADS // 8, 8))
        words = tl.where(q < STORED, words, tl.reshape(last, words.shape))
    return words


@triton.jit
def key_codes(field, half, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Codes of half a page's tokens, k_codes at `field`: [64, DP] fp32."""
    UNITS: tl.constexpr = key_units(BITS) // 2
    words = key_words(field, half * UNITS, UNITS, BITS, D, DP)
    x, y = _numbers(words, 0, BITS), _numbers(words, 1, BITS)
    if pairs(BITS) == 2:
        x, y = tl.join(x, _numbers(words, 2, BITS)), tl.join(y, _numbers(words, 3, BITS))
    else:
        x, y = tl.expand_dims(x, 3), tl.expand_dims(y, 3)
    numbers = tl.permute(tl.join(x, y), (0, 3, 4, 1, 2))  # [units, pairs, 2, 16, DP]
    return tl.reshape(numbers, (64, DP))


@triton.jit
def value_codes(field, half, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Codes of half a page's tokens, v_codes at `field`: [64, DP / 32, 32] fp32."""
    words = value_words(field, half * 16 if pairs(BITS) == 1 else 0, 16, BITS, D, DP)
    if pairs(BITS) == 2:
        words = words >> 2 * pitch(BITS) * half
    numbers = tl.join(_numbers(words, 0, BITS), _numbers(words, 1, BITS))
    # [units, 16 channels, tokens, halves of the unit's channels]
    return tl.reshape(tl.permute(numbers, (2, 0, 3, 1)), (64, DP // 32, 32))


@triton.constexpr_function
def stored(vectors, bits):
    """Of so many vectors of a page those that are not in spare bits."""
    return vectors - vectors // 4 * spare(bits)


@triton.jit
def tokens_of(part, BITS: tl.constexpr, TOKENS: tl.constexpr):
    """Part `part` of a page's tokens of V, [TOKENS]: those that share their bytes."""
    EACH: tl.constexpr = TOKENS // pairs(BITS)
    i = tl.arange(0, TOKENS)
    return i // EACH * value_tokens(BITS) + _in_pair(i % EACH, part, BITS, EACH)


@triton.jit
def _in_pair(i, part, BITS: tl.constexpr, EACH: tl.constexpr):
    """Tokens i of the EACH of a part of a pair of slots, of the pair."""
    token = i + part * EACH
    if spare(BITS):  # in four runs, the last of which is in spare bits of the others
        run, r = i // (EACH // 4), i % (EACH // 4) // 4 + part * (EACH // 16)
        token = tl.where(run < 3, 3 * r + run, 24 + r) * 4 + i % 4
    return token


@triton.jit
def _with_spare(bytes, AXIS: tl.constexpr):
    """Bytes of which the last along AXIS, of 4, go into the spare bits of the others."""
    m = tl.arange(0, 4)[:, None, None] if AXIS == 0 else tl.arange(0, 4)[None, None, :, None]
    last = tl.expand_dims(tl.sum(tl.where(m == 3, bytes, 0), AXIS), AXIS)
    return bytes | ((last >> m) & 0x11) << 3


@triton.jit
def store_keys(field, c, part, d, live, BITS: tl.constexpr, D: tl.constexpr):
    """Codes c [TOKENS, WIDTH] of part `part` of the tokens and of channels d [WIDTH]: to `field`.

    live: which of the channels there are. Of 3 bits, all tokens are one part.
    """
    SLOTS: tl.constexpr = slots(BITS)
    N: tl.constexpr = c.shape[0] // key_tokens(BITS)
    c = tl.reshape(c, (N, SLOTS, 16, c.shape[1])) << _shifts(BITS)[None, :, None, None]
    c = tl.sum(c, 1)  # [N, 16, WIDTH]
    n = (tl.arange(0, N) + part * N)[:, None, None]
    mask = live[None, None]
    if spare(BITS):
        c = _with_spare(c, 0)
        mask &= n < 3
    lane, channel = tl.arange(0, 16)[None, :, None], d[None, None]
    at = (n * (D // 4) + channel // 4) * 64 + lane * 4 + channel % 4
    tl.store(field + at, c.to(tl.uint8), mask=mask)


@triton.jit
def store_values(field, c, part, run, BITS: tl.constexpr, D: tl.constexpr):
    """Codes c [WIDTH, TOKENS] of the tokens `tokens_of(part)` and of run `run` of the channels."""
    PAIRS: tl.constexpr = pairs(BITS)
    EACH: tl.constexpr = c.shape[1] // PAIRS
    UNITS: tl.constexpr = c.shape[0] // 32
    QUADS: tl.constexpr = stored(value_quads(BITS), BITS)
    # Slot i is pair i // 2 of the tokens, and half i % 2 of the unit's 32 channels.
    c = tl.reshape(c, (UNITS, 2, 16, PAIRS, EACH))
    shift = tl.reshape(_shifts(BITS), (PAIRS, 2))
    shift = tl.trans(shift)[None, :, None, :, None]
    c = tl.sum(tl.sum(c << shift, 3), 1)  # [UNITS, 16, EACH]
    if spare(BITS):
        c = _with_spare(tl.reshape(c, (UNITS, 16, 4, EACH // 4)), 2)
        c = tl.reshape(c, (UNITS, 16, EACH))
    n = (tl.arange(0, UNITS) + run * UNITS)[:, None, None]
    lane = tl.arange(0, 16)[None, :, None]
    token = _in_pair(tl.arange(0, EACH), part, BITS, EACH)[None, None]
    at = (n * QUADS + token // 4) * 64 + lane * 4 + token % 4
    tl.store(field + at, c.to(tl.uint8), mask=(n < D // 32) & (token // 4 < QUADS))


@triton.jit
def _shifts(BITS: tl.constexpr):
    """Where the slots of a byte begin."""
    return tl.arange(0, slots(BITS)) * pitch(BITS)
