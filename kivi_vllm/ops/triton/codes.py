"""`kivi_vllm.ops.codes` on the device: codes as numbers that a matrix product takes, and packed.

An int32 word holds 4 bytes, j = 0 to 3, of one lane; a byte holds slots i. With one AND, a
word becomes two 16-bit numbers: the codes in slot i of bytes 0 and 2, or after a shift by 8,
of bytes 1 and 3. **They are never converted**: the bits of code c, in place at bit s =
i * pitch of a 16-bit word, are already the fp16 subnormal number c * 2^(s - 24), which tensor
cores multiply exactly and at full speed. The power of two goes into the result.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kivi_vllm.ops import codes
from kivi_vllm.ops.triton.tokens import B

top = triton.constexpr_function(codes.top)
slots = triton.constexpr_function(codes.slots)
pitch = triton.constexpr_function(codes.pitch)
pairs = triton.constexpr_function(codes.pairs)
key_tokens = triton.constexpr_function(codes.key_tokens)
key_units = triton.constexpr_function(codes.key_units)
value_tokens = triton.constexpr_function(codes.value_tokens)
value_quads = triton.constexpr_function(codes.value_quads)


@triton.jit
def codes_of(words, SLOT: tl.constexpr, BITS: tl.constexpr, T: tl.constexpr):
    """Codes of one slot, times `unit_of(SLOT, BITS, T)`: words [b, 16, n] -> T [b, 16, 2n]."""
    MASK: tl.constexpr = top(BITS) << SLOT * pitch(BITS)
    both = words & MASK * 0x10001
    low, high = both.to(tl.int16), (both >> 16).to(tl.int16)
    if T.primitive_bitwidth == 16:
        low, high = low.to(T, bitcast=True), high.to(T, bitcast=True)
    else:
        low, high = low.to(T), high.to(T)
    return tl.reshape(tl.join(low, high), (words.shape[0], words.shape[1], 2 * words.shape[2]))


@triton.constexpr_function
def unit_of(slot, bits, t):
    """What code 1 is in `codes_of`."""
    return 2.0 ** (slot * pitch(bits) - (24 if t == tl.float16 else 0))


@triton.jit
def words_of(field, SHAPE: tl.constexpr, PADDED: tl.constexpr, UNIT: tl.constexpr):
    """The words [n, 16, q] from address `field` on: of SHAPE (n, q), with 0 up to PADDED.

    UNIT: quads of a unit n in the page, where not all of them are wanted.
    """
    n, q = tl.arange(0, PADDED[0])[:, None, None], tl.arange(0, PADDED[1])[None, None]
    lane = tl.arange(0, 16)[None, :, None]
    at = field.to(tl.pointer_type(tl.int32)) + (n * UNIT + q) * 16 + lane
    if SHAPE == PADDED:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=(n < SHAPE[0]) & (q < SHAPE[1]) & (lane >= 0), other=0)
    return words


@triton.jit
def _numbers(words, SLOT: tl.constexpr, BITS: tl.constexpr):
    """Codes of one slot of all 4 bytes, fp32: words [n, 16, q] -> [n, 16, 4q]."""
    even = codes_of(words, SLOT, BITS, tl.float32)
    odd = codes_of(words >> 8, SLOT, BITS, tl.float32)
    x = tl.reshape(tl.join(even, odd), (words.shape[0], 16, 4 * words.shape[2]))
    return x * (1 / unit_of(SLOT, BITS, tl.float32))


@triton.jit
def key_words(field, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """All words of k_codes at `field`: [units, 16, DP / 4]."""
    UNITS: tl.constexpr = key_units(BITS)
    return words_of(field, (UNITS, D // 4), (UNITS, DP // 4), D // 4)


@triton.jit
def value_words(field, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """All words of v_codes at `field`: [DP / 32, 16, quads]."""
    QUADS: tl.constexpr = value_quads(BITS)
    return words_of(field, (D // 32, QUADS), (DP // 32, QUADS), QUADS)


@triton.jit
def key_codes(field, half, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Codes of half a page's tokens, k_codes at `field`: [2, 32, DP] fp32."""
    UNITS: tl.constexpr = key_units(BITS) // 2
    Q: tl.constexpr = D // 4
    words = words_of(field + half * (UNITS * Q * 64), (UNITS, Q), (UNITS, DP // 4), Q)
    x, y = _numbers(words, 0, BITS), _numbers(words, 1, BITS)
    if pairs(BITS) == 2:
        x, y = tl.join(x, _numbers(words, 2, BITS)), tl.join(y, _numbers(words, 3, BITS))
    else:
        x, y = tl.expand_dims(x, 3), tl.expand_dims(y, 3)
    numbers = tl.permute(tl.join(x, y), (0, 3, 4, 1, 2))  # [units, pairs, 2, 16, DP]
    return tl.reshape(numbers, (2, 32, DP))


@triton.jit
def value_codes(field, half, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Codes of half a page's tokens, v_codes at `field`: [64, DP / 32, 32] fp32."""
    UNITS: tl.constexpr = DP // 32
    field += half * 1024 if pairs(BITS) == 1 else 0
    words = words_of(field, (D // 32, 16), (UNITS, 16), value_quads(BITS))
    if pairs(BITS) == 2:
        words = words >> 2 * pitch(BITS) * half
    numbers = tl.join(_numbers(words, 0, BITS), _numbers(words, 1, BITS))
    # [units, 16 channels, tokens, halves of the unit's channels]
    return tl.reshape(tl.permute(numbers, (2, 0, 3, 1)), (64, UNITS, 32))


@triton.jit
def tokens_of(part, BITS: tl.constexpr, TOKENS: tl.constexpr):
    """Part `part` of a page's tokens of V, [TOKENS]: some of every pair of slots."""
    i = tl.arange(0, TOKENS)
    if TOKENS < B:
        EACH: tl.constexpr = TOKENS // pairs(BITS)
        i = i // EACH * value_tokens(BITS) + part * EACH + i % EACH
    return i


@triton.jit
def store_keys(field, c, part, d, live, BITS: tl.constexpr, D: tl.constexpr):
    """Codes c [TOKENS, WIDTH] of part `part` of the tokens and of channels d [WIDTH]: to `field`.

    live: which of the channels there are.
    """
    SLOTS: tl.constexpr = slots(BITS)
    N: tl.constexpr = c.shape[0] // key_tokens(BITS)
    c = tl.reshape(c, (N, SLOTS, 16, c.shape[1])) << _shifts(BITS)[None, :, None, None]
    n = (part * N + tl.arange(0, N))[:, None, None]
    lane, channel = tl.arange(0, 16)[None, :, None], d[None, None]
    at = (n * (D // 4) + channel // 4) * 64 + lane * 4 + channel % 4
    tl.store(field + at, tl.sum(c, 1).to(tl.uint8), mask=live[None, None])


@triton.jit
def store_values(field, c, part, run, BITS: tl.constexpr):
    """Codes c [WIDTH, TOKENS] of the tokens `tokens_of(part)` and of run `run` of the channels."""
    PAIRS: tl.constexpr = pairs(BITS)
    EACH: tl.constexpr = c.shape[1] // PAIRS
    UNITS: tl.constexpr = c.shape[0] // 32
    # Slot i is pair i // 2 of the tokens, and half i % 2 of the unit's 32 channels.
    c = tl.reshape(c, (UNITS, 2, 16, PAIRS, EACH))
    shift = tl.reshape(_shifts(BITS), (PAIRS, 2))
    shift = tl.trans(shift)[None, :, None, :, None]
    c = tl.sum(tl.sum(c << shift, 3), 1)  # [UNITS, 16, EACH]
    n = (run * UNITS + tl.arange(0, UNITS))[:, None, None]
    lane = tl.arange(0, 16)[None, :, None]
    token = (part * EACH + tl.arange(0, EACH))[None, None]
    at = (n * value_quads(BITS) + token // 4) * 64 + lane * 4 + token % 4
    tl.store(field + at, c.to(tl.uint8))


@triton.jit
def _shifts(BITS: tl.constexpr):
    """Where the slots of a byte begin."""
    return tl.arange(0, slots(BITS)) * pitch(BITS)
